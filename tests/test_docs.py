"""Every Python block of README and docs runs, every public name is explained, and no link between pages is dead."""

import re
from pathlib import Path

import pytest

import latent_trl

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
# Pages whose code other tests run, with what those pages need.
RUN_ELSEWHERE = {
    "docs/rewards.md": "tests/rewards/test_rewards_page.py",
    "docs/grpo_trainer.md": "tests/trainer/test_ppo_grpo_pages.py",
    "docs/ppo_trainer.md": "tests/trainer/test_ppo_grpo_pages.py",
    "docs/sft_trainer.md": "tests/trainer/test_sft_page.py",
    "docs/checkpoint_format.md": "tests/hub",
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


def names_of(page: str) -> dict:
    """What a page takes for granted."""
    names = {"__name__": "page"}
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
    assert sum(map(len, reasons.values())) <= 6


def test_pages_that_are_run_elsewhere_are():
    for page, test in RUN_ELSEWHERE.items():
        assert (ROOT / test).exists()
        if test.endswith(".py"):
            assert Path(page).stem in (ROOT / test).read_text(encoding="utf-8")


def test_every_public_name_is_documented():
    text = "\n".join(path.read_text(encoding="utf-8") for name, path in PAGES.items() if name.startswith("docs/"))
    assert not [name for name in latent_trl.__all__ if not re.search(rf"`{name}\b", text)]


def test_every_command_is_documented():
    from latent_trl.commands.main import COMMANDS

    text = PAGES["docs/how_to/command_line.md"].read_text(encoding="utf-8")
    assert not [name for name in COMMANDS if f"`{name}`" not in text]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in local if not (PAGES[page].parent / link).exists()]


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
