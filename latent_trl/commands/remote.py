"""Answers of a server: `latent-trl serve`, here or on another machine."""

import argparse
import base64
import io
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from .replies import Reply


def whole_url(url: str) -> str:
    """Where the server's API begins, for a name that may have no scheme and no path."""
    url = url.rstrip("/") if "://" in url else "http://" + url.rstrip("/")
    return url if urlsplit(url).path else url + "/v1"


class RemoteAnswerer:
    """
    Asks a server as [`~latent_trl.commands.replies.Answerer`] asks a model. The API key is read from the environment
    variable `LATENT_TRL_API_KEY`.

    Args:
        url (`str`): Such as `http://127.0.0.1:8000/v1`; `http://` and `/v1` may be left out.
        model (`str`, *optional*): Its name there; by default the first that is served.
        args (`Namespace`): Of [`~latent_trl.commands.replies.add_sampling`].

    Raises:
        ConnectionError: When the server refuses, or does not answer.
    """

    def __init__(self, url: str, model: str | None, args: argparse.Namespace):
        try:
            import openai
        except ImportError:
            raise ImportError("`--url` needs the `openai` package: pip install openai") from None
        from ..api_key import read_key

        url = whole_url(url)
        self.args, self.asked = args, 0
        self.failure = openai.APIError
        self.client = openai.OpenAI(base_url=url, api_key=read_key() or "none")
        try:
            listed = {each.id: each for each in self.client.models.list()}
        except openai.APIError as error:
            raise ConnectionError(f"{url}: {error}") from error
        self.name = model or next(iter(listed), "")
        codes = getattr(listed.get(self.name), "latent_actions", None)
        if codes is None:
            raise ConnectionError(f"{url} serves {sorted(listed)}, and no latent actions under the name {self.name!r}.")
        self.num_codes, self.special_tokens = codes["num_codes"], set(codes["special_tokens"])

    def __call__(
        self,
        messages: list[dict[str, Any]],
        images: list[Any],
        samples: int = 1,
        forced: list[int] | None = None,
        on_token: Callable[[str, int], None] | None = None,
    ) -> list[Reply]:
        """As [`~latent_trl.commands.replies.Answerer`], token by token as they come."""
        self.asked += 1
        replies = [Reply("", [], [], 0.0) for _ in range(samples)]
        try:
            stream = self.client.chat.completions.create(
                model=self.name,
                messages=with_images(messages, images),
                n=samples,
                seed=self.args.seed + self.asked,
                max_completion_tokens=self.args.max_new_tokens,
                stream=True,
                extra_body={"latent_actions": self._codes(forced)},
            )
            for choice in (choice for chunk in stream for choice in chunk.choices):
                reply, codes = replies[choice.index], choice.latent_actions
                reply.text += choice.delta.content or ""
                reply.tokens += codes["tokens"]
                reply.action_ids += codes["ids"]
                reply.log_prob += sum(codes["log_probs"])
                if on_token is not None:
                    for token, code in zip(codes["tokens"], codes["ids"], strict=True):
                        on_token(token, code)
        except self.failure as error:
            raise ConnectionError(str(error)) from error
        for reply in replies:
            reply.text = reply.text.strip()
        return replies

    def _codes(self, forced: list[int] | None) -> dict[str, Any]:
        args = self.args
        return {
            "temperature": 0 if args.greedy else args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "forced": forced or [],
            "banned": args.ban,
            "bias": args.bias,
        }


def with_images(messages: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, with the pictures as data URLs before the first text of the user."""
    if not images:
        return messages
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content = [*parts, {"type": "text", "text": messages[first]["content"]}]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def data_url(image: Any) -> str:
    """A picture as PNG in a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
