"""The plain model that comes out of distillation: what it can be made of, and how it is saved."""

import copy
from pathlib import Path
from typing import Any

from ...checkpoint.configuration import STAGES
from ...models.latent_action_model import LatentActionModel


def check_model(model: LatentActionModel, args: Any) -> None:
    """
    Raises `ValueError` for a model that has no policy to be taught, or whose backbone cannot be taught it.

    Args:
        model (`LatentActionModel`): The model.
        args (`LatentActionDistillationConfig`): The trainer's arguments.
    """
    model.require("policy", "codebook", "world_model")
    if STAGES.index(model.config.stage) < STAGES.index("policy"):
        raise ValueError(
            f"Distillation comes after the policy, and the model has only reached stage {model.config.stage!r}. Run "
            "`LatentActionSpaceTrainer` up to its stage 'policy' first."
        )
    tuned = model.peft_backbone is not None or model.tuned_backbone_tensors
    if tuned and not args.merge_adapter:
        raise ValueError(
            "The policy was trained on a backbone that was tuned itself, by SFT say: a new adapter alone would be put "
            "on the base model, which is another. Set `merge_adapter=True`."
        )
    if args.merge_adapter and getattr(model.backbone, "is_quantized", False):
        raise ValueError(
            "`merge_adapter=True` cannot be had of a quantised backbone without rounding. Save the adapter alone, and "
            "merge it into the base model in full precision."
        )
    if args.push_to_hub:
        raise ValueError(
            "`push_to_hub=True` would push latent actions, and what is made here is a plain model. Upload its folder "
            "with `hf upload`."
        )


def save_plain(model: LatentActionModel, folder: str | Path, merge: bool) -> None:
    """
    Writes the adapter of a model's backbone to `folder`, for the base model; or the whole backbone with it merged, for
    which a copy of the backbone is made.
    """
    peft_model = model.peft_backbone
    if merge:
        copy.deepcopy(peft_model).merge_and_unload().save_pretrained(folder)
        return
    for config in peft_model.peft_config.values():
        config.base_model_name_or_path = model.config.base_model_name_or_path
    peft_model.save_pretrained(folder)
    # PEFT's card is a template that names the backbone's folder on this machine.
    (Path(folder) / "README.md").unlink(missing_ok=True)
