"""The HTTP server's application: chat completions, models, health and metrics."""

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..data.rows import short
from .chat_request import ChatRequest, RequestLimits, generation_request, parse_request
from .chat_response import Completion, error_body, error_status
from .engine import Engine, EngineError, GenerationRequest, Piece, RequestError
from .metrics import ServerMetrics

logger = logging.getLogger(__name__)
T = TypeVar("T")
HUNG_UP = 499
BODY_SECONDS = 30
# After the time of a request, for a client to read what is left of its answer.
READ_SECONDS = 10


class ChatCompletions:
    """
    `POST /v1/chat/completions`, as an ASGI application.

    Args:
        engine (`Engine`): Who answers.
        name (`str`): Of the model.
        metrics (`ServerMetrics`): What is counted.
        limits (`RequestLimits`): Of one request.
        max_requests (`int`): Requests at once, waiting ones included; what comes above gets 429.
        timeout (`float`): Seconds for a request, its wait included.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        metrics: ServerMetrics,
        limits: RequestLimits,
        max_requests: int,
        timeout: float,
    ):
        self.engine, self.name, self.metrics, self.limits = engine, name, metrics, limits
        self.max_requests, self.timeout = max_requests, timeout
        self.active = self.pixels = 0
        # One picture is decoded at a time, so that memory is bounded by the requests that wait.
        self.decoding = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.perf_counter(), HUNG_UP
        try:
            with self._admitted():
                async with asyncio.timeout(BODY_SECONDS):
                    request = await self._read(Request(scope, receive))
                deadline = asyncio.get_running_loop().time() + self.timeout
                wanted = await self._wanted(request)
                completion = Completion(self.name, self.engine.kind)
                answer = self._timed(self.engine.generate(wanted), deadline, start)
                with self._room_for_pictures(wanted):
                    async with aclosing(answer) as pieces:
                        response = await unless_hung_up(_response(request, completion, pieces), receive)
                        await _sent(response(scope, receive, send), deadline + READ_SECONDS)
                # Of a stream the status has been sent before the rest.
                status = completion.status or HUNG_UP
        except ClientDisconnect:
            logger.debug("A client hung up.")
        except (RequestError, EngineError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                error = RequestError("The body did not come in time.", status=408)
            status = error_status(error)
            headers = {"Retry-After": "1"} if status == 429 else None
            await JSONResponse(error_body(error), status, headers=headers)(scope, receive, send)
        except Exception as error:
            status = 500
            logger.exception("A request failed.")
            body = error_body(EngineError(f"The request failed: {type(error).__name__}."))
            await JSONResponse(body, status)(scope, receive, send)
        finally:
            self.metrics.requests.labels(status=str(status)).inc()
            self.metrics.seconds.observe(time.perf_counter() - start)

    @contextmanager
    def _admitted(self):
        if self.active >= self.max_requests:
            raise _too_many(f"{self.max_requests} requests are being answered or wait.")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    @contextmanager
    def _room_for_pictures(self, request: GenerationRequest):
        """Pictures that wait take memory, and a small body may hold large ones."""
        pixels = sum(image.width * image.height for image in _images(request))
        if self.pixels and self.pixels + pixels > self.limits.max_waiting_pixels:
            raise _too_many("The pictures of the requests that wait take all of the memory for them.")
        self.pixels += pixels
        try:
            yield
        finally:
            self.pixels -= pixels

    async def _read(self, request: Request) -> ChatRequest:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # What a web page may send to another server without asking is of other types.
            raise RequestError(f"The content type must be application/json, got {kind or 'none'!r}.", status=415)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limits.max_body_bytes:
                raise RequestError(f"The body has more than {self.limits.max_body_bytes} bytes.", status=413)
        found = parse_request(bytes(body), self.engine.kind)
        if found.model != self.name:
            raise RequestError(
                f"There is no model {short(found.model)} here, only {self.name!r}.", "model", 404, "model_not_found"
            )
        return found

    async def _wanted(self, request: ChatRequest) -> GenerationRequest:
        async with self.decoding:
            return await asyncio.to_thread(generation_request, request, self.engine, self.limits)

    async def _timed(
        self, pieces: AsyncGenerator[Piece, None], deadline: float, start: float
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of an engine, until the deadline."""
        first = True
        async with aclosing(pieces):
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    raise RequestError(
                        f"The answer took longer than {self.timeout:g} s.", status=504, code="timeout"
                    ) from error
                if first:
                    self.metrics.first_token.observe(time.perf_counter() - start)
                    self.metrics.prompt_tokens.inc(piece.prompt_tokens)
                    first = False
                self.metrics.completion_tokens.inc(len(piece.tokens))
                yield piece


