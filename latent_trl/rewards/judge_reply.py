"""What is taken from a judge's server: replies of limited size that are not packed, and no word of the key."""

import base64
import re
import unicodedata
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, quote_plus

from ..data.pieces import printable

MAX_REPLY_BYTES = 8 * 2**20
# Of a judge's own words, in characters: scores and a few sentences.
MAX_WORDS = 200_000
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


# A character as HTML, URLs and programming languages may write it.
SPELLED = re.compile(
    r"%([0-9a-f]{2})|\\x([0-9a-f]{2})|\\(?-i:u)([0-9a-f]{4})|\\(?-i:U)([0-9a-f]{8})|&#x([0-9a-f]{1,6});?|&#([0-9]{1,7});?|"
    r"\\([0-3][0-7]{2})",
    re.IGNORECASE,
)
BASES = (16, 16, 16, 16, 16, 10, 8)


class Secret:
    """
    A key, looked for in texts: as it is, in parts, spaced and spelled in any way, and as Base64, Base32, hexadecimal
    and decimal numbers.

    Args:
        key (`str`): The key.
    """

    def __init__(self, key: str):
        raw = key.encode("utf-8", "surrogatepass")
        forms = [key, key[::-1], quote(key, safe=""), quote_plus(key), raw.hex()]
        forms += [raw.hex(":"), ",".join(map(str, raw))]
        forms += [base64.b32encode(raw).decode().rstrip("="), base64.b85encode(raw).decode()]
        for offset in range(3):
            # Where it stands among other bytes, the characters of which it has all bits.
            encoded = base64.b64encode(bytes(offset) + raw).decode()
            whole = encoded[-(-offset * 8 // 6) : (offset + len(raw)) * 8 // 6]
            forms += [whole, whole.translate(str.maketrans("+/", "-_"))]
        self._parts: dict[int, set[str]] = {}
        for form in forms if key != NO_KEY else []:
            form = "".join(c for i, character in enumerate(form) for c, _, _ in _folded(character, i, i))
            size = min(PART, len(form))
            parts = {form[i : i + size] for i in range(len(form) - size + 1)} if size else set()
            self._parts.setdefault(size, set()).update(parts)

    def _marked(self, text: str) -> list[bool]:
        marked = [False] * len(text)
        units = [(c, i, i + 1) for i, c in enumerate(text)]
        # As it is, and spelled, and what is spelled spelled again.
        for _ in range(3):
            folded = [one for unit in units for one in _folded(*unit)]
            seen = "".join(c for c, _, _ in folded)
            for size, parts in self._parts.items():
                for i in range(len(seen) - size + 1):
                    if seen[i : i + size] in parts:
                        start, end = folded[i][1], folded[i + size - 1][2]
                        marked[start:end] = [True] * (end - start)
            before, units = units, _read(units)
            if len(units) == len(before):
                break
        return marked

    def is_in(self, text: str) -> bool:
        """Whether the text has a part of the key."""
        return any(self._marked(text))

    def hidden(self, text: str) -> str:
        """
        The first `MOST_READ` characters, with `[key]` for parts of this key, and for what else looks like one, and "?"
        for what a terminal would take for an order.
        """
        text = text[: MOST_READ + 1]
        shown = [
            c if not marked else "\0" for c, marked in zip(text.replace("\0", "?"), self._marked(text), strict=True)
        ]
        text = re.sub("\0+", "[key]", "".join(shown))
        return printable(re.sub(r"(?i)(bearer\s+|sk-)[\w.*-]{4,}", "[key]", text))


Unit = tuple[str, int, int]


def _folded(character: str, start: int, end: int) -> list[Unit]:
    """What a reader sees of a character that stands from `start` to `end`, in small letters; nothing of a space."""
    seen = unicodedata.normalize("NFKC", character).casefold()
    return [(c, start, end) for c in seen if unicodedata.category(c)[0] not in "CMZ"]


def _read(units: list[Unit]) -> list[Unit]:
    """The characters, with those that are spelled in the place of what spells them."""
    text = "".join(c for c, _, _ in units)
    read, done = [], 0
    for match in SPELLED.finditer(text):
        digits, base = next((d, b) for d, b in zip(match.groups(), BASES, strict=True) if d is not None)
        if int(digits, base) > 0x10FFFF:
            continue
        read += units[done : match.start()]
        read.append((chr(int(digits, base)), units[match.start()][1], units[match.end() - 1][2]))
        done = match.end()
    return read + units[done:]
