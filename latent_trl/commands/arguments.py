"""Arguments of the commands, and parsers that name the nearest right option. Imports no torch."""

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..trainer.run.old_names import RENAMED

DATASET = (
    "`shapes` or `chitchat`, which come with the package; a .json, .jsonl, .csv or .parquet file; a folder; a Hub id; "
    "or `module:function`, called with the split"
)
# What is often written in the place of an option's name.
MEANT = {
    "model": "model_name_or_path",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "text_dataset": "text_dataset_name",
    "split": "dataset_train_split",
    "limit": "dataset_limit",
    "reward": "reward_funcs",
    "rewards": "reward_funcs",
    "output": "output_dir",
    "lr": "learning_rate",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "max_new_tokens": "max_completion_length",
    "temperature": "action_temperature",
    **RENAMED,
}


class UsageError(SystemExit):
    """Wrong flags or keys: one line on stderr, exit code 2."""

    def __init__(self, prog: str, text: str):
        print(f"{prog}: {text}", file=sys.stderr)
        super().__init__(2)


@dataclass
class DataArguments:
    """Tunes the backbone on a task while it follows codes."""

    dataset_name: str = field(default="", metadata={"help": DATASET})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set of the Hub"})
    dataset_train_split: str = field(default="train", metadata={"help": "split to train on"})
    dataset_test_split: str = field(default="test", metadata={"help": "split for evaluation, with --eval_strategy"})
    dataset_limit: int | None = field(default=None, metadata={"help": "the first so many rows only"})

    def rows(self, purpose: str, part: str = "train"):
        """The `"train"` or `"test"` part in the form of `purpose`, see [`~latent_trl.commands.rows.load_rows`]."""
        from .rows import load_rows

        split = {"train": self.dataset_train_split, "test": self.dataset_test_split}[part]
        return load_rows(self.dataset_name, split, self.dataset_config, self.dataset_limit, purpose)


@dataclass
class LearnArguments(DataArguments):
    """Learns a latent action space on a backbone, stage by stage."""

    text_dataset_name: str | None = field(default=None, metadata={"help": "conversations without images; as above"})
    text_dataset_split: str = field(default="train", metadata={"help": "its split"})
    kind: str = field(default="codes", metadata={"help": "codes, one a token; or plans, one an answer: see its help"})
    num_codes: int = field(default=128, metadata={"help": "K, the number of latent actions"})
    policy_layers: int | None = field(default=None, metadata={"help": "decoder layers of the policy; 2 if not given"})
    inverse_dynamics_layers: int | None = field(
        default=None, metadata={"help": "decoder layers of the inverse dynamics model; 4 if not given"}
    )
    read_out: str = field(default="residual", metadata={"help": "residual, subtract or last_block"})
    world_model_intermediate_size: int | None = field(default=None, metadata={"help": "width of the merge blocks"})
    inverse_dynamics_decoder: str | None = field(
        default=None, metadata={"help": """further settings of its layers, JSON: '{"hidden_size": 256}'"""}
    )
    policy_decoder: str | None = field(default=None, metadata={"help": "the same for the policy"})
    policy_init: str = field(default="fresh", metadata={"help": "fresh or last_layers"})
    codebook_std: float | None = field(
        default=None, metadata={"help": "spread of the first codes; by default that of the states"}
    )
    gumbel_temperature: float = field(default=2.0, metadata={"help": "of the straight-through choice"})

    def text_rows(self):
        """Conversations without images, or `None` when none were named."""
        from .rows import load_rows

        if not self.text_dataset_name:
            return None
        return load_rows(self.text_dataset_name, self.text_dataset_split, None, self.dataset_limit, "conversations")

    def model_fields(self) -> dict[str, Any]:
        """Keyword arguments of `LatentActionConfig`."""
        names = [f.name for f in fields(LearnArguments) if f.name not in _names(DataArguments)]
        values = {
            n: getattr(self, n)
            for n in names
            if not n.startswith("text_dataset") and not n.endswith(("_layers", "kind"))
        }
        for part in ("inverse_dynamics", "policy"):
            name, layers = f"{part}_decoder", getattr(self, f"{part}_layers")
            decoder = as_dict(name, values[name])
            if layers is not None:
                if "num_hidden_layers" in (decoder or {}):
                    raise ValueError(f"`{part}_layers` and the `num_hidden_layers` of `{name}` say the same. Give one.")
                decoder = {**(decoder or {}), "num_hidden_layers": layers}
            values[name] = decoder
        return values


