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
from transformers import GenerationConfig
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
from ..vllm.prompts import as_request
from .batches import Pieces
from .engine import CODES, EngineError, GenerationRequest, Piece, RequestError, default_law, longest_answer
from .text_stream import TextStream

logger = logging.getLogger(__name__)


class VLLMServing:
    """
    What the engines of codes and of plans share: requests go to vLLM as they come, one for each answer.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        config (`GenerationConfig`): The backbone's.
        num_actions (`int`): K, of codes or plans.
        arguments (`dict`): Of `vllm.AsyncEngineArgs`.
        max_batch_size (`int`), max_completion_length (`int`): As the engines have them.
    """

    def __init__(
        self,
        processor: Any,
        config: GenerationConfig,
        num_actions: int,
        arguments: dict[str, Any],
        max_batch_size: int,
        max_completion_length: int,
    ):
        self.max_batch_size, self.max_completion_length = max_batch_size, max_completion_length
        self.num_actions = num_actions
        self.encoder = PromptEncoder(processor)
        self.tokenizer = self.encoder.encoder.tokenizer
        self.special_tokens = list(self.tokenizer.all_special_tokens)
        self.ends = end_tokens(SimpleNamespace(generation_config=config), self.tokenizer, {}) or []
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**{"max_num_seqs": max_batch_size, **arguments}))
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
        self._check(request)
        prompt = await self._in_thread(self._encoded, request)
        length = longest_answer(request, self._length(prompt), self.max_completion_length, self.max_model_len)
        pieces, unfinished = Pieces(), request.n
        # A request of vLLM's for each: children of one request would share a seed.
        tasks = [
            asyncio.ensure_future(self._told(prompt, request, length, seed, index, pieces.tell))
            for index, seed in enumerate(_seeds(request))
        ]
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

    async def _told(self, *asked: Any) -> None:
        """Answers once; what fails is told."""
        *_, tell = asked
        try:
            await self._answer(*asked)
        except EngineDeadError:
            tell(EngineError("vLLM's engine has died."))
        except EngineError as error:
            tell(error)
        except (ValueError, VLLMClientError) as error:
            # vLLM refuses prompts and settings with them.
            tell(RequestError(str(error)))
        except Exception as error:
            logger.exception("A request failed in vLLM.")
            tell(EngineError(f"The answer failed: {type(error).__name__}."))

    def _check(self, request: GenerationRequest) -> None:
        """Raises [`RequestError`] for what this model cannot do."""

    def _encoded(self, request: GenerationRequest) -> Any:
        try:
            return self._encode({"prompt": request.messages})
        except RowError as error:
            raise RequestError(str(error).removeprefix("A row: "), "messages") from error

    def _encode(self, row: dict[str, Any]) -> Any:
        """The prompt, in the worker's thread."""
        raise NotImplementedError

    def _length(self, prompt: Any) -> int:
        """Of a prompt, in tokens."""
        raise NotImplementedError

    async def _answer(
        self,
        prompt: Any,
        request: GenerationRequest,
        length: int,
        seed: int | None,
        index: int,
        tell: Callable[[Piece | Exception], None],
    ) -> None:
        """Tells the pieces of one answer."""
        raise NotImplementedError

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoders, call, *arguments)

    def _number(self) -> str:
        return f"chat-{next(self._numbers)}"


class VLLMEngine(VLLMServing):
    """
    Answers with vLLM, which takes requests into its batch as they come.

    Args:
        model (`str`): Folder or Hub id of latent actions.
        max_batch_size (`int`, defaults to `32`): Most answers at once.
        max_completion_length (`int`, defaults to `1024`): Longest answer, and where a request names no length the one
            that it gets, as far as there is room.
        options: Further arguments of vLLM's, such as `dtype`, `max_model_len`, `gpu_memory_utilization`.
    """

    kind = CODES

    def __init__(self, model: str, max_batch_size: int = 32, max_completion_length: int = 1024, **options: Any):
        folders = folders_of_checkpoint(model)
        config = folders.generation_config()
        self.default_law = default_law(config)
        sizes = (max_batch_size, max_completion_length)
        arguments = engine_arguments(folders, **options)
        super().__init__(folders.load_processor(), config, folders.config.num_codes, arguments, *sizes)

    def about(self) -> dict[str, Any]:
        return {"num_codes": self.num_actions, "special_tokens": self.special_tokens}

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        # Without the processor's tokens, which vLLM makes itself.
        rendering = self.encoder.renderer.prompt(row)
        return as_request(self.encoder.encoder.unfilled(rendering), rendering.images)

    def _length(self, prompt: dict[str, Any]) -> int:
        # Without its pictures' tokens, which vLLM fills in and checks.
        return len(prompt["prompt_token_ids"])

    async def _answer(self, prompt, request, length, seed, index, tell) -> None:
        stream, params = TextStream(self.tokenizer), self._params(request, length, seed)
        async with aclosing(self.llm.generate(prompt, params, self._number())) as outputs:
            async for output in outputs:
                tell(_piece(output, index, stream))

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
