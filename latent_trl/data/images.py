"""Images of a data set: from what a row holds to an RGB picture, or a clear error."""

import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000


class ImageError(ValueError):
    """An image that is missing, unreadable, too large, or outside the folder that was given."""


def load_image(value: Any, image_root: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    An RGB picture, turned upright, of the first frame.

    Args:
        value (`PIL.Image.Image`, `str`, `Path`, `bytes` or `dict`):
            A picture, a path below `image_root`, encoded bytes, or a `datasets` cell with `bytes` or `path`.
        image_root (`str` or `Path`, *optional*): The only folder that paths may lead to. Without it paths are refused.
        max_pixels (`int`, defaults to 50 million): Larger pictures are refused before they are decoded.

    Raises:
        ImageError: With what was found and what works.
    """
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Image.Image):
        return _checked(value, max_pixels, "the picture")
    if isinstance(value, (str, Path)):
        source: Any = _inside(value, image_root)
        name = str(value)
    elif isinstance(value, (bytes, bytearray)):
        source, name = io.BytesIO(value), f"{len(value)} bytes"
    else:
        raise ImageError(f"An image must be a PIL image, a path, or bytes, got {type(value).__name__}.")
    try:
        with warnings.catch_warnings():
            # The limit of this function takes the place of Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return _checked(image, max_pixels, name)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to be decoded safely: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist below {image_root}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def _inside(path: str | Path, image_root: str | Path | None) -> Path:
    if "://" in str(path):
        raise ImageError(f"{str(path)!r} is a URL. Download the images first, and pass paths and `image_root`.")
    if image_root is None:
        raise ImageError(f"{str(path)!r} is a path, and no `image_root` says where images may be read from.")
    root = Path(image_root).resolve()
    full = (root / path).resolve()
    if not full.is_relative_to(root):
        raise ImageError(f"{str(path)!r} leads out of `image_root` {str(image_root)!r}.")
    return full


def _checked(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width}×{height} pixels, more than `max_pixels` = {max_pixels}.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # 16- and 32-bit grey: scaled to 8 bits, where a plain conversion would clip.
        low, high = image.getextrema()
        scale = 255.0 / (high - low) if high > low else 0.0
        image = image.convert("F").point(lambda v: (v - low) * scale).convert("L")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")
