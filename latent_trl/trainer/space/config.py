"""Configuration of [`LatentActionSpaceTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..run.health import ON_COLLAPSE, ON_NONFINITE, check_choice
from .objective import CLONING_TARGETS, STAGE_COMPONENTS


@dataclass
class LatentActionSpaceConfig(TrainingArguments):
    r"""
    Configuration of [`LatentActionSpaceTrainer`]. Inherits all of transformers' `TrainingArguments`; learning rate,
    schedule, warm-up and number of steps are set for each stage here instead.

    Args:
        stages (`list[str]`, defaults to all four):
            Stages to run, in this order: `inverse_dynamics`, `projector`, `joint`, `policy`.
        inverse_dynamics_learning_rate (`float`, defaults to `1e-4`), projector_learning_rate (`float`, defaults to
        `1e-3`), joint_learning_rate (`float`, defaults to `1e-4`), policy_learning_rate (`float`, defaults to `1e-4`):
            The paper's.
        inverse_dynamics_max_steps (`int`, defaults to `-1`), projector_max_steps, joint_max_steps, policy_max_steps:
            Optimizer steps of a stage; -1 for `num_train_epochs` epochs.
        entropy_coef (`float`, defaults to `1e-3`):
            Weight of the term that raises the entropy of each position's code distribution.
        balance_coef (`float`, defaults to `0.1`):
            Weight of the term that evens out how often codes are used; neither source has one. 0 turns it off.
        coverage_coef (`float`, defaults to `0.0`):
            Weight of the coverage loss: the mean cross-entropy of the backbone's likely next tokens, each under a code
            of its own, so that codes reach also what the data hardly say. 0 turns it off; neither source has it.
        coverage_positions (`int`, defaults to `2`):
            Positions of each row that it reads in one step, drawn likelier where the backbone is less sure.
        coverage_tokens (`int`, defaults to `8`), coverage_min_prob (`float`, defaults to `0.005`):
            At most so many tokens of a position, and none of less probability, but for the likeliest.
        projection_coef (`float`, defaults to `1e-5`), cycle_coef (`float`, defaults to `1e-5`):
            Weights of the projector's losses in the joint stage.
        use_cycle (`bool`, defaults to `True`):
            Whether the joint stage has the cycle loss, for ablations.
        cloning_target (`str`, defaults to `"backbone"`):
            What the stage `policy` imitates: the `"backbone"`'s own next-token distribution, so that sampling codes
            starts as calibrated as sampling tokens (the probability of a token that some code says is on the code that
            says it the most surely, and that of all others spread so that the mixture over codes comes close to it);
            or, as in the paper, the arg-max codes `"inferred"` by the inverse dynamics model from the data.
        cloning_positions (`int`, defaults to `4`):
            With `"backbone"`: positions of each row that are cloned in one step, drawn likelier where the backbone is
            less sure. The world model and the head read all codes at each of them.
        revive_dead_codes_every (`int`, defaults to `0`):
            Every so many steps, codes that no position chose are moved to where states are. 0 turns it off.
        assistant_only_loss (`bool`, defaults to `True`):
            Learn from assistant tokens; `False` is the paper's loss over whole sequences.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest row in tokens; longer conversations lose whole turns from their end.
        image_root (`str`, *optional*):
            The only folder from which rows may name image files.
        min_random_gap (`float`, defaults to `0.05`):
            Alarm for code-blindness: below this gap in nats between random and inferred codes.
        min_perplexity (`float`, defaults to `2.0`):
            Alarm for collapse: below this perplexity of the usage of codes.
        on_nonfinite (`str`, defaults to `"stop"`):
            What follows a loss or gradient that is NaN or infinite: `"stop"` with an error before the update, or
            `"skip"` the update, log `skipped_updates`, and stop after 20 in a row.
        on_collapse (`str`, defaults to `"warn"`):
            What follows an alarm: `"warn"` once for each, `"stop"` with an error, or `"ignore"`.
    """

    stages: list[str] = field(default_factory=lambda: list(STAGE_COMPONENTS))
    inverse_dynamics_learning_rate: float = 1e-4
    projector_learning_rate: float = 1e-3
    joint_learning_rate: float = 1e-4
    policy_learning_rate: float = 1e-4
    inverse_dynamics_max_steps: int = -1
    projector_max_steps: int = -1
    joint_max_steps: int = -1
    policy_max_steps: int = -1
    entropy_coef: float = 1e-3
    balance_coef: float = 0.1
    coverage_coef: float = 0.0
    coverage_positions: int = 2
    coverage_tokens: int = 8
    coverage_min_prob: float = 0.005
    projection_coef: float = 1e-5
    cycle_coef: float = 1e-5
    use_cycle: bool = True
    cloning_target: str = "backbone"
    cloning_positions: int = 4
    revive_dead_codes_every: int = 0
    assistant_only_loss: bool = True
    max_length: int | None = 2048
    image_root: str | None = None
    min_random_gap: float = 0.05
    min_perplexity: float = 2.0
    on_nonfinite: str = "stop"
    on_collapse: str = "warn"
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 16
    logging_steps: float = 10
    remove_unused_columns: bool | None = False
    report_to: None | str | list[str] = "none"

    def __post_init__(self):
        super().__post_init__()
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_choice("on_collapse", self.on_collapse, ON_COLLAPSE)
        check_choice("cloning_target", self.cloning_target, CLONING_TARGETS)
        for name in ("cloning_positions", "coverage_positions", "coverage_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.coverage_min_prob < 1:
            raise ValueError(f"`coverage_min_prob` must be in [0, 1), got {self.coverage_min_prob}.")
        unknown = [stage for stage in self.stages if stage not in STAGE_COMPONENTS]
        if unknown or not self.stages:
            raise ValueError(f"`stages` must be among {list(STAGE_COMPONENTS)}, got {self.stages}.")
        order = [list(STAGE_COMPONENTS).index(stage) for stage in self.stages]
        if order != sorted(set(order)):
            raise ValueError(f"`stages` must be in the order {list(STAGE_COMPONENTS)}, each once, got {self.stages}.")
