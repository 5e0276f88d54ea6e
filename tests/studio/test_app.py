"""The window on the codes in a headless browser: asked, looked into and continued, by mouse and by keyboard."""

import math
import re
import shutil

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from latent_trl import LatentActionModel  # noqa: E402
from latent_trl.commands.loading import load_processor  # noqa: E402
from latent_trl.commands.rows import load_rows  # noqa: E402
from latent_trl.data.reading import OpenedRows  # noqa: E402
from latent_trl.rewards.exact_match import ExactMatchReward  # noqa: E402
from latent_trl.studio.app import STYLE, build, codes_in, pieces  # noqa: E402
from latent_trl.studio.batch import ScoredAnswers, answer_batch, typed_rows  # noqa: E402
from latent_trl.studio.code_map import map_codes  # noqa: E402
from latent_trl.studio.explorer import Explorer  # noqa: E402
from latent_trl.studio.tabs import as_table, summary  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AFTER, BEFORE = "model_cards/pocket-vlm-latent-actions-grpo", "model_cards/pocket-vlm-latent-actions"


def test_codes_are_numbers():
    assert codes_in(" 3, 17 4") == [3, 17, 4] and codes_in("") == []
    with pytest.raises(ValueError, match="Banned codes are numbers"):
        codes_in("3, red")


def test_tokens_that_cannot_be_seen_are_shown():
    assert pieces(["a", " ", "\n", ""], [1, 2, 3, 4]) == [("a", "1"), ("␣", "2"), ("⏎\n", "3"), ("·", "4")]


@pytest.fixture(scope="module")
def address():
    explorers = {}
    for name in (AFTER, BEFORE):
        model = LatentActionModel.from_pretrained(name)
        explorers[name.rsplit("/", 1)[-1]] = Explorer(model, load_processor(model), 12)

    def read(file: str) -> OpenedRows:
        return OpenedRows(load_rows(file, purpose="prompts"), name="file")

    app = build(explorers, rewards={"exact_match": ExactMatchReward()}, read=read)
    _, url, _ = app.launch(server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True, css=STYLE)
    yield url, explorers
    app.close()


@pytest.fixture
def page(address):
    if BROWSER is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address[0])
        yield page
        browser.close()


def ask(page, tmp_path, question: str):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    page.set_input_files("input[type=file]", tmp_path / "red.png")
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.codes').length == 2")
    tokens = page.locator(".codes").first.locator(".text")
    page.wait_for_function(
        "[...document.querySelectorAll('.codes')].every(panel => panel.textContent.includes('end'))", timeout=60_000
    )
    return tokens