@dataclass
class RewardedArguments(DataArguments):
    """Reinforcement learning."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "a name (`latent-trl env` lists them), `module:attribute`, or a reward model's folder or id"},
    )
    reward_kwargs: str | None = field(
        default=None, metadata={"help": """options of rewards that are classes, JSON: '{"length": {"target": 20}}'"""}
    )

    def rewards(self) -> list[Any]:
        """The reward functions, by [`~latent_trl.commands.loading.load_rewards`]."""
        from .loading import load_rewards

        return load_rewards(self.reward_funcs, as_dict("reward_kwargs", self.reward_kwargs))


@dataclass
class RewardArguments(RewardedArguments):
    """Reinforcement learning over codes."""

    anchor_dataset_name: str | None = field(
        default=None, metadata={"help": "conversations on which the policy stays, with --anchor_coef; as above"}
    )
    anchor_dataset_split: str = field(default="train", metadata={"help": "its split"})

    def anchor_rows(self):
        """Conversations to stay on, or `None` when none were named."""
        from .rows import load_rows

        if not self.anchor_dataset_name:
            return None
        return load_rows(self.anchor_dataset_name, self.anchor_dataset_split, purpose="conversations")


@dataclass
class DistillArguments(DataArguments):
    """Teaches what a policy says to its backbone alone: an adapter, or a plain model."""

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "measure what is kept by these rewards, on the test split; as for grpo"}
    )
    reward_kwargs: str | None = field(default=None, metadata={"help": "options of rewards that are classes, JSON"})

    def rewards(self) -> list[Any]:
        """The reward functions, by [`~latent_trl.commands.loading.load_rewards`]; none where none are named."""
        from .loading import load_rewards

        return (
            load_rewards(self.reward_funcs, as_dict("reward_kwargs", self.reward_kwargs)) if self.reward_funcs else []
        )


def as_dict(name: str, value: str | dict | None) -> dict | None:
    """A JSON object of the command line, or a mapping of a YAML file."""
    if value is None or isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            # The value is not quoted: it may hold a key.
            raise ValueError(f"`{name}` must be a JSON object, got a text that is none: {error}.") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"`{name}` must be a JSON object, got one of type {type(parsed).__name__}.")
    return parsed


def _names(kind: type) -> set[str]:
    return {f.name for f in fields(kind)}


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of an option, not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    number.__name__ = "int"
    return number


def above_zero(text: str) -> float:
    """A finite number of an option, above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return float(text)


class CommandParser(argparse.ArgumentParser):
    """Takes options with `_` or `-`; what is wrong is one line that names the nearest right option."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        words = [_with_dashes(word) for word in (sys.argv[1:] if args is None else args)]
        found, unknown = self.parse_known_args(words, namespace)
        options = {word.partition("=")[0] for word in words}
        found.given = {action.dest for action in self._actions if options & set(action.option_strings)}
        if unknown:
            refuse_unknown(self.prog, unknown[0], [o for action in self._actions for o in action.option_strings])
        return found

    def error(self, message: str):
        raise UsageError(self.prog, f"{message}. See `{self.prog} --help`.")


def refuse_given(prog: str, args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Raises [`UsageError`] when an option of these names was given, whatever its value."""
    wrong = [f"--{name.replace('_', '-')}" for name in names if name in args.given]
    if wrong:
        raise UsageError(prog, f"`{wrong[0]}` {reason}")


def _with_dashes(word: str) -> str:
    head, equals, value = word.partition("=")
    return head.replace("_", "-") + equals + value if word.startswith("--") else word


def refuse_unknown(prog: str, word: str, known: list[str]) -> None:
    """Raises [`UsageError`] with the nearest right option."""
    if not word.startswith("-"):
        raise UsageError(
            prog, f"{word!r} stands alone: give it with the option that it belongs to. See `{prog} --help`."
        )
    shown = word.split("=")[0]
    near = nearest(shown, known)
    raise UsageError(prog, f"no option `{shown}`." + (f" Did you mean `{near}`?" if near else ""))


