"""What each phase takes of a GPU's memory, by arithmetic from a [`~latent_trl.sizing.layout.Layout`]."""

from dataclasses import dataclass, replace

from ..models.cross_entropy import CHUNK_VALUES
from .layout import Layout

GIB = 2**30
# Bytes of a trained parameter: weight, gradient and AdamW's two moments in float32. Between steps there is no gradient.
TRAINED, BETWEEN_STEPS = 16, 12
# Of a component that rests, as it was saved, and of a backbone in bfloat16 and in 4 bits with its scales.
RESTING, HALF, FOUR_BITS = 4, 2, 0.52
# Logits of a chunk in float32, the softmax between and their gradient.
LOGITS = 3 * 4 * CHUNK_VALUES
# What CUDA and its libraries take, and the share of the rest that the allocator loses: common values, not measured.
OF_CUDA, FRAGMENTED = 1.2 * GIB, 0.08


@dataclass
class Batch:
    """
    What is processed at once on one GPU.

    Args:
        rows (`int`, defaults to `4`): Rows of a batch in learning and SFT.
        length (`int`, defaults to `2048`): Tokens of such a row, the picture's among them.
        completions (`int`, defaults to `8`): Completions that are sampled, and rows of an update, in RL.
        generations (`int`, defaults to `8`): Completions a prompt, which share its pass through the policy.
        prompt_length (`int`, defaults to `1024`), completion_length (`int`, defaults to `256`): Tokens of each.
        lora_rank (`int`, defaults to `16`): Of the adapter that SFT trains.
    """

    rows: int = 4
    length: int = 2048
    completions: int = 8
    generations: int = 8
    prompt_length: int = 1024
    completion_length: int = 256
    lora_rank: int = 16

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