@pytest.mark.slow
def test_an_answer_is_looked_into_and_continued(page, address, tmp_path):
    explorer = address[1][AFTER.rsplit("/", 1)[-1]]
    tokens = ask(page, tmp_path, "what color is it?")
    answer = explorer.answer("what color is it?", Image.open(tmp_path / "red.png").convert("RGB"))
    assert [text.strip() for text in tokens.all_inner_texts()] == [token.strip() for token in answer.tokens]
    # By keyboard: tokens are buttons.
    token = page.locator(".codes").first.locator("[role=button]").first
    token.focus()
    page.keyboard.press("Enter")
    page.get_by_text("Token 0:").wait_for(timeout=30_000)
    found = explorer.alternatives(answer, 0)
    other = next(a for a in found if not a.taken)
    page.get_by_role("button", name="Go on from it").first.click()
    first = page.locator(".codes").first.locator(".text").first
    page.wait_for_function(
        "wanted => document.querySelector('.codes .text').textContent.trim() == wanted",
        arg=other.token.strip(),
        timeout=60_000,
    )
    assert first.inner_text().strip() == other.token.strip()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_on_the_screen(page, tmp_path, width):
    page.set_viewport_size({"width": width, "height": 900})
    ask(page, tmp_path, "describe the picture.")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Every control has a name for those who cannot see it.
    unnamed = page.evaluate(
        "[...document.querySelectorAll('textarea, input:not([type=file])')]"
        ".filter(e => !e.labels?.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


@pytest.mark.slow
def test_what_is_wrong_is_said_on_the_page(page):
    page.get_by_label("Question").fill("what is it?")
    page.get_by_label("Banned codes").fill("red")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("Banned codes are numbers").first.wait_for(timeout=30_000)


def test_the_table_of_a_batch_has_each_models_answers_and_rewards():
    found = {name: ScoredAnswers(["q"], [name], {"r": [value]}) for name, value in (("a", 1.0), ("b", math.nan))}
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", as_table(found))
    assert cells == ["prompt", "a", "b", "answer", "r", "answer", "r", "q", "a", "1", "b", "–"]
    assert "<b>" not in as_table({"a": ScoredAnswers(["<b>"], ["<b>"], {})})
    assert summary(found) == "- a: r **1**, 1 prompts\n- b: r **–**, 1 prompts"


@pytest.mark.slow
def test_a_code_is_chosen_on_the_map_by_mouse_and_by_keyboard(page, address, tmp_path):
    explorer = address[1][AFTER.rsplit("/", 1)[-1]]
    ask(page, tmp_path, "what color is it?")
    page.get_by_role("tab", name="Codebook").click()
    codes = page.locator(".code-map [data-code]")
    codes.first.wait_for(timeout=60_000)
    assert codes.count() == explorer.model.config.num_codes
    answer = explorer.answer("what color is it?", Image.open(tmp_path / "red.png").convert("RGB"))
    mapped, _ = map_codes(explorer, answer)
    page.locator('.code-map [data-code="17"] circle').dispatch_event("click")
    page.locator('.code-map .chosen[data-code="17"]').wait_for(timeout=60_000)
    assert page.get_by_label("Code", exact=True).input_value() == "17"
    for saying in mapped[17].sayings:
        # The table keeps rows that it measures widths by, which nobody sees.
        page.get_by_text(repr(saying.token), exact=True).last.wait_for(timeout=60_000)
        page.get_by_text(saying.word, exact=True).last.wait_for(timeout=60_000)
    chosen = page.get_by_label("Code", exact=True)
    chosen.focus()
    chosen.fill("42")
    page.keyboard.press("Enter")
    page.locator('.code-map .chosen[data-code="42"]').wait_for(timeout=60_000)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_batch_is_answered_and_scored(page, address, tmp_path, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.get_by_role("tab", name="Batch").click()
    page.get_by_label("Prompts, one a line").fill("what color is it? => red\nis it red? => yes")
    page.get_by_role("button", name="Answer all").click()
    page.get_by_text("2 prompts").first.wait_for(timeout=60_000)
    rows = typed_rows("what color is it? => red\nis it red? => yes")
    for name, explorer in address[1].items():
        found = answer_batch(explorer, rows, {"exact_match": ExactMatchReward()})
        page.get_by_text(f"{name}: exact_match {found.means['exact_match']:.3g}, 2 prompts").wait_for(timeout=60_000)
        for text in found.texts:
            page.get_by_text(text, exact=True).first.wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_file_of_prompts_is_read_as_by_the_commands_and_its_faults_are_said(page, tmp_path):
    page.get_by_role("tab", name="Batch").click()
    for text, said in (
        ('{"prompt": "what is it?", "answer": "red"}\n', "1 prompts"),
        ('{"question": "what is it?"}\n', "prompt"),
        ('{"prompt": "what is it?", "answer": "red", "images": ["/etc/hostname"]}\n', "image_root"),
    ):
        (tmp_path / "rows.jsonl").write_text(text)
        page.locator("input[type=file][accept='.jsonl']").set_input_files(tmp_path / "rows.jsonl")
        page.get_by_text("rows.jsonl").first.wait_for(timeout=60_000)
        page.get_by_role("button", name="Answer all").click()
        page.get_by_text(said).first.wait_for(timeout=60_000)
        page.reload()
        page.get_by_role("tab", name="Batch").click()
