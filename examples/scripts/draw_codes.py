"""
Draws the README's picture from the committed models, for light and for dark pages: answers on the colours of their
codes before and after RL, and what one question is answered under each choice of the first code, with how likely the
policy takes it before and after RL.

```bash
python examples/scripts/draw_codes.py --output docs/assets
```
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoProcessor
from transformers.utils import logging

from latent_trl import LatentActionModel
from latent_trl.data.prompts import encode_prompts
from latent_trl.data.shapes import shape_questions
from latent_trl.evaluation.answers import answer
from latent_trl.evaluation.report import code_colour
from latent_trl.rewards.exact_match import ExactMatchReward

CARDS = Path("model_cards")
SCALE = 2
WIDTH, MARGIN, ROW, THUMBNAIL, BAR = 900, 20, 76, 60, 150
QUESTION, BEFORE, AFTER = 96, 340, 620


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    ground: str
    ink: str
    dim: str
    right: str
    wrong: str
    line: str


THEMES = {
    "light": Theme("#ffffff", "#222222", "#666666", "#17703a", "#a02020", "#e3e3e3"),
    "dark": Theme("#0d1117", "#e6e6e6", "#a2a6ad", "#6fce93", "#f08a8a", "#30363d"),
}


class Page:
    """A picture in units of half a pixel's size, so that it is sharp on dense screens."""

    def __init__(self, height: int, theme: Theme):
        self.theme = theme
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), theme.ground)
        self.draw = ImageDraw.Draw(self.image)

    def write(self, x: float, y: float, text: str, size: int = 15, colour: str | None = None) -> float:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), text, colour or self.theme.ink, font)
        return font.getlength(text) / SCALE

    def tokens(self, x: float, y: float, tokens: list[str], codes: list[int]) -> None:
        """Each token on the colour of its code, with the code's number below."""
        font, small = ImageFont.load_default(15 * SCALE), ImageFont.load_default(10 * SCALE)
        for token, code in zip(tokens, codes, strict=True):
            shown = token.strip() if token.strip() else " "
            width = max(font.getlength(shown), small.getlength(str(code))) / SCALE + 8
            box = (x * SCALE, y * SCALE, (x + width) * SCALE, (y + 22) * SCALE)
            self.draw.rounded_rectangle(box, 4 * SCALE, code_colour(code))
            self.draw.text(((x + 4) * SCALE, (y + 1) * SCALE), shown, "#222222", font)
            self.draw.text(((x + 4) * SCALE, (y + 23) * SCALE), str(code), self.theme.dim, small)
            x += width + 3

    def bar(self, x: float, y: float, share: float, colour: str) -> None:
        """A share of 1 as a bar, with its percentage."""
        self.draw.rounded_rectangle(
            (x * SCALE, y * SCALE, (x + BAR) * SCALE, (y + 14) * SCALE), 3 * SCALE, self.theme.line
        )
        end = x + max(2.0, BAR * share)
        self.draw.rounded_rectangle((x * SCALE, y * SCALE, end * SCALE, (y + 14) * SCALE), 3 * SCALE, colour)
        self.write(x + BAR + 8, y - 3, f"{100 * share:.0f} %", 13)

    def rule(self, y: float) -> None:
        self.draw.line((MARGIN * SCALE, y * SCALE, (WIDTH - MARGIN) * SCALE, y * SCALE), self.theme.line, SCALE)

    def picture(self, x: float, y: float, image: Image.Image) -> None:
        size = THUMBNAIL * SCALE
        self.image.paste(
            image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), (x * SCALE, int(y * SCALE))
        )


def without_end(tokens: list[str], codes: list[int]) -> tuple[list[str], list[int]]:
    kept = [i for i, token in enumerate(tokens) if not token.startswith("<|")]
    return [tokens[i] for i in kept], [codes[i] for i in kept]


@dataclass
class Choice:
    """
    Args:
        tokens (`list[str]`), codes (`list[int]`): An answer, and its codes.
        members (`list[int]`): First codes that lead to it.
        before (`float`), after (`float`): How likely the policy takes one of them, before RL and after.
    """

    tokens: list[str]
    codes: list[int]
    members: list[int]
    before: float
    after: float


