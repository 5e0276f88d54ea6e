"""What the trainers of plans share: prompts as rows, checkpoints of plans, and logged figures."""

import os
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback

from ...checkpoint.plan_files import PLAN_CONFIG
from ...data.bad_rows import BadRows
from ...data.prompts import PromptEncoder, check_prompts
from ...data.reading import OpenedRows, StoredRows
from ...generation.answers import end_tokens
from ...hub.facts import CodebookReport, Evaluation
from ...plans.model import PlanModel
from ...plans.segments import sentence_ends
from ..run.hub import HubTrainingMixin
from ..run.loading import load_processing_class
from ..run.output_folder import check_writable, clear_run_folder, earlier_run, only_run, raise_together
from .processes import check_processes, everywhere
from .report import PlanReport


class PromptRows(Dataset):
    """
    Rows of a data set, some of them, with their pictures opened and their numbers under `_row` and `_index`.

    Args:
        rows (`Dataset`): With `prompt`.
        image_root (`str`, *optional*): The only folder from which rows may name image files.
        places (`list[int]`, *optional*): Numbers of the rows in use; all by default.
    """

    def __init__(self, rows: Any, image_root: str | None, places: list[int] | None = None):
        opened = OpenedRows(rows, image_root)
        self.places = list(range(len(opened))) if places is None else places
        self.rows = opened.only(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "_index": self.places[index]}


