"""What the trainers share: which tensors are trained, one line that says so, and checkpoints of components."""

import json
import math
from pathlib import Path

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: F401  (the folder names of Trainer)
from transformers.utils import logging

from ..models.checkpoint import ADAPTER_FOLDER, TUNED_FOLDER, read_config
from ..models.component import WEIGHTS_NAME, CheckpointError, load_state, read_tensors
from ..models.latent_action_model import LatentActionModel
from .hub_training import HubTrainingMixin

logger = logging.get_logger(__name__)


def train_only(model: LatentActionModel, components: tuple[str, ...], backbone_parameters: list[str] = ()) -> str:
    """
    Freezes everything but `components` and the named tensors of the backbone. Components of half precision are made
    float32, so that small updates are not lost; autocast computes with them in half precision.

    Returns:
        One line that says what is trained, how many parameters, and what is frozen.

    Raises:
        ValueError: When nothing is left to train.
    """
    model.requires_grad_(False)
    for name in components:
        model.require(name)
        getattr(model, name).float().requires_grad_(True)
    wanted = set(backbone_parameters)
    for name, parameter in model.backbone.named_parameters():
        if name in wanted and parameter.is_floating_point():
            parameter.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if not trained:
        raise ValueError("No parameter is left to train: check the components and the backbone's layers named.")
    what = [*components, *(["backbone"] if wanted else [])]
    frozen = [n for n in (*model.component_classes, "backbone") if n not in what and getattr(model, n) is not None]
    return f"Training {', '.join(what)}: {trained:,} of {total:,} parameters. Frozen: {', '.join(frozen) or 'nothing'}."


def load_components(model: LatentActionModel, folder: str | Path) -> None:
    """
    Copies a checkpoint's tensors into `model`, which has the same components, tuned tensors and adapter.

    Raises:
        CheckpointError: When the checkpoint does not fit. The model is then as it was.
    """
    folder = Path(folder)
    config, names = read_config(folder)
    loaded = {name: read_tensors(folder / name / WEIGHTS_NAME) for name in names}
    own = {name: getattr(model, name) for name in names}
    absent = [name for name, component in own.items() if component is None]
    if absent:
        raise CheckpointError(f"{folder} holds {absent}, which the model has not.")
    before = {name: {k: v.clone() for k, v in component.state_dict().items()} for name, component in own.items()}
    try:
        for name, component in own.items():
            load_state(component, loaded[name], str(folder / name))
        tuned = folder / TUNED_FOLDER / WEIGHTS_NAME
        if tuned.is_file():
            _copy_tensors(model.backbone, read_tensors(tuned), tuned)
        adapter = folder / ADAPTER_FOLDER / "adapter_model.safetensors"
        if model.peft_backbone is not None:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model.peft_backbone, read_tensors(adapter))
    except CheckpointError:
        for name, component in own.items():
            component.load_state_dict(before[name])
        raise
    model.config.stage = config.stage


def _copy_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    own = module.state_dict()
    wrong = [name for name, t in tensors.items() if name not in own or own[name].shape != t.shape]
    if wrong:
        raise CheckpointError(f"{source}: tensors {wrong[:5]} are not the backbone's.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


class ComponentTrainingMixin(HubTrainingMixin):
    """Checkpoints of a Trainer whose model is a [`LatentActionModel`]: components in, components out."""

    def _save(self, output_dir: str | None = None, state_dict=None):
        output_dir = output_dir or self.args.output_dir
        self.record_run()
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        # Not the pickle that Trainer writes: it would hold the token.
        write_json(Path(output_dir) / "training_args.json", json.loads(self.args.to_json_string()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_components(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_components(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)


def check_finite(loss: torch.Tensor, where: str, output_dir: str) -> None:
    """Raises `FloatingPointError` when `loss` is not finite, naming the step and what is safe on disk."""
    value = loss.detach().float().item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The loss became {value} {where}. Training stops here; the last checkpoint in {output_dir!r} is whole. "
            "Lower the learning rate, or look at the batch named."
        )


def write_json(path: Path, value) -> None:
    """Writes JSON through a temporary file, so that a reader never sees half of it."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
