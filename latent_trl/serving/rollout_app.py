"""The application of a rollout server: what it is, policies, rows, and health."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..data.images import ImageError, load_image
from ..data.rows import is_data_url
from ..vllm.wire import DESCRIPTION, GENERATE, POLICY, VERSION_HEADER, packed
from .app import KeyMiddleware, unless_hung_up
from .chat_response import error_body, error_status
from .engine import EngineError, RequestError
from .rollout_engine import RolloutEngine, RolloutRequest

logger = logging.getLogger(__name__)

# Of a request for rows, pictures included.
MOST_BYTES = 1 << 30
# Seconds for a body to arrive.
BODY_SECONDS = 600


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PromptBody(_Strict):
    """A prompt: its tokens, without those of its pictures, and the pictures as data URLs."""

    token_ids: list[int] = Field(min_length=1)
    images: list[str] = []


class RowBody(_Strict):
    """A row: the place of its prompt, and the settings of its codes, which the engine checks."""

    prompt: int = Field(ge=0)
    settings: dict[str, Any]


class GenerateBody(_Strict):
    """What [`~latent_trl.vllm.wire.rollout_body`] writes."""

    policy: str
    prompts: list[PromptBody]
    rows: list[RowBody] = Field(min_length=1)
    max_new_tokens: int = Field(ge=1)
    stop_token_ids: list[int] = []
    output_support: bool = False


def rollout_request(body: bytes) -> RolloutRequest:
    """
    The rows in a body. Pictures are decoded here: it takes a while.

    Raises:
        RequestError: With the field, and what is wrong with it.
    """
    try:
        given = GenerateBody.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"`{place}`: {first['msg']}." if place else f"{first['msg']}.", place or None) from error
    wrong = [row.prompt for row in given.rows if row.prompt >= len(given.prompts)]
    if wrong:
        raise RequestError(f"`rows` name prompt {wrong[0]}, and there are {len(given.prompts)}.", "rows")
    return RolloutRequest(
        policy=given.policy,
        prompts=[_prompt(prompt) for prompt in given.prompts],
        rows=[(row.prompt, row.settings) for row in given.rows],
        max_new_tokens=given.max_new_tokens,
        stop_token_ids=given.stop_token_ids,
        output_support=given.output_support,
    )


def _prompt(prompt: PromptBody) -> Any:
    if not prompt.images:
        return prompt.token_ids
    if not all(map(is_data_url, prompt.images)):
        raise RequestError("`images` must be data URLs.", "images")
    try:
        images = [load_image(image) for image in prompt.images]
    except ImageError as error:
        raise RequestError(str(error), "images") from error
    return {"prompt_token_ids": prompt.token_ids, "multi_modal_data": {"image": images}}


class _Answered:
    """
    A route as an ASGI application, which ends its work when the client hangs up.

    Args:
        answer (`Callable`): Makes the response to a request whose body has been read.
        most_bytes (`int`): Of a body.
    """

    def __init__(self, answer: Callable[[Request, bytes], Awaitable[Response]], most_bytes: int = 0):
        self.answer, self.most_bytes = answer, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(request)
            response = await unless_hung_up(self.answer(request, body), receive)
        except ClientDisconnect:
            return
        except (RequestError, EngineError) as error:
            response = JSONResponse(error_body(error), error_status(error))
        except TimeoutError:
            response = JSONResponse(error_body(RequestError("The body did not come in time.", status=408)), 408)
        except Exception as error:
            logger.exception("A request failed.")
            response = JSONResponse(error_body(EngineError(f"The request failed: {type(error).__name__}.")), 500)
        await response(scope, receive, send)

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.most_bytes:
                raise RequestError(f"The body has more than {self.most_bytes} bytes.", status=413)
        return bytes(body)


def make_rollout_app(
    engine: RolloutEngine,
    identity: dict[str, Any],
    key: str | None = None,
    allowed_hosts: list[str] | None = None,
) -> Starlette:
    """
    The application.

    Args:
        engine (`RolloutEngine`): Who answers. It is closed with the application.
        identity (`dict`): Of [`~latent_trl.vllm.identity.identity_of_checkpoint`].
        key (`str`, *optional*): The API key; without one everybody is answered.
        allowed_hosts (`list[str]`, *optional*): Names by which clients may call the server; all by default.
    """

    async def description(request: Request, body: bytes) -> Response:
        return JSONResponse({**identity, "policy": await engine.ping()})

    async def policy(request: Request, body: bytes) -> Response:
        _check_type(request, "application/octet-stream")
        version = request.headers.get(VERSION_HEADER, "")
        await engine.update(version, body)
        return JSONResponse({"policy": version})

    async def generate(request: Request, body: bytes) -> Response:
        _check_type(request, "application/json")
        answers = await engine.answer(await asyncio.to_thread(rollout_request, body))
        return Response(await asyncio.to_thread(packed, answers), media_type="application/octet-stream")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": engine.failure or "ok"}, 503 if engine.failure else 200)

    @asynccontextmanager
    async def lifespan(app: ASGIApp):
        with contextlib.suppress(asyncio.CancelledError):
            yield
        await asyncio.to_thread(engine.close)

    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)] if allowed_hosts else []
    if key is not None:
        middleware.append(Middleware(KeyMiddleware, key=key))
    return Starlette(
        routes=[
            Route(DESCRIPTION, _Answered(description), methods=["GET"]),
            Route(POLICY, _Answered(policy, engine.most_bytes), methods=["PUT"]),
            Route(GENERATE, _Answered(generate, MOST_BYTES), methods=["POST"]),
            Route("/health", health),
        ],
        middleware=middleware,
        lifespan=lifespan,
    )


def _check_type(request: Request, wanted: str) -> None:
    """What a web page may send to another server without asking is of other types."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise RequestError(f"The content type must be {wanted}, got {kind or 'none'!r}.", status=415)
