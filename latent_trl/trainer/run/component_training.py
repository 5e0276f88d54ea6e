"""What the trainers share: which tensors are trained, one line that says so, and checkpoints of components."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging
from trl import BEMACallback, SyncRefModelCallback

from ...checkpoint.files import ADAPTER_FOLDER, TUNED_FOLDER, WEIGHTS_NAME, CheckpointError, read_config, read_weights
from ...data.bad_rows import BadRows
from ...models.adapter import fitting_tensors, read_adapter
from ...models.component import check_state
from ...models.latent_action_model import LatentActionModel
from .engines import check_engine, elements, prepare_model
from .health import RunHealth, is_finite, loss_trouble, origin, remedy, what_is_kept
from .hub import HubTrainingMixin
from .output_folder import (
    check_same_method,
    clear_run_folder,
    earlier_run,
    no_room,
    only_run,
    raise_together,
    set_aside,
)
from .signals import StopOnSignal

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
    trained = get_model_param_count(model, trainable_only=True)
    total = get_model_param_count(model)
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
    own = {name: getattr(model, name) for name in names}
    absent = [name for name, component in own.items() if component is None]
    if absent:
        raise CheckpointError(f"{folder} holds {absent}, which the model has not.")
    # All is read and looked at before anything is copied.
    loaded = {name: read_weights(folder / name / WEIGHTS_NAME) for name in names}
    for name, component in own.items():
        check_state(component, loaded[name], str(folder / name))
    file, tuned, adapter = folder / TUNED_FOLDER / WEIGHTS_NAME, {}, {}
    of_backbone = model.backbone.state_dict() if file.is_file() else {}
    if file.is_file():
        tuned = read_weights(file)
        wrong = [name for name, t in tuned.items() if name not in of_backbone or of_backbone[name].shape != t.shape]
        if wrong:
            raise CheckpointError(f"{file}: tensors {wrong[:5]} are not the backbone's.")
    if model.peft_backbone is not None:
        _, adapter = read_adapter(folder / ADAPTER_FOLDER)
        fitting_tensors(model.peft_backbone, adapter)
    for name, component in own.items():
        sharded = component.state_dict()
        component.load_state_dict({k: _as_sharded(t, sharded[k]) for k, t in loaded[name].items()})
    with torch.no_grad():
        for name, tensor in tuned.items():
            of_backbone[name].copy_(_as_sharded(tensor, of_backbone[name]))
    if adapter:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model.peft_backbone, adapter)
    model.config.stage = config.stage


def _as_sharded(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor as FSDP2 shards the `own` one, of which it takes the place."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)


def check_kernels(args: Any) -> None:
    """Raises `ValueError` for `use_liger_kernel`, which knows models by their family, and not what is wrapped."""
    if args.use_liger_kernel or args.liger_kernel_config:
        raise ValueError(
            "`use_liger_kernel` and `liger_kernel_config` do not reach the backbone of a latent action model. Leave "
            "them out, load the backbone with Liger's kernels (`liger_kernel.transformers.AutoLigerKernelForCausalLM`),"
            " and pass it as `backbone=` to `LatentActionModel.from_pretrained`."
        )


def check_callbacks(callbacks: list[Any]) -> None:
    """Raises `ValueError` for TRL's callbacks that make a second model of the first one's configuration."""
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        for refused, why in (
            (BEMACallback, "makes a second model from the configuration alone, which holds no backbone"),
            (SyncRefModelCallback, "moves a second model, and the reference is a copy of the policy before RL"),
        ):
            if issubclass(kind, refused):
                raise ValueError(f"`callbacks` has a {kind.__name__}, which {why}. Leave it out.")


class RestoreRun(TrainerCallback):
    """Restores a resumed run once Trainer has set up its counters, before the first step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_run()


