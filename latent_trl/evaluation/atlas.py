"""The atlas of a codebook: what each code is used for, and what it changes, on one self-contained HTML page."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.images import load_image
from ..data.prompts import encode_prompts
from ..data.reading import OpenedRows
from ..generation.answers import end_tokens, evaluation_mode, generated_answers
from .answers import answer
from .report import code_colour, image_url

TEMPLATE = "atlas.html.j2"
THUMBNAIL = 160


@dataclass
class CodeEntry:
    """
    Args:
        code (`int`): Which.
        count (`int`): How often it was taken.
        tokens (`list[tuple[str, int]]`): What it emitted most, and how often.
        contexts (`list[tuple[str, str, str]]`): Text before, the token, and text after, of some uses.
        position (`tuple[float, float]`): Of its vector on the two main axes of all, scaled to [0, 1].
    """

    code: int
    count: int
    tokens: list[tuple[str, int]] = field(default_factory=list)
    contexts: list[tuple[str, str, str]] = field(default_factory=list)
    position: tuple[float, float] = (0.5, 0.5)


@dataclass
class ForcedAnswers:
    """
    What becomes of the answer to one prompt when the first code is forced and the others are free.

    Args:
        prompt (`str`): The last message.
        image (`str`, *optional*): Its picture as a data URL.
        free_code (`int`), free_answer (`str`): Without force.
        groups (`list[tuple[str, list[int]]]`): Each different answer, and the first codes that lead to it.
    """

    prompt: str
    image: str | None
    free_code: int
    free_answer: str
    groups: list[tuple[str, list[int]]]


@dataclass
class Heat:
    """A matrix of shares in [0, 1] with the names of its rows and columns."""

    rows: list[str]
    columns: list[str]
    values: list[list[float]]


@dataclass
class Atlas:
    """
    Args:
        model (`str`): Its name.
        data (`str`): Where the prompts came from.
        answers (`int`), choices (`int`): Number of answers, and of codes taken in them.
        entries (`list[CodeEntry]`): Of all codes, the most used first.
        perplexity (`float`): Of their use.
        information (`float`): Mutual information of codes and tokens in nats, by counting (biased upwards).
        code_tokens (`Heat`): Share of each token among those that a code emitted.
        code_codes (`Heat`): Share of each next code after a code.
        explained (`float`): Share of the code vectors' variance on the two axes of the map.
        forced (`list[ForcedAnswers]`): Of some prompts.
    """

    model: str
    data: str
    answers: int
    choices: int
    entries: list[CodeEntry]
    perplexity: float
    information: float
    code_tokens: Heat
    code_codes: Heat
    explained: float
    forced: list[ForcedAnswers] = field(default_factory=list)

    @property
    def used(self) -> int:
        return sum(entry.count > 0 for entry in self.entries)


def make_atlas(
    model: Any,
    processing_class: Any,
    rows: Any,
    name: str = "model",
    data: str = "prompts",
    max_new_tokens: int = 64,
    batch_size: int = 64,
    forced_prompts: int = 6,
    matrix_size: int = 24,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Atlas:
    """
    Answers prompts with sampled codes, and forces each code once at the beginning of some answers.

    Args:
        model (`LatentActionModel`): The model.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset`): With a conversational `prompt`, and `images` where there are some.
        name (`str`), data (`str`): How the page calls the model and the prompts.
        max_new_tokens (`int`), batch_size (`int`): Of generation.
        forced_prompts (`int`, defaults to `6`): Prompts on which each code is forced.
        matrix_size (`int`, defaults to `24`): Rows and columns of the heat maps.
        seed (`int`, defaults to `0`): Of the sampling.
        progress (`Callable`, *optional*): Told the number of prompts done, forced ones after the others.
    """
    if not len(rows):
        raise ValueError("`rows` is empty: an atlas needs prompts.")
    rows = OpenedRows.of(rows)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    found = answer(
        model,
        processing_class,
        rows,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
        action_do_sample=True,
        action_generator=generator,
    )
    count = model.config.num_codes
    entries = _entries(count, rows, found.tokens, found.action_ids)
    positions, explained = code_positions(model.codebook.weight.detach().float().cpu().numpy())
    for entry in entries:
        entry.position = positions[entry.code]
    shares = np.array([entry.count for entry in entries], dtype=float)
    shares = shares[shares > 0] / shares.sum()
    shown = [entry.code for entry in entries if entry.count][:matrix_size]
    atlas = Atlas(
        model=name,
        data=data,
        answers=len(found.texts),
        choices=sum(map(len, found.action_ids)),
        entries=entries,
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
        information=code_token_information(found.tokens, found.action_ids),
        code_tokens=_code_tokens(shown, found.tokens, found.action_ids, matrix_size),
        code_codes=_code_codes(shown, found.action_ids),
        explained=explained,
    )
    chosen = np.linspace(0, len(rows) - 1, min(forced_prompts, len(rows))).round().astype(int).tolist()
    for done, i in enumerate(dict.fromkeys(chosen), start=1):
        atlas.forced.append(force_each_code(model, processing_class, rows[i], max_new_tokens))
        if progress is not None:
            progress(len(rows) + done)
    return atlas


def force_each_code(model: Any, processing_class: Any, row: dict[str, Any], max_new_tokens: int = 64) -> ForcedAnswers:
    """The answers to one prompt when each code in turn is forced at the first step; the rest is greedy."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    inputs = {k: v.to(model.device) for k, v in encode_prompts(processing_class, [row]).items()}
    ends = end_tokens(model, tokenizer, {})
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": ends}
    options |= {"action_do_sample": False, "output_cache": False, "return_dict_in_generate": True}
    count, start = model.config.num_codes, inputs["input_ids"].shape[1]
    codes = torch.arange(count, device=model.device)[:, None]
    with evaluation_mode(model):
        output = model.generate(**inputs, **options)
        (free,) = generated_answers(output, start, tokenizer, ends)
        output = model.generate(**inputs, **options, num_return_sequences=count, forced_action_ids=codes)
    texts = [found.text for found in generated_answers(output, start, tokenizer, ends)]
    groups: dict[str, list[int]] = {}
    for code, text in enumerate(texts):
        groups.setdefault(text, []).append(code)
    images = row.get("images") or []
    return ForcedAnswers(
        prompt=_text(row["prompt"][-1]["content"]),
        image=_thumbnail(images[0]) if images else None,
        free_code=free.action_ids[0],
        free_answer=free.text,
        groups=sorted(groups.items(), key=lambda item: -len(item[1])),
    )


def visible(token: str) -> str:
    """A token with its spaces and breaks shown."""
    return token.replace(" ", "▁").replace("\n", "↵").replace("\t", "⇥") or "∅"


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def _thumbnail(image: Any) -> str:
    picture = load_image(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return image_url(picture)


def _entries(count: int, rows: Any, tokens: list[list[str]], action_ids: list[list[int]]) -> list[CodeEntry]:
    emitted: list[Counter] = [Counter() for _ in range(count)]
    contexts: list[dict[tuple[str, str, str], None]] = [{} for _ in range(count)]
    for i, (words, codes) in enumerate(zip(tokens, action_ids, strict=True)):
        prompt = _text(rows[i]["prompt"][-1]["content"])[-60:]
        for step, (word, code) in enumerate(zip(words, codes, strict=True)):
            emitted[code][word] += 1
            if len(contexts[code]) < 4:
                before = f"{prompt} → {''.join(words[:step])[-60:]}"
                contexts[code][(before, word, "".join(words[step + 1 :])[:40])] = None
    entries = [
        CodeEntry(code, emitted[code].total(), emitted[code].most_common(6), list(contexts[code]))
        for code in range(count)
    ]
    return sorted(entries, key=lambda entry: (-entry.count, entry.code))


def code_positions(vectors: np.ndarray) -> tuple[list[tuple[float, float]], float]:
    """Principal components of the code vectors, each axis scaled to [0, 1]."""
    centred = vectors - vectors.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((len(vectors), 2))
    axes = min(2, len(singular))
    plane[:, :axes] = left[:, :axes] * singular[:axes]
    spread = np.ptp(plane, axis=0)
    scaled = (plane - plane.min(axis=0)) / np.where(spread > 0, spread, 1)
    total = (singular**2).sum()
    explained = float((singular[:2] ** 2).sum() / total) if total > 0 else 1.0
    return [(float(x), float(y)) for x, y in scaled], explained


def code_token_information(tokens: list[list[str]], action_ids: list[list[int]]) -> float:
    """Mutual information in nats of codes and the tokens they emitted, by counting: too high where there are few."""
    pairs = Counter((c, t) for words, codes in zip(tokens, action_ids) for c, t in zip(codes, words))
    total = pairs.total()
    by_code: Counter = Counter()
    by_token: Counter = Counter()
    for (code, token), n in pairs.items():
        by_code[code] += n
        by_token[token] += n
    return sum(n / total * math.log(n * total / (by_code[c] * by_token[t])) for (c, t), n in pairs.items())


def _code_tokens(shown: list[int], tokens: list[list[str]], action_ids: list[list[int]], size: int) -> Heat:
    """Columns are the most frequent tokens, in the order of the codes that emit them most."""
    pairs = Counter((c, t) for words, codes in zip(tokens, action_ids) for c, t in zip(codes, words))
    frequent = [token for token, _ in Counter(t for words in tokens for t in words).most_common(size)]
    totals = Counter(c for codes in action_ids for c in codes)
    frequent.sort(key=lambda t: max(range(len(shown)), key=lambda row: pairs[(shown[row], t)]))
    values = [[pairs[(code, token)] / totals[code] for token in frequent] for code in shown]
    return Heat([str(code) for code in shown], [visible(token) for token in frequent], values)


def _code_codes(shown: list[int], action_ids: list[list[int]]) -> Heat:
    steps = Counter(pair for codes in action_ids for pair in zip(codes, codes[1:]))
    totals: Counter = Counter()
    for (first, _), n in steps.items():
        totals[first] += n
    values = [[steps[(a, b)] / totals[a] if totals[a] else 0.0 for b in shown] for a in shown]
    names = [str(code) for code in shown]
    return Heat(names, names, values)


def write_atlas(atlas: Atlas, path: Path) -> Path:
    """Writes the page, which needs no other file and no network. Returns `path`."""
    return render_page(TEMPLATE, atlas, Path(path))


def render_page(template: str, atlas: Any, path: Path) -> Path:
    """Writes a page from a template of this folder. Returns `path`."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError("The atlas needs jinja2: `pip install jinja2`.") from error
    environment = Environment(
        loader=PackageLoader("latent_trl.evaluation", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(code_colour=code_colour, visible=visible)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(atlas=atlas), encoding="utf-8")
    return path
