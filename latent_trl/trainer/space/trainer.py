"""Learning the latent action space: inverse dynamics, projector, both together, and the policy by cloning."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, IntervalStrategy
from transformers.utils import logging

from ...checkpoint.configuration import STAGES
from ...data.mixing import MixedRows, MixedRowsCollator
from ...models.latent_action_model import LatentActionModel
from ..run.component_training import load_components, train_only
from ..run.defaults import settle_rate
from ..run.learning import LearningMixin, bad_rows_of, conversation_collator, evaluation_rows, position_means
from ..run.loading import check_columns, load_model, load_processing_class, own_config
from ..run.manifest import newest_whole_checkpoint, write_json
from ..run.output_folder import check_writable, earlier_run, only_run, raise_together, written_whole
from .config import LatentActionSpaceConfig
from .evaluation import HeldOutFigures, check_best_metric
from .objective import LatentActionSpaceObjective
from .stages import SCHEDULES, check_stages, stage_components
from .update import WholeUpdate

logger = logging.get_logger(__name__)

# The paper's rate, and how it grows for narrower decoders; measured at 192, and right at 256.
LARGE_RATE = 1e-4
RATE_EXPONENTS = {"inverse_dynamics": 1.5, "joint": 1.0, "policy": 1.0}
DONE_FILE = "stages.json"
HISTORY_FILE = "history.json"
# Alarms: nats between random and inferred codes, below which codes are blind; perplexity of the usage of codes, below
# which they are few.
MIN_RANDOM_GAP = 0.05
MIN_PERPLEXITY = 2.0


class LatentActionSpaceTrainer(LearningMixin, Trainer):
    """
    Learns a latent action space on a frozen backbone, stage by stage.

    Args:
        model (`LatentActionModel` or `str`): The model, a folder or a Hub id.
        args (`LatentActionSpaceConfig`, *optional*): Stages, rates, weights.
        train_dataset (`Dataset`): Conversations with images (or without, for a text model): `messages`, or `prompt`
            and `completion`; `images`.
        text_dataset (`Dataset`, *optional*): Conversations without images, for the joint stage and cloning.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): Conversations that are held out, with images or
            without; or several sets under their names. Each stage is evaluated at its end, and as `eval_strategy` says.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*): Loaded with the backbone's name
            by default.
        callbacks (`list[TrainerCallback]`, *optional*): As in `Trainer`.

    Raises:
        ValueError: When the data lack the columns, a stage is run before the one that it needs, or
            `metric_for_best_model` is not measured in each stage.
    """

    _tag_names = ["latent-trl", "latent-action-space"]
    _name = "Learning of the latent action space"

    def __init__(
        self,
        model: LatentActionModel | str,
        args: LatentActionSpaceConfig | None = None,
        train_dataset: Any = None,
        text_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = own_config(args, LatentActionSpaceConfig, "latent-action-space")
        check_writable(args)
        model = load_model(model)
        if processing_class is None:
            processing_class = load_processing_class(model)
        check_columns(train_dataset, "train_dataset")
        if text_dataset is not None:
            check_columns(text_dataset, "text_dataset")
        self.text_dataset = text_dataset
        self.paired_dataset = train_dataset
        self.stage: str | None = None
        self.objective: LatentActionSpaceObjective | None = None
        self.history: list[dict[str, Any]] = []
        self.root = args.output_dir
        check_stages(model, args.stages)
        eval_dataset = evaluation_rows(eval_dataset)
        sets = tuple(eval_dataset) if isinstance(eval_dataset, dict) else ("",)
        check_best_metric(args.metric_for_best_model, args.stages, sets)
        self.collate = conversation_collator(args, model, processing_class)
        train_only(model, stage_components(model, args.stages[0]))
        super().__init__(
            model=model,
            args=args,
            data_collator=MixedRowsCollator(
                self.collate, bad_rows_of(args, MixedRows(train_dataset, text_dataset), eval_dataset)
            ),
            train_dataset=MixedRows(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> list[Any]:
        """
        Runs the stages in order. Each has a folder of its own in `output_dir`, with its checkpoints, and leaves the
        model there when it is done.

        Args:
            resume_from_checkpoint (`bool`, *optional*): Skip the stages that are done, and go on from the newest whole
                checkpoint of the one that is not.

        Returns:
            Trainer's `TrainOutput` of each stage that was run.

        Raises:
            ValueError: When `output_dir` is in use by another run, has no room for a checkpoint, or, without
                `resume_from_checkpoint`, holds checkpoints of an earlier run.
            FloatingPointError: When the loss or a gradient is not finite (`on_nonfinite`).
            CollapseError: With `on_collapse="stop"`.
        """
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            raise ValueError(
                f"`resume_from_checkpoint` must be a bool, got {str(resume_from_checkpoint)!r}: the place in the chain "
                "of stages is found in `output_dir`."
            )
        self.data_collator.preflight(self.args.seed)
        with only_run(self.accelerator, self.root):
            return self._train_stages(bool(resume_from_checkpoint), **kwargs)

    def _train_stages(self, resume: bool, **kwargs) -> list[Any]:
        if not resume:
            self._start_anew()
        done = self._done()
        outputs = []
        try:
            for stage in self.args.stages:
                if stage in done:
                    load_components(self.model, self._folder(stage))
                    self.history = json.loads((self._folder(stage) / HISTORY_FILE).read_text(encoding="utf-8"))
                    continue
                self._begin(stage)
                last = newest_whole_checkpoint(self.args.output_dir) if resume else None
                outputs.append(super().train(resume_from_checkpoint=last, **kwargs))
                self._evaluate_at_the_end()
                self._end(stage)
        finally:
            self.args.output_dir = self.root
        return outputs

    def _start_anew(self) -> None:
        for stage in self.args.stages:
            raise_together(earlier_run(self._folder(stage)))
        if self.args.should_save:
            (Path(self.root) / DONE_FILE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def _folder(self, stage: str) -> Path:
        return Path(self.root) / f"{STAGES.index(stage)}-{stage}"

    def _done(self) -> list[str]:
        path = Path(self.root) / DONE_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def _begin(self, stage: str) -> None:
        """Puts the stage's tensors, data, rate and schedule in the place of the last one's."""
        args = self.args
        self.stage = stage
        logger.warning(f"Stage {stage}. {train_only(self.model, stage_components(self.model, stage))}")
        args.output_dir = self.health.output_dir = str(self._folder(stage))
        if stage in RATE_EXPONENTS:
            part = self.model.policy if stage == "policy" else self.model.inverse_dynamics
            width = part.decoder_stack.hidden_size
            settle_rate(args, f"{stage}_learning_rate", LARGE_RATE, width, RATE_EXPONENTS[stage])
        args.learning_rate = getattr(args, f"{stage}_learning_rate")
        args.max_steps = getattr(args, f"{stage}_max_steps")
        args.lr_scheduler_type, args.lr_scheduler_kwargs, warmup = SCHEDULES[stage]
        args.warmup_steps = warmup
        with_text = self.text_dataset is not None and stage in ("joint", "policy")
        self.train_dataset = MixedRows(self.paired_dataset, self.text_dataset if with_text else None)
        # Each stage starts from a seed of its own, so that it does not matter whether those before it ran just now.
        seed = args.seed + STAGES.index(stage)
        set_seed(seed)
        self.objective = LatentActionSpaceObjective(
            stage,
            entropy_coef=args.entropy_coef,
            balance_coef=args.balance_coef,
            coverage_coef=args.coverage_coef,
            cycle_coef=args.cycle_coef,
            cloning_target=args.cloning_target,
            seed=seed,
            kinds=2 if with_text else 1,
            processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            average=lambda tensor: self.accelerator.reduce(tensor, "mean"),
        )
        self.optimizer = self.lr_scheduler = None
        self._created_lr_scheduler = False
        self.accelerator.free_memory()
        self.model_wrapped = self.model

    def _evaluate_at_the_end(self) -> None:
        """Evaluates what the stage ends with, unless its last step has been."""
        own = [row for row in self.history if row["stage"] == self.stage and row["step"] == self.state.global_step]
        done = any(name.startswith("eval_") for row in own for name in row) and not self.args.load_best_model_at_end
        if self.eval_dataset is not None and not done:
            self.evaluate()

    def _end(self, stage: str) -> None:
        reached = self.model.config.stage
        if STAGES.index(stage) > STAGES.index(reached) and (stage != "projector" or reached != "none"):
            self.model.config.stage = stage
        with written_whole(self.args.output_dir, self.args.output_dir):
            self.save_model(self.args.output_dir)
            if self.args.should_save:
                write_json(self._folder(stage) / HISTORY_FILE, self.history)
                write_json(Path(self.root) / DONE_FILE, [*[s for s in self._done() if s != stage], stage])
        self.accelerator.wait_for_everyone()

    def whole_update(self, batches: list[dict[str, Any]]) -> WholeUpdate:
        return self.objective.whole_update(batches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        update, objective = num_items_in_batch, self.objective
        objective.step = self.state.global_step
        objective.measure_gaps = self._logs_next_step()
        if update is not None and update.done == 0 and objective.looks_ahead(update):
            # A pass of its own, so that wrappers (DDP, FSDP, autocast) see it as one.
            with torch.no_grad():
                model(objective=functools.partial(objective.look_ahead, update=update), batch=update.batches)
        loss = model(objective=functools.partial(objective, update=update), batch=inputs).loss
        self._check_loss(loss, inputs)
        return (loss, None) if return_outputs else loss

    def _held_out(self) -> HeldOutFigures:
        # Before any stage is run, the figures are those that the last one will end with.
        args, stage = self.args, self.stage or self.args.stages[-1]
        return HeldOutFigures(stage, args.cloning_target, args.seed, self.accelerator.num_processes)

    def held_out_sums(self, model: LatentActionModel, batch: dict[str, Any]) -> torch.Tensor:
        return self._held_out()(model, batch)

    def held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        names = self._held_out().names
        means = position_means(prediction, names)
        return means | ({"loss": means[names[0]]} if names[0] in means else {})

    def _logs_next_step(self) -> bool:
        args, step = self.args, self.state.global_step + 1
        if args.logging_strategy != IntervalStrategy.STEPS:
            return True
        return step % self.state.logging_steps == 0 or (args.logging_first_step and step == 1)

    def _where(self) -> str:
        return f"in stage {self.stage!r} at step {self.state.global_step}"

    def run_state(self) -> dict[str, Any]:
        own = {"history": self.history, "figures": self.objective.figures.state()}
        return {**super().run_state(), **own}

    def load_run_state(self, state: dict[str, Any]) -> None:
        super().load_run_state(state)
        self.history = state["history"]
        self.objective.figures.load_state(state["figures"], self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.objective is not None and "loss" in logs:
            figures = self.objective.figures.drain()
            if self.stage == "projector" and "projector/nll" not in figures:
                raise ValueError(
                    f"Stage 'projector' compares states with and without the image, and no row up to step "
                    f"{self.state.global_step} has an image. Give paired data, or leave the stage out of `stages`."
                )
            logs.update(figures | self.run_figures())
            self._watch(logs)
        if self.stage is not None:
            self.history.append({"stage": self.stage, "step": self.state.global_step, **logs})
        super().log(logs, start_time)

    def _watch(self, logs: dict[str, float]) -> None:
        """Names the two known failures of such a codebook while there is time to act."""
        late = self.state.global_step >= max(20, 0.5 * self.state.max_steps)
        gap, perplexity = logs.get("world_model/ce_gap_random_action"), logs.get("codebook/perplexity")
        if not late or gap is None:
            return
        if gap < MIN_RANDOM_GAP:
            self.health.collapse(
                "code-blindness",
                f"random codes do as well as inferred ones (gap {gap:.3f} nats), though {logs['codebook/used']:.0f} "
                "codes are used. Raise `codebook_std` to the scale of the states, or the learning rate",
                self.state.global_step,
            )
        if perplexity < MIN_PERPLEXITY:
            self.health.collapse(
                "collapse",
                f"the usage of codes has perplexity {perplexity:.1f}. Raise `balance_coef` or `gumbel_temperature`",
                self.state.global_step,
            )
