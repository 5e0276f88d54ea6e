"""The engine of vLLM behind the server."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import torch
from vllm import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from ..data.prompts import PromptEncoder
from ..data.rows import RowError
from ..generation.answers import end_tokens
from ..vllm.engine import answer_of, engine_arguments, sampling_params
from ..vllm.folders import folders_of_checkpoint
from .batches import Pieces
from .engine import EngineError, GenerationRequest, Piece, RequestError, default_law, longest_answer
from .text_stream import TextStream

logger = logging.getLogger(__name__)


class VLLMEngine:
    """
    Answers with vLLM, which takes requests into its batch as they come.

    Args:
        model (`str`): Folder or Hub id of latent actions.
        max_batch_size (`int`, defaults to `32`): Most answers at once.
        max_completion_length (`int`, defaults to `1024`): Longest answer, and where a request names no length the one
            that it gets, as far as there is room.
        options: Further arguments of vLLM's, such as `dtype`, `max_model_len`, `gpu_memory_utilization`.
    """

    def __init__(self, model: str, max_batch_size: int = 32, max_completion_length: int = 1024, **options: Any):
        folders = folders_of_checkpoint(model)
        self.max_batch_size, self.max_completion_length = max_batch_size, max_completion_length
        self.num_codes = folders.config.num_codes
        self.encoder = PromptEncoder(folders.load_processor())
        self.tokenizer = self.encoder.encoder.tokenizer
        self.special_tokens = list(self.tokenizer.all_special_tokens)
        config = folders.generation_config()
        self.ends = end_tokens(SimpleNamespace(generation_config=config), self.tokenizer, {}) or []
        self.default_law = default_law(config)
        arguments = engine_arguments(folders, **{"max_num_seqs": max_batch_size, **options})
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.max_model_len = self.llm.model_config.max_model_len
        self._numbers = itertools.count()
        self._running = 0
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="latent-trl-prompts")

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self._encoders.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.llm.shutdown)

    def problem(self) -> str | None:
        return "vLLM's engine has died" if self.llm.errored else None

    def load(self) -> dict[str, int]:
        return {"running": self._running}

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._encoders, self._encode, request)
        # Without its pictures' tokens, which vLLM fills in and checks.
        known = len(prompt["prompt_token_ids"])
        length = longest_answer(request, known, self.max_completion_length, self.max_model_len)
        pieces, unfinished = Pieces(), request.n
        # A request of vLLM's for each: children of one request would share a seed.
        params = [self._params(request, length, seed) for seed in _seeds(request)]
        tasks = [asyncio.ensure_future(self._answer(prompt, p, i, pieces.tell)) for i, p in enumerate(params)]
        self._running += request.n
        try:
            while unfinished:
                piece = await pieces.get()
                unfinished -= piece.finish_reason is not None
                yield piece
        finally:
            self._running -= request.n
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(
        self, prompt: dict[str, Any], params: Any, index: int, tell: Callable[[Piece | Exception], None]
    ) -> None:
        stream = TextStream(self.tokenizer)
        try:
            async with aclosing(self.llm.generate(prompt, params, f"chat-{next(self._numbers)}")) as outputs:
                async for output in outputs:
                    tell(_piece(output, index, stream))
        except EngineDeadError:
            tell(EngineError("vLLM's engine has died."))
        except (ValueError, VLLMClientError) as error:
            # vLLM refuses prompts and settings with them.
            tell(RequestError(str(error)))
        except Exception as error:
            logger.exception("A request failed in vLLM.")
            tell(EngineError(f"The answer failed: {type(error).__name__}."))

    def _encode(self, request: GenerationRequest) -> dict[str, Any]:
        try:
            rendering = self.encoder.renderer.prompt({"prompt": request.messages})
        except RowError as error:
            raise RequestError(str(error).removeprefix("A row: "), "messages") from error
        prompt: dict[str, Any] = {"prompt_token_ids": self.encoder.encoder.unfilled(rendering)}
        return {**prompt, "multi_modal_data": {"image": rendering.images}} if rendering.images else prompt

    def _params(self, request: GenerationRequest, max_tokens: int, seed: int | None) -> Any:
        settings = {
            "action_do_sample": request.do_sample,
            "action_temperature": request.law.temperature,
            "action_top_k": request.law.top_k,
            "action_top_p": request.law.top_p,
            "action_bias": request.bias or None,
            "action_seed": seed,
            "forced_action_ids": request.forced or None,
        }
        return sampling_params(
            max_tokens,
            settings,
            stop=request.stop,
            stop_token_ids=[] if request.ignore_eos else self.ends,
            ignore_eos=request.ignore_eos,
            output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
        )


def _seeds(request: GenerationRequest) -> list[int | None]:
    if request.seed is None:
        return [None] * request.n
    return torch.randint(2**62, (request.n,), generator=torch.Generator().manual_seed(request.seed)).tolist()


def _piece(output: Any, index: int, stream: TextStream) -> Piece:
    """What a `RequestOutput` of one answer adds to it."""
    (part,) = output.outputs
    answer = answer_of(output.prompt_token_ids, part)
    last = len(answer.token_ids) - 1 if part.finish_reason is not None else None
    return Piece(
        index=index,
        text=part.text,
        action_ids=answer.action_ids,
        log_probs=answer.log_probs,
        tokens=[stream.add(token, i == last) for i, token in enumerate(answer.token_ids)],
        finish_reason=part.finish_reason,
        prompt_tokens=len(output.prompt_token_ids),
    )
