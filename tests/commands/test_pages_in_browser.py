"""The pages that are written, in a real browser without a window: they draw what they say, and fit on the screen."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
MEASURE = """
<script>
addEventListener("load", () => {
  const all = selector => [...document.querySelectorAll(selector)];
  const box = element => { const r = element.getBoundingClientRect(); return [r.width, r.height]; };
  const measured = {
    page: [document.documentElement.scrollWidth, innerWidth],
    drawings: all("svg").map(box),
    images: all("img").map(image => [image.complete, image.naturalWidth]),
    colours: [...new Set(all(".token").map(element => getComputedStyle(element).backgroundColor))],
    dead: all('a[href^="#"]').filter(link => !document.querySelector(link.getAttribute("href"))).length,
  };
  const find = document.getElementById("find"), shown = () => all(".code").filter(card => box(card)[1] > 0).length;
  if (find) {
    measured.cards = [shown()];
    for (const wanted of [document.querySelector(".code header b").textContent, "no such word", ""]) {
      find.value = wanted;
      find.dispatchEvent(new Event("input"));
      measured.cards.push(shown());
    }
  }
  document.body.dataset.measured = JSON.stringify(measured);
});
</script>
"""


def measured(page, tmp_path, width: int) -> dict:
    """What a browser makes of a page that it is given alone, without a network."""
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}"]
    words = [BROWSER, *options, f"--window-size={width},900", "--dump-dom", copy.as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    return json.loads(html.unescape(re.search('data-measured="([^"]*)"', shown.stdout)[1]))


@pytest.fixture(scope="module")
def atlas(checkpoint, tmp_path_factory):
    from latent_trl.commands.main import main

    pytest.importorskip("jinja2")
    path = tmp_path_factory.mktemp("atlas") / "atlas.html"
    words = [checkpoint, "latent_trl.data.shapes:shape_questions", "--limit", "24", "--max-new-tokens", "6"]
    assert main(["atlas", *words, "--forced-prompts", "3", "--output", str(path)]) == 0
    return path


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_the_atlas(atlas, tmp_path, width):
    found = measured(atlas, tmp_path, width)
    assert len(found["drawings"]) == 4 and all(w > 100 and h > 50 for w, h in found["drawings"])
    assert found["images"] and all(complete and natural > 0 for complete, natural in found["images"])
    assert found["dead"] == 0
    every, one, none, again = found["cards"]
    assert every > 1 and 1 <= one < every and none == 0 and again == every
    assert found["page"][0] <= found["page"][1] + 1


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_of_completions(tmp_path, width):
    from latent_trl.trainer.run.completions_table import CompletionRow, html_page

    rows = [
        CompletionRow(
            [Image.new("RGB", (64, 64), (9, 99, 9))], "what?", ["it", " is"] * 40, [3, 5] * 40, {"a": 1.0}, 0.5
        )
    ]
    path = tmp_path / "completions.html"
    path.write_text(html_page(rows, "Step 1"), encoding="utf-8")
    found = measured(path, tmp_path, width)
    assert len(found["colours"]) == 2 and found["images"] == [[True, 64]]
    assert found["page"][0] <= found["page"][1] + 1


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_the_report_of_the_demo(tmp_path, width):
    pytest.importorskip("jinja2")
    from evaluation.test_report import a_result

    from latent_trl.evaluation.report import write_report

    found = measured(write_report(a_result(), tmp_path / "report.html"), tmp_path, width)
    assert len(found["drawings"]) == 6 and all(w > 200 and h > 80 for w, h in found["drawings"])
    assert len(found["images"]) == 3 and len(found["colours"]) == 3
    assert found["page"][0] <= found["page"][1] + 1
