"""Images of a data set: from what a row holds to an RGB picture, or a clear error."""

import base64
import io
import math
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from .rows import IMAGE_COLUMNS, UNREADABLE, RowError, is_data_url, row_name, short

MAX_PIXELS = 50_000_000
LONGEST_PATH = 1_000
# Of Pillow's formats those that pictures come in; some others start programs or read further files.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
Image.init()
# AVIF has come to Pillow with 11.3.
FORMATS = tuple(name for name in PICTURE_FORMATS if name in Image.OPEN)


class ImageError(ValueError):
    """An image that is missing, unreadable, too large, or outside the folder that was given."""


def load_image(value: Any, image_root: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    An RGB picture, turned upright, of the first frame; what is transparent becomes white.

    Args:
        value (`PIL.Image.Image`, `str`, `Path`, `bytes` or `dict`):
            A picture, a path below `image_root`, a data URL, encoded bytes, or a `datasets` cell with `bytes` or
            `path`.
        image_root (`str` or `Path`, *optional*): The only folder that paths may lead to. Without it paths are refused.
        max_pixels (`int`, defaults to 50 million): Larger pictures are refused before they are decoded.

    Raises:
        ImageError: With what was found and what works.
    """
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    name, source = "the picture", value
    if is_data_url(value):
        name, source = short(value), io.BytesIO(_data_url(value))
    elif isinstance(value, (str, Path)):
        name, source = short(str(value)), _inside(value, image_root)
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
        # A decoder that meets damaged data raises whatever it runs into. An unknown format's message names an address.
        unknown = isinstance(error, UnidentifiedImageError)
        what = "its format is unknown" if unknown else f"{type(error).__name__}: {error}"
        raise ImageError(f"{name} cannot be read as an image ({what}). Works: {', '.join(FORMATS)}.") from error


def open_image(path: str | Path) -> Image.Image:
    """
    The picture of a file that the user named, and not a row of data, in RGB.

    Raises:
        FileNotFoundError: When there is no such file.
        ImageError: When it is no picture.
    """
    # Followed first: the files of a Hub snapshot are links to elsewhere.
    full = Path(path).resolve()
    if not full.is_file():
        raise FileNotFoundError(f"There is no picture {str(path)!r}.")
    return load_image(full.name, full.parent)


def load_row_images(row: dict[str, Any], image_root: str | Path | None = None) -> dict[str, Any]:
    """
    A copy of a row whose pictures are RGB pictures: those of its columns `images` and `image`, and those within the
    parts of its messages (`messages`, `prompt`, `completion`). Other columns are as they were.

    Args:
        row (`dict`): A row; `_row`, its number, is named in messages.
        image_root (`str` or `Path`, *optional*): The only folder that paths may lead to. Without it paths are refused.

    Raises:
        RowError: With the row, the column, what was found and what works.
    """
    if row.get(UNREADABLE) is not None:
        raise RowError(f"{row_name(row)}: cannot be read ({row[UNREADABLE]}).")
    loaded = dict(row)
    for column in IMAGE_COLUMNS:
        cell = row.get(column)
        if isinstance(cell, (list, tuple)):
            loaded[column] = [_of_row(row, f"`{column}`[{i}]", v, image_root) for i, v in enumerate(cell)]
        elif cell is not None:
            loaded[column] = _of_row(row, f"`{column}`", cell, image_root)
    for column in ("messages", "prompt", "completion"):
        if isinstance(row.get(column), (list, tuple)):
            loaded[column] = [_load_message(row, column, i, m, image_root) for i, m in enumerate(row[column])]
    return loaded


def _load_message(row: dict[str, Any], column: str, i: int, message: Any, image_root: str | Path | None) -> Any:
    """A message whose parts hold pictures; what is no message is left for the check of messages."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), (list, tuple)):
        return message
    parts = []
    for part in message["content"]:
        if isinstance(part, dict) and part.get("type") == "image" and part.get("image") is not None:
            where = f"the image of message {i} of `{column}`"
            part = {**part, "image": _of_row(row, where, part["image"], image_root)}
        parts.append(part)
    return {**message, "content": parts}


def _of_row(row: dict[str, Any], where: str, value: Any, image_root: str | Path | None) -> Image.Image:
    try:
        return load_image(value, image_root)
    except ImageError as error:
        raise RowError(f"{row_name(row)}: {where}: {error}") from error


def _data_url(value: str) -> bytes:
    head, _, payload = value.partition(",")
    if not head.lower().endswith(";base64"):
        raise ImageError(f"{short(value)} is not in base64, the only coding of data URLs that is read.")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise ImageError(f"{short(value)} is no base64: {error}.") from error


def _inside(path: str | Path, image_root: str | Path | None) -> Path:
    if len(str(path)) > LONGEST_PATH:
        raise ImageError(
            f"A text of {len(str(path))} characters is no path. A picture in base64 is given as a data URL, which "
            "begins with data:image/png;base64, or the like."
        )
    name = short(str(path))
    if "://" in str(path):
        raise ImageError(f"{name} is a URL. Download the images first, and pass paths and `image_root`.")
    if image_root is None:
        raise ImageError(f"{name} is a path, and no `image_root` says where images may be read from.")
    try:
        root = Path(image_root).resolve()
        full = (root / path).resolve()
        exists, is_file = full.exists(), full.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        # The text of an `OSError` repeats the name, which may be a picture's whole content.
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{name} is no path: {reason}.") from error
    if not full.is_relative_to(root):
        raise ImageError(f"{name} leads out of `image_root` {str(image_root)!r}.")
    if exists and not is_file:
        # To read from a pipe could take forever.
        raise ImageError(f"{name} is not a file.")
    return full


def _checked(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    width, height = image.size
    if not width * height:
        raise ImageError(f"{name} has no pixels: {width}×{height}.")
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width}×{height} pixels, more than `max_pixels` = {max_pixels}.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """
    Grey of more bits, scaled to 8; a plain conversion would clip. Its range is that of 16 bits where the mode says so,
    else the narrowest of 1, 8 and 16 bits that holds the values, and without one its own.
    """
    low, high = image.convert("F").getextrema()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("the picture has values that are not finite.")
    ranges = (65535.0,) if image.mode.startswith("I;16") else (255.0, 65535.0)
    if image.mode == "F":
        ranges = (1.0, *ranges)
    whole = next((top for top in ranges if low >= 0 and high <= top), None)
    if whole is not None:
        low, high = 0.0, whole
    scale = 255.0 / (high - low) if high > low else 0.0
    return image.convert("F").point(lambda v: v * scale + (-low * scale)).convert("L")
