"""Configuration of [`LatentActionSpaceTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ...data.bad_rows import ON_BAD_ROW
from ..run.defaults import settle_arguments
from ..run.health import ON_COLLAPSE, ON_NONFINITE, check_choice
from .evaluation import HIGHER_IS_BETTER
from .objective import CLONING_TARGETS
from .stages import STAGE_COMPONENTS


@dataclass
class LatentActionSpaceConfig(TrainingArguments):
    r"""
    Configuration of [`LatentActionSpaceTrainer`]. Inherits all of transformers' `TrainingArguments`; learning rate,
    schedule, warm-up and number of steps are set for each stage here instead.

    Args:
        stages (`list[str]`, defaults to all four):
            Stages to run, in this order: `inverse_dynamics`, `projector`, `joint`, `policy`. Leave `projector` out for
            a model without one, and those that a loaded model has been through.
        inverse_dynamics_learning_rate, joint_learning_rate, policy_learning_rate (`float`, *optional*):
            By default the paper's 1e-4 where the stage's decoder is 2048 wide or wider, and larger for a narrower one:
            at 192, 3.5e-3 for the first stage and 1.1e-3 for the others.
        projector_learning_rate (`float`, defaults to `1e-3`):
            The paper's.
        inverse_dynamics_max_steps (`int`, defaults to `-1`), projector_max_steps, joint_max_steps, policy_max_steps:
            Optimizer steps of a stage; -1 for `num_train_epochs` epochs. Set them where a held-out figure is flat
            before an epoch ends.
        entropy_coef (`float`, defaults to `1e-3`):
            Weight of the term that raises the entropy of each position's code distribution, the paper's. Raise it when
            `codebook/conditional_entropy` is near 0 from the start.
        balance_coef (`float`, defaults to `0.1`):
            Weight of the term that evens out how often codes are used, over the positions of the whole update; neither
            source has one, and without it 9 to 19 of 128 codes are used. Raise it when `codebook/perplexity` stays
            low. 0 turns it off.
        coverage_coef (`float`, defaults to `0.0`):
            Weight of the coverage loss: the mean cross-entropy of the backbone's likely next tokens, each under a code
            of its own, so that codes reach also what the data hardly say. 0 turns it off; 0.2 is what worked where RL
            must find rare words. All codes are read at two positions of each row.
        cycle_coef (`float`, defaults to `1e-5`):
            Weight of the cycle loss in the joint stage, the paper's. 0 leaves it out, for an ablation.
        cloning_target (`str`, defaults to `"backbone"`):
            What the stage `policy` imitates: the `"backbone"`'s own next-token distribution, so that sampling codes
            starts as calibrated as sampling tokens (the probability of a token that some code says is on the code that
            says it the most surely, and that of all others spread so that the mixture over codes comes close to it);
            or, as in the paper, the arg-max codes `"inferred"` by the inverse dynamics model from the data. Take the
            latter where time is short: the former reads all codes at four positions of each row.
        assistant_only_loss (`bool`, defaults to `True`):
            Learn from assistant tokens; `False` is the paper's loss over whole sequences.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest row in tokens; longer conversations lose whole turns from their end. Lower it to save memory.
        image_root (`str`, *optional*):
            The only folder from which rows may name image files. Set it when the rows hold paths.
        on_bad_row (`str`, defaults to `"raise"`):
            What follows a row that cannot be used: `"raise"` its error, or `"skip"` it: the next row that can be used
            takes its place, and it is listed in `bad_rows.jsonl` in `output_dir`. Some rows are looked at before the
            first step either way.
        on_nonfinite (`str`, defaults to `"stop"`):
            What follows a loss or gradient that is NaN or infinite: `"stop"` with an error before the update, or
            `"skip"` the update, log `skipped_updates`, and stop after 20 in a row. Skip where half precision overflows
            now and then.
        on_collapse (`str`, defaults to `"warn"`):
            What follows when codes are blind or few: `"warn"` once for each, `"stop"` with an error, or `"ignore"`.
            Stop in a sweep.
    """

    stages: list[str] = field(default_factory=lambda: list(STAGE_COMPONENTS))
    inverse_dynamics_learning_rate: float | None = None
    projector_learning_rate: float = 1e-3
    joint_learning_rate: float | None = None
    policy_learning_rate: float | None = None
    inverse_dynamics_max_steps: int = -1
    projector_max_steps: int = -1
    joint_max_steps: int = -1
    policy_max_steps: int = -1
    entropy_coef: float = 1e-3
    balance_coef: float = 0.1
    coverage_coef: float = 0.0
    cycle_coef: float = 1e-5
    cloning_target: str = "backbone"
    assistant_only_loss: bool = True
    max_length: int | None = 2048
    image_root: str | None = None
    on_bad_row: str = "raise"
    on_nonfinite: str = "stop"
    on_collapse: str = "warn"
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 16
    logging_steps: float = 10
    remove_unused_columns: bool | None = False
    report_to: None | str | list[str] = "none"

    def __post_init__(self):
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # transformers takes every metric for a score whose name does not end in "loss".
            self.greater_is_better = self.metric_for_best_model.endswith(HIGHER_IS_BETTER)
        settle_arguments(self)
        super().__post_init__()
        check_choice("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_choice("on_collapse", self.on_collapse, ON_COLLAPSE)
        check_choice("cloning_target", self.cloning_target, CLONING_TARGETS)
        unknown = [stage for stage in self.stages if stage not in STAGE_COMPONENTS]
        if unknown or not self.stages:
            raise ValueError(f"`stages` must be among {list(STAGE_COMPONENTS)}, got {self.stages}.")
        order = [list(STAGE_COMPONENTS).index(stage) for stage in self.stages]
        if order != sorted(set(order)):
            raise ValueError(f"`stages` must be in the order {list(STAGE_COMPONENTS)}, each once, got {self.stages}.")
