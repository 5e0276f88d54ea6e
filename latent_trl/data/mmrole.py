"""
MMRole-Data ([Dai et al., 2025](https://huggingface.co/papers/2408.04203)): characters who talk about a picture.

The layout is that of `YanqiDai/MMRole_dataset` on the Hub, as its repository on GitHub has it:

```
dialogues/in-distribution/{comment,human-role,inter-role}/<Character>_{COCO,script}.json
dialogues/out-of-distribution/{comment,human-role,inter-role}.json
profiles/{in-distribution,out-of-distribution}/detailed_profiles/<Character>.json
profiles/{in-distribution,out-of-distribution}/profiles.json             condensed ones, by name
images/<image>                   COCO's are not on the Hub: images/COCO/train2017, or `coco_folder`
```

A dialogue file is a list of `{"id", "image", "conversations": [{"role" or "from", "value"}, ...]}`; a profile has
`introduction`, `personality`, `experience`, `relationship` and `catchphrase`.
"""

import logging
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .mmrole_official import is_official
from .task_files import LayoutError, entry, inside, read_json, task_folder, to_dataset

logger = logging.getLogger(__name__)

SOURCE = "YanqiDai/MMRole_dataset"
# Shares of the in-distribution dialogues that are not of the official test; `None` is the separate file.
SPLITS: dict[str, tuple[float, float] | None] = {"sft": (0.0, 0.5), "rl": (0.5, 0.9), "test": (0.9, 1.0)}
SPLITS |= {"official": (0.0, 1.0), "ood": None}
DIALOGUES = ("comment", "human-role", "inter-role")
PROFILE = ("introduction", "personality", "experience", "relationship", "catchphrase")
COCO = "COCO/train2017/"
PROFILES = ("detailed", "condensed")
HUMAN = "human"


@dataclass(frozen=True)
class Wording:
    """The words of a prompt in one language; `human` is what a nameless partner is called."""

    instruction: str
    opening: str
    human: str


ENGLISH = Wording(
    "Stay in character as {name} for the whole conversation, which is with {partner} and about the picture. Say only "
    "what {name} would say, in the voice, with the knowledge and with the feelings that the following description "
    "implies.\n\n{description}",
    "You and {partner} are looking at the picture. Say the first words.",
    "a curious human",
)
CHINESE = Wording(
    "在整个对话中请始终扮演{name}。对话的另一方是{partner}，话题是这张图片。只说{name}会说的话，"
    "语气、知识和情感都要符合下面的描述，并用中文回答。\n\n{description}",
    "你和{partner}正在看这张图片。请你先开口说话。",
    "一位好奇的人",
)


