"""Two tabs of the studio: the codebook's map, and a batch of prompts with rewards."""

import math
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from .batch import ARROW, MOST_PROMPTS, ScoredAnswers, answer_batch, typed_rows
from .code_map import MappedCode, drawn, map_codes, words_at
from .explorer import Answer, Explorer

SAYINGS = ["token", "it would say", "probability", ""]
# A click on a code tells its number; the list beside the map does the same by keyboard.
CLICKED = """
element.addEventListener('click', event => {
    const code = event.target.closest('[data-code]');
    if (code) trigger('click', {code: Number(code.dataset.code)});
});
"""
MAP_STYLE = """
svg { width: 100%; max-width: 34rem; display: block; margin: 0 auto; }
.code { cursor: pointer; }
.code circle { stroke: #555; stroke-width: 0.6; }
.code text { font-size: 8px; text-anchor: middle; fill: #222; pointer-events: none; }
.taken circle { stroke: currentColor; stroke-width: 2.5; }
.chosen circle { stroke: #d03; stroke-width: 4; }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; }
.legend { justify-content: center; }
.legend span { display: inline-block; width: 0.9em; height: 0.9em; border: 1px solid #555; margin-right: 0.3em; }
"""
# Wider than a phone it is scrolled by itself, not with the page.
TABLE_STYLE = """
.answers { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border: 1px solid var(--border-color-primary); padding: 0.4rem 0.6rem; text-align: left; vertical-align: top; }
td { min-width: 9rem; }
tbody th { min-width: 9rem; font-weight: normal; }
td.number { min-width: 4rem; text-align: right; }
"""
BEFORE_AN_ANSWER = (
    "Ask something in the first tab: the map is then coloured by what each code would say at the answer's tokens."
)


class MapTab:
    """
    The map of one model's codebook, at the tokens of its last answer.

    Args:
        explorers (`dict[str, Explorer]`): Models by name.
    """

    def __init__(self, explorers: dict[str, Explorer]):
        self.explorers = explorers

    def build(self, tab: gr.Tab, answers: list[gr.State]) -> None:
        """Components; called inside `tab`, with the last answer of each model."""
        names = list(self.explorers)
        self.model = gr.Radio(names, value=names[0], label="Model", visible=len(names) > 1)
        self.about = gr.Markdown(BEFORE_AN_ANSWER)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.map = gr.HTML(css_template=MAP_STYLE, js_on_load=CLICKED, label="Map", elem_classes="code-map")
            with gr.Column(scale=2, min_width=280):
                self.step = gr.Dropdown([], label="At token", interactive=True)
                self.code = gr.Dropdown([], label="Code", info="Or click one on the map.", interactive=True)
                self.sayings = gr.Dataframe(
                    headers=SAYINGS, datatype=["str", "str", "number", "str"], interactive=False, label="What it says"
                )
        inputs = [self.model, *answers]
        shown = [self.about, self.step, self.code, self.map, self.sayings]
        tab.select(self.show, inputs, shown)
        self.model.change(self.show, inputs, shown)
        self.map.click(self.clicked, None, self.code)
        gr.on([self.code.change, self.step.input], self.choose, [self.step, self.code, *inputs], shown[3:])

    def _codes(self, name: str, answers: tuple[Answer | None, ...]) -> tuple[Answer | None, list[MappedCode], float]:
        answer = answers[list(self.explorers).index(name)]
        return answer, *map_codes(self.explorers[name], answer)

    def show(self, name: str, *answers: Answer | None) -> tuple[Any, ...]:
        """The map of a model at the token where its codes differ most, with no code chosen."""
        answer, codes, explained = self._codes(name, answers)
        words = words_at(codes)
        step = max(words, key=lambda step: len(words[step]), default=None)
        about = BEFORE_AN_ANSWER
        if answer is not None:
            about = (
                f"Codes of {name} while it answered “{answer.text}”. Colour: the word that a code would say at the "
                "chosen token. Thick edge: the answer took it there."
            )
        about += f" The two axes hold {explained:.0%} of the variance of the vectors."
        steps = [(f"{step}: {answer.tokens[step]!r}, {len(words[step])} words", step) for step in words if answer]
        numbers = gr.Dropdown([code.code for code in codes], value=None)
        return about, gr.Dropdown(steps, value=step, visible=bool(steps)), numbers, drawn(codes, step), []

    def choose(
        self, step: int | None, code: int | None, name: str, *answers: Answer | None
    ) -> tuple[str, list[list[Any]]]:
        """The map at a token with a code marked, and what that code says at all of them."""
        _, codes, _ = self._codes(name, answers)
        sayings = [] if code is None else codes[code].sayings
        rows = [[repr(s.token), s.word, round(s.probability, 3), "taken" if s.taken else ""] for s in sayings]
        return drawn(codes, step, code), rows

    def clicked(self, event: gr.EventData) -> int:
        """The code that was clicked on the map."""
        return event.code


