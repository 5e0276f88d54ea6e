"""The adapter of a backbone: PEFT puts it on, says what is trained, and takes it off again."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.files import ADAPTER_FOLDER, CheckpointError, check_range, read_json, read_weights
from ..checkpoint.lora import lora_fields, lora_targets, plain_lora_fields
from ..checkpoint.peft_record import METHODS, plain_fields

# What PEFT puts the layer under that it adapts, or trains a copy of.
WRAPPED = ("base_layer", "original_module")
# And what may stand between.
BETWEEN = "token_adapter"


def check_adapter_config(peft_config: Any) -> None:
    """
    Raises `TypeError` for what is no configuration of PEFT, and `ValueError` for a method that does not adapt layers:
    virtual tokens and prefixes stand in the text model's input or cache, which prompts, codes and policy do not know.
    Options that [`load_adapter`] would refuse raise `ValueError` too: they are the same checks, before the training.
    """
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"`peft_config` must be a `peft.PeftConfig`, got {type(peft_config).__name__}.")
    if "target_modules" not in vars(peft_config) or peft_config.is_adaption_prompt:
        raise ValueError(
            f"`peft_config` is a {type(peft_config).__name__}, which adapts no layer of the backbone but adds to what "
            "its text model reads. Use a method that adapts layers, such as `LoraConfig`."
        )
    method = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    if method not in ("LORA", *METHODS):
        raise ValueError(
            f"`peft_config` is a {type(peft_config).__name__}, whose adapter could not be loaded again from a "
            f"checkpoint. Use LORA or one of {list(METHODS)}."
        )
    record = {k: sorted(v) if isinstance(v, set) else v for k, v in peft_config.to_dict().items()}
    # PEFT puts names of layers in their place.
    if record["target_modules"] == "all-linear":
        del record["target_modules"]
    source = "`peft_config`, whose adapter could not be loaded again from a checkpoint"
    try:
        if method == "LORA":
            plain_lora_fields(record, source)
        else:
            plain_fields(record, type(peft_config), source)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


class BackboneAdapter:
    """
    An adapter on a backbone.

    Args:
        backbone (`PreTrainedModel`): Frozen by this, but for what PEFT trains of the adapter.
        peft_config (`PeftConfig`): What PEFT is to put on it.

    Attributes:
        peft_model (`PeftModel`): The backbone as PEFT sees it.
        trained (`list[str]`): Names in the backbone of the tensors that PEFT trains.
        changed (`list[str]`): Names in the backbone without adapter of the tensors that merging would change.
    """

    def __init__(self, backbone: PreTrainedModel, peft_config: Any):
        from peft import get_peft_model

        peft_config.inference_mode = False
        backbone.requires_grad_(False)
        self.peft_model = get_peft_model(backbone, peft_config)
        self.trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
        self._layers = list(wrapping_layers(backbone).values())
        plain = plain_names(backbone)
        self.changed = sorted({plain[name] for name in plain if name in self.trained or plain[name] != name})

    def is_on(self, backbone: nn.Module) -> bool:
        """Whether it is still there: PEFT's `merge_and_unload` and `unload` take it off."""
        return not set(self._layers).isdisjoint(backbone.modules())


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers. Not the state dict: to make that changes the outputs of a 4-bit backbone on the CPU."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def wrapping_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT has put around others, by their names."""
    return {name: m for name, m in backbone.named_modules() if not set(WRAPPED).isdisjoint(dict(m.named_children()))}


def plain_names(backbone: nn.Module) -> dict[str, str]:
    """The names of tensors that are no adapter's: what each is called now, and in the backbone without an adapter."""
    wrappers, plain = wrapping_layers(backbone), {}
    for name in tensors_of(backbone):
        inside = [name.removeprefix(f"{w}.").split(".")[0] for w in wrappers if name.startswith(f"{w}.")]
        if all(child in WRAPPED for child in inside):
            plain[name] = ".".join(part for part in name.split(".") if part not in (*WRAPPED, BETWEEN))
    return plain


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the tensors of an adapter; what is taken of the record, [`load_adapter`] decides."""
    return read_json(folder / "adapter_config.json"), read_weights(folder / "adapter_model.safetensors")


def load_adapter(
    backbone: PreTrainedModel, record: dict[str, Any], tensors: dict[str, torch.Tensor], is_trainable: bool
) -> BackboneAdapter:
    """
    Puts a saved adapter on `backbone`, frozen unless `is_trainable`, or leaves the backbone as it was and raises
    [`CheckpointError`] where record or tensors do not fit.
    """
    from peft import LoraConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    source, given = Path(ADAPTER_FOLDER) / "adapter_config.json", {n: tuple(t.shape) for n, t in tensors.items()}
    config_class: Any = LoraConfig
    if record.get("peft_type") in METHODS:
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(record["peft_type"])]
        fields = plain_fields(record, config_class, source)
    else:
        fields = lora_fields(record, given, source)
        fields["target_modules"] = lora_targets(record, given, backbone, source)
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    try:
        adapter = BackboneAdapter(backbone, config_class(**fields))
    except Exception as error:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise CheckpointError(f"{source} has a value that cannot be used: {error}") from error
    try:
        own = fitting_tensors(adapter.peft_model, tensors)
        check_range(tensors, {name: tensor.dtype for name, tensor in own.items()}, "The adapter")
    except CheckpointError:
        adapter.peft_model.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    if not is_trainable:
        backbone.requires_grad_(False)
    return adapter


def fitting_tensors(peft_model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's own tensors by their names in a file, whose `tensors` are of the same names and shapes, or else
    [`CheckpointError`] is raised."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(peft_model, state_dict=tensors_of(peft_model))
    shapes, given = ({name: tuple(t.shape) for name, t in found.items()} for found in (own, tensors))
    differing = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
    if differing:
        raise CheckpointError(f"The adapter's tensors do not fit the backbone: {differing[:5]} differ.")
    return own
