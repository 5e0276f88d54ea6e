"""An engine in a thread of its own: rows of several requests in one batch, and other policies between them."""

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from safetensors.torch import load

from ..vllm.rows import EngineText
from ..vllm.wire import NOT_FINITE, OTHER_POLICY, version_of
from .engine import EngineError, RequestError

logger = logging.getLogger(__name__)


class StepEngine(Protocol):
    """
    What [`RolloutEngine`] asks of an engine: [`~latent_trl.vllm.engine.LatentActionEngine`] is one, and
    [`~latent_trl.plans.lora_engine.LoraEngine`], whose policy are the plans.
    """

    def add(
        self,
        name: str,
        prompt: Any,
        settings: dict[str, Any],
        max_new_tokens: int,
        output_support: bool = False,
        **options: Any,
    ) -> None: ...

    def step(self) -> Mapping[str, EngineText | FloatingPointError]: ...

    def abort(self, names: Sequence[str]) -> None: ...

    def load_policy(self, tensors: bytes) -> None: ...


@dataclass
class RolloutRequest:
    """
    Rows to answer.

    Args:
        policy (`str`): The version of the policy that is to answer.
        prompts (`list`): As [`StepEngine.add`] takes them.
        rows (`list[tuple[int, dict]]`): The place of a row's prompt, and the row's settings.
        max_new_tokens (`int`), stop_token_ids (`list[int]`), output_support (`bool`): Of all rows.
    """

    policy: str
    prompts: list[Any]
    rows: list[tuple[int, dict[str, Any]]]
    max_new_tokens: int
    stop_token_ids: list[int]
    output_support: bool


@dataclass
class _Work:
    """A request that is being answered: the answers by row, and who waits for them."""

    future: "Future[list[EngineText]]"
    names: list[str] = field(default_factory=list)
    answers: dict[str, EngineText] = field(default_factory=dict)


