"""Answers of a data set, in the place of the backbone's own alternatives."""

from typing import Any

from ..data.prompts import PromptEncoder
from ..data.reading import OpenedRows
from ..data.rows import RowError, row_name, short, texts_of
from .branching import Alternative


def data_answers(
    encoder: PromptEncoder, rows: Any, column: str, ends: list[int], max_new_tokens: int
) -> list[list[Alternative]]:
    """
    The answers that a data set has to each prompt. Rows with the same prompt, pictures included, share theirs.

    Args:
        encoder (`PromptEncoder`): Encodes prompts, and conversations alike.
        rows (`Dataset` or list): With `prompt`, plain or conversational, and `images` where there are some.
        column (`str`): Of the answers of a row: a text, a list of texts, or TRL's `completion`, a list of messages.
        ends (`list[int]`): Tokens that end an answer.
        max_new_tokens (`int`): Longest answer.

    Returns:
        `list[list[Alternative]]`: For each row, the answers to its prompt, each text once. Those that are longer have
        not `ended`.

    Raises:
        RowError: For a row without answers, or with one that is empty or no text; it names the row.
        ValueError: When no token ends an answer.
    """
    if not ends:
        raise ValueError("No token ends an answer: the backbone and the tokenizer have no `eos_token_id`.")
    opened = OpenedRows.of(rows)
    groups: dict[Any, dict[str, Alternative]] = {}
    keys = []
    for number in range(len(opened)):
        row = opened[number]
        rendering = encoder.renderer.prompt(row)
        key = (rendering.text, *((image.size, image.tobytes()) for image in rendering.images))
        keys.append(key)
        own = groups.setdefault(key, {})
        for text in _texts(row, column):
            if text not in own:
                own[text] = _alternative(encoder, row, text, ends, max_new_tokens)
    return [list(groups[key].values()) for key in keys]


def _texts(row: dict[str, Any], column: str) -> list[str]:
    """The answers of a row."""
    value: Any = row.get(column)
    every: Any = value if isinstance(value, (list, tuple)) else [value]
    if every and all(isinstance(one, dict) for one in every):
        # A conversation is one answer.
        every = ["".join(part for message in every for part in texts_of(message))]
    if not every or any(not isinstance(one, str) or not one.strip() for one in every):
        raise RowError(
            f"{row_name(row)}: `{column}` must be a text, or a list of texts, none of them empty; got {short(value)}."
        )
    return [text.strip() for text in every]


def _alternative(
    encoder: PromptEncoder, row: dict[str, Any], text: str, ends: list[int], max_new_tokens: int
) -> Alternative:
    plain = isinstance(row["prompt"], str)
    completion: Any = text if plain else [{"role": "assistant", "content": text}]
    rendering = encoder.renderer.conversation({**row, "completion": completion, "messages": None})
    (encoding,), _ = encoder.encoder([rendering])
    start, end = encoding.answers[-1]
    ids = encoding.ids[start:end]
    # What a template writes behind the end of a turn is no part of an answer; a plain text has no end of its own.
    last = next((i for i, token in enumerate(ids) if token in ends), None)
    ids = [*ids, ends[0]] if last is None else ids[: last + 1]
    return Alternative(text, ids, 0.0, ended=len(ids) <= max_new_tokens)
