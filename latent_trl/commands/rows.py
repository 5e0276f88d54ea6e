"""Data sets by name, and one form of their rows for all commands: conversations to learn from, or prompts to answer."""

import inspect
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

DATA_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Data that come with the package: purpose to (module, function, what "train" is of a function with splits).
BUILT_IN: dict[str, dict[str, tuple[str, str, str | None]]] = {
    "shapes": {
        "conversations": ("shapes", "shape_pairs", "base"),
        "prompts": ("shapes", "shape_questions", "rl"),
    },
    "chitchat": {"conversations": ("shapes", "chitchat", None), "prompts": ("shapes", "chitchat", None)},
}
NEEDS = {
    "conversations": "`messages`, or `prompt` and `completion`",
    "prompts": "`prompt`, or `messages` that end with the assistant's answer",
}
# Arguments of reward functions that TRL gives them, and that are no columns.
NOT_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def load_rows(
    name: str,
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    purpose: str | None = None,
):
    """
    A data set by its name.

    Args:
        name (`str`): A name in [`BUILT_IN`], a Hub id, folder, file, or `module:function`.
        split (`str`, defaults to `"train"`): Of it. Files have no splits but "train".
        config (`str`, *optional*): Of a data set of the Hub.
        limit (`int`, *optional*): The first so many rows.
        purpose (`str`, *optional*): `"conversations"` to learn from, or `"prompts"` to answer: rows are brought into
            that form ([`as_conversations`], [`as_prompts`]). Not given: as they are.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the split, the columns or all rows are missing.
    """
    rows = _load_rows(name, split, config, purpose or "conversations")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"`dataset_limit` must be at least 1, got {limit}.")
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"{name!r}, {split}, has no rows.")
    if purpose is None:
        return rows
    return {"conversations": as_conversations, "prompts": as_prompts}[purpose](rows, name)


def _load_rows(name: str, split: str, config: str | None, purpose: str):
    if name in BUILT_IN:
        module, function, train = BUILT_IN[name][purpose]
        load = getattr(import_module(f"latent_trl.data.{module}"), function)
        return load() if train is None else load(train if split == "train" else split)
    path = Path(name)
    if ":" in name and not path.exists():
        function = load_attribute(name)
        return function(split) if "split" in inspect.signature(function).parameters else function()
    from datasets import DatasetDict, load_dataset, load_from_disk

    if path.suffix in DATA_FILES:
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {name!r}.")
        _check_lines(path)
        return load_dataset(DATA_FILES[path.suffix], data_files=str(path), split="train")
    if path.is_file():
        raise ValueError(f"{name!r} is no data file that can be read. Works: {', '.join(DATA_FILES)}.")
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        rows = load_from_disk(name)
    else:
        check_exists(name, "data set", f"Names that come with the package: {', '.join(BUILT_IN)}.")
        rows = load_dataset(name, config)
    if not isinstance(rows, DatasetDict):
        return rows
    if split not in rows:
        raise ValueError(f"{name!r} has the splits {sorted(rows)}, not {split!r}.")
    return rows[split]


def _check_lines(path: Path) -> None:
    """Raises `ValueError` with the number of the first line of a .jsonl file that is not JSON."""
    if path.suffix != ".jsonl":
        return
    if not path.stat().st_size:
        raise ValueError(f"{str(path)!r} has no rows: the file is empty.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, must hold an object with columns, got {line.strip()[:60]}.")


