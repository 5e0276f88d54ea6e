"""What all configurations of plans share."""

from dataclasses import dataclass

from transformers import TrainingArguments

from ...data.bad_rows import ON_BAD_ROW
from ...rewards.time_limit import check_timeout
from ..run.defaults import settle_arguments
from ..run.health import check_choice


@dataclass
class PlanTrainingConfig(TrainingArguments):
    """
    Prompts, answers and rewards of a trainer of plans. Inherits all of transformers' `TrainingArguments`.

    Args:
        max_completion_length (`int`, defaults to `32`):
            Longest answer in tokens. Longer ones are not learned.
        max_prompt_length (`int`, *optional*):
            Most tokens of a prompt, visual ones included; a longer one is an error.
        image_root (`str`, *optional*):
            The only folder from which rows may name image files.
        on_bad_row (`str`, defaults to `"raise"`):
            What becomes of a row that cannot be used: `"raise"` ends the run, `"skip"` leaves it out, and it is listed
            in `bad_rows.jsonl` in `output_dir`. Some rows are looked at before the first step either way.
        reward_timeout (`float`, *optional*):
            Seconds that a reward function may take for a batch, after which the run ends with its name; the last
            checkpoint is whole. An async function is cancelled; a plain one runs in a thread, which is left behind.
    """

    max_completion_length: int = 32
    max_prompt_length: int | None = None
    image_root: str | None = None
    on_bad_row: str = "raise"
    reward_timeout: float | None = None
    lr_scheduler_type: str = "constant"
    remove_unused_columns: bool | None = False
    # An update reaches all that is trained.
    ddp_find_unused_parameters: bool | None = False
    report_to: None | str | list[str] = "none"

    def __post_init__(self):
        settle_arguments(self)
        super().__post_init__()
        check_timeout("reward_timeout", self.reward_timeout)
        check_choice("on_bad_row", self.on_bad_row, ON_BAD_ROW)
