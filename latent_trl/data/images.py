"""Images of a data set: from what a row holds to an RGB picture, or a clear error."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000
# Of Pillow's formats those that pictures come in; some others start programs or read further files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


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
    name, source = "the picture", value
    if isinstance(value, (str, Path)):
        name, source = repr(str(value)), _inside(value, image_root)
    elif isinstance(value, (bytes, bytearray)):
        name, source = f"{len(value)} bytes", io.BytesIO(value)
    elif not isinstance(value, Image.Image):
        raise ImageError(f"An image must be a PIL image, a path, or bytes, got {type(value).__name__}.")
    try:
        with warnings.catch_warnings():
            # The limit of this function takes the place of Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _checked(source, max_pixels, name)
            with Image.open(source, formats=FORMATS) as image:
                return _checked(image, max_pixels, name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to be decoded safely: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist below {image_root}.") from error
    except Exception as error:
        # A decoder that meets damaged data raises whatever it runs into.
        what = f"{type(error).__name__}: {error}"
        raise ImageError(f"{name} cannot be read as an image ({what}). Works: {', '.join(FORMATS)}.") from error


def _inside(path: str | Path, image_root: str | Path | None) -> Path:
    if "://" in str(path):
        raise ImageError(f"{str(path)!r} is a URL. Download the images first, and pass paths and `image_root`.")
    if image_root is None:
        raise ImageError(f"{str(path)!r} is a path, and no `image_root` says where images may be read from.")
    try:
        root = Path(image_root).resolve()
        full = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"{str(path)!r} is no path: {error}.") from error
    if not full.is_relative_to(root):
        raise ImageError(f"{str(path)!r} leads out of `image_root` {str(image_root)!r}.")
    if full.exists() and not full.is_file():
        # To read from a pipe could take forever.
        raise ImageError(f"{str(path)!r} is not a file.")
    return full


def _checked(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width}×{height} pixels, more than `max_pixels` = {max_pixels}.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits, scaled to 8 by the range of 16 bits, else by its own; a plain conversion would clip."""
    low, high = image.convert("F").getextrema()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("the picture has values that are not finite.")
    if image.mode.startswith("I") and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scale = 255.0 / (high - low) if high > low else 0.0
    return image.convert("F").point(lambda v: v * scale + (-low * scale)).convert("L")
