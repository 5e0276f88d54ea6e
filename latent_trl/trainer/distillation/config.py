"""Configuration of [`LatentActionDistillationTrainer`]."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ...data.bad_rows import ON_BAD_ROW
from ...generation.action_law import ActionLaw
from ..run.defaults import settle_arguments
from ..run.health import ON_NONFINITE, check_choice

TEACHERS = ("spoken", "mixture")


@dataclass
class LatentActionDistillationConfig(TrainingArguments):
    r"""
    Configuration of [`LatentActionDistillationTrainer`]. Inherits all of transformers' `TrainingArguments`.

    Args:
        teacher (`str`, defaults to `"spoken"`):
            The law over tokens that is taught: `"spoken"`, in which a code puts all on its likeliest token, as
            `generate` does; or `"mixture"`, \\( \sum_a \pi(a \mid s) \, p(x \mid s, a) \\).
        action_temperature, action_top_k, action_top_p (`float`, `int`, `float`, default to `1.0`, `0`, `1.0`):
            The law of the codes, in the samples and in what is taught.
        max_completion_length (`int`, defaults to `256`):
            Longest sample, in tokens.
        merge_adapter (`bool`, defaults to `False`):
            Save the backbone with the adapter merged into it, and not the adapter alone.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the chat template.
        image_root (`str`, *optional*):
            The only folder from which rows may name image files.
        on_bad_row (`str`, defaults to `"raise"`):
            What follows a row that cannot be used: `"raise"` its error, or `"skip"` it: the next row that can be used
            takes its place, and it is listed in `bad_rows.jsonl` in `output_dir`. Some rows are looked at before the
            first step either way.
        on_nonfinite (`str`, defaults to `"stop"`):
            What follows a loss or gradient that is NaN or infinite: `"stop"` with an error before the update, or
            `"skip"` the update, log `skipped_updates`, and stop after 20 in a row.
    """

    teacher: str = "spoken"
    action_temperature: float = 1.0
    action_top_k: int = 0
    action_top_p: float = 1.0
    max_completion_length: int = 256
    merge_adapter: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    image_root: str | None = None
    on_bad_row: str = "raise"
    on_nonfinite: str = "stop"
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 16
    logging_steps: float = 10
    remove_unused_columns: bool | None = False
    report_to: None | str | list[str] = "none"

    def __post_init__(self):
        settle_arguments(self)
        super().__post_init__()
        check_choice("teacher", self.teacher, TEACHERS)
        check_choice("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        if self.max_completion_length < 1:
            raise ValueError(f"`max_completion_length` must be at least 1, got {self.max_completion_length}.")
        # Its fields are checked there.
        self.action_law()

    def action_law(self) -> ActionLaw:
        """The law that codes are drawn from."""
        return ActionLaw(self.action_temperature, self.action_top_k, self.action_top_p)
