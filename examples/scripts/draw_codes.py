"""
Draws the README's picture from the committed models: answers on the colours of their codes, before and after RL, and
what an answer becomes when one code is forced at its first step.

```bash
python examples/scripts/draw_codes.py --output docs/assets/codes.png
```
"""

import argparse
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
WIDTH, MARGIN, ROW, THUMBNAIL = 900, 20, 84, 64
QUESTION, BEFORE, AFTER = 100, 330, 610


class Page:
    """A picture in units of half a pixel's size, so that it is sharp on dense screens."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def write(self, x: float, y: float, text: str, size: int = 15, colour: str = "#222222") -> float:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), text, colour, font)
        return font.getlength(text) / SCALE

    def tokens(self, x: float, y: float, tokens: list[str], codes: list[int]) -> None:
        """Each token on the colour of its code, with the code's number below."""
        font, small = ImageFont.load_default(15 * SCALE), ImageFont.load_default(9 * SCALE)
        for token, code in zip(tokens, codes, strict=True):
            shown = token.strip() if token.strip() else " "
            width = max(font.getlength(shown), small.getlength(str(code))) / SCALE + 8
            box = (x * SCALE, y * SCALE, (x + width) * SCALE, (y + 22) * SCALE)
            self.draw.rounded_rectangle(box, 4 * SCALE, code_colour(code))
            self.draw.text(((x + 4) * SCALE, (y + 1) * SCALE), shown, "#222222", font)
            self.draw.text(((x + 4) * SCALE, (y + 24) * SCALE), str(code), "#777777", small)
            x += width + 3

    def picture(self, x: float, y: float, image: Image.Image) -> None:
        size = THUMBNAIL * SCALE
        self.image.paste(
            image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), (x * SCALE, int(y * SCALE))
        )


def without_end(tokens: list[str], codes: list[int]) -> tuple[list[str], list[int]]:
    kept = [i for i, token in enumerate(tokens) if not token.startswith("<|")]
    return [tokens[i] for i in kept], [codes[i] for i in kept]


def forced_answers(model, processor, row: dict, most: int) -> list[tuple[int, list[int], list[str], list[int]]]:
    """Different answers when each code is forced first: how many codes lead there, and the first one's answer."""
    inputs = encode_prompts(processor, [row])
    count = model.config.num_codes
    output = model.generate(
        **inputs,
        max_new_tokens=12,
        num_return_sequences=count,
        forced_action_ids=torch.arange(count)[:, None],
        action_do_sample=False,
        return_dict_in_generate=True,
    )
    groups: dict[str, list[int]] = {}
    texts = processor.tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :])
    for code, text in enumerate(texts):
        groups.setdefault(text.split("<|")[0], []).append(code)
    found = []
    for codes in sorted(groups.values(), key=len, reverse=True)[:most]:
        ids = output.sequences[codes[0], inputs["input_ids"].shape[1] :].tolist()
        tokens, taken = without_end(
            processor.tokenizer.batch_decode([[i] for i in ids]), output.action_ids[codes[0]].tolist()
        )
        length = next((i for i, token in enumerate(tokens) if token.startswith("<")), len(tokens))
        found.append((len(codes), codes, tokens[:length], taken[:length]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/assets/codes.png"))
    parser.add_argument("--questions", type=int, default=60, help="the first so many, of which three are drawn")
    args = parser.parse_args()
    logging.set_verbosity_error()
    processor = AutoProcessor.from_pretrained(CARDS / "pocket-vlm", padding_side="left")
    rows = list(shape_questions("test", args.questions))
    found = {}
    for name in ("", "-grpo"):
        model = LatentActionModel.from_pretrained(CARDS / f"pocket-vlm-latent-actions{name}", dtype="float32")
        found[name] = answer(model, processor, rows, ExactMatchReward(), max_new_tokens=12)
    # One of each kind that RL set right, where there is one.
    better = [i for i in range(len(rows)) if found[""].rewards[i] < found["-grpo"].rewards[i]]
    chosen = list({rows[i]["kind"]: i for i in reversed(better)}.values())
    forced = forced_answers(model, processor, rows[chosen[0]], 4)

    page = Page(2 * MARGIN + 30 + ROW * len(chosen) + 40 + 50 * len(forced))
    for x, text in ((QUESTION, "question"), (BEFORE, "before RL, most likely codes"), (AFTER, "after GRPO over codes")):
        page.write(x, MARGIN, text, 13, "#777777")
    y = MARGIN + 30
    for i in chosen:
        page.picture(MARGIN, y, rows[i]["images"][0])
        page.write(QUESTION, y + 20, rows[i]["prompt"][-1]["content"])
        for x, name in ((BEFORE, ""), (AFTER, "-grpo")):
            page.tokens(x, y + 18, *without_end(found[name].tokens[i], found[name].action_ids[i]))
            right = found[name].rewards[i] > 0
            page.write(x - 42, y + 20, "right" if right else "wrong", 11, "#17703a" if right else "#a02020")
        y += ROW
    page.write(
        MARGIN,
        y + 8,
        "The first question after GRPO, one code forced at the first step, the others free",
        13,
        "#777777",
    )
    y += 40
    for count, codes, tokens, taken in forced:
        shown = f"{count} of {model.config.num_codes} codes, such as {codes[0]}"
        page.write(QUESTION, y + 3, shown, 13)
        page.tokens(BEFORE, y, tokens, taken)
        y += 50
    args.output.parent.mkdir(parents=True, exist_ok=True)
    page.image.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
