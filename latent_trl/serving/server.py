"""The server's process: its address, its key, and uvicorn."""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ..api_key import KEY_VARIABLE
from .app import make_app
from .engine import Engine
from .rollout_app import make_rollout_app
from .rollout_engine import RolloutEngine

# As clients on the same machine call it; a page of the web that has its name point here uses another.
LOCAL_NAMES = ["127.0.0.1", "localhost", "[::1]"]


def is_local(host: str) -> bool:
    """Whether nobody but this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(host: str, key: str | None) -> list[str] | None:
    """
    By which names clients may call a server at `host`; by any where they show a key.

    Raises:
        ValueError: For an address that other machines reach, without a key.
    """
    if key is not None:
        return None
    if not is_local(host):
        raise ValueError(
            f"At {host!r} other machines are served, so there must be an API key: set {KEY_VARIABLE}, or pass "
            "`--api-key-file`."
        )
    return LOCAL_NAMES


class Server(uvicorn.Server):
    """
    Uvicorn, and what it tells once it listens.

    Args:
        app (`ASGIApp`): What is served.
        host (`str`), port (`int`): The address; 0 takes a free port.
        ready (`Callable`, *optional*): Told the address, such as `http://127.0.0.1:8000/v1`.
        path (`str`, defaults to `""`): At the end of the address.
        keep_alive (`int`, defaults to `30`): Seconds that an idle connection stays; longer than clients keep one, so
            that none is closed while it is taken up again.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        ready: Callable[[str], None] | None = None,
        path: str = "",
        keep_alive: int = 30,
    ):
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,
                # It bounds the size of headers.
                http="h11",
                timeout_keep_alive=keep_alive,
                timeout_graceful_shutdown=5,
            )
        )
        self.ready, self.path = ready, path

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.ready(f"http://{f'[{host}]' if ':' in host else host}:{port}{self.path}")


def make_server(
    engine: Engine,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> Server:
    """
    A server of chat completions; its `run()` returns when it has been stopped.

    Args:
        engine (`Engine`): Who answers.
        name (`str`): Of the model, as requests give it.
        host (`str`, defaults to `"127.0.0.1"`), port (`int`, defaults to `8000`): Its address; 0 takes a free port.
        key (`str`, *optional*): The API key; other machines are not served without one.
        ready (`Callable`, *optional*): Told the address once the server listens.
        options: Of [`~latent_trl.serving.app.make_app`].

    Raises:
        ValueError: For an address that other machines reach, without a key.
    """
    app = make_app(engine, name, key, allowed_hosts=allowed_hosts(host, key), **options)
    return Server(app, host, port, ready, "/v1")


def make_rollout_server(
    engine: RolloutEngine,
    identity: dict[str, Any],
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> Server:
    """
    A server of rollouts.

    Args:
        engine (`RolloutEngine`): Who answers.
        identity (`dict`): Of [`~latent_trl.vllm.identity.identity_of_checkpoint`].
        host, port, key, ready: As in [`make_server`].
    """
    app = make_rollout_app(engine, identity, key, allowed_hosts(host, key))
    # A trainer's connection is idle for the time of its updates.
    return Server(app, host, port, ready, keep_alive=24 * 3600)
