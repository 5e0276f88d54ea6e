"""Calls to a chat-completions endpoint that lose nothing and guess nothing: retries, back-off, cache and counters."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from .judge_cache import ReplyCache, request_key
from .judge_reply import MAX_WORDS, ReplyRefused, Secret, guard_reply
from .judge_template import JudgeReplyError

RETRIED_STATUS = frozenset({408, 409, 425, 429})
FORMAT_REFUSED_STATUS = frozenset({400, 415, 422, 501})
DETAIL_LENGTH = 300


class JudgeCallError(RuntimeError):
    """
    A call that gave no scores after all its attempts.

    Args:
        reason (`str`): One word for the counters: `"timeout"`, `"connection"`, `"http_429"`, `"truncated"`, ...
        detail (`str`): What happened, free of keys.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass
class JudgeStats:
    """
    What a judge has cost so far in this process.

    Args:
        calls (`int`): HTTP requests sent, every attempt counted.
        retries (`int`): Those of them that repeated a failed one.
        cached (`int`): Requests answered from the cache, or by an identical request of the same batch.
        failed (`int`): Requests that gave no scores after all attempts.
        prompt_tokens (`int`): Input tokens, as the server counts them.
        completion_tokens (`int`): Output tokens, as the server counts them.
        samples (`int`): Completions to be scored.
        unscored (`int`): Completions that got `None` because a request failed.
        reasons (`Counter`): Failed requests by reason.
    """

    calls: int = 0
    retries: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    samples: int = 0
    unscored: int = 0
    reasons: Counter = field(default_factory=Counter)


@dataclass
class JudgeClient:
    """
    A chat-completions endpoint, reached through the `openai` client with the client's own retries off.

    Args:
        model (`str`): Name of the model at the endpoint.
        base_url (`str`): Address of the endpoint, such as `"http://localhost:8000/v1"`.
        api_key (`str`): Key. It is sent to the endpoint and goes nowhere else.
        request (`dict`): Settings that are part of every request, such as `temperature`.
        concurrency (`int`): Requests in flight at once.
        timeout (`float`): Seconds for one attempt.
        max_retries (`int`): Further attempts after a timeout, a lost connection, or status 408, 409, 425, 429 or 5xx.
        retry_delay (`float`): Seconds before the first of them; doubles with each.
        max_retry_delay (`float`): Longest wait in seconds, also where the server asks for more with `Retry-After`.
        cache (`ReplyCache`): Where replies that could be read are kept.
    """

    model: str
    base_url: str = field(repr=False)
    api_key: str = field(repr=False)
    request: dict[str, Any]
    concurrency: int
    timeout: float
    max_retries: int
    retry_delay: float
    max_retry_delay: float
    cache: ReplyCache = field(repr=False)
    structured: bool = True
    stats: JudgeStats = field(default_factory=JudgeStats)

    def __post_init__(self):
        parts = urlsplit(self.base_url)
        more = parts.username or parts.password or parts.query or parts.fragment
        if parts.scheme not in ("http", "https") or not parts.hostname or more or not self.base_url.isprintable():
            raise ValueError(
                "`base_url` must look like 'http://localhost:8000/v1', without a user name or key, or a query, in it "
                f"(`api_key` is the place for that); got one with scheme {parts.scheme!r}, host {parts.hostname!r}."
            )
        for name, lowest in (("concurrency", 1), ("max_retries", 0), ("retry_delay", 0), ("max_retry_delay", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"`{name}` must be at least {lowest}; got {getattr(self, name)}.")
        if self.timeout <= 0:
            raise ValueError(f"`timeout` must be above 0 seconds; got {self.timeout}.")
        self.secret = Secret(self.api_key)
        self._jitter = random.Random()  # its own generator: back-off must not move the seeded ones

    @asynccontextmanager
    async def session(self):
        """Opens the connection for one batch, and yields a [`JudgeSession`]. Works under any event loop."""
        openai = import_openai()
        # No redirect is followed: prompt and images go to the host that the user has named, and to no other.
        http_client = openai.DefaultAsyncHttpxClient(
            base_url=self.base_url,
            timeout=self.timeout,
            follow_redirects=False,
            event_hooks={"response": [guard_reply]},
        )
        async with openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.api_key,
            timeout=self.timeout,
            max_retries=0,
            http_client=http_client,
            default_headers={"Accept-Encoding": "identity"},
        ) as connection:
            yield JudgeSession(self, connection, openai)

    @property
    def address(self) -> str:
        """`base_url`, as it may be shown."""
        return self.redact(self.base_url)

    def redact(self, text: str) -> str:
        """Takes keys out of a text that a server sent, parts and encoded forms of them too, and shortens it."""
        text = self.secret.hidden(text)
        return text if len(text) <= DETAIL_LENGTH else text[:DETAIL_LENGTH] + "…"

    def delay(self, attempt: int, headers: Any) -> float:
        """Seconds to wait after the failed attempt number `attempt` (from 0): what the server asks, or back-off."""
        asked = _retry_after(headers)
        if asked is None:
            asked = self.retry_delay * 2**attempt * self._jitter.uniform(0.75, 1.25)
        return min(asked, self.max_retry_delay)


