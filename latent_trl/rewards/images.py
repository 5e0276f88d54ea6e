"""Images as data sets hold them, opened or packed for sending."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image


def open_image(image: Any) -> Image.Image:
    """
    Opens an image in any form in which a data set holds it.

    Args:
        image (`PIL.Image.Image`, `bytes`, `str`, `Path` or `dict`):
            The image, its encoded bytes, the path of its file, or the undecoded `{"bytes": ..., "path": ...}` of
            [`~datasets.Image`].

    Returns:
        `PIL.Image.Image`: The image in RGB; what is transparent becomes white.
    """
    if isinstance(image, dict) and (image.get("bytes") or image.get("path")):
        image = image.get("bytes") or image["path"]
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, (str, Path)):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            "An image must be a PIL image, bytes, a path, or a dict with 'bytes' or 'path'; "
            f"got {type(image).__name__}."
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_url(image: Any, max_side: int | None = None) -> str:
    """
    An image as an address that a chat-completions endpoint takes.

    Args:
        image (`Any`): What [`open_image`] takes; `http(s)` and `data` addresses are returned as they are.
        max_side (`int`, *optional*): Longest side in pixels; larger images are scaled down.

    Returns:
        `str`: A data URL that holds a JPEG.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return image
    picture = open_image(image)
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
