"""The notebooks hold the code of their pages, run from top to bottom, and keep outputs that are fit to be read."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
LARGEST = 300_000
KINDS = {"stream", "display_data", "execute_result"}
MIMES = {"text/plain", "image/png"}
# What runs here and nowhere else, what is said to whoever runs it, and what is drawn again and again.
PATH = re.compile(r"(?<![\w.:/])(/|[A-Z]:\\)[\w.-]+[/\\][\w./\\-]+")
NOISE = re.compile(r"Traceback|[Ww]arning|alarm|it/s|s/it|\x1b\[|\r|<progress")


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def code_of(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in code_cells(path)]


def texts_of(cell: dict) -> list[str]:
    """What a cell shows as text: printed, and the last expression's value."""
    shown = [output["text"] if "text" in output else output["data"]["text/plain"] for output in cell["outputs"]]
    return ["".join(text) for text in shown]


def prints(code: str) -> bool:
    """Whether the cell itself calls `print`, which a function that it only defines does not."""
    cell = ast.parse(code)
    cell.body = [node for node in cell.body if not isinstance(node, ast.FunctionDef)]
    called = [node.func for node in ast.walk(cell) if isinstance(node, ast.Call)]
    return any(isinstance(name, ast.Name) and name.id == "print" for name in called)


@each_notebook
def test_a_notebook_is_of_one_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        code = "".join(cell["source"])
        printed = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        drawn = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert bool(printed) or not prints(code), code
        assert len(drawn) == code.count("plt.show()"), code


@each_notebook
def test_outputs_are_fit_to_be_read(path):
    assert path.stat().st_size <= LARGEST
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for cell in code_cells(path):
        assert not cell["metadata"]
        for output in cell["outputs"]:
            assert output["output_type"] in KINDS and output.get("name", "stdout") == "stdout"
            assert set(output.get("data", {})) <= MIMES
        for text in texts_of(cell):
            assert not NOISE.search(text) and not PATH.search(text), text
            assert all(len(line) <= 160 for line in text.splitlines()), text


@each_notebook
def test_pictures_show_something(path):
    drawn = [
        Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        for cell in code_cells(path)
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(drawn) >= 3
    for picture in drawn:
        assert picture.width <= 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize(
    "text", ["saved in /root/a/b.txt", "/tmp/x", r"C:\Users\me", "Epoch 1: 3.1it/s", "UserWarning: no"]
)
def test_noise_is_found(text):
    assert PATH.search(text) or NOISE.search(text)


@pytest.mark.parametrize(
    "text", ["outputs/atlas.html: 14 codes", "codes 112/128", "{'reward': 0.5}", "ok   gradients reach"]
)
def test_what_is_no_noise_is_let_through(text):
    assert not PATH.search(text) and not NOISE.search(text)


# These have the code of a page, in its order, and cells of their own that draw.
SAME_CODE = {"quickstart": "docs/quickstart.md", "read_and_steer_codes": "docs/how_to/steering.md"}


@pytest.mark.parametrize("name", SAME_CODE)
def test_a_notebook_has_the_code_of_its_page(name):
    page = (ROOT / SAME_CODE[name]).read_text(encoding="utf-8")
    blocks = [block.strip() for block in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]
    first, *cells = code_of(ROOT / "examples" / "notebooks" / f"{name}.ipynb")
    assert "os.chdir" in first and blocks
    assert [cell for cell in cells if cell in blocks] == blocks


@each_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    import transformers

    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))

    class OneStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, OneStep]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    (tmp_path / "examples" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "examples" / "notebooks")
    names = {"__name__": "notebook"}
    for code in code_of(path):
        # A semicolon hides a value in a notebook.
        exec(compile(code.rstrip(";"), path.name, "exec"), names)
    saved = {
        "quickstart": "model/policy",
        "own_model_and_data": "own/model/policy",
        "read_and_steer_codes": "atlas.html",
    }
    assert (tmp_path / "outputs" / saved[path.stem]).exists()
