"""The backbone's adapter in RL: which of its tensors are trained, and what the backbone is for the reference."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import set_seed
from trl.trainer.utils import use_adapter

from ...models.adapter import plain_names
from ...models.latent_action_model import LatentActionModel
from .reference import copy_adapter

REFERENCE_ADAPTER = "reference"


def attach_adapter(model: LatentActionModel, args: Any, peft_config: Any) -> tuple[list[str], str | None]:
    """
    Puts a new adapter on the backbone, or takes the one that is there, where `train_backbone` asks for it.

    Returns:
        Names of the tensors to train, and the name of the copy that the reference is scored with, if there is one.

    Raises:
        ValueError: When the configuration and `peft_config` contradict each other.
    """
    if peft_config is not None and not args.train_backbone:
        raise ValueError("`peft_config` adapts the backbone, which is frozen. Set `train_backbone=True`.")
    if not args.train_backbone:
        return [], None
    reference = None
    if peft_config is not None:
        # Trainer seeds only later, and the adapter's start is drawn here.
        set_seed(args.seed)
        model.add_adapter(peft_config)
    elif model.peft_backbone is None:
        raise ValueError("`train_backbone=True` needs an adapter: pass `peft_config`.")
    elif args.beta != 0.0:
        reference = REFERENCE_ADAPTER
        copy_adapter(model.peft_backbone, reference)
    own = plain_names(model.backbone)
    if args.beta != 0.0 and any(name in own for name in model.adapter.trained):
        raise ValueError(
            f"`beta={args.beta}` measures from the backbone as it was before RL, and the adapter's `bias` trains "
            "tensors of the backbone itself. Set `bias='none'` in its configuration, or `beta=0`."
        )
    _check_head(model)
    return model.adapter.trained, reference


def _check_head(model: LatentActionModel) -> None:
    """Raises `ValueError` for an adapter of the head, which says how a code is read, and not which one is chosen."""
    head = {id(p) for p in model.backbone.get_output_embeddings().parameters()}
    embedding = {id(p) for p in model.backbone.get_input_embeddings().parameters()}
    named = dict(model.backbone.named_parameters(remove_duplicate=False))
    trained = [name for name in model.adapter.trained if id(named[name]) in head - embedding]
    if trained:
        raise ValueError(
            f"The adapter trains {trained[:3]} of the backbone's head, on which no probability of a code depends: RL "
            "over codes would never train them. Leave the head out of `target_modules` and `modules_to_save`."
        )


def backbone_of_reference(
    model: LatentActionModel, train_backbone: bool, adapter: str | None
) -> AbstractContextManager:
    """The backbone as it was before RL, inside the block."""
    return use_adapter(model.peft_backbone, adapter) if train_backbone else nullcontext()