def mmrole(
    split: str = "sft",
    source: str | Path = SOURCE,
    dialogues: str = "comment",
    profile: str = "detailed",
    coco_folder: str | Path | None = None,
    skip_unusable: bool = False,
    limit: int | None = None,
    seed: int = 42,
    revision: str | None = None,
):
    """
    One row for every reply of a character.

    In-distribution dialogues are shuffled and cut at 50 % and 90 % for `sft`, `rl` and `test`; `official` has the
    comments of the official in-distribution test, which are in none of the three; `ood` has characters that the others
    have not. The published code cuts at the same places, but lists files in the order of the disk, so which dialogue
    falls where is not the same.

    Between two characters (`"inter-role"`) the partner's turns are rows too, the first words among them, where the
    part has the partner's profile.

    Args:
        split (`str`, defaults to `"sft"`): `"sft"`, `"rl"`, `"test"`, `"official"` or `"ood"`.
        source (`str` or `Path`): Folder of the layout above, or a Hub id of it.
        dialogues (`str`, defaults to `"comment"`): Kind of dialogue; the paper uses comments on a picture.
        profile (`str`, defaults to `"detailed"`): `"detailed"`, or `"condensed"`, a fourth as long, as in the official
            test's prompts.
        coco_folder (`str` or `Path`, *optional*): COCO's `train2017`, where it is not below `images/`.
        skip_unusable (`bool`, defaults to `False`): Leave out dialogues without a reply, with an empty turn or one
            out of order, or without their picture or profile, and warn of their number, in place of an error.
        limit (`int`, *optional*): The first so many dialogues of the split.
        seed (`int`, defaults to `42`): Of the shuffling.
        revision (`str`, *optional*): Of the data set of the Hub.

    Returns:
        `Dataset` with a conversational `prompt`, `images` (one picture), `key` (unique), `character`, and `reference`,
        the character's own reply; for `"sft"` that is `completion`, a conversational one.

    Raises:
        LayoutError: A file is missing or laid out otherwise; it names the file and the key.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}.")
    if dialogues not in DIALOGUES:
        raise ValueError(f"`dialogues` must be one of {list(DIALOGUES)}, got {dialogues!r}.")
    if profile not in PROFILES:
        raise ValueError(f"`profile` must be one of {list(PROFILES)}, got {profile!r}.")
    if split == "official" and dialogues != "comment":
        raise ValueError(f"`split='official'` has comments alone, got `dialogues={dialogues!r}`.")
    folder = task_folder(source, ["dialogues/*", "profiles/*", "images/*"], revision)
    part = "out-of-distribution" if SPLITS[split] is None else "in-distribution"
    found = _dialogues(folder, part, dialogues)
    share = SPLITS[split]
    if share is not None:
        if dialogues == "comment":
            wanted = split == "official"
            found = [(place, d) for place, d in found if is_official(str(_id(d))) == wanted]
        random.Random(seed).shuffle(found)
        start, end = (int(at * len(found)) for at in share)
        found = found[start:end]
    reader = _Reader(folder, part, profile, coco_folder)
    rows, skipped = [], Counter()
    for place, dialogue in found[:limit]:
        try:
            rows += reader.rows(place, dialogue)
        except _UnusableError as error:
            if not skip_unusable:
                raise LayoutError(f"{error} Pass `skip_unusable=True` to leave such dialogues out.") from None
            skipped[error.reason] += 1
    if skipped:
        logger.warning("MMRole, %s: left out of %d dialogues: %s", split, len(found[:limit]), dict(skipped))
    if not rows:
        raise LayoutError(f"{folder}: no dialogue of the split {split!r} can be used: {dict(skipped)}.")
    if split == "sft":
        for row in rows:
            row["completion"] = [{"role": "assistant", "content": row.pop("reference")}]
    return to_dataset(rows)


class _UnusableError(Exception):
    """A dialogue that the published data has, and that cannot be used."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


def _dialogues(folder: Path, part: str, kind: str) -> list[tuple[str, dict]]:
    """Each dialogue with its place: file and index, as ids need not be unique."""
    base = folder / "dialogues" / part
    files = [base / f"{kind}.json"] if part == "out-of-distribution" else sorted((base / kind).glob("*.json"))
    if not files:
        raise LayoutError(f"{base / kind} has no .json files. `source` must be laid out as {SOURCE} is.")
    return [
        (f"{path.relative_to(folder / 'dialogues').with_suffix('')}/{i}", dialogue)
        for path in files
        for i, dialogue in enumerate(read_json(path, list, f"`source` must be laid out as {SOURCE} is."))
    ]


def _id(dialogue: Any) -> Any:
    return dialogue.get("id") if isinstance(dialogue, dict) else None


