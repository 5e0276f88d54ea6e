"""Help of the training commands, read from the source of the configurations: instant, for it imports no torch."""

import ast
import re
import textwrap
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

TRAINER_FOLDER = Path(__file__).resolve().parents[1] / "trainer"
WIDTH, INDENT = 90, 34
# Options that the configurations inherit, and that most runs set: meaning and default.
INHERITED: dict[str, tuple[str, Any]] = {
    "output_dir": ("folder of the model and of its checkpoints", "outputs/{command}"),
    "max_steps": ("optimizer steps; -1: what num_train_epochs makes", -1),
    "num_train_epochs": ("passes over the data", None),
    "learning_rate": ("peak rate", None),
    "per_device_train_batch_size": ("rows of a micro-batch in each process; in RL, completions", None),
    "gradient_accumulation_steps": ("micro-batches of one optimizer step", 1),
    "num_generations": ("completions of each prompt", 8),
    "max_completion_length": ("longest completion, in tokens", 512),
    "bf16": ("compute in bfloat16 under autocast, on a GPU", False),
}
RL_COMMON = (
    *("model_name_or_path", "dataset_name", "reward_funcs", "image_root", "output_dir", "max_steps", "learning_rate"),
    *("per_device_train_batch_size", "num_generations", "max_completion_length", "beta"),
)
# What everyone sets, in the order of help.
COMMON = {
    "learn": (
        *("model_name_or_path", "dataset_name", "text_dataset_name", "image_root", "output_dir", "num_codes"),
        *("policy_layers", "inverse_dynamics_layers", "num_train_epochs", "per_device_train_batch_size", "max_length"),
    ),
    "sft": (
        *("model_name_or_path", "dataset_name", "image_root", "output_dir", "max_steps", "num_train_epochs"),
        *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    ),
    "distill": (
        *("model_name_or_path", "dataset_name", "image_root", "output_dir", "max_steps", "learning_rate"),
        *("per_device_train_batch_size", "max_completion_length", "merge_adapter", "reward_funcs"),
    ),
    "grpo": RL_COMMON,
    "rloo": RL_COMMON,
    "ppo": (*RL_COMMON, "value_learning_rate"),
    "plans": (
        *("model_name_or_path", "dataset_name", "eval_dataset_name", "reward_funcs", "image_root", "output_dir"),
        *("num_plans", "depth", "branch_min_prob", "max_steps", "per_device_train_batch_size", "max_completion_length"),
    ),
    "bandit": (
        *("model_name_or_path", "dataset_name", "reward_funcs", "eval_dataset_name", "image_root", "output_dir"),
        *("max_steps", "learning_rate", "rollout_prompts", "num_generations", "max_completion_length"),
    ),
}
MODEL = "folder or Hub id of latent actions"
MODELS = {
    "learn": "folder or Hub id: a backbone, or latent actions to learn on",
    "plans": "folder or Hub id: a backbone, or plans to learn on",
    "bandit": "folder or Hub id of plans",
}
ENTRY = re.compile(r"(?P<names>\w+(?: \([^()]*\))?(?:,\s+\w+(?: \([^()]*\))?)*):\s+(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True)
class Option:
    """
    Args:
        name (`str`): Of the field.
        meaning (`str`): Its first sentence in the docstring.
        default: Where it is written as a plain value; else `None`.
    """

    name: str
    meaning: str
    default: object = None


@cache
def config_classes() -> dict[str, ast.ClassDef]:
    """Every class of a trainer's configuration file."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(TRAINER_FOLDER.glob("*/*config.py"))]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def config_options(config: str) -> list[Option]:
    """Fields that a configuration and its parents in this package add to those of transformers and TRL, each once."""
    node = config_classes().get(config)
    if node is None:
        return []
    meanings = field_meanings(ast.get_docstring(node) or "")
    own = [
        Option(one.target.id, meanings.get(one.target.id, ""), _default(one.value))
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    ]
    names = {option.name for option in own}
    parents = [option for base in node.bases if isinstance(base, ast.Name) for option in config_options(base.id)]
    inherited = {option.name: option for option in parents}
    # A default that is set anew keeps the meaning that the parent gives it.
    own = [Option(o.name, o.meaning or _meaning(inherited, o.name), o.default) for o in own]
    return [*own, *(option for name, option in inherited.items() if name not in names)]


def _meaning(options: dict[str, Option], name: str) -> str:
    return options[name].meaning if name in options else ""


def _default(value: ast.expr | None) -> object:
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def field_meanings(docstring: str) -> dict[str, str]:
    """Names under `Args:` of a docstring in the Hugging Face format, and the first sentence of each."""
    _, _, args = docstring.partition("Args:\n")
    lines = textwrap.dedent(args).splitlines()
    entries: list[list[str]] = []
    for line in lines:
        # An entry begins at the margin; a long list of names goes on there.
        if line and not line.startswith(" ") and (not entries or entries[-1][-1].startswith(" ")):
            entries.append([line])
        elif line and entries:
            entries[-1].append(line)
    found = {}
    for entry in entries:
        match = ENTRY.match(" ".join(line.strip() for line in entry))
        if match is None:
            continue
        text = re.split(r"(?<=[A-Za-z0-9`)])\.(?=\s[A-Z0-9`]|$)", match["text"])[0]
        for name in re.sub(r"\([^()]*\)", "", match["names"]).split(","):
            found[name.strip()] = text
    return found


def training_help(prog: str, arguments: type, config: str) -> str:
    """The help of a training command: what everyone sets, then the rest, each option once."""
    command = prog.split()[-1]
    if config.startswith("Plan") and command in ("grpo", "rloo", "ppo"):
        # What everyone sets over plans.
        command = "bandit"
    model = MODELS.get(command, MODEL)
    options = {"model_name_or_path": Option("model_name_or_path", model)}
    for one in fields(arguments):
        default = one.default if isinstance(one.default, (str, int, float)) else None
        options[one.name] = Option(one.name, one.metadata["help"], default)
    of_command = set(options)
    own = {option.name: option for option in config_options(config)}
    for name, (meaning, default) in INHERITED.items():
        inherited = default.format(command=command) if isinstance(default, str) else default
        options[name] = Option(name, meaning, own[name].default if name in own else inherited)
    for name, option in own.items():
        if name not in INHERITED:
            options[name] = Option(name, option.meaning or "as in transformers, with another default", option.default)
    common = [options[name] for name in COMMON[command] if name in options]
    shown = {option.name for option in common}
    rest = [options[name] for name in options if name in of_command - shown]
    trained = [options[name] for name in own if name not in shown | of_command]
    rewards = " --reward_funcs NAME" if "reward_funcs" in options and command != "plans" else ""
    lines = [f"usage: {prog} --config FILE.yaml [OPTIONS]"]
    lines += [
        f"       {prog} --model_name_or_path MODEL --dataset_name DATA",
        f"           {rewards} [OPTIONS]".rstrip(),
        "",
    ]
    lines += [arguments.__doc__.strip().splitlines()[0], "", "what most runs set:", *map(described, common)]
    lines += ["", "model and data:", *map(described, rest)]
    lines += ["", f"training, of {config}:", *map(described, trained)]
    end = (
        "Options may be written with _ or with -. A YAML file has the same names, and flags win over it. Loading and "
        "adapters are TRL's: --dtype, --load_in_4bit, --use_peft, --lora_r, ... So is --accelerate_config with a file "
        "or a name (fsdp2, zero2, zero3, multi_gpu): the command starts itself on several processes, and "
        "--num_processes says how many. --help-all lists all options, those of transformers and TRL included."
    )
    return "\n".join([*lines, "", *textwrap.wrap(end, WIDTH)])


def described(option: Option) -> str:
    """An option, its meaning and its default."""
    text = option.meaning
    if option.default not in (None, ""):
        text = f"{text} (default: {option.default})".strip()
    head = f"  --{option.name}"
    lines = textwrap.wrap(text, WIDTH - INDENT) or [""]
    if len(head) > INDENT - 2:
        lines.insert(0, "")
    return "\n".join(f"{head if i == 0 else '':<{INDENT}}{line}".rstrip() for i, line in enumerate(lines))
