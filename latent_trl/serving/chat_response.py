"""The answer of a chat completion request in OpenAI's form, whole or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from .engine import CODES, PLANS, ActionKind, EngineError, Piece, RequestError


class Completion:
    """
    Puts pieces into OpenAI's form, and counts tokens.

    Args:
        model (`str`): The served name.
        kind (`ActionKind`, defaults to `CODES`): Of its latent actions.
        status (`int`, *optional*): Of the HTTP response, as it ended; `None` until then.
    """

    def __init__(self, model: str, kind: ActionKind = CODES):
        self.kind = kind
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.prompt_tokens = self.completion_tokens = 0
        self.status: int | None = None

    def counted(self, piece: Piece) -> Piece:
        self.prompt_tokens = piece.prompt_tokens
        self.completion_tokens += len(piece.tokens)
        return piece

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    async def whole(self, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        """The `chat.completion` of all pieces."""
        choices: dict[int, dict[str, Any]] = {}
        async for piece in pieces:
            part, field = self._choice(self.counted(piece)), self.kind.field
            choice = choices.setdefault(piece.index, {**part, "message": {"role": "assistant", "content": ""}})
            choice["message"]["content"] += piece.text
            choice["finish_reason"] = piece.finish_reason
            if choice[field] is not part[field]:
                for name, values in part[field].items():
                    choice[field][name] += values
        self.status = 200
        return self._object("chat.completion", [choices[i] for i in sorted(choices)], self.usage())

    async def events(self, pieces: AsyncIterator[Piece], include_usage: bool) -> AsyncIterator[str]:
        """The `chat.completion.chunk`s as server-sent events; an error that comes among them is the last."""
        begun: set[int] = set()
        try:
            async for piece in pieces:
                delta = {"content": self.counted(piece).text}
                if piece.index not in begun:
                    begun.add(piece.index)
                    delta = {"role": "assistant", **delta}
                yield _event(self._object("chat.completion.chunk", [{**self._choice(piece), "delta": delta}], None))
            if include_usage:
                yield _event(self._object("chat.completion.chunk", [], self.usage()))
            self.status = 200
            yield "data: [DONE]\n\n"
        except (RequestError, EngineError) as error:
            self.status = error_status(error)
            yield _event(error_body(error))

    def _choice(self, piece: Piece) -> dict[str, Any]:
        actions = {"ids": piece.action_ids, "log_probs": piece.log_probs, "tokens": piece.tokens}
        if self.kind == PLANS:
            actions["starts"] = piece.starts
        return {
            "index": piece.index,
            "finish_reason": piece.finish_reason,
            "logprobs": None,
            self.kind.field: actions,
        }

    def _object(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_status(error: Exception) -> int:
    return error.status if isinstance(error, RequestError) else 500


def error_body(error: Exception) -> dict[str, Any]:
    """An error in OpenAI's form."""
    mine = error if isinstance(error, RequestError) else RequestError(str(error), status=500)
    kind = "invalid_request_error" if mine.status < 500 else "server_error"
    return {"error": {"message": str(mine), "type": kind, "param": mine.param, "code": mine.code}}
