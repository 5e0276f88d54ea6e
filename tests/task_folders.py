"""Folders laid out as the published data of MMRole and PCogAlignBench are: small made-up ones, and the real text."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

PROFILE = ("introduction", "personality", "experience", "relationship", "catchphrase")


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def picture(path: Path, colour) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 32), colour).save(path)


def real_data(name: str) -> Path:
    """A folder of published data below `LATENT_TRL_REAL_DATA`; the test is skipped without it."""
    root = os.environ.get("LATENT_TRL_REAL_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip("`LATENT_TRL_REAL_DATA` names no folder with this data set")
    return Path(root) / name


def real_mmrole(root: Path) -> Path:
    """MMRole's real dialogues and profiles, with one drawn picture under all names."""
    source = real_data("mmrole")
    for name in ("dialogues", "profiles"):
        (root / name).symlink_to(source / name)
    picture(root / "drawn.png", (200, 120, 40))
    for path in source.glob("dialogues/**/*.json"):
        for said in json.loads(path.read_text(encoding="utf-8")):
            image = root / "images" / said["image"]
            if not image.exists():
                image.parent.mkdir(parents=True, exist_ok=True)
                os.link(root / "drawn.png", image)
    return root


def dialogue(name: str, image: str, turns: list[tuple[str, str]]) -> dict:
    """The first turn names its speaker under `from`, the others under `role`, as in the published files."""
    said = [{"from" if i == 0 else "role": who, "value": words} for i, (who, words) in enumerate(turns)]
    return {"id": name, "image": image, "conversations": said}


def mmrole_folder(root: Path, each: int = 5) -> Path:
    """Two characters with `2 * each` comments and a talk of two replies each; one other out of distribution."""
    for part, characters in (("in-distribution", ("Ada Stone", '老 "Lou"')), ("out-of-distribution", ("Bo",))):
        comments, talks = [], []
        for character in characters:
            name = character.replace(" ", "_")
            write_json(
                root / "profiles" / part / "detailed_profiles" / f"{name}.json", {k: f"{k} of {name}" for k in PROFILE}
            )
            own = []
            for i in range(each):
                for folder in ("COCO/train2017", "a_film"):
                    image = f"{folder}/{name[:2]}{i}.png"
                    picture(root / "images" / image, (40 * i, 90, 10 * len(name)))
                    turns = [("human", f"what is in number {i}?"), (character, f"good {i} of {folder}")]
                    own.append(dialogue(f"{name}_{i}", image, turns))
            turns = [("human", "hello"), (character, "hi"), ("human", "and now?"), (character, "reference words")]
            talk = dialogue(f"{name}_talk", own[0]["image"], turns)
            if part == "in-distribution":
                write_json(root / "dialogues" / part / "comment" / f"{name}_COCO.json", own)
                write_json(root / "dialogues" / part / "human-role" / f"{name}_COCO.json", [talk])
            comments, talks = comments + own, [*talks, talk]
        if part == "out-of-distribution":
            write_json(root / "dialogues" / part / "comment.json", comments)
            write_json(root / "dialogues" / part / "human-role.json", talks)
    return root


def pcogalign_folder(root: Path, each: int = 20, references: bool = True) -> Path:
    """`each` instances in each of the two location sets; with `references`, 80 % to train on and 20 % to test on."""
    for name in ("HCMAS", "HCSHR"):
        instances = []
        for i in range(each):
            image = f"images/{name}/{i}.png"
            picture(root / "version_v4" / image, (10 * i, 60, 200))
            instances.append(
                {
                    "individual_RoleSet": {"Home": "Parent", "Park": f"Guard {i}"},
                    "query": f"what do I do about {name} {i}?",
                    "image": {"file_path": image},
                    "eval_info": {"ImageDesc": f"a scene {i}", "EvalHelp": f"calm words {i}"},
                }
            )
        write_json(root / "version_v4" / f"{name}-test.json", instances)
        if references:
            answered = [{**instance, "golden_response": f"reference {i}"} for i, instance in enumerate(instances)]
            cut = 4 * each // 5
            write_json(root / "version_v4" / f"{name}-golden-train.json", answered[:cut])
            write_json(root / "version_v4" / f"{name}-golden-test.json", answered[cut:])
    return root
