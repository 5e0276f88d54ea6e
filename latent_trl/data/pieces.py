"""What each token adds to a text, and texts as a terminal may show them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"


def printable(text: str) -> str:
    """A text without what a terminal would take for an order: "?" stands for each such character but line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def text_pieces(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], skip_special: bool = False) -> list[str]:
    """
    The text that each token adds to what is before it, spaces included; joined they are the whole text. A token that
    ends within a character adds nothing, the one that completes it adds the character.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        token_ids (`Sequence[int]`): Tokens of one text.
        skip_special (`bool`, defaults to `False`): Whether special tokens add nothing.
    """
    pieces: list[str] = []
    done = ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:end], skip_special_tokens=skip_special)
        if text.endswith(UNFINISHED) and end < len(token_ids):
            pieces.append("")
        else:
            pieces.append(text[len(done) :])
            done = text
    return pieces
