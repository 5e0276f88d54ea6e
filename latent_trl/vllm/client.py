"""One rollout server, as a trainer calls it."""

from collections.abc import Callable
from typing import Any

import requests

from .wire import DESCRIPTION, GENERATE, NOT_FINITE, OTHER_POLICY, POLICY, VERSION_HEADER, PolicyFile, unpacked

# Seconds for a server to say what it is, so that one that hangs does not hold up the others.
DESCRIBE_SECONDS = 10.0


class ServerFault(RuntimeError):
    """A server that does not answer as it should: another may do its part."""


class WrongRequest(ValueError):
    """What a server refuses, and any other would: it is not asked again."""


class RolloutServer:
    """
    A server of `latent-trl vllm-serve`. One thread calls it at a time.

    Args:
        url (`str`): Its address, such as `http://127.0.0.1:8000`.
        timeout (`float`): Seconds for answers, and for a policy to arrive.
        key (`str`, *optional*): The API key.
    """

    def __init__(self, url: str, timeout: float, key: str | None = None):
        self.url, self.timeout = url, timeout
        self.session = requests.Session()
        # Neither a proxy nor a password of the environment's `.netrc`: the key is for this server alone.
        self.session.trust_env = False
        if key is not None:
            self.session.headers["Authorization"] = f"Bearer {key}"

    def describe(self) -> dict[str, Any]:
        """What the server is, and under `policy` the version of the policy that it holds, `None` where that is lost."""
        seconds = min(DESCRIBE_SECONDS, self.timeout)
        described = self._json(self._call("GET", DESCRIPTION, timeout=seconds))
        if not isinstance(described, dict) or "policy" not in described:
            raise ServerFault("it is no rollout server of latent_trl")
        return described

    def give(self, policy: PolicyFile) -> None:
        """Gives the server a policy, which takes effect at once."""
        headers = {VERSION_HEADER: policy.version, "Content-Type": "application/octet-stream"}
        reply = self._json(self._call("PUT", POLICY, data=policy.data, headers=headers, timeout=self.timeout))
        if not isinstance(reply, dict) or reply.get("policy") != policy.version:
            raise ServerFault("it did not take the policy")

    def answers(self, body: bytes, rows: int, read: Callable[[bytes, int], list[Any]] = unpacked) -> list[Any]:
        """
        Answers.

        Args:
            body (`bytes`): Of [`~latent_trl.vllm.wire.rollout_body`].
            rows (`int`): How many rows are in it.
            read (`Callable`, defaults to [`~latent_trl.vllm.wire.unpacked`]): Makes answers of bytes.

        Raises:
            FloatingPointError: When the policy's probabilities are not finite.
        """
        headers = {"Content-Type": "application/json"}
        reply = self._call("POST", GENERATE, data=body, headers=headers, timeout=self.timeout)
        try:
            return read(reply.content, rows)
        except ValueError as error:
            raise ServerFault(str(error)) from error

    def _call(self, method: str, path: str, **options: Any) -> requests.Response:
        """
        Raises:
            ServerFault: Where the server does not answer, or cannot.
            WrongRequest: For what it refuses.
        """
        try:
            reply = self.session.request(method, f"{self.url}{path}", allow_redirects=False, **options)
        except requests.Timeout as error:
            raise ServerFault(f"no answer in {options['timeout']:g} s") from error
        except requests.RequestException as error:
            raise ServerFault(f"{type(error).__name__}: {error}") from error
        if reply.status_code == 200:
            return reply
        message, code = _error_of(reply)
        if code == NOT_FINITE:
            raise FloatingPointError(message)
        if code == OTHER_POLICY or reply.status_code >= 500:
            raise ServerFault(message)
        raise WrongRequest(f"{self.url}{path} refuses this ({reply.status_code}): {message}")

    def _json(self, reply: requests.Response) -> Any:
        try:
            return reply.json()
        except ValueError as error:
            raise ServerFault("it is no rollout server of latent_trl") from error


def _error_of(reply: requests.Response) -> tuple[str, str | None]:
    """What a server's error says, and its code."""
    try:
        error = reply.json()["error"]
        return error["message"], error["code"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {reply.status_code}: {reply.text[:200]!r}", None
