"""Arguments of the training commands, and the parser that names the nearest right key. Imports no torch."""

import ast
import json
import sys
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

DATASET = (
    "Hub id, folder (of `save_to_disk`, or with data files), .json/.jsonl/.csv/.parquet file, or `module:function`, "
    "called with the split"
)
TRAINER_FOLDER = Path(__file__).resolve().parents[1] / "trainer"


class UsageError(SystemExit):
    """Wrong flags or keys: one line on stderr, exit code 2."""

    def __init__(self, prog: str, text: str):
        print(f"{prog}: {text}", file=sys.stderr)
        super().__init__(2)


@dataclass
class DataArguments:
    """What to train on, named as in TRL."""

    dataset_name: str = field(default="", metadata={"help": DATASET})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set of the Hub"})
    dataset_train_split: str = field(default="train", metadata={"help": "split to train on"})
    dataset_test_split: str = field(default="test", metadata={"help": "split for evaluation, with --eval_strategy"})
    dataset_limit: int | None = field(default=None, metadata={"help": "the first so many rows only"})


@dataclass
class LearnArguments(DataArguments):
    """`latent-trl learn`: data, and the fields of `LatentActionConfig`."""

    text_dataset_name: str | None = field(default=None, metadata={"help": "conversations without images; as above"})
    text_dataset_split: str = field(default="train", metadata={"help": "its split"})
    num_codes: int = field(default=128, metadata={"help": "K, the number of latent actions"})
    read_out: str = field(default="residual", metadata={"help": "residual, subtract or last_block"})
    world_model_intermediate_size: int | None = field(default=None, metadata={"help": "width of the merge blocks"})
    inverse_dynamics_decoder: str | None = field(
        default=None, metadata={"help": """overrides of its layers, JSON: '{"num_hidden_layers": 2}'"""}
    )
    policy_decoder: str | None = field(default=None, metadata={"help": "the same for the policy"})
    policy_init: str = field(default="fresh", metadata={"help": "fresh or last_layers"})
    codebook_std: float | None = field(default=None, metadata={"help": "spread of the first codes; measured"})
    gumbel_temperature: float = field(default=2.0, metadata={"help": "of the straight-through choice"})

    def model_fields(self) -> dict[str, Any]:
        """Keyword arguments of `LatentActionConfig`."""
        names = [f.name for f in fields(LearnArguments) if f.name not in _names(DataArguments)]
        values = {name: getattr(self, name) for name in names if not name.startswith("text_dataset")}
        for name in ("inverse_dynamics_decoder", "policy_decoder"):
            values[name] = as_dict(name, values[name])
        return values


@dataclass
class RewardArguments(DataArguments):
    """`latent-trl grpo` and `latent-trl ppo`."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "`module:attribute`, a name (`latent-trl env` lists them), or a reward model's folder or id"},
    )
    reward_kwargs: str | None = field(
        default=None, metadata={"help": """options of rewards that are classes, JSON: '{"length": {"target": 20}}'"""}
    )
    anchor_dataset_name: str | None = field(
        default=None, metadata={"help": "conversations on which the policy stays, with --anchor_coef; as above"}
    )
    anchor_dataset_split: str = field(default="train", metadata={"help": "its split"})


def as_dict(name: str, value: str | dict | None) -> dict | None:
    """A JSON object of the command line, or a mapping of a YAML file."""
    if value is None or isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"`{name}` must be a JSON object, got {value!r}: {error}.") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"`{name}` must be a JSON object, got {value!r}.")
    return parsed


def _names(kind: type) -> set[str]:
    return {f.name for f in fields(kind)}


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
        print(training_help(prog, arguments, config))
        raise SystemExit(0)
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in argv:
        check_config_file(prog, argv)

    from trl import ModelConfig

    import latent_trl

    parser = make_parser((arguments, getattr(latent_trl, config), ModelConfig), prog)
    if "--help-all" in argv:
        parser.print_help()
        raise SystemExit(0)
    *parsed, in_file, on_line = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = [option for action in parser._actions for option in action.option_strings]
    for where, words in (("the configuration file has the key", in_file), ("no option", on_line)):
        for word in words:
            if word.startswith("--") or where == "no option":
                refuse_unknown(prog, where, word.split("=")[0], known)
    given = parsed[0]
    if not given.dataset_name:
        raise UsageError(prog, "`--dataset_name` is missing: " + DATASET + ".")
    if not parsed[2].model_name_or_path:
        raise UsageError(prog, "`--model_name_or_path` is missing: a folder or a Hub id.")
    return tuple(parsed)


def make_parser(kinds: tuple[type, ...], prog: str):
    """TRL's parser, which does not abbreviate, and whose errors are one line."""
    from trl import TrlParser

    class CommandParser(TrlParser):
        def error(self, message: str):
            raise UsageError(prog, f"{message}. See `{prog} --help`.")

    parser = CommandParser(kinds, prog=prog, allow_abbrev=False)
    for action in parser._actions:
        if action.dest == "output_dir":
            action.required = False
            action.default = "outputs/" + prog.split()[-1]
    return parser


