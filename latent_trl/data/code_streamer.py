"""Tells the tokens of one answer, and the codes behind them, while the answer is generated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..models.latent_action_model import LatentActionModel
from .pieces import UNFINISHED


class _Streamer(BaseStreamer):
    """Text of the tokens as soon as its characters are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_token: Callable[[str, int], None]):
        self.tokenizer, self.on_token = tokenizer, on_token
        self.ids: list[int] = []
        self.codes: list[int] = []
        self.prompt, self.shown = True, ""

    def put(self, value):
        if self.prompt:
            self.prompt = False
            return
        self.ids.extend(value.tolist())
        # A character that is not complete waits for the tokens that complete it.
        text = self.tokenizer.decode(self.ids)
        if not text.endswith(UNFINISHED):
            self.on_token(text[len(self.shown) :], self.codes[-1])
            self.shown = text

    def end(self):
        # Nothing completes a character that the answer ends within.
        rest = self.tokenizer.decode(self.ids)[len(self.shown) :]
        if rest:
            self.on_token(rest, self.codes[-1])


@contextmanager
def code_streamer(
    model: LatentActionModel, tokenizer: PreTrainedTokenizerBase, on_token: Callable[[str, int], None]
) -> Iterator[BaseStreamer]:
    """
    A streamer for one call of `model.generate` with one row.

    Args:
        model (`LatentActionModel`), tokenizer (`PreTrainedTokenizerBase`): What generates, and its tokenizer.
        on_token (`Callable[[str, int], None]`): Told each token's text and its code as they come.
    """
    streamer = _Streamer(tokenizer, on_token)

    def keep(module, args, output):
        # Of each row the code of the token that comes next; a greedy choice asks for many, to read what they say.
        if args[0].ndim == 1:
            streamer.codes.extend(args[0].tolist())

    hook = model.codebook.register_forward_hook(keep)
    try:
        yield streamer
    finally:
        hook.remove()
