"""The demo's report: a stage has axes of its own, and the page is legible in the dark and on a phone."""

import re

import pytest
from PIL import Image

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from latent_trl.commands.demo import DemoResult, DemoSettings  # noqa: E402
from latent_trl.evaluation.report import write_report  # noqa: E402


def a_result() -> DemoResult:
    """Cross-entropy near 0.1 with pictures, near 3 once text joins."""
    result = DemoResult(dict(vars(DemoSettings())))
    result.reward = {"before RL": 0.5, "after RL": 0.75}
    result.reward_by_kind = {when: {"colour": value} for when, value in result.reward.items()}
    for stage, ce in (("inverse_dynamics", 0.1), ("joint", 3.0)):
        rows = [{"stage": stage, "step": 100 * n, "world_model/ce": ce + 0.01 * n} for n in range(1, 4)]
        result.space_history += rows
    result.rl_history = [{"step": n, "reward": 0.5 + 0.1 * n, "entropy": 1.0, "kl": 0.2} for n in range(3)]
    result.code_counts = [0, 3, 1, 0, 2]
    answer = [("it", 1), (" is", 2), (" red", 4)] * 4
    example = {"image": Image.new("RGB", (64, 64)), "question": "what?", "truth": "red", "before": answer}
    result.examples = [{**example, "after": answer, "reward_before": 0.0, "reward_after": 1.0}] * 3
    return result


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(a_result(), tmp_path_factory.mktemp("report") / "report.html").read_text(encoding="utf-8")


def test_each_stage_is_drawn_on_axes_of_its_own(page):
    sections = re.split("<h3>", page)[1:]
    assert [section.split(",")[0] for section in sections] == ["Stage 1", "Stage 3"]
    numbers = [{float(n) for n in re.findall(r">([0-9]\.[0-9]+)</text>", s.split("<h2>")[0])} for s in sections]
    assert max(numbers[0]) < 0.2 and min(numbers[1]) > 2.9


def test_drawings_take_the_pages_colours_and_width(page):
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    drawings = re.findall(r"<svg [^>]*>", page)
    assert len(drawings) == 6 and not [tag for tag in drawings if "width=" in tag]
    assert "currentColor" in page and "#010203" not in page and "#ffffff" not in page.split("</style>")[1]


def test_the_page_needs_nothing_else(page):
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
