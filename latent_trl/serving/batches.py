"""Requests of the embedded engine: their answers as they come, and which of them go into one batch."""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..data.prompts import EncodedPrompt
from .engine import EngineError, GenerationRequest, Piece
from .text_stream import StopText, TextStream


class GrowingAnswer:
    """
    One answer while it is made.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        ends (`list[int]`): Tokens that end it.
        max_tokens (`int`): Its longest length.
        stops (`list[str]`): Texts before which it ends.
        piece (`Piece`): An empty one with its index, in which what comes is gathered.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: list[int], max_tokens: int, stops: list[str], piece: Piece
    ):
        self.text, self.tokens = TextStream(tokenizer, skip_special=True), TextStream(tokenizer)
        self.stop = StopText(stops)
        self.ends, self.max_tokens, self.piece = ends, max_tokens, piece
        self.length = 0

    def choose(self, action_id: int, log_prob: float) -> None:
        """What the tokens that come next are said under."""
        self.piece.action_ids.append(action_id)
        self.piece.log_probs.append(log_prob)
        self.piece.starts.append(self.length)

    def add(self, token_id: int) -> None:
        self.length += 1
        ended = token_id in self.ends
        last = ended or self.length == self.max_tokens
        piece = self.piece
        piece.text += self.stop.add(self.text.add(token_id, last), last)
        piece.tokens.append(self.tokens.add(token_id, last))
        if ended or self.stop.reached:
            piece.finish_reason = "stop"
        elif last:
            piece.finish_reason = "length"

    def taken(self) -> Piece:
        """What was gathered since the last time."""
        piece = self.piece
        self.piece = Piece(piece.index, prompt_tokens=piece.prompt_tokens)
        return piece


@dataclass(eq=False)
class Job:
    """
    A request on its way.

    Args:
        request (`GenerationRequest`): What is wanted.
        prompt (`EncodedPrompt`): Its conversation.
        max_tokens (`int`): Longest answer.
        tell (`Callable`): Takes pieces, or the error that ends the request, in any thread.
        answers (`list[GrowingAnswer]`): One a sample, while it is in a batch.
        open (`set[int]`): Samples that have not ended.
        has_told (`bool`): Whether anything was told.
        is_cancelled (`bool`): Whether nobody waits for it.
    """

    request: GenerationRequest
    prompt: EncodedPrompt
    max_tokens: int
    tell: Callable[[Piece | Exception], None]
    answers: list[GrowingAnswer] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    has_told: bool = False
    is_cancelled: bool = False

    def begin(self, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
        pieces = [Piece(index, prompt_tokens=len(self.prompt.ids)) for index in range(self.request.n)]
        ends = [] if self.request.ignore_eos else ends
        self.answers = [GrowingAnswer(tokenizer, ends, self.max_tokens, self.request.stop, p) for p in pieces]
        self.open = set(range(self.request.n))

    def choose(self, index: int, action_id: int, log_prob: float) -> None:
        """Takes the code or plan of the tokens of one sample that come next."""
        if self.is_cancelled or index not in self.open:
            return
        if math.isfinite(log_prob):
            self.answers[index].choose(action_id, log_prob)
        else:
            self.fail(EngineError("Nothing could be drawn: the probabilities of codes or plans are not finite."))

    def add(self, index: int, token_id: int) -> bool:
        """Takes a token of one sample. Returns whether the sample has ended."""
        if self.is_cancelled or index not in self.open:
            return True
        answer = self.answers[index]
        answer.add(token_id)
        ended = answer.piece.finish_reason is not None
        if ended:
            self.open.discard(index)
        if ended or self.request.stream:
            self.has_told = True
            self.tell(answer.taken())
        return ended

    def fail(self, error: Exception) -> None:
        self.open.clear()
        self.tell(error)


def next_batch(waiting: deque[Job], max_batch_size: int, max_model_len: int | None) -> list[Job]:
    """
    Takes the oldest jobs that one call of `generate` can answer: as many samples each, and no longer than the longest
    context, where the longest prompt and the longest answer count for all.
    """
    batch: list[Job] = []
    left: list[Job] = []
    while waiting:
        job = waiting.popleft()
        if job.is_cancelled:
            continue
        together = [*batch, job]
        length = max(len(j.prompt.ids) for j in together) + max(j.max_tokens for j in together)
        fits = max_model_len is None or length <= max_model_len
        if batch and (job.request.n != batch[0].request.n or not fits):
            left.append(job)
        elif len(together) * job.request.n > max_batch_size and batch:
            left.append(job)
            break
        else:
            batch = together
    waiting.extendleft(reversed(left))
    return batch


class Pieces:
    """What a worker's thread tells a coroutine."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def tell(self, piece: Piece | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:
            # The loop has closed: the server has stopped, and nobody waits.
            pass

    async def get(self) -> Piece:
        piece = await self._queue.get()
        if isinstance(piece, Exception):
            raise piece
        return piece
