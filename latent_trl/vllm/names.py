"""Names of tensors: from those that transformers has in memory or writes, to those that vLLM reads."""

from collections.abc import Iterable, Iterator

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from ..models.policy import LatentActionPolicy
from ..models.whole_loading import loaded_whole

# In front of the names of tensors of the policy's decoder.
DECODER = "decoder."


def policy_weights(
    policy: LatentActionPolicy, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """
    The tensors of the policy's decoder, under the names that they would have in the checkpoint of a causal model of
    transformers, which is what vLLM reads.

    Args:
        policy (`LatentActionPolicy`): The policy.
        state_dict (`dict`, *optional*): Its whole tensors by its own names, where its parameters are sharded.
    """
    state_dict = policy.state_dict() if state_dict is None else state_dict
    named = decoder = policy.decoder_stack.decoder
    # The text model of some backbones with pictures stands in no causal model of transformers.
    if type(decoder.config) in AutoModelForCausalLM._model_mapping:
        with loaded_whole(), torch.device("meta"):
            named = AutoModelForCausalLM.from_config(decoder.config)
    prefix = named.base_model_prefix
    tensors = {f"{prefix}.{name}": tensor.detach() for name, tensor in _part(state_dict, "decoder_stack.decoder.")}
    return revert_weight_conversion(named, tensors)


def policy_tensors(
    policy: LatentActionPolicy, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """
    All tensors of a policy as an engine takes them: those of [`policy_weights`] under `decoder`, and those around the
    decoder under `policy_input` and `policy_head`.

    Args:
        policy, state_dict: As in [`policy_weights`].
    """
    state_dict = policy.state_dict() if state_dict is None else state_dict
    parts = {"policy_input": "decoder_stack.input.", "policy_head": "head."}
    around = {f"{k}.{name}": t for k, place in parts.items() for name, t in _part(state_dict, place)}
    inside = {f"{DECODER}{name}": tensor for name, tensor in policy_weights(policy, state_dict).items()}
    return {name: tensor.detach().contiguous() for name, tensor in (inside | around).items()}


def _part(state_dict: dict[str, torch.Tensor], prefix: str) -> list[tuple[str, torch.Tensor]]:
    return [(name.removeprefix(prefix), tensor) for name, tensor in state_dict.items() if name.startswith(prefix)]


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """How many bytes the values of `tensors` take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def with_old_prefixes(
    weights: Iterable[tuple[str, torch.Tensor]], config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Tensors of a backbone with pictures, under the names that vLLM knows. A model that was not loaded from a file of an
    older transformers is written without the prefixes that transformers has since taken off its parts.

    Args:
        weights (`Iterable[tuple[str, torch.Tensor]]`): As the backbone's files have them.
        config (`PreTrainedConfig`): Of the backbone.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    changes = [c for c in get_model_conversion_mapping(model, add_legacy=False) if isinstance(c, PrefixChange)]
    model._weight_conversions = changes
    for name, tensor in weights:
        old = next(iter(revert_weight_conversion(model, {name: tensor}))) if changes else name
        # What was put in stands there already in a file of an older transformers.
        added = next((part for part in old.split(".") if part not in name.split(".")), None)
        yield name if added is None else old, tensor
