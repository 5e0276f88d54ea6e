"""The API key of a server: where it is kept."""

import os
from pathlib import Path

KEY_VARIABLE = "LATENT_TRL_API_KEY"


def read_key(file: str | None = None) -> str | None:
    """
    The API key: the content of `file`, else of the environment variable `LATENT_TRL_API_KEY`.

    Raises:
        ValueError: For one that is empty, or that cannot be sent in a header.
    """
    key = os.environ.get(KEY_VARIABLE) if file is None else Path(file).read_text(encoding="utf-8").strip()
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"The API key of {file or KEY_VARIABLE} is empty, or has other characters than ASCII's.")
    return key
