"""The table of completions: what it holds, how it looks in each place, and what trackers are told."""

import re
import sys
import types

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from PIL import Image
from rich.console import Console
from tiny_models import latent

from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer, LatentActionPPOConfig, LatentActionPPOTrainer
from latent_trl.evaluation.report import code_colour
from latent_trl.trainer.run.completions_table import (
    CompletionRow,
    html_page,
    markdown_table,
    picture,
    prompt_text,
    terminal_table,
)

ROWS = [
    CompletionRow(
        [Image.new("RGB", (40, 60), (200, 30, 30))], "what?", ["it", " is", " red|"], [3, 5, 3], {"a": 1}, 0.7
    ),
    CompletionRow([], "<b>", ["<i>", "\n"], [1, 2], {"a": float("nan")}, -0.7),
]


def trainer_of(kind: str, folder, with_images: bool = True, **options):
    model, tiny = latent("llava")
    pictures = [Image.new("RGB", (32, 32), (60 * i, 0, 0)) for i in range(4)]
    rows = [{"prompt": [{"role": "user", "content": f"what {i}?"}]} for i in range(4)]
    if with_images:
        rows = [{**row, "images": [image]} for row, image in zip(rows, pictures, strict=True)]
    config, trainer = {
        "grpo": (LatentActionGRPOConfig, LatentActionGRPOTrainer),
        "ppo": (LatentActionPPOConfig, LatentActionPPOTrainer),
    }[kind]
    fields = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4, "logging_steps": 1}
    args = config(str(folder), **{**fields, "max_steps": 1, "log_completions": True, "save_strategy": "no", **options})
    data = Dataset.from_list(rows)
    return trainer(model, length, args, train_dataset=data, eval_dataset=data, processing_class=tiny.processor)


def length(completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_shows_its_completions_in_the_terminal_and_on_a_page(kind, tmp_path, capsys):
    trainer = trainer_of(kind, tmp_path, num_completions_to_print=2)
    trainer.train()
    said = capsys.readouterr().out
    assert said.count("answer, with its codes") == 1 and "Step 1" in said and "what" in said
    page = (tmp_path / "completions" / "completions_00001.html").read_text()
    assert page.count("<tr>") == 5 and page.count('src="data:image/png') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    codes = [code for row in trainer._logs["extra"]["action_ids"] for code in row]
    assert [int(code) for code in re.findall(r'title="code (\d+)"', page)] == codes
    tokens = trainer._logs["extra"]["completion_ids"]
    assert [len(row) for row in tokens] == [len(row) for row in trainer._logs["extra"]["action_ids"]]
    texts = [completion[0]["content"] for completion in trainer._logs["completion"]]
    tokenizer = trainer.processing_class.tokenizer
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens] == texts
    # wandb takes no column of lists whose parts differ.
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert all(isinstance(prompt, str) for prompt in table["prompt"])


def test_evaluation_has_a_page_of_its_own(tmp_path, capsys):
    trainer = trainer_of("grpo", tmp_path, with_images=False, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert "Evaluation, step 1" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "completions").glob("*.html")}
    assert names == {"completions_00001.html", "eval_completions_00001.html"}
    assert "<img" not in (tmp_path / "completions" / "completions_00001.html").read_text()


def test_without_log_completions_nothing_is_shown(tmp_path, capsys):
    trainer_of("grpo", tmp_path, log_completions=False).train()
    assert not (tmp_path / "completions").exists()
    assert "answer, with its codes" not in capsys.readouterr().out


def test_tensorboard_gets_picture_and_text(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of("grpo", tmp_path, report_to="tensorboard", num_completions_to_print=0)
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "tensors": 0}).Reload()
    (image,) = events.Images("completions_by_code")
    assert image.step == 1 and image.width > 900 and image.height > 200
    (text,) = events.Tensors("completions_by_code/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert said.startswith("| prompt | answer | length | advantage |") and said.count("\n") == 5


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_with_pictures_get_one(name, tmp_path, monkeypatch):
    """At the boundary: the two calls that are made of their public interface, `Image` and `log`."""
    told = []
    module = types.SimpleNamespace(Image=lambda image: ("picture", image.size), log=told.append)
    monkeypatch.setitem(sys.modules, name, module)
    trainer = trainer_of("grpo", tmp_path)
    trainer.args.report_to = [name]
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "CompletionsTable")
    callback._report(trainer.args, trainer.state, ROWS, "Step 1", "completions")
    assert told == [{"completions_by_code": ("picture", picture(ROWS, "Step 1").size)}]


def test_the_terminal_shows_tokens_on_their_colours_with_a_thumbnail():
    console = Console(
        width=120, force_terminal=True, color_system="truecolor", record=True, file=open("/dev/null", "w")
    )
    console.print(terminal_table(ROWS, "Step 1"))
    shown = console.export_html(inline_styles=True)
    for code in (3, 5, 1, 2):
        assert f"background-color: {code_colour(code)}" in shown
    assert shown.count("▀") > 60 and "background-color: #c81e1e" in shown
    plain = Console(width=120, record=True, file=open("/dev/null", "w"))
    plain.print(terminal_table(ROWS, "Step 1", thumbnails=False))
    text = plain.export_text()
    assert "▀" not in text and "it3  is5  red|3" in text and "–" in text and "<b>" in text


def test_the_page_shows_words_as_words():
    page = html_page(ROWS, "<s>")
    assert "<b>" not in page and "<i>" not in page and "<s>" not in page
    assert page.count(f"background: {code_colour(3)}") == 2
    assert ">–</td>" in page and 'class="number up">0.7' in page and 'class="number down">-0.7' in page


def test_the_picture_has_the_colours_of_the_codes_and_the_thumbnail():
    page = np.asarray(picture(ROWS, "Step 1"))
    colours = {tuple(colour) for colour in page.reshape(-1, 3).tolist()}
    for code in (3, 5, 1, 2):
        assert tuple(bytes.fromhex(code_colour(code)[1:])) in colours
    assert (page == (200, 30, 30)).all(axis=-1).sum() == 64 * 64
    long = CompletionRow([], "word " * 200, ["token "] * 200, [7] * 200, {"a": 1.0}, 0.0)
    assert picture([long], "Step 1").size[0] < page.shape[1] < picture([long], "Step 1").size[1] + 960


def test_markdown_keeps_its_columns():
    lines = markdown_table(ROWS).split("\n")
    assert lines[2] == "| what? | it[3]  is[5]  red\\|[3] | 1 | 0.7 |" and len(lines) == 4


def test_prompts_of_several_messages_keep_their_roles():
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert prompt_text("plain") == "plain"
    assert prompt_text([{"role": "user", "content": parts}]) == "what?"
    both = [{"role": "system", "content": "be kind"}, {"role": "user", "content": parts}]
    assert prompt_text(both) == "system: be kind\nuser: what?"
