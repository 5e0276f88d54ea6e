"""A map of the codebook: where the vectors of codes lie, and what each code says at the tokens of an answer."""

from collections import Counter
from dataclasses import dataclass, field
from html import escape

import torch

from ..evaluation.atlas import code_positions
from ..evaluation.report import code_colour
from .explorer import Answer, Explorer

# Reading all codes takes a pass of the vocabulary for each: of longer answers so many tokens, evenly spread, are read.
MOST_PLACES = 16
# Words with a colour of their own; the codes that say others are grey.
MOST_WORDS = 9
OTHERS = "#d0d0d0"
SIZE, MARGIN, RADIUS = 480, 24, 9


@dataclass
class Saying:
    """What a code says at a token of an answer: the token's number and text, the code's word, and its probability."""

    step: int
    token: str
    word: str
    probability: float
    taken: bool


@dataclass
class MappedCode:
    """
    Args:
        code (`int`): Which.
        position (`tuple[float, float]`): Of its vector on the two main axes of all, scaled to [0, 1].
        sayings (`list[Saying]`): At each token of the answer that was read; none without an answer.
    """

    code: int
    position: tuple[float, float]
    sayings: list[Saying] = field(default_factory=list)

    def at(self, step: int | None) -> Saying | None:
        """What it says at a token of the answer; `None` where that was not read."""
        return next((saying for saying in self.sayings if saying.step == step), None)


@torch.no_grad()
def map_codes(explorer: Explorer, answer: Answer | None = None) -> tuple[list[MappedCode], float]:
    """
    The codes of a model on the two main axes of their vectors.

    Args:
        explorer (`Explorer`): Of the model.
        answer (`Answer`, *optional*): Of this explorer, at whose tokens the codes are read.

    Returns:
        The codes in order, and the share of their vectors' variance on the two axes.
    """
    model = explorer.model
    positions, explained = code_positions(model.codebook.weight.detach().float().cpu().numpy())
    codes = [MappedCode(code, position) for code, position in enumerate(positions)]
    if answer is None or not answer.action_ids:
        return codes, explained
    count = len(answer.action_ids)
    steps = torch.linspace(0, count - 1, min(count, MOST_PLACES)).round().long().unique().tolist()
    for step in steps:
        words = [word.strip() or "␣" for word in explorer.said(answer, step, range(len(codes)))]
        chances = explorer.probabilities(answer, step).tolist()
        for mapped, word, chance in zip(codes, words, chances, strict=True):
            taken = mapped.code == answer.action_ids[step]
            mapped.sayings.append(Saying(step, answer.tokens[step], word, chance, taken))
    return codes, explained


def words_at(codes: list[MappedCode]) -> dict[int, Counter[str]]:
    """For each token of the answer that was read, how many codes say each word there."""
    found: dict[int, Counter[str]] = {}
    for code in codes:
        for saying in code.sayings:
            found.setdefault(saying.step, Counter())[saying.word] += 1
    return found


def drawn(codes: list[MappedCode], step: int | None = None, chosen: int | None = None) -> str:
    """
    The map as SVG with a legend. Each code carries its number as `data-code`, and the colour of the word that it says;
    the one that the answer took has a thick edge, the chosen one a ring.

    Args:
        codes (`list[MappedCode]`): All codes.
        step (`int`, *optional*): The token of the answer at which they speak; without one all are grey.
        chosen (`int`, *optional*): The code to mark.
    """
    counts = words_at(codes).get(step, Counter()) if step is not None else Counter()
    colours = {word: code_colour(i) for i, (word, _) in enumerate(counts.most_common(MOST_WORDS))}
    speaking = {code.code: code.at(step) for code in codes}
    taken = {code for code, saying in speaking.items() if saying is not None and saying.taken}
    parts = [f'<svg viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="Map of {len(codes)} codes">']
    # What is marked lies above the others.
    for code in sorted(codes, key=lambda code: (code.code == chosen, code.code in taken, code.code)):
        x, y = (MARGIN + position * (SIZE - 2 * MARGIN) for position in code.position)
        saying = speaking[code.code]
        says = f"code {code.code}" + (f": {saying.word}" if saying else "")
        marks = [mark for mark, there in (("taken", code.code in taken), ("chosen", code.code == chosen)) if there]
        colour = colours.get(saying.word, OTHERS) if saying else OTHERS
        parts.append(
            f'<g class="{" ".join(["code", *marks])}" data-code="{code.code}"><title>{escape(says)}</title>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{colour}"/>'
            f'<text x="{x:.1f}" y="{y + 3:.1f}">{code.code}</text></g>'
        )
    entries = [(word, colour, counts[word]) for word, colour in colours.items()]
    others = sum(counts.values()) - sum(count for *_, count in entries)
    entries += [("other words", OTHERS, others)] if others else []
    legend = "".join(
        f'<li><span style="background:{colour}"></span>{escape(word)} <small>{count}</small></li>'
        for word, colour, count in entries
    )
    return "".join(parts) + "</svg>" + (f'<ul class="legend" aria-label="Words">{legend}</ul>' if entries else "")
