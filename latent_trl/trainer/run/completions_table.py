"""The table of completions: picture, prompt, answer on the colours of its codes, rewards and advantage."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ...data.pieces import printable, text_pieces
from ...evaluation.report import code_colour, image_url

TEMPLATE = "completions.html.j2"
# Of the picture, in pixels.
THUMBNAIL, PADDING, LINE, FONT_SIZE = 64, 8, 19, 13
WIDTHS = {"picture": 80, "prompt": 230, "answer": 430, "rewards": 210, "advantage": 90}
# Of a thumbnail in the terminal, in characters, each of which shows two pixels.
CHARACTERS = 12
MOST_ROWS = 16


@dataclass
class CompletionRow:
    """
    One completion.

    Args:
        images (`list`): PIL pictures of its prompt.
        prompt (`str`): The text of its prompt.
        tokens (`list[str]`): Up to and including the end.
        action_ids (`list[int]`): The codes that emitted them.
        rewards (`dict[str, float]`): By reward function; NaN where one could not say.
        advantage (`float`): Of its codes; in PPO their mean.
    """

    images: list[Any]
    prompt: str
    tokens: list[str]
    action_ids: list[int]
    rewards: dict[str, float]
    advantage: float


def completion_rows(logs: dict[str, Any], tokenizer: Any) -> list[CompletionRow]:
    """The rows of what a trainer logged last, of all processes."""
    prompts, extra = list(logs["prompt"]), logs["extra"]
    # Only batches with pictures are kept there: where some had none, which is whose cannot be told.
    images = list(logs["images"]) if len(logs["images"]) == len(prompts) else [None] * len(prompts)
    rows = []
    for i, (prompt, ids, codes) in enumerate(zip(prompts, extra["completion_ids"], extra["action_ids"], strict=True)):
        rows.append(
            CompletionRow(
                images=list(images[i] or []),
                prompt=prompt_text(prompt),
                tokens=text_pieces(tokenizer, ids),
                action_ids=list(codes),
                rewards={name: values[i] for name, values in logs["rewards"].items()},
                advantage=logs["advantages"][i],
            )
        )
    return rows


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """The text of a prompt; of a conversation with several messages, with their roles."""
    if isinstance(prompt, str):
        return prompt
    texts = []
    for message in prompt:
        content = message["content"]
        if not isinstance(content, str):
            content = " ".join(part["text"] for part in content if part.get("type") == "text")
        texts.append((message["role"], content.strip()))
    return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)


def number(value: float) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def terminal_table(rows: list[CompletionRow], title: str, thumbnails: bool = True) -> Table:
    """The table for a terminal; `thumbnails` are drawn in coloured characters."""
    table = Table(title=Text(title), show_lines=True)
    if thumbnails := thumbnails and any(row.images for row in rows):
        table.add_column("picture", width=CHARACTERS)
    table.add_column("prompt", ratio=2)
    table.add_column("answer, with its codes", ratio=4)
    for name in rows[0].rewards if rows else ():
        table.add_column(Text(printable(name)), justify="right")
    table.add_column("advantage", justify="right")
    for row in rows:
        answer = Text()
        for token, code in zip(row.tokens, row.action_ids, strict=True):
            shown = "".join(c if c.isprintable() else "↵" if c == "\n" else "�" for c in token)
            answer.append(shown, style=f"black on {code_colour(code)}")
            answer.append(f"{code} ", style="dim")
        cells: list[Any] = [_characters(row.images[0]) if row.images else ""] if thumbnails else []
        cells += [Text(printable(row.prompt)), answer, *map(number, row.rewards.values()), number(row.advantage)]
        table.add_row(*cells)
    return table


def _characters(image: Image.Image) -> Text:
    """A picture in half blocks: the foreground is the upper pixel, the background the lower."""
    small = np.asarray(image.convert("RGB").resize((CHARACTERS, CHARACTERS)))
    text = Text()
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", style=f"rgb({','.join(map(str, above))}) on rgb({','.join(map(str, below))})")
        text.append("\n")
    text.rstrip()
    return text


def html_page(rows: list[CompletionRow], title: str) -> str:
    """The table as one page that needs nothing else."""
    environment = Environment(loader=PackageLoader("latent_trl.trainer", "."), autoescape=True)
    environment.globals |= {"code_colour": code_colour, "number": number, "thumbnail_url": _thumbnail_url, "zip": zip}
    names = list(rows[0].rewards) if rows else []
    return environment.get_template(TEMPLATE).render(rows=rows, title=title, names=names)


def _thumbnail_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    return image_url(small)


def picture(rows: list[CompletionRow], title: str) -> Image.Image:
    """The table as a picture, for trackers that show pictures."""
    font = ImageFont.load_default(FONT_SIZE)
    widths = dict(WIDTHS) if any(row.images for row in rows) else {**WIDTHS, "picture": 0}
    left, at = {}, 0
    for name, width in widths.items():
        left[name], at = at + PADDING, at + width

    def wrapped(text: str, width: int) -> list[str]:
        lines = [""]
        for word in text.replace("\n", " ").split(" "):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width - 2 * PADDING:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def boxes(row: CompletionRow) -> Iterator[tuple[float, int, float, str, int]]:
        """Place, line, width and code of each token."""
        x, line = 0.0, 0
        for token, code in zip(row.tokens, row.action_ids, strict=True):
            shown = "".join(c if c.isprintable() else " " for c in token) or " "
            width = font.getlength(shown) + 4
            if x and x + width > widths["answer"] - 2 * PADDING:
                x, line = 0.0, line + 1
            yield x, line, width, shown, code
            x += width + 1

    drawn = []
    for row in rows:
        prompt = wrapped(row.prompt, widths["prompt"])
        rewards = [line for name, value in row.rewards.items() for line in wrapped(f"{name} {number(value)}", 210)]
        answer = list(boxes(row))
        lines = max(len(prompt), len(rewards), answer[-1][1] + 1 if answer else 1)
        drawn.append((row, prompt, rewards, answer, max(lines * LINE, THUMBNAIL if row.images else 0) + 2 * PADDING))
    height = LINE + 2 * PADDING
    page = Image.new("RGB", (at, height + LINE + sum(row[-1] for row in drawn)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((PADDING, PADDING), title, "black", font)
    for name in widths:
        if widths[name]:
            draw.text((left[name], height - 4), name, "#666666", font)
    y = height + LINE
    for row, prompt, rewards, answer, tall in drawn:
        draw.line((0, y, at, y), "#dddddd")
        top = y + PADDING
        if row.images:
            page.paste(row.images[0].convert("RGB").resize((THUMBNAIL, THUMBNAIL)), (left["picture"], top))
        draw.multiline_text((left["prompt"], top), "\n".join(prompt), "black", font, spacing=LINE - FONT_SIZE)
        for x, line, length, shown, code in answer:
            place = left["answer"] + x, top + line * LINE
            draw.rectangle((*place, place[0] + length, place[1] + LINE - 3), code_colour(code))
            draw.text((place[0] + 2, place[1]), shown, "black", font)
        draw.multiline_text((left["rewards"], top), "\n".join(rewards), "black", font, spacing=LINE - FONT_SIZE)
        draw.text((left["advantage"], top), number(row.advantage), "black", font)
        y += tall
    return page


def markdown_table(rows: list[CompletionRow]) -> str:
    """The table as Markdown, each token with its code after it."""

    def cell(text: str) -> str:
        return text.replace("\n", " ").replace("|", "\\|")

    names = list(rows[0].rewards) if rows else []
    lines = [["prompt", "answer", *names, "advantage"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        answer = " ".join(f"{token}[{code}]" for token, code in zip(row.tokens, row.action_ids, strict=True))
        values = [*map(number, row.rewards.values()), number(row.advantage)]
        lines.append([cell(row.prompt), cell(answer), *values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class CompletionsTable(TrainerCallback):
    """
    Shows the completions of the last rollout at each log, in place of TRL's table in the terminal: there, in
    `completions/completions_STEP.html` of the output folder, and as a picture in the trackers of `report_to` that show
    pictures (TensorBoard, which also gets the text, trackio and Weights & Biases).

    The RL trainers add it with `log_completions=True`. `num_completions_to_print` limits the terminal; pictures have at
    most 16 rows, the page has all.

    Args:
        trainer (`LatentActionGRPOTrainer`): Whose completions are shown.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.printed = trainer.num_completions_to_print
        # TRL prints nothing of 0 rows.
        trainer.num_completions_to_print = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Of evaluation it has the set's name before it, where there are several.
        rewards = [name for name in logs if name == "reward" or (name.startswith("eval_") and name.endswith("reward"))]
        if not state.is_world_process_zero or not rewards:
            return
        prefix = rewards[0].removesuffix("reward")
        processor = self.trainer.processing_class
        rows = completion_rows(self.trainer._logs, getattr(processor, "tokenizer", processor))
        evaluated = bool(prefix)
        title = f"{'Evaluation, step' if evaluated else 'Step'} {state.global_step}"
        console = Console()
        if self.printed != 0:
            console.print(terminal_table(rows[: self.printed], title, thumbnails=console.is_terminal))
        folder = Path(args.output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{prefix}completions_{state.global_step:05d}.html"
        (folder / name).write_text(html_page(rows, title), encoding="utf-8")
        self._report(args, state, rows[:MOST_ROWS], title, "eval/completions" if evaluated else "completions")

    def _report(self, args, state, rows: list[CompletionRow], title: str, name: str) -> None:
        for writer in self._tensorboard_writers():
            page = np.asarray(picture(rows, title))
            writer.add_image(f"{name}_by_code", page, state.global_step, dataformats="HWC")
            writer.add_text(f"{name}_by_code", markdown_table(rows), state.global_step)
        for tracker in {"wandb", "trackio"} & set(args.report_to):
            module = import_module(tracker)
            module.log({f"{name}_by_code": module.Image(picture(rows, title))})

    def _tensorboard_writers(self) -> Iterator[Any]:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                yield callback.tb_writer