def nearest(word: str, known: list[str]) -> str | None:
    """The option that was probably meant, as it is written in `known`."""
    name = word.lstrip("-").replace("-", "_")
    by_name = {option.lstrip("-").replace("-", "_"): option for option in reversed(known)}
    if MEANT.get(name) in by_name:
        return by_name[MEANT[name]]
    near = get_close_matches(name, by_name, n=1, cutoff=0.5)
    return by_name[near[0]] if near else None


def parse_training(argv: list[str] | None, prog: str, arguments: type, config: str) -> tuple[Any, Any, Any]:
    """
    Flags and `--config FILE.yaml` of a training command.

    Args:
        argv (`list[str]`, *optional*): The command line.
        prog (`str`): Such as `latent-trl grpo`.
        arguments (`type`): The command's own dataclass.
        config (`str`): Name of the trainer's configuration in `latent_trl`.

    Returns:
        The command's arguments, the trainer's configuration and TRL's `ModelConfig`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        from .training_help import training_help

        print(training_help(prog, arguments, config))
        raise SystemExit(0)
    argv, content = read_config_file(prog, argv)

    from trl import ModelConfig

    import latent_trl

    parser = make_parser((arguments, getattr(latent_trl, config), ModelConfig), prog)
    if "--help-all" in argv or "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    set_from_file(prog, parser, content)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        refuse_unknown(prog, unknown[0], _options(parser))
    given, args, model_args = parsed
    if not given.dataset_name:
        raise UsageError(prog, "`--dataset_name` is missing: " + DATASET + ".")
    if not model_args.model_name_or_path:
        raise UsageError(prog, "`--model_name_or_path` is missing: a folder or a Hub id.")
    return given, args, model_args


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def make_parser(kinds: tuple[type, ...], prog: str):
    """TRL's parser, which does not abbreviate, and whose errors are one line."""
    from trl import TrlParser

    class TrainingParser(TrlParser):
        def error(self, message: str):
            raise UsageError(prog, f"{message}. See `{prog} --help`.")

    parser = TrainingParser(kinds, prog=prog, allow_abbrev=False)
    for action in parser._actions:
        if action.dest == "output_dir":
            action.required = False
            action.default = "outputs/" + prog.split()[-1]
    return parser


def read_config_file(prog: str, argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The flags without `--config FILE`, and what the file holds, its keys written with `_`."""
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in argv:
        return argv, {}
    place = argv.index("--config")
    if place + 1 == len(argv):
        raise UsageError(prog, "`--config` needs the name of a YAML file.")
    import yaml

    path = Path(argv[place + 1])
    if not path.is_file():
        raise UsageError(prog, f"there is no configuration file {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(prog, f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(prog, f"{path} must hold `key: value` lines, got {type(content).__name__}.")
    return argv[:place] + argv[place + 2 :], {str(key).replace("-", "_"): value for key, value in content.items()}


def set_from_file(prog: str, parser, content: dict[str, Any]) -> None:
    """Makes the values of a configuration file the parser's defaults; `env` sets environment variables, as in TRL."""
    environment = content.pop("env", {})
    if not isinstance(environment, dict):
        raise UsageError(prog, f"`env` must hold `NAME: value` lines, got {environment!r}.")
    os.environ.update({name: str(value) for name, value in environment.items()})
    actions = {action.dest: action for action in parser._actions}
    for key, value in content.items():
        if key not in actions:
            near = nearest(key, _options(parser))
            hint = f" Did you mean `{near.lstrip('-').replace('-', '_')}`?" if near else ""
            raise UsageError(prog, f"the configuration file has the key `{key}`, which is no option.{hint}")
        if key.endswith("_strategy") and isinstance(value, bool):
            raise UsageError(
                prog, f'`{key}` is a word that YAML reads as {str(value).lower()}: put it in quotes, such as "no".'
            )
        # One value of a list may stand alone.
        if actions[key].nargs == "+" and value is not None and not isinstance(value, list):
            content[key] = [value]
    parser.set_defaults_with_config(**content)
