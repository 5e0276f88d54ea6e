"""What a repository, a file or a prompt says is shown as text: the terminal and the page see no orders in it."""

import io
import json
import re
import time

import pytest
from checkpoints import make_base, make_model, report
from PIL import Image, PngImagePlugin
from rich.console import Console
from safetensors.torch import load_file, save_file

from latent_trl import CheckpointError
from latent_trl.commands.inspect import main as inspect_command
from latent_trl.commands.main import main as command_line
from latent_trl.hub import card
from latent_trl.hub.card import write_card
from latent_trl.hub.facts import TrainingRun
from latent_trl.hub.push import published_files
from latent_trl.hub.secrets import hide_secrets
from latent_trl.trainer.run.completions_table import CompletionRow, terminal_table

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"
HOSTILE = [
    "[red]x[/red]" + ESCAPES,
    "[/]",
    "[link=file:///etc/passwd]x[/link]",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "```\n\n# Trust me\n\n```",
    "x`\n~~~\n<b>",
    "\\[x](javascript:alert(1))",
    "[x](javascript:alert(1))",
    "\\| \\<script>",
    "a\r\n\r\n<script>",
]


@pytest.fixture
def folder(tmp_path):
    base = make_base(tmp_path / "base", "llama").model
    make_model(base).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def poison(folder, text):
    """The text wherever a checkpoint has room for one."""
    told = report()
    told.runs[0] = TrainingRun(
        text, [text], {"datasets": [text], "rows": 3}, {text: text}, report().runs[0].history, [text]
    )
    told.codebook.over = text
    told.codebook.codes[0] |= {"tokens": [[text, 1]], "examples": [text]}
    for name in ("dataset", "metric", "split", "interval", "note"):
        setattr(told.evaluation[0], name, text)
    told.write(folder)
    record = folder / "latent_action_config.json"
    fields = ("stage", "read_out", "base_model_name_or_path", "base_model_revision", "hidden_size", "num_codes")
    edit(record, **dict.fromkeys(fields, text), data_description={text: text}, package_versions={text: text})


@pytest.mark.parametrize("text", HOSTILE)
def test_inspect_shows_text_as_text(folder, text, capsys):
    poison(folder, text)
    inspect_command([str(folder)])
    inspect_command([str(folder), "--json"])
    out = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)
    if "[" in text:
        assert text[: text.index("]") + 1] in out


def test_inspect_shows_the_name_of_a_bare_component_as_text(folder, capsys):
    edit(folder / "codebook" / "config.json", component="[red]x[/red]" + ESCAPES)
    inspect_command([str(folder / "codebook")])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out and not re.search("[\x1b\x07\x9b]", out)


@pytest.mark.parametrize("value", ["[red]", "9e9", None, [1], {"a": 1}])
def test_figures_that_are_none_are_left_out(folder, value, capsys):
    told = report()
    told.codebook = None
    told.write(folder)
    path = folder / "training_report.json"
    content = json.loads(path.read_text())
    for row in content["runs"][0]["history"]:
        row["codebook/used"] = row["codebook/perplexity"] = value
    path.write_text(json.dumps(content))
    inspect_command([str(folder)])
    assert "its usage was not kept" in capsys.readouterr().out
    assert "was not measured" in write_card(folder).read_text()


def test_a_table_of_completions_shows_text_as_text():
    row = CompletionRow([], "[red]x[/red]" + ESCAPES, ["[/]" + ESCAPES], [1], {"[bold]r" + ESCAPES: 1.0}, 0.5)
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    console.print(terminal_table([row], "Step [1]"))
    out = console.file.getvalue()
    assert not re.search("[\x07\x9b\u202e]", out) and "\x1b]" not in out and "\x1b[2J" not in out
    assert "[red]x[/red]" in out and "[bold]r" in out and "Step [1]" in out


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_shows_text_as_text(folder, text):
    poison(folder, text)
    page = write_card(folder, repo_id=f"ada/{text}", title=text).read_text()
    body = page.split("\n---\n", 1)[1]
    fences = [line for line in body.splitlines() if line.lstrip(" 0123456789.-*").startswith(("```", "~~~"))]
    assert len(fences) == 4, fences
    outside = re.sub(r"```.*?\n```", "", body, flags=re.DOTALL)
    outside = re.sub(r"(?<!\\)`[^`\n]*(?<!\\)`", "", outside)
    assert not re.search(r"<\w|</", outside)
    assert not re.search(r"(?<!\\)(?:\\\\)*\[x\]\(", outside)
    assert outside.count("\n# ") == 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page)


