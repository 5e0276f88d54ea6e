"""
PCogAlignBench ([Li et al., 2025](https://huggingface.co/papers/2506.00930)): help for a person with certain roles in
life, in a situation that a picture shows.

The layout is that of `YongqiLi/PCogAlignBench` on the Hub, as the code that reads it has it:

```
version_v4/{HCMAS,HCSHR}-{train,test}.json      two location sets, LS1 and LS2
version_v4/<image.file_path>                    the pictures
```

A file is a list of `{"individual_RoleSet": {place: role, ...}, "query", "image": {"file_path"}, "eval_info":
{"ImageDesc", "EvalHelp"}, ...}`. It has **no reference answers**: the latent-action paper had a language model write
them. `examples/scripts/pcogalign_references.py` does so, and [`write_references`] stores them under the published
code's names, `{HCMAS,HCSHR}-golden-{train,test}.json`, with the further key `golden_response`.
"""

import json
import random
from pathlib import Path
from typing import Any

from .task_files import LayoutError, entry, inside, read_json, task_folder, to_dataset

SOURCE = "YongqiLi/PCogAlignBench"
VERSION = "version_v4"
LOCATION_SETS = {"LS1": "HCMAS", "LS2": "HCSHR"}
# Part of the references, and shares of it. The published code trains RL on 50 to 70 % and leaves the rest.
SPLITS = {"sft": ("train", 0.0, 0.5), "rl": ("train", 0.5, 0.7), "test": ("test", 0.0, 1.0), "ood": ("test", 0.0, 1.0)}
TRAIN_SHARE = 0.8
INSTRUCTION = (
    "You help one particular person, whose roles in life are: {roles}. The picture shows where this person is now. "
    "Answer for this person in this situation."
)
REFERENCE_REQUEST = (
    "A person asks an assistant for help. The picture shows the situation.\n\nRoles of the person: {roles}\n"
    "What the picture shows: {description}\nWhat would help this person: {expectation}\nThe question: {query}\n\n"
    "Write the best reply the assistant could give: kind, concrete, grounded in the picture and in what this person "
    "can do here, in plain spoken English. Name the roles only where that is natural. Write the reply and nothing else."
)


def pcogalign(
    split: str = "sft",
    source: str | Path = SOURCE,
    references: str | Path | None = None,
    location_set: str = "LS1",
    limit: int | None = None,
    seed: int = 42,
    revision: str | None = None,
):
    """
    One row for every question.

    `sft` and `rl` are 0 to 50 % and 50 to 70 % of the location set's training references, shuffled; `test` its test
    references; `ood` the test references of the other location set.

    Args:
        split (`str`, defaults to `"sft"`): `"sft"`, `"rl"`, `"test"` or `"ood"`.
        source (`str` or `Path`): Folder of the layout above, or a Hub id of it.
        references (`str` or `Path`, *optional*): Folder with the files of reference answers; `version_v4` of the
            source by default.
        location_set (`str`, defaults to `"LS1"`): The one that is trained on: `"LS1"` (HCMAS) or `"LS2"` (HCSHR).
        limit (`int`, *optional*): The first so many rows of the split.
        seed (`int`, defaults to `42`): Of the shuffling.
        revision (`str`, *optional*): Of the data set of the Hub.

    Returns:
        `Dataset` with a conversational `prompt`, `images` (one picture), `key` (unique) and `reference`; for `"sft"`
        that is `completion`, a conversational one.

    Raises:
        LayoutError: A file is missing or laid out otherwise; it names the file and the key.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}.")
    folder = task_folder(source, [f"{VERSION}/*"], revision) / VERSION
    part, start, end = SPLITS[split]
    places = [name for name in LOCATION_SETS if (name == _checked(location_set)) == (split != "ood")]
    name = f"{LOCATION_SETS[places[0]]}-golden-{part}.json"
    path = Path(references or folder) / name
    hint = "The published data has no reference answers: make them with examples/scripts/pcogalign_references.py."
    instances = list(enumerate(read_json(path, list, hint)))
    if part == "train":
        random.Random(seed).shuffle(instances)
    instances = instances[int(start * len(instances)) : int(end * len(instances))][:limit]
    if not instances:
        raise LayoutError(f"{path} has too few instances for the split {split!r}.")
    rows = []
    for i, instance in instances:
        where = f"{path}: instance {i}"
        reference = entry(instance, "golden_response", str, where)
        row = {"key": f"{name.removesuffix('.json')}/{i}", "prompt": prompt(instance, where)}
        row["images"] = [str(image_path(folder, instance, where))]
        if split == "sft":
            row["completion"] = [{"role": "assistant", "content": reference}]
        else:
            row["reference"] = reference
        rows.append(row)
    return to_dataset(rows)


def prompt(instance: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The conversation up to the reply."""
    return [
        {"role": "system", "content": INSTRUCTION.format(roles=_roles(instance, where))},
        {"role": "user", "content": entry(instance, "query", str, where)},
    ]