def _too_many(what: str) -> RequestError:
    return RequestError(f"{what} Try again later.", status=429, code="rate_limit_exceeded")


def _images(request: GenerationRequest) -> list[Image.Image]:
    return [part["image"] for message in request.messages for part in message["content"] if part["type"] == "image"]


async def _response(request: ChatRequest, completion: Completion, pieces: AsyncGenerator[Piece, None]) -> Response:
    if not request.stream:
        return JSONResponse(await completion.whole(pieces))
    # With the first piece at hand, what cannot be answered has a status of its own.
    first = await anext(pieces)
    include_usage = request.stream_options is not None and request.stream_options.include_usage
    events = completion.events(_chained(first, pieces), include_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _chained(first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    yield first
    async for piece in pieces:
        yield piece


async def unless_hung_up(work: Awaitable[T], receive: Receive) -> T:
    """
    What `work` gives.

    Raises:
        ClientDisconnect: When the client hangs up before; the work is cancelled.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _sent(work: Awaitable[None], end: float) -> None:
    """Raises `ClientDisconnect` where a client has not read its answer by the time `end` of the loop."""
    try:
        async with asyncio.timeout_at(end):
            await work
    except TimeoutError as error:
        raise ClientDisconnect from error


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class KeyMiddleware:
    """
    Asks for `Authorization: Bearer KEY`, but of `/health`.

    Args:
        app (`ASGIApp`): What is behind it.
        key (`str`): The key.
    """

    def __init__(self, app: ASGIApp, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
                error = RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")
                await JSONResponse(error_body(error), 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def make_app(
    engine: Engine,
    name: str,
    key: str | None = None,
    allowed_hosts: list[str] | None = None,
    limits: RequestLimits | None = None,
    max_requests: int = 256,
    timeout: float = 300.0,
) -> Starlette:
    """
    The application.

    Args:
        engine (`Engine`): Who answers.
        name (`str`): Of the model, as requests give it.
        key (`str`, *optional*): The API key; without one everybody is answered.
        allowed_hosts (`list[str]`, *optional*): Names by which clients may call the server; all by default.
        limits (`RequestLimits`, *optional*): Of one request.
        max_requests (`int`, defaults to `256`): Requests at once, waiting ones included; what comes above gets 429.
        timeout (`float`, defaults to `300`): Seconds for a request, its wait included.
    """
    metrics = ServerMetrics(engine)
    chat = ChatCompletions(engine, name, metrics, limits or RequestLimits(), max_requests, timeout)
    model = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "latent_trl",
        engine.kind.field: engine.about(),
    }

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        wanted = request.path_params["name"]
        if wanted == name:
            return JSONResponse(model)
        return _failed(RequestError(f"There is no model {short(wanted)} here.", "model", 404, "model_not_found"))

    async def health(request: Request) -> Response:
        problem = engine.problem()
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    async def shown_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(app: Starlette):
        await engine.start()
        with contextlib.suppress(asyncio.CancelledError):
            yield
        await engine.close()

    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)] if allowed_hosts else []
    if key is not None:
        middleware.append(Middleware(KeyMiddleware, key=key))
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
            Route("/metrics", shown_metrics),
        ],
        middleware=middleware,
        exception_handlers={404: _no_route, 405: _no_route},
        lifespan=lifespan,
    )


def _failed(error: RequestError) -> JSONResponse:
    return JSONResponse(error_body(error), error.status)


async def _no_route(request: Request, error: Any) -> Response:
    message = f"There is no {request.method} {request.url.path} here; there is POST /v1/chat/completions."
    return _failed(RequestError(message, status=error.status_code))
