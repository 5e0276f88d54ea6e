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


def one(completions, **columns):
    return [1.0] * len(completions)


RL = {"per_device_train_batch_size": 2, "max_completion_length": 2}
TRAINERS = {
    "Space": {"stages": ["inverse_dynamics"], "inverse_dynamics_max_steps": 1},
    "SFT": {},
    "GRPO": {**RL, "num_generations": 2},
    "RLOO": {**RL, "num_generations": 2},
    "PPO": RL,
    "PlanSpace": {"max_completion_length": 2, "answers_per_prompt": 3},
    "PlanBandit": {"max_completion_length": 2, "rollout_prompts": 2},
}


def trainer_of(name: str, folder, rows, evaluated=None, **options):
    import latent_trl

    plans = name.startswith("Plan")
    prefix = name if plans else f"LatentAction{name}"
    shared = {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
    args = getattr(latent_trl, f"{prefix}Config")(str(folder), **shared, **TRAINERS[name], **options)
    model, own = latent("llava")
    if plans:
        model = latent_trl.PlanModel(own.model, latent_trl.PlanConfig(num_plans=4, depth=1, rank=2))
    else:
        model.config.stage = "policy"
    rewards = {} if name in ("Space", "SFT", "PlanSpace") else {"reward_funcs": one}
    return getattr(latent_trl, f"{prefix}Trainer")(
        model, args=args, train_dataset=rows, eval_dataset=evaluated, processing_class=own.processor, **rewards
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_open_neither_and_say_so_before_the_first_step(name, secret, tmp_path):
    fine = Dataset.from_list([{"prompt": USER, "completion": SAID, "reference": "red"}] * 4)
    evaluates = {"eval_strategy": "no"} if name == "PlanSpace" else {}
    for cell in (secret, URL):
        for kind in ("images", "a column that datasets decodes"):
            rows = ROWS[kind](cell)
            rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
            with pytest.raises(ValueError, match="Row [01]: "):
                trainer_of(name, tmp_path / "train", rows, **evaluates).train()
            with pytest.raises(ValueError, match="Row [01] of `eval_dataset`: "):
                trainer_of(name, tmp_path / "eval", fine, rows, **evaluates).train()
            with pytest.raises(ValueError, match="Row [01] of `eval_dataset`: "):
                trainer_of(name, tmp_path / "other", fine, **evaluates).evaluate(rows)
    assert not touched


@pytest.mark.parametrize("name", TRAINERS)
def test_skipping_opens_neither(name, secret, tmp_path):
    fine = [{"prompt": USER, "completion": SAID, "images": [], "reference": "red"}] * 3
    rows = [*fine, *ROWS["images"](secret), *ROWS["images"](URL)]
    trainer = trainer_of(
        name,
        tmp_path,
        Dataset.from_list(fine),
        on_bad_row="skip",
        **({"eval_strategy": "no"} if name == "PlanSpace" else {}),
    )
    trainer.evaluate(Dataset.from_list(rows))
    assert len(trainer.bad_rows.listed()) == 4 and not touched


def test_the_anchor_opens_neither(secret, tmp_path):
    from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer

    fine = Dataset.from_list([{"prompt": USER}] * 4)
    for cell in (secret, URL):
        model, own = latent("llava")
        args = LatentActionGRPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, save_strategy="no", anchor_coef=0.1, **TRAINERS["GRPO"]
        )
        trainer = LatentActionGRPOTrainer(
            model, one, args, train_dataset=fine, processing_class=own.processor, anchor_dataset=ROWS["images"](cell)
        )
        with pytest.raises(ValueError, match="Row [01] of `anchor_dataset`: "):
            trainer.train()
    assert not touched


def test_commands_open_neither(secret, tmp_path, checkpoint_without_pictures, capsys):
    from latent_trl.commands.main import main

    for name, cell in (("path", secret), ("url", URL)):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text(json.dumps({"prompt": USER, "images": [cell], "answer": "red"}) + "\n")
        assert main(["evaluate", checkpoint_without_pictures, str(rows), "--split", "train"]) == 1
        output = ["--output", str(tmp_path / "a.html")]
        assert main(["atlas", checkpoint_without_pictures, str(rows), "--split", "train", *output]) == 1
        row = {"prompt": USER, "completion": SAID, "images": [cell], "answer": "red"}
        rows.write_text((json.dumps(row) + "\n") * 16)
        for command in ("learn", "sft", "grpo", "ppo", "rloo"):
            words = [command, "--model_name_or_path", checkpoint_without_pictures, "--dataset_name", str(rows)]
            words += ["--output_dir", str(tmp_path / command), "--use_cpu", "true", "--save_strategy", "no"]
            words += ["--per_device_train_batch_size", "8"]
            words += ["--reward_funcs", "exact_match"] if command in ("grpo", "ppo", "rloo") else []
            words += ["--stages", "policy"] if command == "learn" else []
            assert main(words) == 1, command
            assert "Row " in capsys.readouterr().err
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
