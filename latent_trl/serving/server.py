"""The server's process: its address, its key, and uvicorn."""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from ..api_key import KEY_VARIABLE
from .app import make_app
from .engine import Engine

# As clients on the same machine call it; a page of the web that has its name point here uses another.
LOCAL_NAMES = ["127.0.0.1", "localhost", "[::1]"]


def is_local(host: str) -> bool:
    """Whether nobody but this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """
    Uvicorn, and what it tells once it listens.

    Args:
        config (`uvicorn.Config`): Its settings.
        ready (`Callable`, *optional*): Told the address, such as `http://127.0.0.1:8000/v1`.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None] | None = None):
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")


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
    A server; its `run()` returns when it has been stopped.

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
    if key is None and not is_local(host):
        raise ValueError(
            f"At {host!r} other machines are served, so there must be an API key: set {KEY_VARIABLE}, or pass "
            "`--api-key-file`."
        )
    app = make_app(engine, name, key, allowed_hosts=LOCAL_NAMES if key is None else None, **options)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        # Longer than clients keep an idle connection, so that none is closed while it is taken up again.
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    return Server(config, ready)
