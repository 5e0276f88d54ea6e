"""The window on the codes in a headless browser: asked, looked into and continued, by mouse and by keyboard."""

import shutil

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from latent_trl import LatentActionModel  # noqa: E402
from latent_trl.commands.loading import load_processor  # noqa: E402
from latent_trl.studio.app import STYLE, build, codes_in, pieces  # noqa: E402
from latent_trl.studio.explorer import Explorer  # noqa: E402

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
    app = build(explorers)
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
