"""Text from tokens that come one by one, and the end of it at a stop text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..data.pieces import UNFINISHED


class TextStream:
    """
    The text that each token adds; joined they are the decoded whole. A token that ends within a character adds nothing.

    Only the last tokens are decoded again, so that a long answer costs what it is long.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        skip_special (`bool`, defaults to `False`): Whether special tokens add nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special: bool = False):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.ids: list[int] = []
        # Tokens from `start` to `told` have been told; they are decoded with what follows, for the spaces between.
        self.start = self.told = 0

    def add(self, token_id: int, last: bool = False) -> str:
        """What `token_id` adds; with `last` an unfinished character too."""
        self.ids.append(token_id)
        before = self._decode(self.ids[self.start : self.told])
        whole = self._decode(self.ids[self.start :])
        if whole.endswith(UNFINISHED) and not last:
            return ""
        if len(whole) > len(before):
            self.start, self.told = self.told, len(self.ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special)


class StopText:
    """
    Text up to the first of some stop texts.

    Args:
        stops (`Sequence[str]`): Not empty ones.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = list(stops)
        self.held = ""
        self.reached = False

    def add(self, text: str, last: bool = False) -> str:
        """What can be told now that `text` has come; what may begin a stop text waits, unless it is the `last`."""
        self.held += text
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.reached = True
            told, self.held = self.held[: min(found)], ""
            return told
        keep = 0 if last else max((self._begun(stop) for stop in self.stops), default=0)
        told, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return told

    def _begun(self, stop: str) -> int:
        """Characters at the end of what is held that a stop text begins with."""
        longest = min(len(stop) - 1, len(self.held))
        return next((length for length in range(longest, 0, -1) if self.held.endswith(stop[:length])), 0)
