"""What rollouts add to TRL's metrics and to its table of completions."""

from typing import Any

import torch
from accelerate.utils import gather, gather_object

from ..run.completions_table import prompt_text
from .metrics import EvaluationMeans, Figure, length_figures, reward_figures, usage_figures
from .prompts import reward_prompts
from .rollout import Sample

# Losses that TRL divides by the codes of all processes.
OVER_ALL_CODES = ("dapo", "cispo", "vespo")


class RolloutLog:
    """
    Writes into the lists that TRL's `log` averages and prints.

    Args:
        metrics (`dict`): `GRPOTrainer._metrics`: for `"train"` and `"eval"` a list of values by name.
        tables (`dict`): `GRPOTrainer._logs`, the columns of the table of completions.
        with_images (`bool`): Whether the table has the prompts' pictures.
    """

    def __init__(self, metrics: dict[str, Any], tables: dict[str, Any], with_images: bool):
        self.metrics = metrics
        self.tables = tables
        self.with_images = with_images
        self.evaluation = EvaluationMeans(metrics["eval"])
        self.rows_left: int | None = None
        # Of this process, in the last batch of an evaluation.
        self.counted_rows = 0

    def figures(self, training: bool, figures: dict[str, Figure]) -> None:
        """Adds figures of one rollout; those of evaluation count by what they are means over."""
        for name, (value, count) in figures.items():
            if training:
                self.metrics["train"][name].append(value)
            else:
                self.evaluation.add(name, value, count)

    def rollout(
        self,
        trainer: Any,
        samples: list[Sample],
        ended: torch.Tensor,
        rewards: torch.Tensor,
        total: torch.Tensor,
        advantages: torch.Tensor,
    ) -> None:
        """
        Adds one scored rollout.

        Args:
            trainer (`GRPOTrainer`): Whose rollout it is.
            samples (`list[Sample]`): Of this process.
            ended (`torch.Tensor`): Boolean, which of them ended by themselves.
            rewards (`torch.Tensor`): `[N, functions]` over all processes.
            total (`torch.Tensor`), advantages (`torch.Tensor`): `[N]` over all processes.
        """
        training, device = trainer.model.training, trainer.accelerator.device
        size = trainer.num_generations if training else trainer.num_generations_eval
        names, num_codes = trainer.reward_func_names, trainer.accelerator.unwrap_model(trainer.model).config.num_codes
        lengths = torch.tensor([len(sample.completion_ids) for sample in samples], device=device)
        lengths, ended, counted = gather(lengths), gather(ended), rewards
        if not training and self.rows_left is not None:
            # Processes fill up the last batch with rows from the front, which have been counted.
            kept, self.rows_left = self.rows_left, max(self.rows_left - len(total), 0)
            lengths, ended, counted, total = (values[:kept] for values in (lengths, ended, rewards, total))
        own = {name: (value, len(total)) for name, value in trainer.rewards.logged_metrics().items()}
        of_rows = samples if training else samples[: self.counted_rows]
        codes = torch.cat([torch.empty(0, dtype=torch.long), *(sample.action_ids.cpu() for sample in of_rows)]).to(
            device
        )
        usage = trainer.accelerator.reduce(torch.bincount(codes, minlength=num_codes).float(), "sum")
        self.figures(training, length_figures(lengths, ended))
        self.figures(training, reward_figures(counted, names, total, size))
        self.figures(training, usage_figures(usage) | own)
        self.metrics["train" if training else "eval"]["num_tokens"] = [trainer.state.num_input_tokens_seen]
        self.table(samples, names, rewards, advantages)

    def counted(self, process: int, rows: int) -> int:
        """How many of the `rows` of a process, the first, count: those that fill up the last batch do not."""
        self.counted_rows = rows if self.rows_left is None else min(max(self.rows_left - process * rows, 0), rows)
        return self.counted_rows

    def evaluated(self, trainer: Any, loss: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Adds the loss of a batch of an evaluation, and the figures that TRL has appended for it.

        Args:
            trainer (`GRPOTrainer`): Whose evaluation it is.
            loss (`torch.Tensor`): Of this process: a mean over completions, or a share of one over codes.
            mask (`torch.Tensor`): `[B, C]`, the codes that count.
        """
        rows = mask.any(dim=1).sum()
        # Rows that do not count are in the mean over completions, with nothing.
        of_counted = loss.detach() * len(mask) / max(self.counted_rows, 1)
        parts = torch.stack([loss.detach(), of_counted * rows, loss.detach() * mask.sum(), rows, mask.sum()])
        total, of_rows, of_codes, rows, codes = trainer.accelerator.reduce(parts, "sum").tolist()
        if trainer.loss_type == "bnpo":
            value, count = of_codes / max(codes, 1.0), codes
        elif trainer.loss_type in OVER_ALL_CODES:
            value, count = total / trainer.accelerator.num_processes, codes
        else:
            value, count = of_rows / max(rows, 1.0), rows
        self.evaluation.take_appended(codes)
        self.evaluation.add("loss", value, count)

    def start_evaluation(self, rows: int | None) -> None:
        """Forgets the rows of the evaluation before; `rows` of it are to come, if their number is known."""
        self.rows_left = rows
        self.metrics["eval"].clear()
        self.evaluation = EvaluationMeans(self.metrics["eval"])

    def end_evaluation(self, prefix: str) -> dict[str, float]:
        """
        Puts the name of the data set before the figures of an evaluation of several, each of which has a `prefix` of
        its own.

        Returns:
            The loss by its name, where there is one.
        """
        figures = self.metrics["eval"]
        loss = figures.pop("loss", None)
        if prefix.startswith("eval_"):
            for name in list(figures):
                figures[f"{prefix.removeprefix('eval_')}_{name}"] = figures.pop(name)
        return {} if loss is None else {f"{prefix}_loss": loss[0]}

    def table(self, samples: list[Sample], names: list[str], rewards: torch.Tensor, advantages: torch.Tensor) -> None:
        """
        Adds the completions of all processes.

        Args:
            samples (`list[Sample]`): Of this process.
            names (`list[str]`): Of the reward functions.
            rewards (`torch.Tensor`): `[N, functions]` over all processes.
            advantages (`torch.Tensor`): `[N]` over all processes.
        """
        rows = [sample.row for sample in samples]
        # One form whether or not a row has pictures, which every tracker takes.
        self.tables["prompt"].extend(gather_object([prompt_text(prompt) for prompt in reward_prompts(rows)]))
        self.tables["completion"].extend(gather_object([sample.completion for sample in samples]))
        for name, column in zip(names, rewards.unbind(dim=1), strict=True):
            self.tables["rewards"][name].extend(column.tolist())
        self.tables["advantages"].extend(advantages.tolist())
        columns = {
            "action_ids": [sample.action_ids.tolist() for sample in samples],
            "completion_ids": [sample.completion_ids for sample in samples],
        }
        for column in sorted(set(gather_object([column for sample in samples for column in sample.extra]))):
            columns[column] = [sample.extra.get(column) for sample in samples]
        for column, values in columns.items():
            self.tables["extra"][column].extend(gather_object(values))
        if self.with_images and any(gather_object([bool(row.get("images") or row.get("image")) for row in rows])):
            self.tables["images"].extend(gather_object([_images(row) for row in rows]))


def _images(row: dict[str, Any]) -> list[Any]:
    return list(row["images"] or []) if row.get("images") is not None else [row["image"]] if row.get("image") else []
