"""NLVR's drawn scenes and COCO's photographs, where `LATENT_TRL_REAL_DATA` has them: trained on by all commands."""

import json
from pathlib import Path

import pytest
from task_folders import real_data

from latent_trl.commands.main import main

MODEL = str(Path(__file__).parents[2] / "model_cards" / "pocket-vlm-latent-actions")
RUN = [
    "--save_strategy",
    "no",
    "--use_cpu",
    "true",
    "--bf16",
    "false",
    "--disable_tqdm",
    "true",
    "--logging_steps",
    "1",
]
RUN += ["--per_device_train_batch_size", "4", "--report_to", "none"]
REWARD = json.dumps({"exact_match": {"candidates": ["true", "false", *map(str, range(1, 100))]}})
RL = ["--num_generations", "2", "--max_completion_length", "4", "--max_steps", "2"]


def nlvr() -> list[dict]:
    """Whether what people wrote of a scene is true."""
    scenes = json.loads((real_data("nlvr") / "dev_150.json").read_text(encoding="utf-8"))
    return [
        {
            "prompt": [{"role": "user", "content": f"true or false: {scene['sentence']}"}],
            "completion": [{"role": "assistant", "content": scene["label"]}],
            "images": [f"dev-{scene['identifier']}-0.png"],
            "answer": scene["label"],
        }
        for scene in scenes
    ]


def coco() -> list[dict]:
    """How many of its most frequent object a photograph shows, and the first person's caption of it."""
    photographs = json.loads((real_data("coco") / "captions_and_objects.json").read_text(encoding="utf-8"))
    return [
        {
            "prompt": [{"role": "user", "content": f"how many are there of this: {kind}?"}],
            "completion": [{"role": "assistant", "content": f"{count}: {photograph['captions'][0]}"}],
            "images": [photograph["file_name"]],
            "answer": str(count),
            "caption": photograph["captions"][0],
        }
        for photograph in photographs
        for kind, count in [max(photograph["objects"].items(), key=lambda item: item[1])]
    ]


@pytest.fixture(scope="module", params=[nlvr, coco], ids=["nlvr", "coco"])
def given(request, tmp_path_factory) -> list[str]:
    """The options of a data set: a file of rows, whose pictures lie in the published folder."""
    name, rows = request.param.__name__, request.param()
    file = tmp_path_factory.mktemp(name) / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["--dataset_name", str(file), "--image_root", str(real_data(name) / "images")]


def logged(folder: Path) -> list[dict]:
    state = json.loads(next(folder.rglob("trainer_state.json")).read_text())
    return [row for row in state["log_history"] if "loss" in row]


@pytest.mark.parametrize("command", ["learn", "sft", "grpo", "ppo"])
def test_every_command_trains_on_real_rows(command, given, tmp_path):
    words = [command, "--model_name_or_path", MODEL, *given, *RUN, "--output_dir", str(tmp_path)]
    words[words.index("--save_strategy") + 1] = "steps"
    words += ["--save_steps", "1"]
    if command == "learn":
        words += ["--stages", "policy", "--policy_max_steps", "2"]
    elif command == "sft":
        words += ["--max_steps", "2"]
    else:
        words += [*RL, "--reward_funcs", "exact_match", "--reward_kwargs", REWARD]
        if command == "ppo":
            place = words.index("--num_generations")
            del words[place : place + 2]
    assert main(words) == 0
    rows = logged(tmp_path)
    assert len(rows) == 2 and all(abs(row["loss"]) < 100 for row in rows)
    if command in ("grpo", "ppo"):
        # PPO's second step is made from the first one's rollout.
        assert 0 <= rows[0]["rewards/exact_match/mean"] <= 1


def test_answers_are_evaluated(given, tmp_path):
    file, root = given[1], given[3]
    words = ["evaluate", MODEL, file, "--split", "train", "--image-root", root, "--limit", "12"]
    words += ["--reward-funcs", "exact_match", "--reward-kwargs", REWARD, "--output", str(tmp_path / "report.json")]
    assert main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0 <= report["figures"]["reward/exact_match"]["estimate"] <= 1 and len(report["answers"]) == 12
