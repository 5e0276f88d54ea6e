"""Arguments of the commands that train plans. Imports no torch."""

from dataclasses import dataclass, field, fields
from typing import Any

from .arguments import RewardedArguments, UsageError, read_config_file

KINDS = ("codes", "plans")


@dataclass
class HeldOutArguments(RewardedArguments):
    """RL over plans: learns which plan to hold for a prompt."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "held-out prompts; by default dataset_test_split of dataset_name"}
    )

    def held_out(self):
        """
        The held-out prompts.

        Raises:
            ValueError: When a file without splits holds the training prompts too.
        """
        from .rows import DATA_FILES, load_rows

        if self.eval_dataset_name is not None:
            return load_rows(self.eval_dataset_name, self.dataset_test_split, self.dataset_config, None, "prompts")
        if self.dataset_name.endswith(tuple(DATA_FILES)):
            raise ValueError(
                f"{self.dataset_name!r} is a file, which has no split {self.dataset_test_split!r}. Give held-out "
                "prompts with `--eval_dataset_name`, or `--eval_strategy no`."
            )
        return self.rows("prompts", "test")


@dataclass
class PlanLearnArguments(HeldOutArguments):
    """Learns a codebook of plans, one an answer, from the backbone's alternatives or from data."""

    kind: str = field(default="plans", metadata={"help": "plans, one an answer; or codes, one a token: see its help"})
    num_plans: int = field(default=16, metadata={"help": "K, the number of plans"})
    depth: int | None = field(default=None, metadata={"help": "decoder layers that carry no plan; half of them"})
    rank: int = field(default=4, metadata={"help": "of a plan's LoRA"})
    init_std: float = field(default=0.2, metadata={"help": "spread of the up-projections at the start"})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "linear maps that plans change; those that write to the residual stream"}
    )
    chooser_layers: int = field(default=4, metadata={"help": "decoder layers that the chooser reads"})
    chooser_size: int = field(default=256, metadata={"help": "width of the chooser"})
    chooser_reads_plans: bool = field(
        default=False, metadata={"help": "the chooser also reads the state that each plan gives the last position"}
    )
    segment: str = field(
        default="answer", metadata={"help": "how long a plan is held: answer, sentence, switch (learned), or tokens"}
    )

    def model_fields(self) -> dict[str, Any]:
        """Keyword arguments of `PlanConfig`."""
        inherited = {f.name for f in fields(HeldOutArguments)}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {*inherited, "kind"}}
        return {**values, "segment": int(self.segment) if self.segment.isdigit() else self.segment}


def asked_value(prog: str, argv: list[str], name: str, default: Any = None) -> Any:
    """What an option says, in the words of the command line or in its YAML file, before they are parsed."""
    words, content = read_config_file(prog, argv)
    options = {f"--{name}", f"--{name.replace('_', '-')}"}
    value = content.get(name, default)
    for place, word in enumerate(words):
        head, equals, said = word.partition("=")
        if head in options:
            value = said if equals else next(iter(words[place + 1 :]), None)
    return value


def names_plans(prog: str, argv: list[str]) -> bool:
    """Whether the model of a training command holds plans."""
    name = asked_value(prog, argv, "model_name_or_path")
    if not isinstance(name, str):
        return False
    from .plan_loading import is_plan_model

    try:
        return is_plan_model(name)
    except FileNotFoundError:
        # It is said where the model is loaded.
        return False


def asked_kind(prog: str, argv: list[str]) -> str:
    """What `learn` is to learn: `--kind`, or `kind` of the YAML file."""
    kind = asked_value(prog, argv, "kind", "codes")
    if kind not in KINDS:
        raise UsageError(prog, f"`--kind` must be one of {list(KINDS)}, got {kind!r}.")
    return kind


def refuse_peft(prog: str, model_args: Any) -> None:
    """Raises [`UsageError`] where an adapter was asked for that no one would train."""
    if model_args.use_peft:
        raise UsageError(
            prog, "`--use_peft` has nothing to adapt: the backbone is frozen here. `latent-trl sft` tunes one."
        )