class _Reader:
    """Rows of the dialogues of one part; profiles are read once."""

    def __init__(self, folder: Path, part: str, profile: str, coco_folder: str | Path | None):
        self.images = folder / "images"
        self.coco_folder = coco_folder
        self.profiles = folder / "profiles" / part / "detailed_profiles"
        self.known: dict[str, str] = {}
        hint = f"`source` must be laid out as {SOURCE} is."
        self.condensed = (
            None if profile == "detailed" else read_json(self.profiles.parent / "profiles.json", dict, hint)
        )
        if self.condensed is None and not self.profiles.is_dir():
            raise LayoutError(f"{self.profiles} is missing. {hint}")

    def rows(self, place: str, dialogue: Any) -> list[dict[str, Any]]:
        """A row for every reply: the turns before it are its prompt. The partner speaks first."""
        where = f"dialogues/{place}"
        image = entry(dialogue, "image", str, where)
        turns = [_turn(turn, f"{where}: conversations[{i}]") for i, turn in enumerate(_turns(dialogue, where))]
        speakers = tuple(turns[i][0] for i in (0, 1))
        wrong = [i for i, (speaker, _) in enumerate(turns) if speaker != speakers[i % 2]]
        if wrong or speakers[0] == speakers[1]:
            raise _UnusableError("a turn out of order", f"{where}: turn {(wrong or [1])[0]} is out of order.")
        path = self._image(image, where)
        words = CHINESE if _is_chinese(turns[0][1]) else ENGLISH
        prompts = {1: [{"role": "system", "content": self._instruction(words, speakers[1], speakers[0], where)}]}
        if speakers[0] != HUMAN and self._has_profile(speakers[0]):
            opening = words.opening.format(partner=speakers[1])
            instruction = self._instruction(words, speakers[0], speakers[1], where)
            prompts[0] = [{"role": "system", "content": instruction}, {"role": "user", "content": opening}]
        rows = []
        for i, (speaker, text) in enumerate(turns):
            if i % 2 in prompts:
                row = {"key": f"{place}/{i}", "character": speaker, "images": [path]}
                rows.append({**row, "prompt": list(prompts[i % 2]), "reference": text})
            for side, messages in prompts.items():
                messages.append({"role": "assistant" if i % 2 == side else "user", "content": text})
        return rows

    def _image(self, name: str, where: str) -> str:
        path = inside(self.images, name, where)
        if self.coco_folder is not None and name.startswith(COCO):
            path = Path(self.coco_folder) / name.removeprefix(COCO)
        if not path.is_file():
            hint = " COCO's train2017 is a download of its own; see `coco_folder`." if name.startswith(COCO) else ""
            raise _UnusableError("no picture", f"{where}: its picture {path} is missing.{hint}")
        return str(path)

    def _has_profile(self, character: str) -> bool:
        if self.condensed is not None:
            return character in self.condensed
        return self._profile_path(character, "profiles").is_file()

    def _profile_path(self, character: str, where: str) -> Path:
        return inside(self.profiles, f"{character.replace(' ', '_')}.json", where)

    def _instruction(self, words: Wording, character: str, partner: str, where: str) -> str:
        named = words.human if partner == HUMAN else partner
        return words.instruction.format(name=character, partner=named, description=self._profile(character, where))

    def _profile(self, character: str, where: str) -> str:
        if character not in self.known:
            if not self._has_profile(character):
                at = self.profiles.parent / "profiles.json" if self.condensed else self._profile_path(character, where)
                raise _UnusableError("no profile", f"{where}: the profile {at} is missing.")
            self.known[character] = self._read_profile(character, where)
        return self.known[character]

    def _read_profile(self, character: str, where: str) -> str:
        if self.condensed is not None:
            return entry(self.condensed, character, str, str(self.profiles.parent / "profiles.json")).strip()
        path = self._profile_path(character, where)
        profile = read_json(path, dict)
        return "\n".join(f"{name.capitalize()}: {entry(profile, name, str, str(path)).strip()}" for name in PROFILE)


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def _turns(dialogue: dict, where: str) -> list:
    turns = entry(dialogue, "conversations", list, where)
    if len(turns) < 2:
        raise _UnusableError("no reply", f"{where}: 'conversations' has {len(turns)} turns, so there is no reply.")
    return turns


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """Speaker, which stands under `role` or `from`, and words."""
    name = "from" if isinstance(turn, dict) and "role" not in turn and "from" in turn else "role"
    speaker = entry(turn, name, str, where)
    if turn.get("value") == "":
        raise _UnusableError("an empty turn", f"{where}: 'value' is empty.")
    return speaker, entry(turn, "value", str, where).strip()
