"""A LoRA that a backbone carries already, below all plans: checked, saved with them and put back."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.files import ADAPTER_FOLDER, CheckpointError, has_folder
from ..models.adapter import fitting_tensors, load_adapter, read_adapter, wrapping_layers
from .configuration import PlanConfig

MERGE = "Merge it first: `backbone = model.merge_and_unload()`."


class BaseAdapter:
    """
    The LoRA of a backbone. Plans are added to what its layers give, as PEFT adds several active LoRAs.

    Args:
        peft_model (`PeftModel`): The backbone with the LoRA, not merged.

    Raises:
        ValueError: For several adapters, or one that is no LoRA.
    """

    def __init__(self, peft_model: PeftModel):
        names = list(peft_model.peft_config)
        if len(names) != 1:
            raise ValueError(f"`backbone` carries the adapters {names}; plans take one. {MERGE}")
        kind = peft_model.peft_config[names[0]].peft_type
        if getattr(kind, "value", kind) != "LORA":
            raise ValueError(f"`backbone` carries an adapter of type {kind}; plans stand beside a LoRA alone. {MERGE}")
        self.peft_model = peft_model

    @classmethod
    def of(cls, backbone: Any) -> "BaseAdapter | None":
        """That of a `PeftModel`; `None` for a plain backbone. Raises `ValueError` where PEFT's model is not given."""
        if isinstance(backbone, PeftModel):
            return cls(backbone)
        if isinstance(backbone, nn.Module) and any(name.endswith("base_layer") for name, _ in backbone.named_modules()):
            raise ValueError(
                "`backbone` carries an adapter of PEFT. Merge it first: `model = model.merge_and_unload()`. Or pass "
                "the `PeftModel` itself, if it is one LoRA."
            )
        return None

    @property
    def backbone(self) -> PreTrainedModel:
        """The model that carries it."""
        return self.peft_model.get_base_model()

    def save(self, folder: Path, base_model_name_or_path: str | None) -> None:
        """Writes it in PEFT's format into the folder of plans."""
        for config in self.peft_model.peft_config.values():
            config.base_model_name_or_path = base_model_name_or_path
        self.peft_model.save_pretrained(folder / ADAPTER_FOLDER)
        # PEFT's card is a template that names the backbone's folder on this machine.
        (folder / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)

    def check_same(self, folder: Path) -> None:
        """Raises [`CheckpointError`] unless the folder of plans holds this LoRA."""
        _, tensors = read_adapter(adapter_folder(folder))
        own = fitting_tensors(self.peft_model, tensors)
        other = [n for n, tensor in own.items() if not torch.equal(tensor.cpu().float(), tensors[n].float())]
        if other:
            raise CheckpointError(
                f"The plans in {folder} were learned beside another LoRA: {other[:3]} differ. Load the plain backbone; "
                "the LoRA comes with the plans."
            )


def check_adapter(folder: Path, config: PlanConfig, own: BaseAdapter | None) -> None:
    """Raises [`CheckpointError`] unless a backbone carries the LoRA beside which the plans of a folder were learned."""
    if config.has_adapter != (own is not None):
        with_, without = ("with", "without") if config.has_adapter else ("without", "with")
        raise CheckpointError(f"{folder} has plans of a backbone {with_} a LoRA, and this model is {without} one.")
    if own is not None:
        own.check_same(folder)


def with_saved_adapter(backbone: Any, folder: Path) -> Any:
    """
    The backbone with the LoRA of a folder of plans, beside which they were learned.

    Raises:
        CheckpointError: When it is missing or damaged, or does not fit the backbone, which is then as it was.
    """
    if isinstance(backbone, PeftModel) or wrapping_layers(backbone):
        return backbone
    return load_adapter(backbone, *read_adapter(adapter_folder(folder)), is_trainable=False).peft_model


def adapter_folder(folder: Path) -> Path:
    """Where a folder of plans has its LoRA. Raises [`CheckpointError`] when it is missing, or a link out of there."""
    if not has_folder(folder, ADAPTER_FOLDER):
        raise CheckpointError(f"{folder} was learned beside a LoRA, and has no folder {ADAPTER_FOLDER!r} with it.")
    return folder / ADAPTER_FOLDER
