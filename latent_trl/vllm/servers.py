"""Several rollout servers in the place of one engine: a batch is divided over them, and no server's end loses it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils import logging

from ..models.latent_action_model import LatentActionModel
from .client import RolloutServer, ServerFault
from .identity import differences, identity_of_model
from .rows import EngineAnswer, row_settings
from .wire import PolicyFile, rollout_body, unpacked

logger = logging.get_logger(__name__)

# Seconds between two tries while no server answers.
RETRY_SECONDS = 1.0
# How often all servers may fail at one batch, though they come back.
TRIALS = 4


class RolloutServersError(RuntimeError):
    """No server is left, or one is not of this model."""


@dataclass
class _Report:
    """What a process tells the others after a round: whether rows are left, which servers failed, and an error."""

    unanswered: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    error: str | None = None


class ServerPool:
    """
    Rollout servers that hold one policy, and answer rows by it.

    A server that does not answer, or holds another policy, is named in a warning; its rows are answered by the others.
    Before a later batch it is tried again, and has the policy before it has work.

    Args:
        identity (`Callable`): Makes the identity that servers must have.
        urls (`list[str]`): Their addresses, each once.
        timeout (`float`): Seconds to wait for the servers at the start, for answers, and for any server to come back
            when none is left.
        key (`str`, *optional*): The API key.
        together (`bool`, defaults to `True`): Whether all processes of a trainer make and call it alike: the first
            gives the servers the policy, and all learn which servers are lost. Otherwise each process is on its own.
        pause (`float`, defaults to `0.0`): Seconds that a lost server is left alone, as long as there are others.

    Raises:
        RolloutServersError: When a server does not answer in time, or is of another model or package.
    """

    # Makes answers of bytes.
    read: Callable[[bytes, int], list[Any]] = staticmethod(unpacked)

    def __init__(
        self,
        identity: Callable[[], dict[str, Any]],
        urls: list[str],
        timeout: float,
        key: str | None = None,
        together: bool = True,
        pause: float = 0.0,
    ):
        self.servers = {url: RolloutServer(url, timeout, key) for url in urls}
        self.timeout, self.together, self.pause = timeout, together, pause
        self.main = not together or PartialState().is_main_process
        self.identity = identity() if self.main else {}
        # Why a server has no work, and when those were tried last.
        self.lost: dict[str, str] = {}
        self.tried = 0.0
        self.policy: PolicyFile | None = None
        self.version = ""
        self._told(self._check_all if self.main else None)

    def differences(self, url: str, described: dict[str, Any]) -> list[str]:
        """In words, where a server that `described` itself is not of this model."""
        return differences(self.identity, described)

    def _check_all(self) -> None:
        """Waits until all servers are there; a wrong address or model is an error before the first rollout."""
        missing, until = dict.fromkeys(self.servers, ""), time.monotonic() + self.timeout
        while missing:
            jobs = {url: self.servers[url].describe for url in missing}
            missing = {}
            for url, described in in_threads(jobs):
                if isinstance(described, ServerFault):
                    missing[url] = str(described)
                elif isinstance(described, Exception):
                    raise described
                elif found := self.differences(url, described):
                    raise RolloutServersError(f"The rollout server {url} is not of this model: {'; '.join(found)}.")
            if missing and time.monotonic() > until:
                named = ", ".join(f"{url} ({why})" for url, why in missing.items())
                raise RolloutServersError(
                    f"No answer in {self.timeout:g} s from {named}. Start `latent-trl vllm-serve` there, or leave it "
                    "out of `vllm_server_hosts`."
                )
            if missing:
                time.sleep(RETRY_SECONDS)

    def give(self, policy: PolicyFile | None) -> dict[str, float]:
        """
        Gives the servers a policy; those that hold it already are sent nothing.

        Args:
            policy (`PolicyFile`, *optional*): On the process that gives it.

        Returns:
            `dict[str, float]`: `seconds` that it took, `bytes` of tensors that were sent, and how many `servers` have
            the policy.

        Raises:
            RolloutServersError: When no server is left.
        """
        start = time.perf_counter()
        self.policy = policy
        sent = self._share()
        left = len(self.servers) - len(self.lost)
        return {"seconds": time.perf_counter() - start, "bytes": float(sent), "servers": float(left)}

    def _share(self) -> int:
        """
        Gives the policy to those that lack it. All processes that are together call this, and know then which servers
        have it. Returns the bytes that were sent.
        """
        before = self.lost
        self.version, self.lost, sent = self._told(self._give_all if self.main else None)
        self.tried = time.monotonic()
        if self.main:
            for url in before.keys() - self.lost.keys():
                logger.warning(f"The rollout server {url} is back, and has the policy.")
        return sent

    def _give_all(self) -> tuple[str, dict[str, str], int]:
        policy = self.policy
        if policy is None:
            raise RuntimeError("The servers have no policy: call `update` first.")
        until, warned = time.monotonic() + self.timeout, set(self.lost)
        while True:
            jobs = {url: partial(self._give, server, policy) for url, server in self.servers.items()}
            lost, sent = {}, 0
            for url, outcome in in_threads(jobs):
                if isinstance(outcome, ServerFault):
                    lost[url] = str(outcome)
                elif isinstance(outcome, Exception):
                    raise outcome
                else:
                    sent += outcome
            for url in lost.keys() - warned:
                _warn(url, lost[url], "It has no work")
            warned |= set(lost)
            if len(lost) < len(self.servers):
                return policy.version, lost, sent
            if time.monotonic() > until:
                raise _none_left(lost, f"None came back in {self.timeout:g} s")
            time.sleep(RETRY_SECONDS)

    def _give(self, server: RolloutServer, policy: PolicyFile) -> int:
        """Gives a server a policy, unless it holds it. Returns the bytes that were sent."""
        described = server.describe()
        if found := self.differences(server.url, described):
            raise ServerFault(f"it came back with another model: {'; '.join(found)}")
        if described["policy"] == policy.version:
            return 0
        server.give(policy)
        return policy.size

    def answers(
        self,
        prompts: Sequence[Any],
        rows: Sequence[tuple[int, dict[str, Any]]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        output_support: bool = False,
    ) -> list[Any]:
        """
        Answers rows; what a row answers depends neither on the number of servers nor on their fate.

        Args:
            prompts, rows, max_new_tokens, stop_token_ids, output_support: As in
                [`~latent_trl.vllm.wire.rollout_body`].

        Returns:
            `list`: Row by row, as `read` makes them.

        Raises:
            RolloutServersError: When no server is left.
            FloatingPointError: When the policy's probabilities are not finite.
        """

        def body(part: list[int]) -> bytes:
            places = sorted({rows[row][0] for row in part})
            numbers = {place: number for number, place in enumerate(places)}
            own = [(numbers[rows[row][0]], rows[row][1]) for row in part]
            sent = [prompts[place] for place in places]
            return rollout_body(self.version, sent, own, max_new_tokens, stop_token_ids, output_support)

        if self.lost and time.monotonic() - self.tried >= self.pause:
            self._share()
        answers: dict[int, Any] = {}
        trial = 0
        while True:
            trial += 1
            report, error = _Report(), None
            try:
                report.failed = self._answer(answers, len(rows), body)
                report.unanswered = len(answers) < len(rows)
                if report.unanswered and trial == TRIALS:
                    raise _none_left(self.lost | report.failed, f"Each has failed {TRIALS} times")
            except Exception as raised:
                error, report.error = raised, f"{type(raised).__name__}: {raised}"
            if not self._rows_left(report, error):
                return [answers[row] for row in range(len(rows))]
            self._share()

    def _answer(self, answers: dict[int, Any], rows: int, body: Callable[[list[int]], bytes]) -> dict[str, str]:
        """Fills `answers` by row, as far as there are servers. Returns those that failed on the way, and why."""
        lost = dict(self.lost)
        while True:
            left = [row for row in range(rows) if row not in answers]
            urls = [url for url in self.servers if url not in lost]
            if not left or not urls:
                return {url: why for url, why in lost.items() if url not in self.lost}
            parts = dict(zip(urls, divided(left, len(urls))))
            jobs = {url: partial(self._asked, url, part, body) for url, part in parts.items()}
            errors = []
            for url, outcome in in_threads(jobs):
                if isinstance(outcome, ServerFault):
                    lost[url] = str(outcome)
                    _warn(url, lost[url], f"Its {len(parts[url])} completions are made elsewhere")
                elif isinstance(outcome, Exception):
                    errors.append(outcome)
                else:
                    answers.update(zip(parts[url], outcome, strict=True))
            if errors:
                raise errors[0]

    def _asked(self, url: str, part: list[int], body: Callable[[list[int]], bytes]) -> list[Any]:
        return self.servers[url].answers(body(part), len(part), self.read)

    def _rows_left(self, own: _Report, error: Exception | None) -> bool:
        """Whether a process has rows left; all learn which servers failed, and of an error of any process."""
        reports = gather_object([own]) if self.together else [own]
        if error is not None:
            raise error
        for process, report in enumerate(reports):
            if report.error is not None:
                raise RolloutServersError(f"On process {process}: {report.error}")
            self.lost = self.lost | report.failed
        return any(report.unanswered for report in reports)

    def _told(self, work: Callable[[], Any] | None) -> Any:
        """What `work` of the first process returns or raises, on all that are together."""
        if work is not None and not self.together:
            return work()
        outcome: list[Any] = [None]
        own: Exception | None = None
        if work is not None:
            try:
                outcome = [work()]
            except Exception as error:
                own, outcome = error, [RolloutServersError(f"On process 0: {type(error).__name__}: {error}")]
        broadcast_object_list(outcome)
        if own is not None:
            raise own
        if isinstance(outcome[0], RolloutServersError):
            raise outcome[0]
        return outcome[0]

    def close(self) -> None:
        """Ends the connections. The servers go on."""
        for server in self.servers.values():
            server.session.close()


class RolloutServers(ServerPool):
    """
    Rollout servers over codes, called as a [`LatentActionEngine`] is. All processes of a trainer make one and call it
    alike: each has its own rows answered, with the seeds that they have whoever answers.

    Args:
        model (`LatentActionModel`): Of the trainer. Servers must have its backbone and frozen components.
        urls, timeout, key: As in [`ServerPool`].

    Raises:
        RolloutServersError: As [`ServerPool`].
    """

    def __init__(self, model: LatentActionModel, urls: list[str], timeout: float, key: str | None = None):
        super().__init__(lambda: identity_of_model(model), urls, timeout, key)

    def update(self, model: LatentActionModel, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, float]:
        """
        Gives the servers the policy of `model`, and returns what [`~ServerPool.give`] returns.

        Args:
            model (`LatentActionModel`): The model.
            state_dict (`dict`, *optional*): The policy's whole tensors by its own names, on the first process, where
                its parameters are sharded.
        """
        return self.give(PolicyFile.of(model.policy, state_dict) if self.main else None)

    def generate(
        self,
        prompts: Sequence[Any],
        n: int = 1,
        seed: int | None = None,
        max_new_tokens: int = 20,
        output_support: bool = False,
        stop_token_ids: Sequence[int] = (),
        **settings: Any,
    ) -> list[EngineAnswer]:
        """
        Answers prompts, each `n` times.

        Args:
            prompts, n, seed, max_new_tokens, output_support, stop_token_ids: As in [`LatentActionEngine.generate`].
            settings: Of [`~latent_trl.vllm.rows.row_settings`].

        Raises:
            RolloutServersError, FloatingPointError: As [`~ServerPool.answers`].
        """
        rows = [(row // n, own) for row, own in enumerate(row_settings(len(prompts), n, seed, **settings))]
        return self.answers(prompts, rows, max_new_tokens, stop_token_ids, output_support)


def _none_left(lost: dict[str, str], what: str) -> RolloutServersError:
    named = ", ".join(f"{url} ({why})" for url, why in lost.items())
    return RolloutServersError(
        f"No rollout server is left. {what}: {named}. Start them again, and go on from the last checkpoint "
        "(`resume_from_checkpoint=True`)."
    )


def divided(rows: list[int], parts: int) -> list[list[int]]:
    """Neighbours stay together, as rows of one prompt are; none is empty, so that there may be fewer of them."""
    parts = min(parts, len(rows))
    bounds = [len(rows) * i // parts for i in range(parts + 1)]
    return [rows[start:end] for start, end in zip(bounds, bounds[1:])]


def in_threads(jobs: Mapping[str, Callable[[], Any]]) -> Iterator[tuple[str, Any]]:
    """What each job returns, or the exception that it raises, in the order in which they end."""
    outcomes: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def work(name: str, job: Callable[[], Any]) -> None:
        try:
            outcomes.put((name, job()))
        except Exception as error:
            outcomes.put((name, error))

    for name, job in jobs.items():
        # A server that hangs does not keep an interrupted run from its end.
        threading.Thread(target=work, args=(name, job), daemon=True).start()
    for _ in jobs:
        yield outcomes.get()


def _warn(url: str, why: str, what: str) -> None:
    logger.warning(f"The rollout server {url} failed: {why}. {what}; it is tried again before a later batch.")
