"""Results as JSON files that every reader can read."""

import json
import math
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def write_json(value: Any, path: str | Path) -> Path:
    """Writes `value`, with dataclasses as objects, and `null` for what is not a finite number. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
