"""What the embedded engines share: a thread that takes the requests that wait as one batch."""

import asyncio
import copy
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.prompts import EncodedPrompt, PromptEncoder
from ..data.rows import RowError
from ..generation.choice import ActionChoice, code_bias
from ..generation.row_choices import RowChoices
from ..models.backbone import Backbone
from .batches import Job, Pieces, next_batch
from .engine import EngineError, GenerationRequest, Piece, RequestError, longest_answer

logger = logging.getLogger(__name__)


class BatchedEngine:
    """
    Requests that come while a batch is being answered wait, and go into the next one together, whatever their laws. An
    answer that has ended is told at once; the batch ends with its longest.

    Args:
        view (`Backbone`): The backbone.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        num_actions (`int`): K, of codes or plans.
        max_batch_size (`int`), max_completion_length (`int`), max_model_len (`int`, *optional*): As the engines have
            them.

    Raises:
        ValueError: For a `max_model_len` that the backbone has no positions for.
    """

    def __init__(
        self,
        view: Backbone,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        num_actions: int,
        max_batch_size: int,
        max_completion_length: int,
        max_model_len: int | None,
    ):
        self.num_actions = num_actions
        self.max_batch_size, self.max_completion_length = max_batch_size, max_completion_length
        self.encoder = PromptEncoder(processing_class)
        # A tokenizer that encodes cannot decode at the same time, in another thread.
        self.tokenizer = copy.deepcopy(self.encoder.encoder.tokenizer)
        self.ends: list[int] = []
        self.max_model_len = _max_model_len(view, max_model_len)
        self.special_tokens = list(self.tokenizer.all_special_tokens)
        self._encoding = threading.Lock()
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="latent-trl-prompts")
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._wake = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="latent-trl-answers", daemon=True)

    async def start(self) -> None:
        self._worker.start()

    async def close(self) -> None:
        with self._wake:
            self._closed = True
            unanswered = [*self._waiting, *self._running]
            self._waiting.clear()
            self._wake.notify()
        for job in unanswered:
            job.is_cancelled = True
            job.tell(EngineError("The server is stopping."))
        self._encoders.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._worker.join)

    def problem(self) -> str | None:
        return None if self._worker.is_alive() else "the thread that answers is not running"

    def load(self) -> dict[str, int]:
        return {"waiting": len(self._waiting), "running": sum(len(job.open) for job in self._running)}

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        self._check(request)
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._encoders, self._encode, request)
        pieces = Pieces()
        length = longest_answer(request, len(prompt.ids), self.max_completion_length, self.max_model_len)
        job = Job(request, prompt, length, pieces.tell)
        with self._wake:
            if self._closed:
                raise EngineError("The server is stopping.")
            self._waiting.append(job)
            self._wake.notify()
        unfinished = request.n
        try:
            while unfinished:
                piece = await pieces.get()
                unfinished -= piece.finish_reason is not None
                yield piece
        finally:
            job.is_cancelled = True

    def _check(self, request: GenerationRequest) -> None:
        """Raises [`RequestError`] for what this model cannot do."""

    def _encode(self, request: GenerationRequest) -> EncodedPrompt:
        try:
            with self._encoding:
                return self.encoder({"prompt": request.messages})
        except RowError as error:
            raise RequestError(str(error).removeprefix("A row: "), "messages") from error

    def _work(self) -> None:
        while True:
            with self._wake:
                self._running = []
                self._wake.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._running = next_batch(self._waiting, self.max_batch_size, self.max_model_len)
            if self._running:
                self._answer(self._running)

    def _answer(self, jobs: list[Job]) -> None:
        """Answers a batch. When it fails, each job of which nothing has been told is tried alone."""
        try:
            for job in jobs:
                job.begin(self.tokenizer, self.ends)
            self._generate(jobs)
            error: Exception = EngineError("The answer did not end.")
        except Exception as raised:
            logger.exception("A batch of %d requests failed.", len(jobs))
            error = EngineError(f"The answer failed: {type(raised).__name__}.")
        for job in jobs:
            if not job.open or job.is_cancelled:
                continue
            if len(jobs) > 1 and not job.has_told:
                self._answer([job])
            else:
                job.fail(error)

    def _generate(self, jobs: list[Job]) -> None:
        """Answers jobs that have begun, as many samples each. Of each answer its job knows the end."""
        raise NotImplementedError

    def _choices(self, requests: list[GenerationRequest], device: Any) -> RowChoices:
        """How each row chooses. Rows come as all prompts for the first sample, for the second, ..."""
        alike: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            key: Any = (request.do_sample, request.law, tuple(sorted(request.bias.items())))
            if request.forced or (request.seed is not None and request.do_sample):
                key = place
            alike.setdefault(key, []).append(place)
        parts = []
        for places in alike.values():
            rows = [copy * len(requests) + place for copy in range(requests[0].n) for place in places]
            parts.append((rows, action_choice(requests[places[0]], self.num_actions, len(rows), device)))
        return RowChoices(parts)


def action_choice(
    request: GenerationRequest, count: int, rows: int, device: Any, seed: int | None = None
) -> ActionChoice:
    """
    How a request chooses.

    Args:
        request (`GenerationRequest`): What is wanted.
        count (`int`): K.
        rows (`int`): How many it chooses for at once.
        device (`torch.device`): Where.
        seed (`int`, *optional*): In the place of its own.
    """
    forced, generator = None, None
    seed = request.seed if seed is None else seed
    bias = code_bias(count, added=request.bias, device=device)
    if request.forced:
        forced = torch.tensor([request.forced] * rows, device=device)
    if seed is not None:
        generator = torch.Generator(device=device).manual_seed(seed)
    return ActionChoice(request.law, request.do_sample, forced, bias, generator)


def _max_model_len(view: Backbone, wanted: int | None) -> int | None:
    # Rotary positions go on behind those that were trained; a table of positions has an end.
    trained, limit = getattr(view.text_config, "max_position_embeddings", None), view.max_positions
    if wanted is not None and limit is not None and wanted > limit:
        raise ValueError(f"`max_model_len` is at most {limit}, the positions of the backbone; got {wanted}.")
    return wanted or limit or trained