class ComponentTrainingMixin(HubTrainingMixin):
    """Checkpoints of a Trainer whose model is a [`LatentActionModel`]: components in, components out."""

    # What becomes of rows that cannot be used.
    bad_rows: BadRows
    # The checkpoint that the run goes on from.
    resumed_from: str | None = None
    # The folder of the run that this trainer has made, if any.
    _trained_in: str | None = None

    def __init__(self, *args, **kwargs):
        check_kernels(kwargs["args"])
        check_callbacks(kwargs.get("callbacks") or [])
        super().__init__(*args, **kwargs)
        check_engine(self.accelerator)
        prepare_model(self)
        self.add_callback(RestoreRun(self))
        self.stop_on_signal = StopOnSignal()
        self.add_callback(self.stop_on_signal)
        self.health = RunHealth(self.args.on_nonfinite, self._on_collapse(), self.args.output_dir)
        if self.is_deepspeed_enabled and self.args.on_nonfinite == "skip":
            raise ValueError(
                "`on_nonfinite='skip'` cannot work under DeepSpeed, which updates before the gradient can be looked "
                "at. Use 'stop'."
            )

    def add_callback(self, callback: Any) -> None:
        """As `Trainer.add_callback`; raises `ValueError` for those that copy or follow the whole model."""
        check_callbacks([callback])
        super().add_callback(callback)

    def usable_rows(self, dataset: Any, name: str) -> Any:
        """An evaluation set, called `name`, as the trainer reads it: of the rows that can be used."""
        raise NotImplementedError

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """As `Trainer.get_eval_dataloader`. Skipped rows are left out, so that figures are means over the others."""
        given = self.eval_dataset
        # One process lists the rows, and the others find them listed.
        with self.accelerator.main_process_first():
            if isinstance(eval_dataset, str):
                name = f"eval_dataset[{eval_dataset!r}]"
                self.eval_dataset = {eval_dataset: self.usable_rows(given[eval_dataset], name)}
            else:
                rows = given if eval_dataset is None else eval_dataset
                eval_dataset = None if rows is None else self.usable_rows(rows, "eval_dataset")
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.eval_dataset = given

    def _latent_model(self) -> LatentActionModel:
        return self.accelerator.unwrap_model(self.model)

    def _on_collapse(self) -> str:
        return self.args.on_collapse

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        As `Trainer.train`; `True` goes on from the newest checkpoint that is whole. Called again, it trains the model
        further in a run of its own, and no run goes on from the checkpoints of the one before.

        Raises:
            ValueError: When `output_dir` is in use by another run, holds checkpoints of an earlier one that is not to
                be resumed, or has no room for a checkpoint.
            CheckpointError: When the checkpoint is of another trainer or model.
            CheckpointWriteError: When a checkpoint could not be written. The one before it is whole.
            FloatingPointError: When the loss or a gradient is not finite (`on_nonfinite`).
            CollapseError: With `on_collapse="stop"`.
            SystemExit, KeyboardInterrupt: After SIGTERM (code 143) and SIGINT, when the step's checkpoint is written.
        """
        folder = self.args.output_dir
        with only_run(self.accelerator, folder):
            if self._trained_in == folder and not resume_from_checkpoint and self.args.should_save:
                set_aside(folder)
            self._trained_in = folder
            self.accelerator.wait_for_everyone()
            fault = None if resume_from_checkpoint else earlier_run(folder)
            if fault is None and self.args.save_strategy != SaveStrategy.NO:
                fault = no_room(folder, self._checkpoint_bytes())
            raise_together(fault)
            return self._train_alone(resume_from_checkpoint, **kwargs)

    def _checkpoint_bytes(self) -> int:
        """
        About what a checkpoint takes: the components, what is trained of the backbone, and Adam's two moments. FSDP and
        DeepSpeed write all of the model a second time.
        """
        model = self.accelerator.unwrap_model(self.model)
        components = [getattr(model, name) for name in model.component_classes]
        kept = {id(p): p for module in components if module is not None for p in module.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        kept.update((id(p), p) for p in trained)
        moments = 2 * sum(4 * elements(p) for p in trained) if self.args.optim.startswith("adamw_torch") else 0
        again = list(model.parameters()) if self.is_fsdp_enabled or self.is_deepspeed_enabled else []
        return sum(elements(p) * p.element_size() for p in [*kept.values(), *again]) + moments

    def _train_alone(self, resume_from_checkpoint: str | bool | None, **kwargs):
        if self.args.should_save:
            clear_run_folder(self.args.output_dir)
        resume_from_checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if resume_from_checkpoint:
            check_same_method(resume_from_checkpoint, self._name)
        self.resumed_from = resume_from_checkpoint
        with self.stop_on_signal.watched():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step's checkpoint, after which Trainer would take one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`: components, what was tuned of the backbone, processing class and settings."""
        output_dir = output_dir or self.args.output_dir
        self.record_run()
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        # All processes take part in gathering what is sharded.
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if sharded else None
        if self.args.should_save:
            self._latent_model().save_pretrained(output_dir, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            self.save_arguments(output_dir)
        if _internal_call:
            # The other processes put their own files into the checkpoint only once its folder has its place.
            self.accelerator.wait_for_everyone()
        elif self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def restore_run(self) -> None:
        """Called when Trainer has set up its counters: puts back what [`save_run`] wrote to `resumed_from`."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_components(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_components(self._latent_model(), self.state.best_model_checkpoint)

    def _where(self) -> str:
        return f"at step {self.state.global_step}"

    def _no_code(self, error: FloatingPointError) -> FloatingPointError:
        """Names the cause when codes cannot be drawn, because their probabilities are not finite."""
        return FloatingPointError(
            f"No code could be drawn {self._where()}: the policy's probabilities are not finite. "
            f"{origin(self._latent_model(), {})} {what_is_kept(self.args.output_dir)} "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        return remedy(self._latent_model(), self.args.fp16)

    def _check_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Acts on a loss that is not finite on some process, as `on_nonfinite` says."""
        trouble = loss_trouble(loss, self._latent_model(), inputs, self._where())
        if trouble is not None:
            self.health.nonfinite(trouble, self._remedy())

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if is_finite(grad_norm):
            self.health.skipped_in_a_row = 0
            return grad_norm
        what = f"The gradient became {float(grad_norm)} {self._where()}."
        # A gradient scaler meets infinite gradients as a matter of course, and skips those steps itself.
        if self.accelerator.scaler is None:
            self.health.nonfinite(what, self._remedy())
            # Without a gradient the optimizer changes neither a tensor nor its moments.
            self.model.zero_grad(set_to_none=True)
        self.health.skip_update(what, self._remedy())
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | self.run_figures() if "loss" in logs else logs, start_time)

    def run_figures(self) -> dict[str, float]:
        """What is logged of a run beside its loss: skipped updates since the last time, and skipped rows so far."""
        return self.health.figures() | self.bad_rows.figures()