def reference_request(instance: dict[str, Any], where: str) -> str:
    """What to ask a strong model for, with the instance's picture, to get a reference answer."""
    notes = entry(instance, "eval_info", dict, where)
    return REFERENCE_REQUEST.format(
        roles=_roles(instance, where),
        description=entry(notes, "ImageDesc", str, f"{where}: eval_info"),
        expectation=entry(notes, "EvalHelp", str, f"{where}: eval_info"),
        query=entry(instance, "query", str, where),
    )


def unanswered(source: str | Path, location_set: str, revision: str | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the pictures, and the instances of a location set's test file: those that get reference answers."""
    folder = task_folder(source, [f"{VERSION}/*"], revision) / VERSION
    path = folder / f"{LOCATION_SETS[_checked(location_set)]}-test.json"
    return folder, read_json(path, list, f"`source` must be laid out as {SOURCE} is.")


def write_references(
    folder: str | Path, location_set: str, instances: list[dict[str, Any]], answers: list[str | None], seed: int = 42
) -> list[Path]:
    """
    Stores reference answers, shuffled and cut at 80 % into a file to train on and one to test on.

    Args:
        folder (`str` or `Path`): Where to write.
        location_set (`str`): `"LS1"` or `"LS2"`.
        instances (`list[dict]`), answers (`list[str]`): Of equal length; instances whose answer is `None` are left out.
        seed (`int`, defaults to `42`): Of the shuffling.

    Returns:
        The two files.
    """
    answered = [{**i, "golden_response": a} for i, a in zip(instances, answers, strict=True) if a is not None]
    random.Random(seed).shuffle(answered)
    cut = int(TRAIN_SHARE * len(answered))
    if not cut:
        raise ValueError(f"`answers` has {len(answered)} that are not `None`: too few for a file to train on.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for part, some in (("train", answered[:cut]), ("test", answered[cut:])):
        paths.append(Path(folder) / f"{LOCATION_SETS[_checked(location_set)]}-golden-{part}.json")
        paths[-1].write_text(json.dumps(some, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return paths


def image_path(folder: Path, instance: dict[str, Any], where: str) -> Path:
    """The picture of an instance; it must be there."""
    image = entry(instance, "image", dict, where)
    path = inside(folder, entry(image, "file_path", str, f"{where}: image"), where)
    if not path.is_file():
        raise LayoutError(f"{where}: its picture {path} is missing.")
    return path


def _roles(instance: dict[str, Any], where: str) -> str:
    roles = entry(instance, "individual_RoleSet", dict, where)
    return "; ".join(f"{entry(roles, place, str, f'{where}: individual_RoleSet')} at {place}" for place in roles)


def _checked(location_set: str) -> str:
    if location_set not in LOCATION_SETS:
        raise ValueError(f"`location_set` must be one of {list(LOCATION_SETS)}, got {location_set!r}.")
    return location_set
