"""What the trainers of plans share: prompts as rows, checkpoints of plans, and logged figures."""

import os
from collections import defaultdict
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback

from ...data.bad_rows import BadRows
from ...data.prompts import PromptEncoder
from ...data.reading import OpenedRows, StoredRows
from ...generation.answers import end_tokens
from ...plans.model import PlanModel
from ...plans.segments import sentence_ends
from ..run.loading import load_processing_class
from ..run.output_folder import check_writable, clear_run_folder, earlier_run, only_run, raise_together
from ..run.whole_checkpoints import WholeCheckpointMixin
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


class PlanTrainer(WholeCheckpointMixin, Trainer):
    """
    A Trainer whose model is a [`PlanModel`] and whose data set are prompts. One process.

    Args:
        model (`PlanModel` or `str`), args, train_dataset, eval_dataset, processing_class, callbacks: Of the trainer.
        trained (`str`): What of the model is trained, `"plans"` or `"chooser"`.
    """

    train_dataset: Any
    control: Any

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
        if args.push_to_hub:
            raise ValueError(
                "`push_to_hub` is not for plans. Call `trainer.save_model(folder)`, and upload that folder: `hf upload "
                "user/name folder`."
            )
        if args.world_size > 1:
            raise ValueError(f"Plans are trained in one process, and this run has {args.world_size}.")
        check_prompts(train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_prompts(eval_dataset, "eval_dataset")
        if processing_class is None:
            processing_class = load_processing_class(model)
        self.encoder = PromptEncoder(processing_class, args.image_root, max_length=args.max_prompt_length)
        self.ends = end_tokens(model.backbone, self.encoder.encoder.tokenizer, {}) or []
        config = model.plan_config
        if isinstance(config.segment, int) and config.segment >= args.max_completion_length:
            raise ValueError(
                f"A plan is held for {config.segment} tokens (`segment`), and an answer has at most "
                f"`max_completion_length={args.max_completion_length}`. Take shorter segments, or `segment='answer'`."
            )
        if config.segment == "sentence" and config.segment_end_token_ids is None:
            config.segment_end_token_ids = sentence_ends(self.encoder.encoder.tokenizer)
        sources = [StoredRows(train_dataset)]
        if eval_dataset is not None:
            sources.append(StoredRows(eval_dataset, "eval_dataset"))
        self.bad_rows = BadRows(args.on_bad_row, args.output_dir, sources)
        self.figures: dict[str, list[float]] = defaultdict(list)
        self.rows_in_use: list[int] | None = None
        # What the plans say to held-out prompts, and which of them is chosen for each, once that has been evaluated.
        self.report: PlanReport | None = None
        self.chosen_plans: list[int] | None = None
        model.requires_grad_(False)
        getattr(model, trained).requires_grad_(True)
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: {"rows": rows},
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )

    def usable_places(self, dataset: Any, name: str) -> list[int]:
        """Numbers of the rows of a set that can be used; all, unless bad ones are skipped."""
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
            logs |= self.bad_rows.figures()
            self.figures.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`: plans, chooser, processing class and settings."""
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder)
        self.encoder.processing_class.save_pretrained(folder)
        self.save_arguments(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_folder(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_folder(self.state.best_model_checkpoint)


def check_prompts(dataset: Any, name: str) -> None:
    """Raises `ValueError` unless `dataset` has rows with `prompt`."""
    if dataset is None:
        raise ValueError(f"`{name}` must be given.")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"`{name}` is a {type(dataset).__name__}, which has no length. Give a `datasets.Dataset`.")
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    if "prompt" not in columns:
        raise ValueError(f"`{name}` has the columns {sorted(columns)}; it needs `prompt`.")
