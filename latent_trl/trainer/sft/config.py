"""Configuration of [`LatentActionSFTTrainer`]."""

from dataclasses import dataclass

from transformers import TrainingArguments

from ...data.bad_rows import ON_BAD_ROW
from ..run.defaults import settle_arguments
from ..run.health import ON_NONFINITE, check_choice

GUIDANCE = ("inferred", "policy")


@dataclass
class LatentActionSFTConfig(TrainingArguments):
    r"""
    Configuration of [`LatentActionSFTTrainer`]. Inherits all of transformers' `TrainingArguments`; the defaults of
    rate, schedule and epochs are the paper's.

    Args:
        guidance (`str`, defaults to `"inferred"`):
            Whose most likely codes are followed: those that the inverse dynamics model infers from the next token, so
            that each code goes on saying what it said; or, as in the paper, those of the `"policy"`.
        trained_layers (`list[str]`, *optional*):
            Beginnings of names of the backbone's tensors to train in place of an adapter, such as
            `["model.language_model.layers.35", "model.language_model.norm"]`.
        assistant_only_loss (`bool`, defaults to `True`):
            Learn from assistant tokens only.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest row in tokens; longer conversations lose whole turns from their end.
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

    guidance: str = "inferred"
    trained_layers: list[str] | None = None
    assistant_only_loss: bool = True
    max_length: int | None = 2048
    image_root: str | None = None
    on_bad_row: str = "raise"
    on_nonfinite: str = "stop"
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 16
    logging_steps: float = 10
    remove_unused_columns: bool | None = False
    report_to: None | str | list[str] = "none"

    def __post_init__(self):
        settle_arguments(self)
        super().__post_init__()
        check_choice("guidance", self.guidance, GUIDANCE)
        check_choice("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