def check_config_file(prog: str, argv: list[str]) -> None:
    place = argv.index("--config") + 1
    if place == len(argv):
        raise UsageError(prog, "`--config` needs the name of a YAML file.")
    import yaml

    path = Path(argv[place])
    if not path.is_file():
        raise UsageError(prog, f"there is no configuration file {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(prog, f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(prog, f"{path} must hold `key: value` lines, got {type(content).__name__}.")


def refuse_unknown(prog: str, where: str, word: str, known: list[str]) -> None:
    """Raises [`UsageError`] with the nearest right name."""
    name = "--" + word.lstrip("-").replace("-", "_")
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    shown = word.lstrip("-") if where != "no option" else word
    hint = "" if not near else f" Did you mean `{near[0].lstrip('-') if where != 'no option' else near[0]}`?"
    raise UsageError(prog, f"{where} `{shown}`{'' if where == 'no option' else ', which is no option'}.{hint}")


def config_fields(config: str) -> list[tuple[str, str]]:
    """Fields and defaults that a trainer's configuration adds to its parent's, read from its source."""
    stem = "".join("_" + c.lower() if c.isupper() else c for c in config.replace("GRPO", "Grpo").replace("PPO", "Ppo"))
    path = TRAINER_FOLDER / f"{stem.lstrip('_').replace('s_f_t', 'sft')}.py"
    (body,) = [
        node.body
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == config
    ]
    return [
        (node.target.id, ast.unparse(node.value) if node.value else "")
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def training_help(prog: str, arguments: type, config: str) -> str:
    """Help of a training command, without an import of torch or TRL."""
    lines = [f"usage: {prog} --model_name_or_path MODEL --dataset_name DATA [--config FILE.yaml] [OPTIONS]", ""]
    lines += [arguments.__doc__.strip(), "", "model and data (also dtype, load_in_4bit, use_peft, lora_r, ... of TRL):"]
    lines.append(f"  {'--model_name_or_path':<34} folder or Hub id")
    for one in fields(arguments):
        default = one.default if one.default is not MISSING else ""
        shown = f" (default: {default})" if default not in ("", None) else ""
        lines.append(f"  {'--' + one.name:<34} {one.metadata['help']}{shown}")
    lines += ["", f"training, the fields of {config}:"]
    lines.append(f"  {'--output_dir':<34} outputs/{prog.split()[-1]}")
    for name, default in config_fields(config):
        lines.append(f"  {'--' + name:<34} {default}")
    if config == "LatentActionPPOConfig":
        lines += ["", "and those of LatentActionGRPOConfig:"]
        lines += [f"  {'--' + name:<34} {default}" for name, default in config_fields("LatentActionGRPOConfig")]
    lines += ["", "All options, those of transformers and TRL included: --help-all. A YAML file has the same names."]
    return "\n".join(lines)
