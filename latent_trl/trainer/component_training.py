"""What the trainers share: which tensors are trained, one line that says so, and checkpoints of components."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from ..models.checkpoint import ADAPTER_FOLDER, TUNED_FOLDER, read_config
from ..models.component import WEIGHTS_NAME, CheckpointError, load_state, read_tensors
from ..models.latent_action_model import LatentActionModel
from .checkpoint_manifest import (
    MANIFEST_FILE,
    checkpoint_fault,
    newest_whole_checkpoint,
    write_json,
    write_manifest,
)
from .hub_training import HubTrainingMixin

logger = logging.get_logger(__name__)

RUN_STATE_FILE = "run_state_{rank}.json"


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

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; `True` goes on from the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir!r} holds no whole checkpoint. Leave it "
                    "out to start anew."
                )
        elif resume_from_checkpoint and (fault := checkpoint_fault(resume_from_checkpoint)):
            logger.warning(f"Checkpoint {resume_from_checkpoint} may be damaged: {fault}.")
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step's checkpoint, after which Trainer would take one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call:
            # The other processes put their own files into the checkpoint only once its folder has its place.
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict=None):
        output_dir = output_dir or self.args.output_dir
        self.record_run()
        if not self.args.should_save:
            # Trainer calls this on every process.
            return
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        self._save_arguments(output_dir)

    def _save_arguments(self, folder: str | Path) -> None:
        # Not the pickle that Trainer writes: it would hold the token.
        write_json(Path(folder) / "training_args.json", json.loads(self.args.to_json_string()))

    def _save_checkpoint(self, model, trial) -> None:
        run_folder = self._get_output_dir(trial)
        folder = Path(run_folder) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
        # Older checkpoints go when this one is known to be whole, and not before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_arguments(folder)
            write_manifest(folder)
            rotate_checkpoints(run_folder, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_components(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_components(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)


class ExactLearningMixin(ComponentTrainingMixin):
    """
    For trainers that learn from data sets: a resumed run goes on bit by bit, in the middle of a logging interval too,
    and no update is made with a gradient that is not finite.
    """

    _unread_state: str | None = None

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        self._unread_state = resume_from_checkpoint
        return super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)

    def _finalize_training(self, *args, **kwargs):
        if self._unread_state is not None:
            # Resumed from the last step's checkpoint: no epoch was run that would have read it.
            self._load_rng_state(self._unread_state)
        return super()._finalize_training(*args, **kwargs)

    def _run_state(self) -> dict[str, Any]:
        """What changes during a run, as plain JSON values; a subclass adds its own."""
        return {"loss": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}

    def _restore_run_state(self, state: dict[str, Any]) -> None:
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged_step"]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        write_json(Path(output_dir) / RUN_STATE_FILE.format(rank=self.accelerator.process_index), self._run_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._unread_state = None
        path = None if checkpoint is None else Path(checkpoint) / RUN_STATE_FILE.format(rank=self.args.process_index)
        if path is not None and path.is_file():
            self._restore_run_state(json.loads(path.read_text(encoding="utf-8")))
        elif path is not None:
            logger.warning(f"{checkpoint} has no {path.name}: the logs do not go on exactly.")

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler meets infinite gradients as a matter of course, and skips those steps itself.
        if self.accelerator.scaler is None and not math.isfinite(float(grad_norm)):
            raise FloatingPointError(
                f"The gradient became {float(grad_norm)} {self._where()}. "
                f"{_what_is_kept(self.args.output_dir)} Lower the learning rate, or set `max_grad_norm`."
            )
        return grad_norm

    def _where(self) -> str:
        return f"at step {self.state.global_step}"


def check_finite(loss: torch.Tensor, where: str, output_dir: str) -> None:
    """
    Raises `FloatingPointError` when `loss` is not finite on any process, naming the step and what is safe on disk.
    """
    value = loss.detach().float()
    wrong = ~value.isfinite()
    elsewhere = wrong.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # All processes stop together: the others would wait for this one.
        torch.distributed.all_reduce(elsewhere)
    if elsewhere.item():
        what = str(value.item()) if wrong else "infinite or NaN on another process"
        raise FloatingPointError(
            f"The loss became {what} {where}. Training stops here. {_what_is_kept(output_dir)} "
            "Lower the learning rate, or look at the batch named."
        )


def _what_is_kept(output_dir: str) -> str:
    last = newest_whole_checkpoint(output_dir)
    if last is None:
        return f"No checkpoint was written to {output_dir!r} before it."
    return f"The last checkpoint, {last!r}, is whole."
