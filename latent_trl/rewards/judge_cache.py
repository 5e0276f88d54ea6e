"""Replies of a judge on disk, addressed by the content of the request."""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def request_key(request: dict[str, Any]) -> str:
    """SHA-256 of a request: the same endpoint, model, settings, words and images give the same key."""
    canonical = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


class ReplyCache:
    """
    A folder of replies, one small JSON file each; several processes may share it.

    Files are written whole or not at all, and a file that cannot be read counts as absent. Where the disk is full or
    read-only, a warning says so once, and nothing more is stored.

    Args:
        folder (`str` or `Path`, *optional*): Where the files are kept. Without one, nothing is stored.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder).expanduser()
        self.stands_aside = False

    def get(self, key: str) -> str | None:
        """Text stored under a key, or `None`."""
        if self.folder is None:
            return None
        try:
            reply = json.loads(self._path(key).read_text(encoding="utf-8"))["reply"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return reply if isinstance(reply, str) else None

    def put(self, key: str, reply: str) -> None:
        """Stores a text under a key, replacing whatever is there."""
        if self.folder is None or self.stands_aside:
            return
        try:
            self._write(self._path(key), reply)
        except (OSError, UnicodeError) as error:
            self.stands_aside = isinstance(error, OSError)
            logger.warning(
                f"`cache_dir` {str(self.folder)!r} cannot be written to ({error}): replies of the judge are not kept."
            )

    def _write(self, path: Path, reply: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"reply": reply}, file)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