class BatchTab:
    """
    Prompts, answers of all models, and rewards.

    Args:
        explorers (`dict[str, Explorer]`): Models by name.
        rewards (`dict[str, Callable]`): Reward functions that may be chosen, by name.
        read (`Callable[[str], Any]`, *optional*): From a file to its rows with `prompt`; none: there are no files.
    """

    def __init__(
        self,
        explorers: dict[str, Explorer],
        rewards: dict[str, Callable[..., Any]],
        read: Callable[[str], Any] | None = None,
    ):
        self.explorers, self.rewards, self.read = explorers, rewards, read

    def build(self) -> None:
        """Components; called inside a tab."""
        gr.Markdown(f"Up to {MOST_PROMPTS} prompts, one a line. `{ARROW}` stands before the right answer, for rewards.")
        with gr.Row():
            with gr.Column():
                self.text = gr.Textbox(
                    label="Prompts, one a line", lines=5, placeholder=f"what color is it? {ARROW} red"
                )
                self.file = gr.File(
                    label="Or a JSONL file, as for the commands",
                    file_types=[".jsonl"],
                    height=140,
                    visible=self.read is not None,
                )
            with gr.Column():
                self.image = gr.Image(label="Picture of all typed prompts (optional)", type="pil", height=180)
                self.chosen = gr.CheckboxGroup(
                    list(self.rewards), value=list(self.rewards)[:1], label="Rewards", visible=bool(self.rewards)
                )
                with gr.Row():
                    self.temperature = gr.Slider(0, 3, 0, step=0.1, label="Temperature in the batch")
                    self.seed = gr.Number(label="Seed of the batch", value=0, precision=0)
        send = gr.Button("Answer all", variant="primary")
        means = gr.Markdown()
        table = gr.HTML(css_template=TABLE_STYLE, label="Answers and rewards")
        inputs = [self.text, self.file, self.image, self.chosen, self.temperature, self.seed]
        send.click(self.answer, inputs, [means, table])

    def answer(
        self,
        text: str,
        file: str | None,
        image: Any,
        chosen: list[str],
        temperature: float,
        seed: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio finds it by this default)
    ) -> tuple[str, str]:
        """Answers of all models, with their rewards."""
        try:
            rows = typed_rows(text, image) if file is None or self.read is None else self.read(file)
            rewards = {name: self.rewards[name] for name in chosen}
            found = {}
            for name, explorer in self.explorers.items():

                def told(done: int, name: str = name) -> None:
                    progress((done, len(rows)), desc=name)

                found[name] = answer_batch(explorer, rows, rewards, temperature, int(seed), told)
        except Exception as error:
            raise gr.Error(str(error)) from error
        return summary(found), as_table(found)


def summary(found: dict[str, ScoredAnswers]) -> str:
    """Mean rewards of each model, as Markdown."""
    lines = []
    for name, scored in found.items():
        means = ", ".join(f"{reward} **{_number(mean)}**" for reward, mean in scored.means.items())
        lines.append(f"- {name}: {means or 'no reward chosen'}, {len(scored.texts)} prompts")
    return "\n".join(lines)


def as_table(found: dict[str, ScoredAnswers]) -> str:
    """HTML: a row a prompt, with each model's answer and its rewards."""
    rewards = list(next(iter(found.values())).rewards)
    models = "".join(f'<th colspan="{1 + len(rewards)}" scope="colgroup">{escape(name)}</th>' for name in found)
    names = "".join(f'<th scope="col">{escape(name)}</th>' for _ in found for name in ("answer", *rewards))
    rows = []
    for i, prompt in enumerate(next(iter(found.values())).prompts):
        cells = [f'<th scope="row">{escape(prompt)}</th>']
        for scored in found.values():
            cells.append(f"<td>{escape(scored.texts[i])}</td>")
            cells += [f'<td class="number">{_number(scored.rewards[name][i])}</td>' for name in rewards]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = f'<thead><tr><th rowspan="2" scope="col">prompt</th>{models}</tr><tr>{names}</tr></thead>'
    return f'<div class="answers"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"
