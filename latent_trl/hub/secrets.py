"""Tokens and keys: found in the files that are to be published, whatever their format, and taken out of texts."""

import re
from pathlib import Path

from PIL import Image

from ..checkpoint.files import CheckpointError, check_file

# Tokens of the Hub, keys of OpenAI's kind, which have a digit somewhere, and of AWS, GitHub, GitLab, Slack and Google,
# JSON web tokens, and private keys.
KINDS = (
    r"hf_[A-Za-z0-9]{20,}",
    r"sk-(?=[A-Za-z_-]{0,200}[0-9])[A-Za-z0-9_-]{20,400}[A-Za-z0-9_-]*",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    r"gh[opsur]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}",
    r"glpat-[A-Za-z0-9_-]{20,}",
    r"xox[abeprs]-[0-9A-Za-z-]{10,}",
    r"AIza[0-9A-Za-z_-]{35}(?![A-Za-z0-9])",
    r"eyJ[A-Za-z0-9_-]{10,400}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,}",
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----[A-Za-z0-9+/=\s\\]*",
)
PATTERN = rf"(?<![A-Za-z0-9])(?:{'|'.join(KINDS)})"
SECRET = re.compile(PATTERN)
SECRET_BYTES = re.compile(PATTERN.encode())
SPELLED = re.compile(rb"\\u00([2-7][0-9a-fA-F])")


def hide_secrets(text: str) -> str:
    """The text with the first letters alone of each token and key."""
    return SECRET.sub(lambda match: match[0][:3] + "***", text)


def check_no_secret(path: Path) -> None:
    """
    Looks through a file: all of a text, the list of tensors and the metadata of a safetensors file, the texts of a PNG.

    Raises:
        CheckpointError: When it holds what looks like a token or a key, which is not quoted.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            content = file.read(int.from_bytes(file.read(8), "little"))
    else:
        content = path.read_bytes()
    if path.suffix == ".png":
        content += "\n".join(_texts_of(path)).encode("utf-8", "replace")
    # Letters that JSON has spelled.
    if path.suffix in (".json", ".jsonl") and b"\\u" in content:
        content += SPELLED.sub(lambda match: bytes([int(match[1], 16)]), content)
    if SECRET_BYTES.search(content):
        raise CheckpointError(
            f"{path} holds what looks like a Hugging Face token, or a key of an API. Take it out before publishing."
        )


def _texts_of(path: Path) -> list[str]:
    """The texts of a PNG, packed ones too, of which Pillow limits the size."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            # Those behind the picture are found when it has been read.
            image.load()
            return [str(text) for pair in image.text.items() for text in pair]
    except (OSError, ValueError, SyntaxError) as error:
        raise CheckpointError(f"{path} is not a whole PNG picture ({error}).") from error