@torch.no_grad()
def choices(before, after, processor, row: dict, most: int) -> list[Choice]:
    """Answers after RL to one question when each code is forced first, those of equal text together."""
    inputs = encode_prompts(processor, [row])
    count, start = after.config.num_codes, inputs["input_ids"].shape[1]
    laws = [model(**inputs, return_logits=False).action_logits[0, -1].softmax(-1) for model in (before, after)]
    output = after.generate(
        **inputs,
        max_new_tokens=12,
        num_return_sequences=count,
        forced_action_ids=torch.arange(count)[:, None],
        action_do_sample=False,
        return_dict_in_generate=True,
    )
    groups: dict[str, list[int]] = {}
    for code, text in enumerate(processor.tokenizer.batch_decode(output.sequences[:, start:])):
        groups.setdefault(text.split("<|")[0], []).append(code)
    found = []
    for members in groups.values():
        likeliest = max(members, key=lambda code: laws[1][code].item())
        ids = output.sequences[likeliest, start:].tolist()
        length = next((i for i, one in enumerate(ids) if one in processor.tokenizer.all_special_ids), len(ids))
        tokens = processor.tokenizer.batch_decode([[i] for i in ids[:length]])
        shares = [law[members].sum().item() for law in laws]
        found.append(Choice(tokens, output.action_ids[likeliest, :length].tolist(), members, *shares))
    found = [choice for choice in found if max(choice.before, choice.after) >= 0.005]
    return sorted(found, key=lambda choice: -max(choice.before, choice.after))[:most]


def draw(rows: list[dict], chosen: list[int], found: dict, options: list[Choice], theme: Theme) -> Image.Image:
    """The whole page."""
    page = Page(2 * MARGIN + 28 + ROW * len(chosen) + 50 + 46 * len(options), theme)
    for x, text in ((QUESTION, "question"), (BEFORE, "before RL"), (AFTER, "after 30 steps of GRPO over codes")):
        page.write(x, MARGIN, text, 13, theme.dim)
    y = MARGIN + 28
    for i in chosen:
        page.picture(MARGIN, y, rows[i]["images"][0])
        page.write(QUESTION, y + 20, rows[i]["prompt"][-1]["content"])
        for x, name in ((BEFORE, ""), (AFTER, "-grpo")):
            page.tokens(x, y + 18, *without_end(found[name].tokens[i], found[name].action_ids[i]))
            right = found[name].rewards[i] > 0
            page.write(x - 44, y + 20, "right" if right else "wrong", 12, theme.right if right else theme.wrong)
        y += ROW
    page.rule(y + 2)
    question, answer_column = rows[chosen[0]]["prompt"][-1]["content"], QUESTION - 76
    page.write(answer_column, y + 16, f"“{question}” under each first code", 13, theme.dim)
    for x, text in ((BEFORE + 20, "likely before RL"), (AFTER, "likely after")):
        page.write(x, y + 16, text, 13, theme.dim)
    y += 48
    for option in options:
        page.tokens(answer_column, y, option.tokens, option.codes)
        colour = theme.right if rows[chosen[0]]["answer"] in "".join(option.tokens) else theme.wrong
        for x, share in ((BEFORE + 20, option.before), (AFTER, option.after)):
            page.bar(x, y + 4, share, colour)
        count = len(option.members)
        page.write(AFTER + BAR + 52, y + 1, f"{count} code{'s' if count > 1 else ''}", 12, theme.dim)
        y += 46
    return page.image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/assets"), help="folder")
    parser.add_argument("--questions", type=int, default=60, help="the first so many, of which three are drawn")
    args = parser.parse_args()
    logging.set_verbosity_error()
    processor = AutoProcessor.from_pretrained(CARDS / "pocket-vlm", padding_side="left")
    rows = list(shape_questions("test", args.questions))
    found, models = {}, {}
    for name in ("", "-grpo"):
        models[name] = LatentActionModel.from_pretrained(CARDS / f"pocket-vlm-latent-actions{name}", dtype="float32")
        found[name] = answer(models[name], processor, rows, ExactMatchReward(), max_new_tokens=12)
    # One of each kind that RL set right, where there is one.
    better = [i for i in range(len(rows)) if found[""].rewards[i] < found["-grpo"].rewards[i]]
    chosen = list({rows[i]["kind"]: i for i in reversed(better)}.values())
    options = choices(models[""], models["-grpo"], processor, rows[chosen[0]], 5)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        image = draw(rows, chosen, found, options, theme)
        image.quantize(128).save(args.output / f"codes-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
