"""Configuration of [`PlanSpaceTrainer`]."""

from dataclasses import dataclass

from .training_config import PlanTrainingConfig


@dataclass
class PlanSpaceConfig(PlanTrainingConfig):
    r"""
    Configuration of [`PlanSpaceTrainer`]. Inherits all of
    [`~latent_trl.trainer.plans.training_config.PlanTrainingConfig`].

    Args:
        answers_column (`str`, *optional*):
            Column of a row's answers, a text, a list of texts or TRL's `completion`, which are learned in place of the
            backbone's own alternatives. Rows with the same prompt share theirs.
        branch_top_k (`int`, defaults to `6`):
            Tokens of a step that are looked at for alternatives, the greedy one among them
            ([`~latent_trl.plans.branching.branch_answers`]).
        branch_min_prob (`float`, defaults to `0.02`):
            Least probability of a token that an alternative begins with. Lower it where right words are rare.
        max_branches (`int`, defaults to `16`):
            Alternatives of a prompt beside the greedy answer.
        answers_per_prompt (`int`, defaults to `5`):
            Answers of a prompt that are assigned in one step, drawn anew each time. At most K.
        segment_starts (`int`, defaults to `3`):
            Where a plan is held for a segment: at most so many starts of segments of a prompt's answers are learned
            from, the prompt itself among them.
        new_plans (`int`, defaults to `0`):
            Learn only the last so many plans ([`~PlanModel.add_plans`]), from alternatives of the backbone and of the
            plans that the chooser takes. The others stay as they are. 0 learns all.
        assignment_temperature (`float`, defaults to `0.3`):
            Of the assignment of answers to plans, in nats.
        scoring_batch_size (`int`, defaults to `512`):
            Rows of a pass without gradient. Lower it to save memory.
        early_stopping_patience, early_stopping_threshold (`int` and `float`, default to `3` and `0.002`):
            Learning stops when so many evaluations in a row have not raised `metric_for_best_model` by more. `None`
            goes on to `max_steps`. The last plans are kept, since they become more distinct while the ceiling is flat;
            with `load_best_model_at_end=True` the best.
        metric_for_best_model (`str`, *optional*):
            `"ceiling"` where the trainer has reward functions, `"coverage"` where it has none.
    """

    answers_column: str | None = None
    branch_top_k: int = 6
    branch_min_prob: float = 0.02
    max_branches: int = 16
    answers_per_prompt: int = 5
    segment_starts: int = 3
    new_plans: int = 0
    assignment_temperature: float = 0.3
    scoring_batch_size: int = 512
    early_stopping_patience: int | None = 3
    early_stopping_threshold: float = 0.002
    metric_for_best_model: str | None = None
    learning_rate: float = 3e-3
    max_steps: int = 200
    per_device_train_batch_size: int = 10
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float | None = 20
    save_strategy: str = "steps"
    save_steps: float = 20
    save_total_limit: int | None = 1

    def __post_init__(self):
        given = self.metric_for_best_model
        super().__post_init__()
        # transformers fills in a loss, which an evaluation of plans has not.
        self.metric_for_best_model = given
        self.greater_is_better = True
        if self.answers_per_prompt < 2:
            raise ValueError(
                f"`answers_per_prompt` must be at least 2, or plans have nothing to differ in; got "
                f"{self.answers_per_prompt}."
            )
        for name, least in (("segment_starts", 1), ("new_plans", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.new_plans and self.weight_decay:
            raise ValueError(
                f"`weight_decay` ({self.weight_decay}) would change the plans that are not learned. Set it to 0, or "
                "learn all plans (`new_plans=0`)."
            )
        if not self.assignment_temperature > 0:
            raise ValueError(f"`assignment_temperature` must be above 0, got {self.assignment_temperature}.")
