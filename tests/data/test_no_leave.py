"""No entry point opens a path or an address that a row names, unless `image_root` gives leave."""

import json
import sys

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_models import latent

from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.formats import convert_row
from latent_trl.data.mixing import MixedRows, MixedRowsCollator
from latent_trl.data.prompts import encode_prompts
from latent_trl.data.reading import OpenedRows
from latent_trl.evaluation.answers import answer, score_answers
from latent_trl.evaluation.atlas import make_atlas
from latent_trl.evaluation.perplexity import text_perplexity
from latent_trl.rewards.image_text import ImageTextReward

USER = [{"role": "user", "content": "what is it?"}]
SAID = [{"role": "assistant", "content": "red"}]
PORT = 47123
URL = f"http://127.0.0.1:{PORT}/not-to-be-opened.png"
touched: list[str] = []
watching = False


def watch(event: str, args: tuple) -> None:
    if watching and event == "open" and "not-to-be-opened" in str(args[0]):
        touched.append(str(args[0]))
    if watching and event == "socket.connect" and PORT in tuple(args[1]):
        touched.append(URL)


sys.addaudithook(watch)


@pytest.fixture(autouse=True)
def watched():
    global watching
    touched.clear()
    watching = True
    yield
    watching = False


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("elsewhere") / "not-to-be-opened.png"
    Image.new("RGB", (16, 16), "red").save(path)
    return str(path)


@pytest.fixture(scope="module")
def tiny():
    return latent("llava")


def of_feature(cell: str) -> Dataset:
    text = List({"role": Value("string"), "content": Value("string")})
    features = Features(
        {"prompt": text, "completion": text, "images": List(ImageFeature()), "reference": Value("string")}
    )
    row = {"prompt": USER, "completion": SAID, "images": [{"bytes": None, "path": cell}], "reference": "red"}
    return Dataset.from_list([row] * 2, features=features)


def in_part(cell: str) -> list[dict]:
    prompt = [{"role": "user", "content": [{"type": "image", "image": cell}, {"type": "text", "text": "what is it?"}]}]
    return [{"prompt": prompt, "completion": SAID, "reference": "red"}] * 2


def converted(cell: str) -> list[dict]:
    part = {"type": "image_url", "image_url": {"url": cell}}
    return [convert_row({"prompt": [{"role": "user", "content": [part]}], "completion": SAID, "reference": "red"})] * 2


ROWS = {
    "images": lambda cell: [{"prompt": USER, "completion": SAID, "images": [cell], "reference": "red"}] * 2,
    "image": lambda cell: [{"prompt": USER, "completion": SAID, "image": cell, "reference": "red"}] * 2,
    "a cell": lambda cell: (
        [{"prompt": USER, "completion": SAID, "images": [{"path": cell, "bytes": None}], "reference": "red"}] * 2
    ),
    "a column that datasets decodes": of_feature,
    "a part": in_part,
    "another format": converted,
}


def learning(model, tiny, rows):
    mixed = MixedRows(rows)
    MixedRowsCollator(LatentActionDataCollator(tiny.processor))([mixed[0]])


def searching(model, tiny, rows):
    from latent_trl.search import best_of_n

    best_of_n(model, tiny.processor, rows, lambda completions, **_: [1.0] * len(completions), n=2, max_new_tokens=2)


ENTRIES = {
    "learning": learning,
    "search": searching,
    "prompts": lambda model, tiny, rows: encode_prompts(tiny.processor, [OpenedRows(rows).stored[0]]),
    "answers": lambda model, tiny, rows: answer(model, tiny.processor, rows, max_new_tokens=2),
    "scores": lambda model, tiny, rows: score_answers(lambda **_: [1.0] * 2, rows, ["a", "b"], [[1], [2]]),
    "perplexity": lambda model, tiny, rows: text_perplexity(model, tiny.processor, rows),
    "atlas": lambda model, tiny, rows: make_atlas(model, tiny.processor, rows, max_new_tokens=2),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", ROWS)
def test_neither_a_path_nor_an_address_is_opened(tiny, secret, kind, entry):
    model, own = tiny
    for cell, message in ((secret, "no `image_root` says"), (URL, "is a URL")):
        with pytest.raises(ValueError, match=f"Row [01]: .*{message}"):
            ENTRIES[entry](model, own, ROWS[kind](cell))
    assert not touched


def test_rewards_open_neither(secret):
    reward = ImageTextReward(lambda images, texts: [1.0] * len(images))
    for cell in (secret, URL, {"path": secret, "bytes": None}):
        with pytest.raises(ValueError, match="Row 0 of the batch: "):
            reward(prompts=["?"], completions=["a"], images=[[cell]])
    assert not touched


def test_the_judge_opens_neither(secret):
    pytest.importorskip("openai")
    from latent_trl.rewards.judge import JudgeReward

    judge = JudgeReward("judge", base_url="http://127.0.0.1:9/v1")
    for cell in (secret, URL):
        with pytest.raises(ValueError, match="Row 1 of the batch: "):
            judge._image_urls([[], [cell]])
    assert not touched


@pytest.mark.parametrize("kind", ["images", "a column that datasets decodes"])
def test_trainers_open_neither_and_say_so_before_the_first_step(secret, kind, tmp_path):
    from latent_trl import (
        LatentActionGRPOConfig,
        LatentActionGRPOTrainer,
        LatentActionSFTConfig,
        LatentActionSFTTrainer,
    )

    options = {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
    for cell in (secret, URL):
        rows = ROWS[kind](cell)
        rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        model, own = latent("llava")
        model.config.stage = "policy"
        args = LatentActionSFTConfig(str(tmp_path / "sft"), **options)
        with pytest.raises(ValueError, match="Row [01]: "):
            LatentActionSFTTrainer(model, args, rows, processing_class=own.processor).train()
        model, own = latent("llava")
        args = LatentActionGRPOConfig(
            str(tmp_path / "rl"), per_device_train_batch_size=2, num_generations=2, max_completion_length=2, **options
        )
        reward = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
        with pytest.raises(ValueError, match="Row [01]: "):
            LatentActionGRPOTrainer(model, reward, args, train_dataset=rows, processing_class=own.processor).train()
    assert not touched


def test_commands_open_neither(secret, tmp_path, checkpoint_without_pictures):
    from latent_trl.commands.main import main

    for name, cell in (("path", secret), ("url", URL)):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text(json.dumps({"prompt": USER, "images": [cell], "answer": "red"}) + "\n")
        assert main(["evaluate", checkpoint_without_pictures, str(rows), "--split", "train"]) == 1
        output = ["--output", str(tmp_path / "a.html")]
        assert main(["atlas", checkpoint_without_pictures, str(rows), "--split", "train", *output]) == 1
    assert not touched


@pytest.fixture
def checkpoint_without_pictures():
    from pathlib import Path

    return str(Path(__file__).parents[2] / "model_cards" / "pocket-vlm-latent-actions")


def test_leave_is_given_for_one_folder(tiny, secret):
    from pathlib import Path

    model, own = tiny
    for kind, rows in ROWS.items():
        found = answer(model, own.processor, OpenedRows(rows(secret), Path(secret).parent), max_new_tokens=2)
        assert len(found.texts) == 2, kind
    assert touched