def check_exists(name: str, what: str, hint: str = "") -> None:
    """
    Says that a folder is not there before the Hub is asked for a repository of that name.

    Raises:
        FileNotFoundError: When `name` can only be a folder, or its first part is a folder here.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    parts = path.parts
    is_folder = name.startswith((".", "/", "~")) or name.endswith("/") or len(parts) > 2 or "\\" in name
    beside = path.parent.is_dir() and path.parent != Path()
    if not (is_folder or beside or (len(parts) == 2 and Path(parts[0]).is_dir())):
        print(f"There is no folder {name!r} here; asking the Hub.", file=sys.stderr)
        return
    found = sorted(child.name for child in path.parent.iterdir() if child.is_dir()) if path.parent.is_dir() else None
    there = f" {str(path.parent)!r} holds {found[:8]}." if found else ""
    raise FileNotFoundError(f"There is no {what} {name!r}.{there}" + (f" {hint}" if hint else ""))


def load_attribute(name: str) -> Any:
    """`module:attribute`, of a module that is installed or in the current directory."""
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: {error}. Write `module:attribute`, as Python imports the module.") from error
    if not hasattr(module, attribute):
        names = sorted(n for n in vars(module) if not n.startswith("_"))
        raise ValueError(f"{name!r}: {module_name} has no {attribute!r}; it has {names}.")
    return getattr(module, attribute)


def as_conversations(rows, name: str):
    """
    Rows with `messages`, or `prompt` and `completion`, and `images`.

    Raises:
        ValueError: With the columns that are there and those that are needed.
    """
    columns = set(rows.column_names)
    if "messages" not in columns and not {"prompt", "completion"} <= columns:
        raise ValueError(_lacks(name, rows, "conversations"))
    return _with_user_turns(_with_images(rows))


def as_prompts(rows, name: str):
    """
    Rows with `prompt`, `images` and the further columns. Of `messages` the prompt is all but the assistant's last
    turn, whose text becomes the column `reference` where there is none.

    Raises:
        ValueError: With the columns that are there and those that are needed.
    """
    columns = rows.column_names
    if "prompt" not in columns:
        if "messages" not in columns:
            raise ValueError(_lacks(name, rows, "prompts"))
        first = rows.with_format(None)["messages"][0]
        if first[-1]["role"] != "assistant":
            raise ValueError(
                f"{name!r}: `messages` of the first row end with the {first[-1]['role']}'s turn. Give a column "
                "`prompt`, or `messages` that end with the assistant's answer."
            )
        reference = "reference" not in columns
        rows = rows.map(
            lambda messages: {
                "prompt": messages[:-1],
                **({"reference": _text(messages[-1]["content"])} if reference else {}),
            },
            input_columns=["messages"],
            remove_columns=["messages"],
        )
    return _with_user_turns(_with_images(rows))


def _lacks(name: str, rows, purpose: str) -> str:
    return (
        f"{name!r} has the columns {sorted(rows.column_names)}; it needs {NEEDS[purpose]}, in TRL's format. "
        "Other formats are converted by `latent_trl.data.formats.convert_row`."
    )


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content).strip()


def _with_images(rows):
    """`image`, or one picture in `images`, as a list in `images`."""
    from datasets import Image, List, Value

    name = "images" if "images" in rows.column_names else "image"
    if name not in rows.column_names or isinstance(rows.features[name], List):
        return rows
    is_path = isinstance(rows.features[name], Value)
    if not is_path:
        rows = rows.cast_column(name, Image(decode=False))
    features = rows.features.copy()
    del features[name]
    features["images"] = List(Value("string") if is_path else Image())
    return rows.map(
        lambda picture: {"images": [] if picture is None else [picture]},
        input_columns=[name],
        remove_columns=[] if name == "images" else [name],
        features=features,
    )


def _with_user_turns(rows):
    """A prompt that is text becomes a user's message where rows have pictures, which only messages can show."""
    from datasets import Value

    if "images" not in rows.column_names or not isinstance(rows.features.get("prompt"), Value):
        return rows
    return rows.map(lambda prompt: {"prompt": [{"role": "user", "content": prompt}]}, input_columns=["prompt"])


def check_reward_columns(rewards: list[Callable | str], rows, name: str) -> None:
    """Raises `ValueError` when a reward function reads a column that the data set has not."""
    for reward in rewards:
        if isinstance(reward, str):
            continue
        needed = [
            p.name
            for p in inspect.signature(reward).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in NOT_COLUMNS
        ]
        missing = [column for column in needed if column not in rows.column_names]
        if missing:
            raise ValueError(
                f"The reward {reward.__name__!r} reads the columns {needed}; {name!r} has {sorted(rows.column_names)}. "
                f"Add {missing}, or take another reward."
            )