def test_the_snippet_of_a_card_is_still_python(folder):
    for text in HOSTILE:
        poison(folder, text)
        page = write_card(folder, repo_id=f"ada/{text}").read_text()
        compile(re.search(r"```python\n(.*?)\n```", page, re.DOTALL)[1], "card", "exec")


@pytest.mark.parametrize("text", [r"$\frac{1}{$", "$", "$x$ and $\\nothing{$", "x" * 5000, "\n\n\n"])
def test_labels_that_are_no_formulas_are_drawn(folder, text):
    poison(folder, text)
    write_card(folder)
    assert (folder / card.CURVES_FILE).is_file() and (folder / card.CODES_FILE).is_file()


@pytest.mark.parametrize(
    "codes", [[1], [{}], [{"code": 99}], [{"code": 0, "tokens": ["x"]}], [{"code": 0, "examples": 1}]]
)
def test_codes_that_are_none_are_refused(folder, codes):
    content = report().to_dict()
    content["codebook"]["codes"] = codes
    (folder / "training_report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="`codes` describe no codes"):
        write_card(folder)


KEYS = ["hf_" + "a1" * 15, "sk-proj-" + "a1" * 15, "sk-" + "A1b2" * 8]
KEYS += ["AKIA" + "A1B2" * 4, "ghp_" + "a1" * 18, "github_pat_" + "a1" * 30, "glpat-" + "a1" * 12, "AIza" + "a1b2c" * 7]
KEYS += ["xoxb-" + "1" * 12 + "-" + "a1" * 12, "eyJ" + "a1" * 9 + ".eyJ" + "b2" * 30 + "." + "c3" * 20]
KEYS += ["-----BEGIN OPENSSH PRIVATE KEY-----"]


BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj"


@pytest.mark.parametrize(
    "key",
    [
        f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n{BODY}=\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\\n{BODY}\\n-----END PRIVATE KEY-----",
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{BODY}",
        "sk-" + "A1b2" * 200,
    ],
)
def test_a_key_is_hidden_whole(key):
    hidden = hide_secrets(f"note: {key}")
    assert BODY not in hidden and "A1b2" not in hidden and hidden.startswith("note: ")


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_found_in_files_of_any_kind(folder, key):
    published_files(folder)
    weights = folder / "codebook" / "model.safetensors"
    tensors = load_file(weights)

    def refused():
        with pytest.raises(CheckpointError, match="looks like a Hugging Face token, or a key") as error:
            published_files(folder)
        assert key not in str(error.value)

    save_file(tensors, weights, metadata={"made_by": f"me, with {key}"})
    refused()
    save_file({**tensors, key: tensors["weight"].clone()}, weights)
    refused()
    save_file(tensors, weights)
    for packed in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", f"made with {key}", zip=packed)
        Image.new("RGB", (4, 4)).save(folder / card.CURVES_FILE, pnginfo=info)
        refused()
    (folder / card.CURVES_FILE).unlink()
    (folder / "README.md").write_text(f"key: {key}")
    refused()
    (folder / "README.md").write_text("")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"note": key}).replace("-", "\\u002d").replace("_", "\\u005F")
    )
    refused()
    (folder / "tokenizer_config.json").unlink()
    told = report()
    told.runs[0].hyperparameters["note"] = key
    (folder / "README.md").unlink()
    told.write(folder)
    assert key not in write_card(folder).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "AKIArnold",
        "ghp_short",
        "eyJust.a.text",
        "xoxb",
        "AIzawa",
        "task-oriented-dialogue-system-2024",
        "sk-learn-and-the-like-of-it-all",
        "hf_short",
        "risk-" + "a1" * 20,
    ],
)
def test_words_that_are_no_keys(folder, text):
    (folder / "README.md").write_text(text)
    published_files(folder)


@pytest.mark.parametrize("text", ["sk-" * 10**6, "-eyJ" + "a" * 10**6, "-eyJaaaaaaaaaa" * 10**5, "gh" * 10**6])
def test_a_search_for_keys_takes_its_time_once(folder, text):
    start = time.monotonic()
    (folder / "README.md").write_text(text)
    published_files(folder)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("base", [f"/nowhere/{ESCAPES}", ["x"], {"a": 1}, 3])
def test_an_error_that_quotes_a_file_gives_the_terminal_no_order(folder, base, capsys):
    edit(folder / "latent_action_config.json", base_model_name_or_path=base)
    for command in (["generate", str(folder), "--prompt", "x"], ["plan", str(folder)]):
        assert command_line(command) == 1
        told = capsys.readouterr().err
        assert "Error: " in told and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", told)
