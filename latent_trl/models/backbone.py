"""What the package needs to know of a backbone, found by looking at the model itself and not at its family's name."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from .adapter import plain_names
from .blank_picture import BlankPicture

VISION_TOKEN_FIELD = re.compile(r"^(image|video)_token_(id|index)$")


@dataclass
class DecoderCall:
    """One call of the text model: its final states `[B, L, d]`, the positions it was given, and an auxiliary loss."""

    states: torch.Tensor
    position_ids: torch.Tensor | None
    aux_loss: torch.Tensor | None = None


class _HeadInput(BaseModelOutputWithPast):
    """Stands for the base model's output where only the head's computation is wanted; other fields read as `None`."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _same_values(output, states: torch.Tensor) -> bool:
    if not isinstance(output, torch.Tensor) or output.numel() != states.numel():
        return False
    return output.shape[-1] == states.shape[-1] and torch.equal(output.reshape(states.shape), states)


def _keep_unpacked(model: PreTrainedModel) -> None:
    """
    Keeps 4-bit weights on the CPU as they are. On some CPUs bitsandbytes packs them at inference: their scales are then
    rounded to bfloat16, a state dict cannot quite be had from them, and a backward pass silently gives no gradient.
    """
    layers = [m for m in model.modules() if "support_avx512bf16_for_cpu" in vars(m)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    if layers and model.device.type == "cpu":
        # Those that were packed before are unpacked for a state dict.
        model.state_dict()


def _check_at_hand(model: PreTrainedModel) -> None:
    """Raises `ValueError` where tensors that are needed now are elsewhere: offloaded, or sharded by ZeRO-3."""
    if model.device.type == "meta":
        raise ValueError(
            "The first tensors of `backbone` are offloaded, so no device can be told by them. Give its input embedding "
            "and its vision tower a device in `device_map`; layers behind them may be offloaded."
        )
    sharded = next((name for name, p in model.named_parameters() if "ds_numel" in vars(p)), None)
    if sharded is not None:
        raise ValueError(
            f"`backbone` is sharded by ZeRO-3 already ({sharded!r} has no elements here), as transformers makes models "
            "once a trainer's arguments are there. Load it before those, or give the trainer the checkpoint's name."
        )


@contextmanager
def _at_hand(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values of a tensor of the model's state dict, fetched where accelerate has offloaded them."""
    if not tensor.is_meta:
        yield tensor
        return
    module, _, own = name.rpartition(".")
    with align_module_device(model.get_submodule(module), torch.device("cpu")):
        yield getattr(model.get_submodule(module), own)


def _text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose last states the head reads. What `get_decoder` gives may be a head, or have one of its own."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        decoder = model.base_model
    while decoder is model or decoder.get_output_embeddings() is not None:
        inner = next((child for child in decoder.children() if isinstance(child, PreTrainedModel)), None)
        if inner is None:
            raise ValueError(f"`backbone` ({type(model).__name__}) has no separate text model: it is itself.")
        decoder = inner
    return decoder


def vision_token_ids(config: PreTrainedConfig) -> list[int]:
    """The ids that stand for visual tokens in a prompt, sorted; none for a text model."""
    found = {name: value for name, value in config.to_dict().items() if VISION_TOKEN_FIELD.match(name)}
    return sorted({value for value in found.values() if isinstance(value, int)})


class Backbone:
    """
    View of a causal or image-text-to-text model: its text model, final norm, head and placeholders.

    Args:
        model (`PreTrainedModel`): The model. It is not copied; only bitsandbytes' packing on the CPU is turned off.

    Raises:
        ValueError: When it has no output embedding, or its head cannot be run on given states.
    """

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"`backbone` must be a transformers `PreTrainedModel`, got {type(model).__name__}.")
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"`backbone` ({type(model).__name__}) has no output embedding, so no token can be read from a state. "
                "Pass a model with a language-model head (`AutoModelForCausalLM`, `AutoModelForImageTextToText`)."
            )
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"`backbone` ({type(model).__name__}) is an encoder-decoder model: its prompt is no part of the text "
                "that the decoder reads. Pass a model of the decoder alone (`AutoModelForCausalLM`, "
                "`AutoModelForImageTextToText`)."
            )
        _check_at_hand(model)
        self.model = model
        self.decoder = _text_model(model)
        self.base = model.base_model
        self.text_config = model.config.get_text_config(decoder=True)
        self.hidden_size: int = self.text_config.hidden_size
        self.vision_token_ids = vision_token_ids(model.config)
        # Set by who trains on several processes that shard the tensors.
        self.blank_picture: BlankPicture | None = None
        _keep_unpacked(model)
        self.before_head = self.base
        self.final_norm, self.state_rms, self.plain_head = self._probe()

    @torch.no_grad()
    def _probe(self) -> tuple[nn.Module | None, float, bool]:
        """Runs the text model once: which module makes its output, at what scale, and is the head a bare linear map?"""
        embedding = self.model.get_input_embeddings()
        device = embedding.weight.device
        high = min(self.text_config.vocab_size, len(embedding.weight), *self.vision_token_ids or [10**9])
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, max(high, 2), (1, 16), generator=generator).to(device)
        outputs: dict[nn.Module, torch.Tensor] = {}
        handles = [
            module.register_forward_hook(lambda m, _, out: outputs.__setitem__(m, out))
            for module in self.decoder.modules()
            if not list(module.children()) and module.__class__ is not nn.Dropout
        ]
        training = self.model.training
        self.model.eval()
        try:
            states = self.decoder(input_ids=ids).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        # The first whose output has the final values; a model may reshape them afterwards.
        norm = next((m for m, out in outputs.items() if _same_values(out, states)), None)
        self.before_head = self._find_before_head(states)
        logits = self._head_through_model(states)
        bare = self.model.get_output_embeddings()(states)
        self.model.train(training)
        return norm, states.float().pow(2).mean().sqrt().item(), torch.equal(bare, logits)

    def _find_before_head(self, states: torch.Tensor) -> nn.Module:
        """What can be replaced by given states: the base model, or the text model where the head's model calls that."""
        for module in (self.base, self.decoder):
            if module is not self.model:
                self.before_head = module
                if not torch.equal(self._head_through_model(states), self._head_through_model(-states)):
                    return module
        raise ValueError(f"The head of {type(self.model).__name__} cannot be run on given states.")

    def norm(self, states: torch.Tensor) -> torch.Tensor:
        """The text model's final norm."""
        if self.final_norm is None:
            raise ValueError(
                f"No module of {type(self.decoder).__name__} makes its output, so it has no final norm that the "
                "read-outs 'subtract' and 'last_block' could use. Use `read_out='residual'`."
            )
        return self.final_norm(states)

    def logits(self, merged: torch.Tensor) -> torch.Tensor:
        """The backbone's own head on `merged` `[B, L, d]`: scaling and soft-capping included. `[B, L, V]`."""
        head = self.model.get_output_embeddings()
        if self.plain_head:
            return head(merged.to(head.weight.dtype) if head.weight.is_floating_point() else merged)
        return self._head_through_model(merged)

    def _head_through_model(self, merged: torch.Tensor) -> torch.Tensor:
        """The model's own forward with what stands before its head replaced by `merged`."""
        base = self.before_head
        own = base.__dict__.get("forward")
        merged = merged.to(self.model.dtype)
        base.forward = lambda *args, **kwargs: _HeadInput(last_hidden_state=merged)
        try:
            ids = torch.zeros(merged.shape[:2], dtype=torch.long, device=merged.device)
            return self.model(input_ids=ids).logits
        finally:
            if own is None:
                del base.forward
            else:
                base.forward = own

    @contextmanager
    def record(self) -> Iterator[list[DecoderCall]]:
        """Records what the text model is given and gives, for every call inside the block."""
        calls: list[DecoderCall] = []

        def keep(module, args, kwargs, output):
            calls.append(DecoderCall(output.last_hidden_state, kwargs.get("position_ids")))

        handle = self.decoder.register_forward_hook(keep, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        completion_mask: torch.Tensor | None = None,
        with_aux_loss: bool = False,
        **inputs,
    ) -> DecoderCall:
        """
        One pass of the backbone without its vocabulary head.

        Positions are made by the same code that makes them for `generate`, so that a sequence is scored where it was
        generated.

        Args:
            input_ids (`torch.Tensor`): `[B, L]`.
            attention_mask (`torch.Tensor`, *optional*): `[B, L]`.
            completion_mask (`torch.Tensor`, *optional*): `[B, L]`, what is no prompt to be read both ways. Zeros of
                `token_type_ids` there become what `generate` gives to a generated token.
            with_aux_loss (`bool`, defaults to `False`): Also compute the load-balancing loss of a mixture of experts,
                for which the head is run on the last position.
            inputs: Further inputs of the model, such as `pixel_values`, or `position_ids` to impose.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.blank_picture is not None and self.blank_picture.is_needed(inputs):
            return self._encode_with_blank(input_ids, attention_mask, completion_mask, with_aux_loss, inputs)
        types = inputs.get("token_type_ids")
        if completion_mask is not None and types is not None:
            inputs["token_type_ids"] = types.masked_fill(completion_mask.bool() & (types == 0), self.completion_type)
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = self.positions(input_ids, attention_mask, **inputs)
        shared = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **inputs}
        with self.record() as calls:
            if with_aux_loss:
                aux_loss = self.model(**shared, output_router_logits=True, logits_to_keep=1).aux_loss
                return replace(calls[-1], aux_loss=aux_loss)
            self.base(**shared)
        return calls[-1]

    def _encode_with_blank(self, input_ids, attention_mask, completion_mask, with_aux_loss, inputs) -> DecoderCall:
        """[`encode`] of a batch of text with a blank picture's row below it, which is taken off again."""
        assert self.blank_picture is not None
        (rows, length), inputs = input_ids.shape, dict(inputs)
        # Text is no prompt to be read both ways.
        inputs["completion_mask"] = torch.ones_like(input_ids) if completion_mask is None else completion_mask
        ids, mask, inputs = self.blank_picture.below(input_ids, attention_mask, inputs)
        call = self.encode(ids, mask, with_aux_loss=with_aux_loss, **inputs)
        positions = call.position_ids
        if positions is not None:
            positions = positions[..., :rows, :length] if positions.shape[-2] > 1 else positions[..., :length]
        return replace(call, states=call.states[:rows, :length], position_ids=positions)

    @cached_property
    def completion_type(self) -> int:
        """What the model's `generate` appends to `token_type_ids` of text."""
        prompt = {"token_type_ids": torch.zeros(1, 1, dtype=torch.long)}
        later = self.model._update_model_kwargs_for_generation(ModelOutput(), prompt, is_encoder_decoder=False)
        return int(later["token_type_ids"][0, -1])

    def positions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs) -> torch.Tensor:
        """Position ids of whole sequences, as the model's `generate` makes them."""
        inputs = {k: v for k, v in inputs.items() if v is not None and k != "position_ids"}
        return self.model._prepare_position_ids_for_generation(
            input_ids, {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        )

    def fingerprint(self, through: torch.dtype = torch.bfloat16) -> str | None:
        """
        SHA-256 over names, shapes and 64 values of each of the backbone's tensors, adapters left out; `None` for a
        quantised backbone, whose tensors are not those of the model that it was made of.

        Args:
            through (`torch.dtype`, defaults to `torch.bfloat16`): Values are rounded to it, and then to bfloat16, so
                that a model loaded in that precision has the fingerprint of the same one loaded in float32.
        """
        if getattr(self.model, "is_quantized", False):
            return None
        digest = hashlib.sha256()
        plain = plain_names(self.model)
        named = {plain[name]: (name, tensor) for name, tensor in self.model.state_dict().items() if name in plain}
        for name, (own, tensor) in sorted(named.items()):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            step = max(1, tensor.numel() // 64)
            with _at_hand(self.model, own, tensor) as values:
                sample = values.detach().reshape(-1)[::step][:64].float().cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(sample.to(through).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def fits(self, fingerprints: Iterable[str | None]) -> bool:
        """
        Whether the tensors are those of `fingerprints`, taken `through` bfloat16 and float16. A quantised backbone, or
        a checkpoint without one, cannot be told.
        """
        known = [f for f in fingerprints if f]
        own = (self.fingerprint(dtype) for dtype in (torch.bfloat16, torch.float16))
        return not known or any(f is None or f in known for f in own)

    @cached_property
    def max_positions(self) -> int | None:
        """
        Number of positions that the text model has a vector for; `None` where it computes them (rotary positions,
        ALiBi, none), and so goes on behind those that it was trained on.
        """
        limit = getattr(self.text_config, "max_position_embeddings", None)
        tokens = self.model.get_input_embeddings()
        for module in self.decoder.modules():
            tables = [] if module is tokens else [b for b in module.buffers(recurse=False) if b.ndim == 2]
            if isinstance(module, nn.Embedding) and module is not tokens:
                tables.append(module.weight)
            # Some keep a few more, for padding.
            if limit and any(limit <= len(table) <= limit + 8 for table in tables):
                # Some count from behind the padding's id.
                return limit - (getattr(module, "padding_idx", None) or -1) - 1
        return None

    def linear_names(self) -> list[str]:
        """Names of the linear maps of the text model, the default targets of an adapter."""
        prefix = next(name for name, module in self.model.named_modules() if module is self.decoder)
        head = self.model.get_output_embeddings()
        return [
            f"{prefix}.{name}"
            for name, module in self.decoder.named_modules()
            if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        ]
