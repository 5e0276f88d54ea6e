"""Answers of a server: `latent-trl serve`, here or on another machine."""

import argparse
import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from .plan_replies import PlanReply, segment_texts
from .replies import Reply


def whole_url(url: str) -> str:
    """Where the server's API begins, for a name that may have no scheme and no path."""
    url = url.rstrip("/") if "://" in url else "http://" + url.rstrip("/")
    return url if urlsplit(url).path else url + "/v1"


class Server:
    """
    A server, and what it says of a model. The API key is read from the environment variable `LATENT_TRL_API_KEY`.

    Args:
        url (`str`): Such as `http://127.0.0.1:8000/v1`; `http://` and `/v1` may be left out.
        model (`str`, *optional*): Its name there; by default the first that is served.

    Raises:
        ConnectionError: When the server refuses, or does not answer; for a model without latent actions.
    """

    def __init__(self, url: str, model: str | None):
        try:
            import openai
        except ImportError:
            raise ImportError("`--url` needs the `openai` package: pip install openai") from None
        from ..api_key import read_key

        url = whole_url(url)
        self.failure = openai.APIError
        self.client = openai.OpenAI(base_url=url, api_key=read_key() or "none")
        try:
            listed = {each.id: each for each in self.client.models.list()}
        except openai.APIError as error:
            raise ConnectionError(f"{url}: {error}") from error
        self.name = model or next(iter(listed), "")
        found = listed.get(self.name)
        self.codes: Any = getattr(found, "latent_actions", None)
        self.plans: Any = getattr(found, "plans", None)
        if self.codes is None and self.plans is None:
            raise ConnectionError(f"{url} serves {sorted(listed)}, and no latent actions under the name {self.name!r}.")

    def choices(self, messages: list[dict[str, Any]], images: list[Any], field: str, how: Any, **options: Any) -> Any:
        """
        Choices of the chunks of an answer as they come.

        Args:
            messages (`list[dict]`), images (`list`): The conversation.
            field (`str`), how (`dict`): What is asked for of codes, or of plans.
            options: Further fields of the request.
        """
        try:
            stream = self.client.chat.completions.create(
                model=self.name,
                messages=with_images(messages, images),
                stream=True,
                extra_body={field: how},
                **options,
            )
            for chunk in stream:
                yield from chunk.choices
        except self.failure as error:
            raise ConnectionError(str(error)) from error


class RemoteAnswerer:
    """
    Asks a server as [`~latent_trl.commands.replies.Answerer`] asks a model.

    Args:
        server (`Server`): It has a model of codes.
        args (`Namespace`): Of [`~latent_trl.commands.replies.add_sampling`].
    """

    def __init__(self, server: Server, args: argparse.Namespace):
        self.server, self.args, self.asked = server, args, 0
        self.num_codes, self.special_tokens = server.codes["num_codes"], set(server.codes["special_tokens"])

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
        options = {"n": samples, "seed": self.args.seed + self.asked, "max_completion_tokens": self.args.max_new_tokens}
        for choice in self.server.choices(messages, images, "latent_actions", self._codes(forced), **options):
            reply, codes = replies[choice.index], choice.latent_actions
            reply.text += choice.delta.content or ""
            reply.tokens += codes["tokens"]
            reply.action_ids += codes["ids"]
            reply.log_prob += sum(codes["log_probs"])
            if on_token is not None:
                for token, code in zip(codes["tokens"], codes["ids"], strict=True):
                    on_token(token, code)
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


class RemotePlanAnswerer:
    """
    Asks a server as [`~latent_trl.commands.plan_replies.PlanAnswerer`] asks a model of plans.

    Args:
        server (`Server`): It has a model of plans.
        args (`Namespace`): Of [`~latent_trl.commands.replies.add_sampling`].
    """

    def __init__(self, server: Server, args: argparse.Namespace):
        self.server, self.args = server, args
        self.plans, self.has_chooser = range(server.plans["num_plans"]), server.plans["has_chooser"]

    def __call__(
        self, messages: list[dict[str, Any]], images: list[Any], plans: list[int] | None = None
    ) -> list[PlanReply]:
        """As [`~latent_trl.commands.plan_replies.PlanAnswerer`]; plans are asked for at once."""
        if plans is None:
            return [self._reply(messages, images, None)]
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda plan: self._reply(messages, images, plan), plans))

    def _reply(self, messages: list[dict[str, Any]], images: list[Any], plan: int | None) -> PlanReply:
        how = {"temperature": 0} if plan is None else {"forced": plan}
        text, tokens, chosen, starts = "", [], [], []
        options = {"max_completion_tokens": self.args.max_new_tokens}
        for choice in self.server.choices(messages, images, "plans", how, **options):
            text += choice.delta.content or ""
            tokens += choice.plans["tokens"]
            chosen += choice.plans["ids"]
            starts += choice.plans["starts"]
        reply = PlanReply(text.strip(), tokens, [], chosen[0])
        if plan is None and self.server.plans["segment"] != "answer":
            texts = segment_texts(tokens, starts, set(self.server.plans["special_tokens"]))
            reply = replace(reply, plans=chosen, segments=texts)
        return reply


def remote_answerer(url: str, model: str | None, args: argparse.Namespace) -> RemoteAnswerer | RemotePlanAnswerer:
    """Who asks a server, of codes or of plans; raises as [`Server`]."""
    server = Server(url, model)
    return RemoteAnswerer(server, args) if server.plans is None else RemotePlanAnswerer(server, args)


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
