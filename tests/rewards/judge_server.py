"""A chat-completions server on loopback that a test can make answer well, late, badly or not at all."""

import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

QUALITY = {"good": 9, "fair": 6, "poor": 3, "reference": 6}


@dataclass
class Reply:
    """
    What the server sends for one request: a chat completion with `content`, `body` as it stands, or so many `endless`
    bytes, whose number it does not say.
    """

    content: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    body: str | bytes | None = None
    endless: int = 0
    finish_reason: str = "stop"
    cut: bool = False


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """The two replies in a request, in the order shown."""
    content = request["messages"][1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return tuple(re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL)[1] for tag in ("first_reply", "second_reply"))


def aspects(request: dict[str, Any]) -> list[str]:
    """The aspects that a request asks for, in order."""
    return re.findall(r"^- (\w+):", request["messages"][0]["content"], re.MULTILINE)


def scores(request: dict[str, Any], first_bonus: int = 0) -> dict[str, dict[str, int]]:
    """The right scores: by the first word of a reply, and a bonus for standing first."""
    values = [QUALITY.get(text.split()[0] if text.split() else "", 5) for text in shown(request)]
    first = dict.fromkeys(aspects(request), values[0] + first_bonus)
    return {"first": first, "second": dict.fromkeys(aspects(request), values[1])}


def right(request: dict[str, Any], count: int) -> Reply:
    return Reply(json.dumps(scores(request)))


class JudgeServer:
    """`respond(request, count)` makes the reply to request number `count`; `requests` and `headers` keep what came."""

    def __init__(self):
        self.respond = right
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def forget(self):
        """Drops what came so far, such as the trial request."""
        self.requests.clear()
        self.headers.clear()
        self.times.clear()
        self.most_in_flight = 0

    def _take(self, handler) -> tuple[dict, int]:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.requests.append({**request, "path": handler.path})
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            return request, len(self.requests)

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                request, count = server._take(self)
                try:
                    self._answer(server.respond(request, count))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client gave up, as some tests mean it to
                finally:
                    with server._lock:
                        server.in_flight -= 1

            def _answer(self, reply: Reply):
                time.sleep(reply.delay)
                message = {"role": "assistant", "content": reply.content}
                completion = {
                    "id": "1",
                    "object": "chat.completion",
                    "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                }
                body = json.dumps(completion) if reply.body is None else reply.body
                body = body.encode() if isinstance(body, str) else body
                self.send_response(reply.status)
                if "Content-Type" not in reply.headers:
                    self.send_header("Content-Type", "application/json")
                if reply.endless:
                    self.send_header("Connection", "close")
                    self.end_headers()
                    for _ in range(reply.endless // 2**16):
                        self.wfile.write(bytes(2**16))
                    self.close_connection = True
                    return
                self.send_header("Content-Length", str(len(body) * 2 if reply.cut else len(body)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = self.close_connection or reply.cut

        return Handler
