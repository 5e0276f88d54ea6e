"""The window on the codes, as a Gradio app: ask, read the answer on the colours of its codes, and try other codes."""

from collections.abc import Callable, Iterator
from queue import Queue
from threading import Thread
from typing import Any

import gradio as gr

from ..evaluation.report import code_colour
from .explorer import Answer, Explorer
from .tabs import BatchTab, MapTab

TITLE = "latent_trl studio"
INTRODUCTION = (
    "Each token of an answer stands on the colour of the latent action, or *code*, that led to it. "
    "Choose a token to see which other codes were likely there, and what each would have said. "
    "Choose one of those to go on from it."
)
HEADERS = ["code", "probability", "next token", ""]
# The numbers of codes stand on pale colours in both modes.
STYLE = ".codes .label { color: #222 !important; }"
NONE = "Choose a token of an answer."


def codes_in(text: str) -> list[int]:
    """
    Codes in `"3, 17"`.

    Raises:
        ValueError: For anything that is not a number.
    """
    words = text.replace(",", " ").split()
    wrong = [word for word in words if not word.isdigit()]
    if wrong:
        raise ValueError(f"Banned codes are numbers such as `3, 17`, got {wrong}.")
    return [int(word) for word in words]


def pieces(tokens: list[str], action_ids: list[int]) -> list[tuple[str, str]]:
    """What `HighlightedText` shows: each token and its code. A token of white space is made visible."""
    shown = [token if token.strip() else token.replace("\n", "⏎\n").replace(" ", "␣") for token in tokens]
    return [(token or "·", str(code)) for token, code in zip(shown, action_ids, strict=True)]


class Panel:
    """
    One model's answer, its tokens and their alternatives.

    Args:
        name (`str`): In the heading.
        explorer ([`Explorer`]): Answers.
    """

    def __init__(self, name: str, explorer: Explorer):
        self.name, self.explorer = name, explorer

    def build(self) -> None:
        """Components; called inside `gr.Blocks`."""
        count = self.explorer.model.config.num_codes
        with gr.Column():
            gr.Markdown(f"### {self.name}")
            self.answer = gr.State()
            self.step = gr.State()
            self.tokens = gr.HighlightedText(
                label=f"Answer of {self.name}, token by token, with its codes",
                color_map={str(code): code_colour(code) for code in range(count)},
                combine_adjacent=False,
                show_legend=False,
                elem_classes="codes",
            )
            self.place = gr.Markdown(NONE)
            self.table = gr.Dataframe(
                headers=HEADERS,
                datatype=["number", "number", "str", "str"],
                interactive=False,
                label="Codes that were likely",
            )
            with gr.Row():
                self.code = gr.Number(label="Take code", value=0, precision=0, minimum=0, maximum=count - 1)
                self.go_on = gr.Button("Go on from it")

    def ask(
        self, question: str, image: Any, temperature: float, banned: str, seed: int, forced: list[int] | None = None
    ) -> Iterator[tuple[Answer | None, list[tuple[str, str]]]]:
        """The answer so far, token by token; at the end with what the alternatives are found from."""
        told: Queue[Any] = Queue()

        def run() -> None:
            try:
                told.put(
                    self.explorer.answer(
                        question, image, temperature, codes_in(banned), forced or (), int(seed), lambda *t: told.put(t)
                    )
                )
            except Exception as error:
                told.put(error)

        Thread(target=run, daemon=True).start()
        said: list[tuple[str, int]] = []
        while True:
            found = told.get()
            if isinstance(found, Exception):
                raise gr.Error(str(found)) from found
            if isinstance(found, Answer):
                yield found, pieces(found.tokens, found.action_ids)
                return
            said.append(found)
            yield None, pieces([token for token, _ in said], [code for _, code in said])

    def show(self, answer: Answer | None, event: gr.SelectData) -> tuple[int | None, str, list[list[Any]], int]:
        """The codes that were likely at the token that was chosen."""
        if answer is None:
            return None, NONE, [], 0
        step = event.index if isinstance(event.index, int) else event.index[0]
        found = self.explorer.alternatives(answer, step)
        rows = [[a.action_id, round(a.probability, 3), repr(a.token), "taken" if a.taken else ""] for a in found]
        token, code = answer.tokens[step], answer.action_ids[step]
        other = next((a.action_id for a in found if not a.taken), code)
        return step, f"Token {step}: {token!r}, code {code}. Choose a row, or give a code.", rows, other

    def choose(self, rows: Any, event: gr.SelectData) -> int:
        """The code of the row that was chosen."""
        return int(rows.iloc[event.index[0], 0])

    def continued(
        self,
        answer: Answer | None,
        step: int | None,
        code: float,
        question: str,
        image: Any,
        temperature: float,
        banned: str,
        seed: int,
    ) -> Iterator[tuple[Answer | None, list[tuple[str, str]]]]:
        """The answer with another code at the token that was chosen, free after it."""
        if answer is None or step is None:
            raise gr.Error(NONE)
        forced = [*answer.action_ids[:step], int(code)]
        yield from self.ask(question, image, temperature, banned, seed, forced)


def build(
    explorers: dict[str, Explorer],
    examples: list[list[Any]] | None = None,
    rewards: dict[str, Callable[..., Any]] | None = None,
    read: Callable[[str], Any] | None = None,
) -> gr.Blocks:
    """
    The app.

    Args:
        explorers (`dict[str, Explorer]`): One or two models by name; the same question goes to all.
        examples (`list[list]`, *optional*): Questions to begin with: picture and text.
        rewards (`dict[str, Callable]`, *optional*): Reward functions that may be chosen for a batch, by name.
        read (`Callable[[str], Any]`, *optional*): From a JSONL file to its rows with `prompt`.
    """
    panels = [Panel(name, explorer) for name, explorer in explorers.items()]
    with gr.Blocks(title=TITLE) as app:
        gr.Markdown(f"# {TITLE}")
        with gr.Tab("Ask"):
            gr.Markdown(INTRODUCTION)
            _ask(panels, examples)
        with gr.Tab("Codebook") as tab:
            MapTab(explorers).build(tab, [panel.answer for panel in panels])
        with gr.Tab("Batch"):
            BatchTab(explorers, rewards or {}, read).build()
    return app


def _ask(panels: list[Panel], examples: list[list[Any]] | None) -> None:
    """The first tab: a question, and the answer of each panel."""
    with gr.Row():
        image = gr.Image(label="Picture (optional)", type="pil", height=220)
        with gr.Column():
            question = gr.Textbox(label="Question", lines=2, autofocus=True)
            with gr.Row():
                temperature = gr.Slider(0, 3, 0, step=0.1, label="Temperature of the codes; 0 is greedy")
                seed = gr.Number(label="Seed", value=0, precision=0)
            banned = gr.Textbox(label="Banned codes, such as 3, 17")
            send = gr.Button("Ask", variant="primary")
    inputs = [question, image, temperature, banned, seed]
    with gr.Row():
        for panel in panels:
            panel.build()
    for panel in panels:
        outputs = [panel.answer, panel.tokens]
        gr.on([send.click, question.submit], panel.ask, inputs, outputs)
        panel.tokens.select(panel.show, panel.answer, [panel.step, panel.place, panel.table, panel.code])
        panel.table.select(panel.choose, panel.table, panel.code)
        panel.go_on.click(panel.continued, [panel.answer, panel.step, panel.code, *inputs], outputs)
    if examples:
        gr.Examples(examples, [image, question])