@dataclass
class Phase:
    """
    Memory of one phase in bytes.

    Args:
        name (`str`): The phase.
        weights (`float`): Backbone and components that rest.
        training (`float`): What is trained, with gradient and optimizer.
        working (`float`): Independent of the number of rows: logits of a chunk.
        row (`float`): Each row: activations, states, caches.
        rows (`int`): Rows at once.
    """

    name: str
    weights: float
    training: float
    working: float
    row: float
    rows: int

    @property
    def total(self) -> float:
        """Bytes, with what CUDA takes and the allocator loses."""
        return self.needed(self.rows)

    def needed(self, rows: int) -> float:
        """Bytes with that many rows."""
        return (self.weights + self.training + self.working + self.row * rows) * (1 + FRAGMENTED) + OF_CUDA

    def rows_that_fit(self, memory: float) -> int:
        """The most rows for `memory` bytes; 0 where not even one fits."""
        free = (memory - OF_CUDA) / (1 + FRAGMENTED) - self.weights - self.training - self.working
        return max(0, int(free // self.row))


def phases(
    layout: Layout,
    batch: Batch | None = None,
    four_bit: bool = False,
    value_head: bool = False,
    reference: bool = False,
    gradient_checkpointing: bool = False,
) -> list[Phase]:
    """
    The phases from learning to serving.

    Args:
        layout (`Layout`): Of the backbone and its components.
        batch (`Batch`, *optional*): What is processed at once.
        four_bit (`bool`, defaults to `False`): The backbone's linear maps in 4 bits.
        value_head (`bool`, defaults to `False`): PPO in place of GRPO.
        reference (`bool`, defaults to `False`): A reference policy is kept (`beta` above 0).
        gradient_checkpointing (`bool`, defaults to `False`): Layers are run again in the backward pass.
    """
    batch = batch or Batch()
    sizes = _Sizes(layout, four_bit, gradient_checkpointing)
    learning = [sizes.learning(name, trained, batch) for name, trained in sizes.stages().items()]
    return [*learning, sizes.sft(batch), *sizes.rl(batch, value_head, reference), sizes.serving(batch)]


class _Sizes:
    """The terms that phases are made of."""

    def __init__(self, layout: Layout, four_bit: bool, gradient_checkpointing: bool):
        self.layout = layout
        self.checkpointing = gradient_checkpointing
        packed = layout.quantizable() if four_bit else 0
        self.backbone = packed * FOUR_BITS + (layout.parameters("backbone") - packed) * HALF
        self.names = [name for name in layout.components if name != "value_head"]
        self.state = layout.width * HALF
        text_model = layout.backbone.get_decoder()
        layers = text_model.config.num_hidden_layers
        self.of_backbone = layout.activation_bytes(text_model)
        # A pass without gradients holds one layer's at a time.
        self.passing = self.of_backbone / layers

    def _decoder(self, name: str) -> float:
        decoder = self.layout.components[name].decoder_stack.decoder
        config, kept = decoder.config, self.layout.activation_bytes(decoder)
        if self.checkpointing:
            kept = config.num_hidden_layers * config.hidden_size * HALF + kept / config.num_hidden_layers
        return kept

    def stages(self) -> dict[str, list[str]]:
        found = {
            "learn: inverse_dynamics": ["inverse_dynamics", "codebook", "world_model"],
            "learn: projector": ["projector"],
            "learn: joint": ["inverse_dynamics", "codebook", "world_model", "projector"],
            "learn: policy": ["policy"],
        }
        there = self.layout.components
        return {stage: kept for stage, names in found.items() if (kept := [name for name in names if name in there])}

    def _rest(self, trained: list[str], names: list[str] | None = None) -> float:
        resting = [name for name in (names or self.names) if name not in trained]
        return self.backbone + self.layout.parameters(*resting) * RESTING

    def learning(self, name: str, trained: list[str], batch: Batch) -> Phase:
        decoders = [part for part in ("inverse_dynamics", "policy") if part in trained]
        kept = sum(self._decoder(part) for part in decoders) + 4 * self.state + self.passing
        if "world_model" in trained:
            # Two blocks: what goes in, the two inner products, their activation and product.
            kept += 2 * 4 * (4 * self.layout.width + 4 * self.layout.components["world_model"].intermediate_size)
        training = self.layout.parameters(*trained) * TRAINED
        return Phase(name, self._rest(trained), training, LOGITS, kept * batch.length, batch.rows)

    def sft(self, batch: Batch) -> Phase:
        kept = self.of_backbone
        if self.checkpointing:
            kept = self.layout.backbone.get_decoder().config.num_hidden_layers * self.layout.width * HALF + self.passing
        training = self.layout.lora(batch.lora_rank) * TRAINED
        return Phase("sft", self._rest([]), training, LOGITS, kept * batch.length, batch.rows)

    def rl(self, batch: Batch, value_head: bool, reference: bool) -> list[Phase]:
        names = [name for name in self.names if name != "inverse_dynamics"]
        trained = ["policy", *(["value_head"] if value_head else [])]
        resting = self._rest(trained, names) + (self.layout.parameters("policy") * RESTING if reference else 0)
        length = batch.prompt_length + batch.completion_length
        between = Phase("", resting, self.layout.parameters(*trained) * BETWEEN_STEPS, 0.0, 0.0, batch.completions)
        rollout = replace(
            between,
            name="rl: rollout",
            working=self.passing * batch.prompt_length,
            # Logits of one position, and the law that is made of them.
            row=(self._caches() + self.state) * length + 2 * 4 * self.layout.vocabulary,
        )
        update = replace(
            between,
            name="rl: update",
            training=self.layout.parameters(*trained) * TRAINED,
            row=self._decoder("policy") * (batch.prompt_length / batch.generations + batch.completion_length)
            + self.state * length,
        )
        return [rollout, update]

    def serving(self, batch: Batch) -> Phase:
        names = [name for name in self.names if name != "inverse_dynamics"]
        weights = self.backbone + self.layout.parameters(*names) * HALF
        length = batch.prompt_length + batch.completion_length
        return Phase(
            "serve", weights, 0.0, self.passing * batch.prompt_length, self._caches() * length, batch.completions
        )

    def _caches(self) -> float:
        """Keys and values of a token, the backbone's and the policy's."""
        policy = self.layout.components["policy"].decoder_stack.decoder
        return self.layout.cache_bytes(self.layout.backbone.get_decoder()) + self.layout.cache_bytes(policy)