class PlanTrainer(HubTrainingMixin, Trainer):
    """
    A Trainer whose model is a [`PlanModel`] and whose data set are prompts. Several processes (DDP) share the rows, and
    learn what one process would of all of them.

    Args:
        model (`PlanModel` or `str`), args, train_dataset, eval_dataset, processing_class, callbacks: Of the trainer.
        trained (`str`): What of the model is trained, `"plans"` or `"chooser"`.
    """

    train_dataset: Any
    control: Any
    _config_file = PLAN_CONFIG
    _evaluated = ("eval_reward", "eval_ceiling", "eval_random_plan", "eval_backbone", "eval_coverage")

    def __init__(
        self,
        model: PlanModel | str,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None,
        callbacks: list[TrainerCallback] | None,
        trained: str,
    ):
        check_writable(args)
        if isinstance(model, (str, os.PathLike)):
            model = PlanModel.from_pretrained(model)
        if not isinstance(model, PlanModel):
            raise TypeError(
                f"`model` must be a PlanModel, a folder or a Hub id, got {type(model).__name__}. Make one of a "
                "backbone with `PlanModel(backbone)`."
            )
        check_prompts(train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_prompts(eval_dataset, "eval_dataset")
        if processing_class is None:
            processing_class = load_processing_class(model)
        # A chooser that reads plans does so at the last of several tokens.
        least, most = 2 if model.plan_config.chooser_reads_plans else 1, args.max_prompt_length
        self.encoder = PromptEncoder(processing_class, args.image_root, max_length=most, min_length=least)
        self.ends = end_tokens(model.backbone, self.encoder.encoder.tokenizer, {}) or []
        sources = [StoredRows(train_dataset)]
        if eval_dataset is not None:
            sources.append(StoredRows(eval_dataset, "eval_dataset"))
        self.bad_rows = BadRows(args.on_bad_row, args.output_dir, sources)
        config = model.plan_config
        if isinstance(config.segment, int) and config.segment >= args.max_completion_length:
            raise ValueError(
                f"A plan is held for {config.segment} tokens (`segment`), and an answer has at most "
                f"`max_completion_length={args.max_completion_length}`. Take shorter segments, or `segment='answer'`."
            )
        if config.segment in ("sentence", "switch") and config.segment_end_token_ids is None:
            config.segment_end_token_ids = sentence_ends(self.encoder.encoder.tokenizer)
        # Figures of all processes, and shares of figures by the step, which are sums over processes.
        self.figures: dict[str, list[float]] = defaultdict(list)
        self.shares: dict[str, dict[int, float]] = defaultdict(dict)
        self.rows_in_use: list[int] | None = None
        # What the plans say to held-out prompts, and which of them is chosen for each, once that has been evaluated.
        self.report: PlanReport | None = None
        self.chosen_plans: list[int] | None = None
        model.requires_grad_(False)
        getattr(model, trained).requires_grad_(True)
        self._trained = (trained,)
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: {"rows": rows},
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        check_processes(self)

    def no_loss(self) -> torch.Tensor:
        """The loss of a process that has no row of an update."""
        return (
            torch.stack([parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad]).sum() * 0
        )

    def usable_places(self, dataset: Any, name: str) -> list[int]:
        """Numbers of the rows of a set that can be used; all, unless bad ones are skipped."""
        # One process lists bad rows, and the others find them listed.
        with self.accelerator.main_process_first():
            return self.bad_rows.usable_places(StoredRows(dataset, name), self.encoder)

    def evaluated_rows(self, dataset: Any) -> list[dict[str, Any]]:
        """Rows of an evaluation set that can be used, with their pictures opened."""
        check_prompts(dataset, "eval_dataset")
        opened = OpenedRows(dataset, self.args.image_root, "eval_dataset")
        opened = opened.only(self.usable_places(dataset, "eval_dataset"))
        return [opened[i] for i in range(len(opened))]

    def before_training(self) -> None:
        """Called before the first step: what a trainer needs to know of its prompts."""

    def after_training(self) -> None:
        """Called when the best model has been loaded."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        As `Trainer.train`; `True` goes on from the newest checkpoint that is whole.

        Raises:
            ValueError: When `output_dir` is in use by another run, holds checkpoints of an earlier one that is not to
                be resumed, or none to resume.
            RowError: For a row that cannot be used, as `on_bad_row` says.
            CheckpointWriteError: When a checkpoint could not be written. The one before it is whole.
        """
        folder = self.args.output_dir
        self.bad_rows.preflight(self.encoder, seed=self.args.seed)
        with only_run(self.accelerator, folder):
            if self.args.should_save:
                clear_run_folder(folder)
            raise_together(None if resume_from_checkpoint else earlier_run(folder))
            last = self.checkpoint_to_resume(resume_from_checkpoint)
            self.before_training()
            output = super().train(resume_from_checkpoint=last, **kwargs)
            self.after_training()
        return output

    def get_train_dataloader(self):
        whole = self.train_dataset
        self.train_dataset = PromptRows(whole, self.args.image_root, self.rows_in_use)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = whole

    def finish_evaluation(self, figures: dict[str, float], prefix: str) -> dict[str, float]:
        """Logs the figures of an evaluation and tells the callbacks of them."""
        metrics = {f"{prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self.figures.items()}
            logs |= self._shared_figures() | self.bad_rows.figures()
            self.figures.clear()
        super().log(logs, start_time)

    def _shared_figures(self) -> dict[str, float]:
        """Means over steps of what the processes had shares of."""
        totals: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for own in everywhere(dict(self.shares)):
            for name, steps in own.items():
                for step, value in steps.items():
                    totals[name][step] += value
        self.shares.clear()
        return {name: sum(steps.values()) / len(steps) for name, steps in sorted(totals.items())}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`: plans, chooser, processing class and settings."""
        folder = output_dir or self.args.output_dir
        self.record_run()
        if self.args.should_save:
            self.model.save_pretrained(folder)
            self.encoder.processing_class.save_pretrained(folder)
            self.save_arguments(folder)
        if _internal_call:
            # The other processes put their own files into the checkpoint only once its folder has its place.
            self.accelerator.wait_for_everyone()
        elif self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def record_run(self, evaluation: list[Evaluation] | None = None, codebook: CodebookReport | None = None) -> None:
        """As other trainers, with what each plan says."""
        super().record_run(evaluation, codebook)
        if self.report is not None:
            said = {**self.model.training_report, "plans": asdict(self.report.summary(self.chosen_plans))}
            self.model.training_report = said

    def _trained_parts(self, model: Any) -> list[str]:
        return []

    def _keep_data(self, model: Any) -> None:
        """The data are told in the report alone."""

    def _rollout_usage(self, model: Any) -> None:
        """Of plans, the report says what each says."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_folder(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_folder(self.state.best_model_checkpoint)
