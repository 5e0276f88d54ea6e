"""Configuration of a latent action model: the sizes of its components and the backbone that they belong to."""

import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

READ_OUTS = ("residual", "subtract", "last_block")
STAGES = ("none", "inverse_dynamics", "projector", "joint", "policy", "sft", "rl")
SCHEMA_VERSION = 1
# The most of each of which a configuration, or a model that is laid out by it, makes a list.
COUNTS = {
    re.compile(r"(?!.*(size|dim|width|channels|token))(layer|.*(_layer|depth|block|stage|label|head))"): 10_000,
    re.compile(r"(?!.*(size|dim|width|channels|token)).*expert"): 20_000,
}
DECODER_KINDS = ("backbone", "plain")
# The plainest of transformers' text models: full attention, rotary positions, a gated feed-forward block.
PLAIN_DECODER = "llama"
CODE_FIELDS = ("attn_implementation", "attn_implementation_internal", "experts_implementation", "auto_map")


class LatentActionConfig(PreTrainedConfig):
    """
    Configuration of a [`LatentActionModel`].

    What describes the backbone (`text_config`, `vision_token_ids`, ...) is filled in by
    [`LatentActionModel.from_backbone`]; a user sets the rest.

    Args:
        num_codes (`int`, defaults to `128`):
            K, the number of latent actions. At least 2, except for the one-code control, which must be asked for with
            `allow_single_code=True`.
        read_out (`str`, defaults to `"residual"`):
            How the merged vector becomes what the backbone's head reads, from learning to serving:
            `"residual"`: `s + F_1 + F_2`, output projections start at zero, so an untrained head gives the backbone's
            own logits; `"subtract"`: `norm(m_2) - s` (CoLA); `"last_block"`: `norm(F_2([m_1; c]))`.
        world_model_intermediate_size (`int`, *optional*):
            Width I of the merge blocks. Defaults to the backbone's intermediate size.
        inverse_dynamics_decoder (`dict`, *optional*):
            Overrides of the backbone's text configuration for the decoder layers of the inverse dynamics model, such
            as `{"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4}`. 4 layers by default.
        policy_decoder (`dict`, *optional*):
            The same for the policy. 2 layers by default; the paper has 8.
        decoder_kind (`str`, *optional*):
            `"backbone"`, decoder layers of the kind of the backbone's last ones; or `"plain"`, rotary positions, full
            attention and a gated feed-forward block at the backbone's width. [`LatentActionModel.from_backbone`] takes
            the backbone's kind where it can be had by itself, says so in the log where it cannot, and sets this field.
        policy_init (`str`, defaults to `"fresh"`):
            `"fresh"`, or `"last_layers"` to start the policy's decoder from the backbone's last layers.
        use_projector (`bool`, *optional*):
            Whether samples without an image pass through the cross-modal projector. Defaults to whether the backbone
            has vision placeholders.
        projector_residual (`bool`, defaults to `True`):
            Whether the projectors predict a change of the state (zero at the start), so that an untrained one is the
            identity. `False` gives the paper's plain two-layer map.
        inverse_reads_tokens (`bool`, defaults to `True`):
            Whether the inverse dynamics model also reads the tokens' input embeddings. `False` is the paper's, which
            reads states alone.
        codebook_std (`float`, *optional*):
            Standard deviation of the initial codes. Defaults to the measured root mean square of the context states:
            at the sources' 0.02 the world model cannot see them.
        gumbel_temperature (`float`, defaults to `2.0`):
            τ of the straight-through Gumbel-softmax while learning the space.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the backbone's text model.
        vision_token_ids (`list[int]`, *optional*):
            Ids that stand for visual tokens in a prompt. Never generated; a sample that has one has an image.
        base_model_name_or_path (`str`, *optional*), base_model_revision (`str`, *optional*):
            Where the backbone came from, and its commit.
        backbone_fingerprint (`str`, *optional*), backbone_fingerprint_float16 (`str`, *optional*):
            SHA-256 over names, shapes and samples of the backbone's tensors, rounded to bfloat16, and to float16 first.
        stage (`str`, defaults to `"none"`):
            Last stage reached, one of `none`, `inverse_dynamics`, `projector`, `joint`, `policy`, `sft`, `rl`.
        data_description (`dict`, *optional*):
            What the last run was trained on: `datasets` (names), `rows`, `columns`. Written by the trainers.
    """

    model_type = "latent_action"
    has_no_defaults_at_init = True

    def __init__(
        self,
        num_codes: int = 128,
        read_out: str = "residual",
        world_model_intermediate_size: int | None = None,
        inverse_dynamics_decoder: dict[str, Any] | None = None,
        policy_decoder: dict[str, Any] | None = None,
        decoder_kind: str | None = None,
        policy_init: str = "fresh",
        use_projector: bool | None = None,
        projector_residual: bool = True,
        inverse_reads_tokens: bool = True,
        codebook_std: float | None = None,
        gumbel_temperature: float = 2.0,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_token_ids: list[int] | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        backbone_fingerprint: str | None = None,
        backbone_fingerprint_float16: str | None = None,
        stage: str = "none",
        data_description: dict[str, Any] | None = None,
        allow_single_code: bool = False,
        schema_version: int = SCHEMA_VERSION,
        **kwargs,
    ):
        self.num_codes = num_codes
        self.read_out = read_out
        self.world_model_intermediate_size = world_model_intermediate_size
        for name, value in (("inverse_dynamics_decoder", inverse_dynamics_decoder), ("policy_decoder", policy_decoder)):
            if value is not None and not isinstance(value, dict):
                raise TypeError(f"`{name}` must be a dict of fields of the text configuration, got {value!r}.")
        if isinstance(vision_token_ids, str) or not all(isinstance(i, int) for i in vision_token_ids or []):
            raise TypeError(f"`vision_token_ids` must be a list of ints, got {vision_token_ids!r}.")
        self.inverse_dynamics_decoder = {"num_hidden_layers": 4, **(inverse_dynamics_decoder or {})}
        self.policy_decoder = {"num_hidden_layers": 2, **(policy_decoder or {})}
        self.decoder_kind = decoder_kind
        self.policy_init = policy_init
        self.use_projector = use_projector
        self.projector_residual = projector_residual
        self.inverse_reads_tokens = inverse_reads_tokens
        self.codebook_std = codebook_std
        self.gumbel_temperature = gumbel_temperature
        self.vision_token_ids = list(vision_token_ids or [])
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.backbone_fingerprint = backbone_fingerprint
        self.backbone_fingerprint_float16 = backbone_fingerprint_float16
        self.stage = stage
        self.data_description = data_description
        self.allow_single_code = allow_single_code
        self.schema_version = schema_version
        self.text_config = None if text_config is None else read_text_config(text_config)
        self._validate()
        super().__init__(**kwargs)

    def _validate(self) -> None:
        if not isinstance(self.num_codes, int) or isinstance(self.num_codes, bool):
            raise TypeError(f"`num_codes` must be an int, got {self.num_codes!r}.")
        if self.num_codes < 2 and not (self.num_codes == 1 and self.allow_single_code):
            raise ValueError(
                f"`num_codes` must be at least 2, got {self.num_codes}. A single code leaves nothing to choose; for "
                "the one-code control pass `allow_single_code=True` with `num_codes=1`."
            )
        if self.read_out not in READ_OUTS:
            raise ValueError(f"`read_out` must be one of {READ_OUTS}, got {self.read_out!r}.")
        if self.policy_init not in ("fresh", "last_layers"):
            raise ValueError(f"`policy_init` must be 'fresh' or 'last_layers', got {self.policy_init!r}.")
        if self.decoder_kind not in (None, *DECODER_KINDS):
            raise ValueError(f"`decoder_kind` must be one of {DECODER_KINDS} or None, got {self.decoder_kind!r}.")
        if self.stage not in STAGES:
            raise ValueError(f"`stage` must be one of {STAGES}, got {self.stage!r}.")
        for name in ("gumbel_temperature", "codebook_std", "world_model_intermediate_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name in ("inverse_dynamics_decoder", "policy_decoder"):
            layers = getattr(self, name)["num_hidden_layers"]
            if not isinstance(layers, int) or layers < 1:
                raise ValueError(f"`{name}` must have at least one layer, got num_hidden_layers={layers!r}.")

    @property
    def image_token_id(self) -> int | None:
        """The first visual placeholder, which TRL asks for."""
        return self.vision_token_ids[0] if self.vision_token_ids else None

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The backbone's text configuration, which TRL reads; the configuration itself until a backbone is attached."""
        return self if self.text_config is None else self.text_config

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the backbone is named in `base_model_name_or_path` alone."""
        values = super().to_dict()
        if values["text_config"] is not None:
            values["text_config"] = {**values["text_config"], "_name_or_path": ""}
        return values

    def decoder_config(self, overrides: dict[str, Any]) -> PreTrainedConfig:
        """
        The configuration of a decoder that reads context states: a copy of the backbone's text configuration, or a
        plain one of its width, with `overrides`.

        It has no vocabulary, and no dropout unless `overrides` say so: a rollout must be scored under the policy that
        it was sampled from.
        """
        if self.decoder_kind == "plain":
            return _override(plain_config(self.text_config), overrides)
        values = self.text_config.to_dict()
        # The backbone's special tokens are outside this vocabulary; some text models must have one that pads.
        values |= {name: 0 for name, value in values.items() if name.endswith("_token_id") and value is not None}
        values |= {"_name_or_path": "", "vocab_size": 1, "pad_token_id": 0}
        values |= {name: 0.0 for name, value in values.items() if "drop" in name and isinstance(value, float)}
        # A backbone may read its prompt both ways; a code is chosen before what follows it is known.
        values |= {name: False for name, value in values.items() if "bidirectional" in name and value is True}
        config = type(self.text_config)(**values)
        return _override(config, overrides)


def read_text_config(text_config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """A text configuration from its JSON form, less what would name code to run."""
    if isinstance(text_config, PreTrainedConfig):
        return text_config
    check_counts(text_config)
    return AutoConfig.for_model(**{k: v for k, v in text_config.items() if k.lstrip("_") not in CODE_FIELDS})


def check_counts(values: dict[str, Any]) -> None:
    """Raises `ValueError` for more layers, heads, labels or experts than `COUNTS` allows."""
    for name, value in values.items():
        if isinstance(value, dict):
            # Labels' names are the user's.
            check_counts({} if name == "label2id" else value)
        elif isinstance(value, int):
            for kind, most in COUNTS.items():
                if value > most and kind.match(name):
                    raise ValueError(f"`{name}` must be at most {most:,}, got {value!r:.50}.")


def plain_config(text_config: PreTrainedConfig) -> PreTrainedConfig:
    """A plain decoder's configuration, of the width of `text_config` and about its number of heads."""
    width = text_config.hidden_size
    # Not every text model has heads. Rotary positions turn pairs of a head's entries.
    heads = getattr(text_config, "num_attention_heads", None) or max(1, width // 64)
    heads = next(n for n in range(heads, 0, -1) if width % (2 * n) == 0)
    return AutoConfig.for_model(
        PLAIN_DECODER,
        vocab_size=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=width,
        intermediate_size=intermediate_size(text_config),
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


def intermediate_size(text_config: PreTrainedConfig) -> int:
    """Width of the feed-forward blocks; the last layer's where each has its own."""
    size = getattr(text_config, "intermediate_size", None) or getattr(text_config, "n_inner", None)
    if isinstance(size, list | tuple):
        size = size[-1]
    return size or 4 * text_config.hidden_size


def _override(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    values = config.to_dict()
    for name, value in overrides.items():
        name = config.attribute_map.get(name, name)
        if name not in values and not hasattr(config, name):
            raise ValueError(f"{name!r} is not a field of {type(config).__name__}; its fields are {sorted(values)}.")
        values[name] = value
    # Lists of one entry a layer follow the count; the last ones are kept, for these layers stand nearest to the output.
    before = config.num_hidden_layers
    layers = values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")]
    for name, value in values.items():
        # A list of floats is a range.
        by_layer = isinstance(value, list) and len(value) == before and not any(isinstance(v, float) for v in value)
        if by_layer and name not in overrides:
            values[name] = (value * (layers // before + 1))[-layers:]
    heads = "num_attention_heads" in overrides
    if heads and "num_key_value_heads" in values and "num_key_value_heads" not in overrides:
        values["num_key_value_heads"] = values[config.attribute_map.get("num_attention_heads", "num_attention_heads")]
    values.pop("model_type", None)
    return type(config)(**values)