class RolloutEngine:
    """
    Answers rows and takes policies. Its methods are called in the server's event loop; the engine is touched by one
    thread, in the order of the calls, so that no row is answered by another policy than it was asked of.

    Args:
        engine (`StepEngine`): Who answers.
        policy (`bytes`): The tensors of the policy that it holds, as [`StepEngine.load_policy`] takes them.
        slots (`int`, *optional*): Where the policy are plans, for how many the engine has room. All tensors of a policy
            have as many entries as it has plans.
    """

    def __init__(self, engine: StepEngine, policy: bytes, slots: int | None = None):
        self.engine = engine
        self.version: str | None = version_of(policy)
        tensors = load(policy)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.slots = slots
        # Of a policy in another precision too, and of as many plans as there may be.
        self.most_bytes = len(policy) + 4 * sum(tensor.numel() for tensor in tensors.values())
        if slots is not None:
            self.most_bytes *= -(-slots // next(iter(self.shapes.values()))[0])
        self.failure: str | None = None
        self._numbers = itertools.count()
        self._works: dict[str, _Work] = {}
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="latent-trl-engine", daemon=True)
        self._thread.start()

    async def answer(self, request: RolloutRequest) -> list[EngineText]:
        """
        Answers, row by row. To cancel it ends the work.

        Raises:
            RequestError: For rows that cannot be answered, or of a policy that the engine does not hold.
            EngineError: When the engine fails.
        """
        work = _Work(Future())
        try:
            return await self._wait(work.future, lambda: self._begin(work, request))
        finally:
            # Of what is done nothing is left to be ended.
            self._tasks.put(lambda: self._end(work))

    async def update(self, version: str, policy: bytes) -> None:
        """
        Takes a policy, unless it is there already. Rows that are being answered by the last one end with an error.

        Args:
            version (`str`): Which the policy must have.
            policy (`bytes`): Of tensors of the same names and shapes, as safetensors; of plans there may be others.

        Raises:
            RequestError: For other bytes. The policy that the engine holds stays.
        """
        await asyncio.to_thread(self._check, version, policy)
        future: Future[None] = Future()
        await self._wait(future, lambda: self._update(future, version, policy))

    async def ping(self) -> str | None:
        """The version of the policy that the engine holds, once the thread comes to it."""
        future: Future[str | None] = Future()
        return await self._wait(future, lambda: _settle(future, self.version))

    def close(self) -> None:
        """Ends the thread; what is unanswered fails."""
        self._tasks.put(None)
        self._thread.join()

    async def _wait(self, future: Future, task: Callable[[], None]) -> Any:
        if self.failure is not None:
            raise EngineError(self.failure)
        self._tasks.put(task)
        return await asyncio.wrap_future(future)

    def _check(self, version: str, policy: bytes) -> None:
        if version_of(policy) != version:
            raise RequestError("The bytes of the policy are not those that were sent: their SHA-256 is another.")
        try:
            tensors = load(policy)
        except Exception as error:
            raise RequestError(f"The body is no safetensors file ({type(error).__name__}: {error}).") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}
        expected = self._expected(shapes)
        for name in sorted(expected.keys() | shapes.keys()):
            own, theirs = expected.get(name), shapes.get(name)
            if own != theirs:
                found, wanted = ("no numbers" if s is None else f"shape {s}" for s in (theirs, own))
                raise RequestError(f"The policy's {name!r} has {found}, and that of the engine has {wanted}.")

    def _expected(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Which shapes the tensors of a policy of these `shapes` must have."""
        if self.slots is None:
            return self.shapes
        plans = max([1, *(shape[0] for shape in shapes.values() if shape)])
        if plans > self.slots:
            raise RequestError(f"There are {plans} plans, and the engine has room for {self.slots}.")
        return {name: (plans, *shape[1:]) for name, shape in self.shapes.items()}

    def _run(self) -> None:
        while True:
            try:
                task = self._tasks.get(block=not self._works)
            except queue.Empty:
                task = self._step
            if task is None:
                self._fail("The server ends.")
                return
            try:
                task()
            except Exception as error:
                logger.exception("The engine failed.")
                self.failure = f"The engine failed: {type(error).__name__}. Start the server again."
                self._fail(self.failure)

    def _begin(self, work: _Work, request: RolloutRequest) -> None:
        if self.failure is not None:
            _settle(work.future, EngineError(self.failure))
        elif request.policy != self.version:
            _settle(work.future, _other_policy(f"The engine holds the policy {self.version!r:.20}"))
        elif not work.future.cancelled():
            try:
                for place, settings in request.rows:
                    name = str(next(self._numbers))
                    self.engine.add(
                        name,
                        request.prompts[place],
                        settings,
                        request.max_new_tokens,
                        request.output_support,
                        stop_token_ids=request.stop_token_ids,
                    )
                    work.names.append(name)
                    self._works[name] = work
            except Exception as error:
                self._end(work)
                refused = isinstance(error, ValueError)
                if not refused:
                    logger.exception("Rows could not be taken.")
                _settle(work.future, RequestError(str(error)) if refused else EngineError(f"{error!r}"))

    def _step(self) -> None:
        """The next token of all rows."""
        ended = self.engine.step()
        works = {name: self._works.pop(name, None) for name in ended}
        for name, answer in ended.items():
            work = works[name]
            if work is None:
                continue
            if isinstance(answer, FloatingPointError):
                self._end(work)
                _settle(work.future, RequestError(str(answer), status=422, code=NOT_FINITE))
                continue
            work.answers[name] = answer
            if len(work.answers) == len(work.names):
                _settle(work.future, [work.answers[row] for row in work.names])

    def _end(self, work: _Work) -> None:
        """Ends what is left of a request."""
        names = [name for name in work.names if self._works.pop(name, None) is not None]
        if names and self.failure is None:
            self.engine.abort(names)

    def _update(self, future: Future, version: str, policy: bytes) -> None:
        if version == self.version:
            # Another process of the same run gave it.
            _settle(future, None)
            return
        for work in list(self._works.values()):
            self._end(work)
            _settle(work.future, _other_policy("The engine was given another policy"))
        # Until it is whole, the engine holds none.
        self.version = None
        try:
            self.engine.load_policy(policy)
        except Exception as error:
            logger.exception("A policy could not be taken.")
            _settle(future, EngineError(f"The policy could not be taken: {type(error).__name__}."))
            return
        self.version = version
        _settle(future, None)

    def _fail(self, why: str) -> None:
        for work in list(self._works.values()):
            _settle(work.future, EngineError(why))
        self._works.clear()


def _other_policy(what: str) -> RequestError:
    return RequestError(f"{what}; give it yours first.", "policy", 409, OTHER_POLICY)


def _settle(future: Future, outcome: Any) -> None:
    """Gives a future its result or its exception, unless it has one, or nobody waits for it."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
