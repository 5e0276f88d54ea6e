"""Images of a batch of rows for reward functions: opened, each once, and packed for sending."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import ImageError, load_image
from ..data.rows import RowError


def load_images(rows: list[list[Any]], image_root: str | Path | None = None) -> list[list[Image.Image]]:
    """
    The pictures of each row in RGB; one that several rows share, as the completions of a group do, is opened once.

    Args:
        rows (`list[list]`): What [`~latent_trl.data.images.load_image`] takes, for each row.
        image_root (`str` or `Path`, *optional*): The only folder that paths may lead to.

    Raises:
        RowError: With the row of the batch, what was found and what works.
    """
    opened: dict[int, Image.Image] = {}
    for i, row in enumerate(rows):
        for image in row:
            if id(image) not in opened:
                try:
                    opened[id(image)] = load_image(image, image_root)
                except ImageError as error:
                    raise RowError(f"Row {i} of the batch: its image: {error}") from error
    return [[opened[id(image)] for image in row] for row in rows]


def image_url(picture: Image.Image, max_side: int | None = None) -> str:
    """
    A picture as an address that a chat-completions endpoint takes.

    Args:
        picture (`PIL.Image.Image`): In RGB.
        max_side (`int`, *optional*): Longest side in pixels; larger pictures are scaled down.

    Returns:
        `str`: A data URL that holds a JPEG.
    """
    if max_side is not None and max(picture.size) > max_side:
        picture = picture.copy()
        picture.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
