"""What is taken from a judge's server: replies of limited size that are not packed, and no word of the key."""

import base64
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, quote_plus

MAX_REPLY_BYTES = 8 * 2**20
# Of a text that is shown, more than is shown of it.
MOST_READ = 4_000
# The default key, which local servers accept, is none.
NO_KEY = "EMPTY"
# So many characters of a key in a row are not shown.
PART = 8


class ReplyRefused(RuntimeError):
    """
    A reply that is not read.

    Args:
        reason (`str`): One word for the counters.
        detail (`str`): Why.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


async def guard_reply(response: Any) -> None:
    """
    A hook of `httpx`, before a reply is read.

    Raises:
        ReplyRefused: When it is packed, or says that it is longer than `MAX_REPLY_BYTES`. Reading it raises the same
            where it is.
    """
    packed = response.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise ReplyRefused("packed", f"the reply is packed ({packed!r:.50}), which was not asked for")
    length = response.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MAX_REPLY_BYTES:
        raise _too_large()
    # JSON is UTF-8, whatever is said of it.
    response.headers["content-type"] = "application/json"
    response.stream = _limited(response.stream)


def _limited(stream: Any) -> Any:
    """The stream up to the limit, of the class that the client has: it depends on the version of `openai`."""

    class Limited(type(stream)):  # type: ignore[misc]
        def __init__(self):
            """What the class has is in `stream`."""

        async def __aiter__(self) -> AsyncIterator[bytes]:
            read = 0
            async for part in stream:
                read += len(part)
                if read > MAX_REPLY_BYTES:
                    raise _too_large()
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    return Limited()


def _too_large() -> ReplyRefused:
    return ReplyRefused("too_large", f"the reply has more than {MAX_REPLY_BYTES:,} bytes")


class Secret:
    """
    A key, looked for in texts: as it is, in parts, and as URLs, JSON, Base64 and hexadecimal digits write it.

    Args:
        key (`str`): The key.
    """

    def __init__(self, key: str):
        raw = key.encode("utf-8", "surrogatepass")
        forms = [key, quote(key, safe=""), quote_plus(key), json.dumps(key)[1:-1], raw.hex()]
        for offset in range(3):
            # Where it stands among other bytes, the characters of which it has all bits.
            encoded = base64.b64encode(bytes(offset) + raw).decode()
            whole = encoded[-(-offset * 8 // 6) : (offset + len(raw)) * 8 // 6]
            forms += [whole, whole.translate(str.maketrans("+/", "-_"))]
        spelled = "".join(f"\\u{ord(c):04x}" for c in key)
        self._parts: dict[int, set[str]] = {}
        for form, size in [*((form, PART) for form in forms), (spelled, 6 * PART)]:
            form, size = form.lower(), min(size, len(form))
            parts = {form[i : i + size] for i in range(len(form) - size + 1)} if size and key != NO_KEY else set()
            self._parts.setdefault(size, set()).update(parts)

    def _marked(self, text: str) -> list[bool]:
        lowered = text.lower()
        marked = [False] * len(text)
        if len(lowered) != len(text):
            lowered = text
        for size, parts in self._parts.items():
            for i in range(len(lowered) - size + 1):
                if lowered[i : i + size] in parts:
                    marked[i : i + size] = [True] * size
        return marked

    def is_in(self, text: str) -> bool:
        """Whether the text has a part of the key."""
        return any(self._marked(text))

    def hidden(self, text: str) -> str:
        """The first `MOST_READ` characters, with `[key]` for parts of this key, and for what else looks like one."""
        text = text[: MOST_READ + 1]
        marked = self._marked(text)
        shown = [c if not m else "\0" for c, m in zip(text, marked, strict=True)]
        text = re.sub("\0+", "[key]", "".join(shown))
        return re.sub(r"(?i)(bearer\s+|sk-)[\w.*-]{4,}", "[key]", text)
