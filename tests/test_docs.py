"""Every Python block of README and docs runs, every public name is explained, and no link between pages is dead."""

import re
from pathlib import Path

import pytest

import latent_trl

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "benchmarks/logs")
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
}
# Pages whose code other tests run, with what those pages need.
RUN_ELSEWHERE = {
    "docs/rewards.md": "tests/rewards/test_rewards_page.py",
    "docs/grpo_trainer.md": "tests/trainer/test_ppo_grpo_pages.py",
    "docs/ppo_trainer.md": "tests/trainer/test_ppo_grpo_pages.py",
    "docs/rloo_trainer.md": "tests/trainer/test_ppo_grpo_pages.py",
    "docs/sft_trainer.md": "tests/trainer/test_sft_page.py",
    "docs/distillation_trainer.md": "tests/trainer/test_distillation_page.py",
    "docs/checkpoint_format.md": "tests/hub",
    "docs/serving.md": "tests/serving/test_page.py",
    "docs/quickstart.md": "tests/commands/test_notebooks.py",
    "docs/how_to/steering.md": "tests/commands/test_notebooks.py",
}
BLOCK = re.compile(r"(?:^<!-- no-run: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[str | None, str]]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [(match["reason"], match["code"]) for match in BLOCK.finditer(text)]


RUN_HERE = [page for page in PAGES if page not in RUN_ELSEWHERE and any(reason is None for reason, _ in blocks(page))]


@pytest.fixture
def at_root(tmp_path, monkeypatch):
    """A folder that looks like the clone's root, where outputs may be written; training stops after one step."""
    import transformers

    pytest.importorskip("easy_vqa")
    pytest.importorskip("chitchat_dataset")
    pytest.importorskip("jinja2")

    class OneStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, OneStep]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_full(tmp_path, monkeypatch, caplog):
    """The same folder, where training runs to its end, and what was logged."""
    pytest.importorskip("easy_vqa")
    pytest.importorskip("chitchat_dataset")
    for name in ("model_cards", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return caplog


def held_out_reward(model, processor) -> float:
    from latent_trl.data.shapes import shape_questions
    from latent_trl.evaluation.answers import answer
    from latent_trl.rewards.exact_match import ExactMatchReward

    rows = shape_questions("test", limit=300)
    return answer(model, processor, rows, ExactMatchReward(), max_new_tokens=12).mean_reward


def alarms(caplog) -> list[str]:
    return [record.message for record in caplog.records if "alarm" in record.message]


@pytest.mark.slow
def test_the_readmes_twenty_lines_learn_without_an_alarm(in_full):
    (block,) = [code for _, code in blocks("README.md")]
    start, train = block.split("args = LatentActionSpaceConfig")
    names: dict = {"__name__": "readme"}
    exec(compile(start, "README.md", "exec"), names)
    before = held_out_reward(names["model"], names["processor"])
    exec(compile("args = LatentActionSpaceConfig" + train, "README.md", "exec"), names)
    after = held_out_reward(names["model"], names["processor"])
    print(f"exact match {before:.3f} before, {after:.3f} after")
    assert after >= 0.80 and after >= before + 0.2
    assert not alarms(in_full)


@pytest.mark.slow
def test_the_commands_of_the_command_line_page_learn_without_an_alarm(in_full):
    import shlex

    from transformers import AutoProcessor

    from latent_trl import LatentActionModel
    from latent_trl.commands.main import main

    text = PAGES["docs/how_to/command_line.md"].read_text(encoding="utf-8").split("Or with flags.")[1]
    block = re.search(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]
    for line in block.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        assert program == "latent-trl" and main([*words, "--use_cpu", "true"]) == 0
    processor = AutoProcessor.from_pretrained("model_cards/pocket-vlm")
    rewards = [
        held_out_reward(LatentActionModel.from_pretrained(f"outputs/{name}"), processor) for name in ("space", "grpo")
    ]
    print(f"exact match {rewards[0]:.3f} before, {rewards[1]:.3f} after")
    assert rewards[1] >= 0.80 and rewards[1] >= rewards[0] + 0.2
    assert not alarms(in_full)


@pytest.mark.slow
def test_the_notebook_on_own_data_learns_without_an_alarm(in_full):
    import json

    cells = json.loads((ROOT / "examples/notebooks/own_model_and_data.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "own_model_and_data.ipynb", "exec"), names)
    before, after = names["before"].mean_reward, names["after"].mean_reward
    print(f"in one word: {before:.2f} before, {after:.2f} after")
    assert after >= 0.9 and after >= before + 0.3
    assert not alarms(in_full)


def names_of(page: str) -> dict:
    """What a page takes for granted."""
    names = {"__name__": "page"}
    if page == "docs/evaluation.md":
        # Of the extra that the page names.
        pytest.importorskip("evaluate")
    if page == "docs/backbones.md":
        from transformers import AutoModelForImageTextToText

        names["model"] = AutoModelForImageTextToText.from_pretrained("model_cards/pocket-vlm", dtype="float32")
    return names


@pytest.mark.parametrize("page", RUN_HERE)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, at_root):
    names = names_of(page)
    for reason, code in blocks(page):
        if reason is None:
            exec(compile(code, page, "exec"), names)


def test_what_is_not_run_says_why(record_property):
    reasons = {page: [reason for reason, _ in blocks(page) if reason] for page in PAGES}
    for page, found in reasons.items():
        for reason in found:
            record_property(page, reason)
            assert len(reason.split()) >= 3, f"{page}: {reason!r} is no reason"
    assert not reasons["README.md"]
    assert sum(map(len, reasons.values())) <= 9


def test_pages_that_are_run_elsewhere_are():
    for page, test in RUN_ELSEWHERE.items():
        assert (ROOT / test).exists()
        if test.endswith(".py"):
            assert Path(page).stem.removesuffix("_trainer") in (ROOT / test).read_text(encoding="utf-8")


def test_every_public_name_is_documented():
    text = "\n".join(path.read_text(encoding="utf-8") for name, path in PAGES.items() if name.startswith("docs/"))
    assert not [name for name in latent_trl.__all__ if not re.search(rf"`{name}\b", text)]


def test_no_page_installs_from_an_index_that_has_not_got_the_package():
    wrong = re.compile(r"pip install [^\n`]*latent[_-]trl")
    pages = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
    assert not [name for name, text in pages.items() if wrong.search(text)]


def test_the_readme_keeps_the_markers_of_the_test_command():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    block = text.split("<!-- test command -->")[1].split("<!-- end -->")[0]
    assert block.count("```") == 2 and "pytest" in block


def test_every_command_is_documented():
    from latent_trl.commands.main import COMMANDS

    text = PAGES["docs/how_to/command_line.md"].read_text(encoding="utf-8")
    assert not [name for name in COMMANDS if f"`{name}`" not in text]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in local if not (PAGES[page].parent / link).exists()]


def test_links_and_pictures_of_the_site_are_on_it():
    """A page lies where its source does, so that paths in HTML hold, and links to files beside `docs` become text."""
    import runpy

    import yaml

    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["use_directory_urls"] is False
    changed = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_markdown"]
    for page, path in PAGES.items():
        if page.startswith("docs/"):
            text = re.sub(r"```.*?```", "", changed(path.read_text(encoding="utf-8")), flags=re.DOTALL)
            links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
            local = [path.parent / link for link in links if "://" not in link and not link.startswith("mailto:")]
            assert all(link.resolve().is_relative_to(ROOT / "docs") for link in local), page


def test_the_site_has_pages_that_exist():
    import yaml

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(node) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]

    found = leaves(site["nav"])
    assert len(found) == len(set(found)) > 15
    assert not [name for name in found if f"docs/{name}" not in PAGES]