class JudgeSession:
    """
    One batch of requests over one connection.

    Args:
        client ([`JudgeClient`]): Settings, cache and counters.
        connection (`openai.AsyncOpenAI`): The open connection.
        openai (module): The `openai` package, for its exceptions.
    """

    def __init__(self, client: JudgeClient, connection: Any, openai: Any):
        self.client = client
        self.connection = connection
        self.openai = openai
        self._slots = asyncio.Semaphore(client.concurrency)
        self._asked: dict[str, asyncio.Future] = {}

    async def ask(self, messages: list[dict], response_format: dict, parse: Callable[[str], Any], cache=True) -> Any:
        """
        Scores for one request; identical requests of a batch are sent once.

        Args:
            messages (`list[dict]`): The conversation to send.
            response_format (`dict`): JSON schema, sent as long as the endpoint takes it.
            parse (`Callable[[str], Any]`): Reads the reply, or raises [`JudgeReplyError`].
            cache (`bool`, *optional*, defaults to `True`): Whether to read and fill the cache.

        Raises:
            [`JudgeCallError`]: No scores after all attempts. It is counted in `client.stats`.
        """
        client = self.client
        key = request_key(
            {"url": client.base_url, "model": client.model, "messages": messages, "settings": client.request}
        )
        if key in self._asked:
            client.stats.cached += 1
            return await asyncio.shield(self._asked[key])
        store = client.cache if cache else ReplyCache()
        future = self._asked[key] = asyncio.ensure_future(self._ask(key, messages, response_format, parse, store))
        return await future

    async def _ask(self, key: str, messages: list, response_format: dict, parse: Callable, store: ReplyCache) -> Any:
        stats = self.client.stats
        stored = store.get(key)
        if stored is not None:
            try:
                scores = parse(stored)
            except JudgeReplyError:
                pass  # an entry that cannot be read counts as absent
            else:
                stats.cached += 1
                return scores
        try:
            async with self._slots:
                reply = await self._send(messages, response_format)
            scores = parse(reply)
        except (JudgeCallError, JudgeReplyError) as error:
            stats.failed += 1
            stats.reasons[error.reason] += 1
            raise JudgeCallError(error.reason, self.client.redact(error.detail)) from None
        if not self.client.secret.is_in(reply):  # a server that repeats the key does not get it written to disk
            store.put(key, reply)
        return scores

    async def _send(self, messages: list, response_format: dict) -> str:
        """The reply's text. Falls back to a request without a schema where the server refuses the schema."""
        structured = self.client.structured
        try:
            return await self._attempts(messages, {"response_format": response_format} if structured else {})
        except JudgeCallError as error:
            refused = structured and error.reason in {f"http_{status}" for status in FORMAT_REFUSED_STATUS}
            if not refused:
                raise
        reply = await self._attempts(messages, {})
        self.client.structured = False
        return reply

    async def _attempts(self, messages: list, extra: dict) -> str:
        client, openai = self.client, self.openai
        for attempt in range(client.max_retries + 1):
            client.stats.calls += 1
            client.stats.retries += attempt > 0
            headers, retried = {}, True
            try:
                return self._read(await self._post(messages, extra))
            except openai.APIStatusError as error:
                headers, status = error.response.headers, error.status_code
                retried = status in RETRIED_STATUS or status >= 500
                failure = JudgeCallError(f"http_{status}", client.redact(error.response.text))
            except ReplyRefused as error:
                raise JudgeCallError(error.reason, str(error)) from None
            except (TimeoutError, openai.APITimeoutError):
                failure = JudgeCallError("timeout", f"no answer within {client.timeout} s")
            except openai.APIConnectionError as error:
                failure = JudgeCallError("connection", client.redact(f"{error} {error.__cause__ or ''}".strip()))
            except (openai.OpenAIError, UnicodeError, LookupError) as error:
                retried = False
                failure = JudgeCallError("client", client.redact(f"{type(error).__name__}: {error}"))
            if not retried or attempt == client.max_retries:
                break
            await asyncio.sleep(client.delay(attempt, headers))
        raise failure

    async def _post(self, messages: list, extra: dict) -> str:
        """Body of the answer. Read raw: a server's nonsense is ours to judge, not the client library's to mend."""
        create = self.connection.chat.completions.with_raw_response.create
        call = create(model=self.client.model, messages=messages, **self.client.request, **extra)
        response = await asyncio.wait_for(call, timeout=self.client.timeout)
        return response.text

    def _read(self, body: str) -> str:
        stats = self.client.stats
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            content, refusal = message.get("content"), message.get("refusal")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise JudgeCallError("malformed", f"not a chat completion: {self.client.redact(body)[:100]!r}") from None
        stats.prompt_tokens += _token_count(answer, "prompt_tokens")
        stats.completion_tokens += _token_count(answer, "completion_tokens")
        if refusal or finish == "content_filter":
            raise JudgeCallError("refused", f"the judge declined: {refusal or finish}")
        if finish == "length":
            raise JudgeCallError("truncated", "the reply ran into the limit on tokens: raise `max_tokens`")
        if not isinstance(content, str) or not content.strip():
            raise JudgeCallError("empty", "the reply has no text")
        if len(content) > MAX_WORDS:
            raise JudgeCallError("too_large", f"the reply has {len(content):,} characters")
        return content


def import_openai() -> Any:
    """The `openai` package, or a plain word on how to get it."""
    try:
        import openai
    except ImportError:
        raise ImportError("`JudgeReward` needs the `openai` package: pip install openai") from None
    return openai


def _token_count(answer: dict, name: str) -> int:
    usage = answer.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    # What a server says is no number to reckon with beyond that of floats.
    return count if type(count) is int and 0 <= count < 2**53 else 0


def _retry_after(headers: Any) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or a date. `None` where none can be read."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return seconds if 0 <= seconds < float("inf") else None
