"""The notebooks run from top to bottom, and are kept without outputs."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    for code in code_of(path):
        ast.parse(code)


# These have the code of pages that `test_docs.py` runs.
SAME_CODE = {"quickstart": "docs/quickstart.md", "read_and_steer_codes": "docs/how_to/steering.md"}


@pytest.mark.parametrize("name", SAME_CODE)
def test_a_notebook_has_the_code_of_its_page(name):
    page = (ROOT / SAME_CODE[name]).read_text(encoding="utf-8")
    first, *cells = code_of(ROOT / "examples" / "notebooks" / f"{name}.ipynb")
    assert "os.chdir" in first and cells
    assert not [cell for cell in cells if cell not in page]
    assert page.count("```python") == len(cells)


def test_own_model_and_data_runs(tmp_path, monkeypatch):
    import transformers

    class OneStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, OneStep]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    (tmp_path / "examples" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "examples" / "notebooks")
    names = {"__name__": "notebook"}
    for code in code_of(ROOT / "examples" / "notebooks" / "own_model_and_data.ipynb"):
        exec(compile(code, "own_model_and_data.ipynb", "exec"), names)
    assert (tmp_path / "outputs" / "own" / "model" / "policy" / "model.safetensors").is_file()
