"""Pictures of every kind that a data set of others may hold: read rightly, or refused with what was found."""

import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from latent_trl.data.images import FORMATS, ImageError, load_image, load_row_images
from latent_trl.data.rows import RowError


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 8, height: int = 4) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("wrap", [lambda b: b, bytearray, lambda b: {"bytes": b, "path": None}])
def test_bytes_and_cells_of_datasets(wrap):
    assert np.array_equal(load_image(wrap(encoded(gradient()))), gradient())


def test_paths_below_the_root(tmp_path):
    (tmp_path / "a").mkdir()
    gradient().save(tmp_path / "a" / "x.png")
    for value in ("a/x.png", tmp_path / "a" / "x.png", {"bytes": None, "path": "a/../a/x.png"}):
        assert np.array_equal(load_image(value, tmp_path), gradient())


def test_a_wrong_extension_does_not_matter(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(gradient()))
    assert np.array_equal(load_image("x.jpg", tmp_path), gradient())


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3, 2)])
def test_small_and_narrow_pictures(size):
    assert load_image(encoded(Image.new("RGB", size, "red"))).size == size


def test_animated_pictures_give_the_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.allclose(load_image(data), frames[0], atol=4)


def test_sixteen_bits_keep_their_brightness():
    grey = np.full((4, 4), 0.5 * 65535, dtype=np.uint16)
    grey[0, 0] = 65535
    image = load_image(encoded(Image.fromarray(grey)))
    assert image.mode == "RGB" and image.getpixel((1, 1)) == (127,) * 3 and image.getpixel((0, 0)) == (255,) * 3
    flat = load_image(Image.fromarray(np.full((4, 4), 52428, dtype=np.uint16)))
    assert flat.getpixel((0, 0)) == (204,) * 3


def test_floating_point_pictures():
    values = np.array([[0.0, 0.5], [1.0, 0.2]], dtype=np.float32)
    assert np.array_equal(np.asarray(load_image(Image.fromarray(values)))[..., 0], [[0, 127], [255, 51]])
    wide = load_image(Image.fromarray(values * 4000 - 1000))
    assert np.array_equal(np.asarray(wide)[..., 0], [[0, 127], [255, 51]])
    assert load_image(Image.fromarray(np.full((2, 2), 128.0, np.float32))).getpixel((0, 0)) == (128,) * 3
    assert load_image(Image.fromarray(np.float32([[100.0, 150.0]]))).getpixel((1, 0)) == (150,) * 3
    assert load_image(Image.fromarray(np.float32([[0.0, 52428.0]]))).getpixel((1, 0)) == (204,) * 3
    with pytest.raises(ImageError, match="not finite"):
        load_image(Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)))


def test_integers_of_32_bits_have_the_range_that_holds_them():
    for values, wanted in (([100, 200], [100, 200]), ([0, 52428], [0, 204]), ([-100, 100], [0, 255])):
        assert np.asarray(load_image(Image.fromarray(np.int32([values]))))[0, :, 0].tolist() == wanted
    dark = load_image(encoded(Image.fromarray(np.full((2, 2), 200, np.uint16))))
    assert dark.getpixel((0, 0)) == (0,) * 3


def test_sixteen_bits_of_colour_keep_it():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    line = b"\0" + struct.pack(">HHHH", 51400, 7710, 10280, 65535) * 2
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 6, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(line * 2)) + chunk(b"IEND", b"")
    assert load_image(data).getpixel((1, 1)) == (200, 30, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_colour_modes_become_rgb(mode):
    image = Image.new("RGB", (4, 4), "white")
    image = image.convert(mode)
    assert load_image(image).mode == "RGB" and min(load_image(image).getpixel((1, 1))) > 250
    if mode == "CMYK":
        assert min(load_image(encoded(image, "JPEG")).getpixel((1, 1))) > 250


def test_exif_turns_the_picture_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_image(encoded(gradient(), "PNG", exif=exif))
    assert image.size == (4, 8)
    assert np.array_equal(image, gradient().transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize(
    "size, message",
    [((8000, 8000), "64000000|8000×8000 pixels"), ((30000, 30000), "30000|too large"), ((2**31 - 1, 2**31 - 1), "")],
)
def test_bombs_are_refused_before_they_are_decoded(size, message):
    with pytest.raises(ImageError, match=message):
        load_image(bomb(*size))


def test_a_lower_limit():
    with pytest.raises(ImageError, match="8×4 pixels, more than `max_pixels` = 31"):
        load_image(gradient(), max_pixels=31)
    assert load_image(gradient(), max_pixels=32).size == (8, 4)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_pictures(format):
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), format)
    for length in (0, 3, 20, len(data) // 2):
        with pytest.raises(ImageError, match=f"{length} bytes cannot be read as an image"):
            load_image(data[:length])


def test_lazy_pictures_that_turn_out_truncated():
    data = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7", b"<svg/>", b"text"]
)
def test_formats_that_run_programs_or_are_none(data):
    assert not {"EPS", "PDF", "PSD"} & set(FORMATS)
    with pytest.raises(ImageError, match="Works: PNG"):
        load_image(data)


def test_paths_that_lead_out(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    gradient().save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    for path in ("../outside.png", str(tmp_path / "outside.png"), "link.png", "a/../../outside.png"):
        with pytest.raises(ImageError, match="leads out of `image_root`"):
            load_image(path, root)


def test_paths_that_are_no_pictures(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for path, message in (
        ("missing.png", "does not exist below"),
        ("folder.png", "is not a file"),
        ("pipe.png", "is not a file"),
        ("a\0b.png", "is no path"),
        ("https://example.com/x.png", "is a URL. Download"),
        ("file:///etc/passwd", "is a URL"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(path, tmp_path)
    with pytest.raises(ImageError, match="no `image_root` says"):
        load_image("x.png")


@pytest.mark.parametrize("value", [None, 3, [1, 2], {"bytes": None, "path": None}, {}])
def test_values_that_are_no_pictures(value):
    with pytest.raises(ImageError, match="must be a PIL image, a path, or bytes, got"):
        load_image(value)


def test_a_text_that_is_no_path_is_not_printed():
    payload = base64.b64encode(encoded(Image.effect_noise((64, 64), 90))).decode()
    with pytest.raises(ImageError, match="^A text of [0-9]+ characters is no path.*data URL") as caught:
        load_image(payload, ".")
    assert payload[:20] not in str(caught.value)


def test_a_picture_without_a_pixel():
    with pytest.raises(ImageError, match="no pixels: 0×5"):
        load_image(Image.new("RGB", (0, 5)))


def test_the_reason_is_the_same_each_time():
    """It names no address in memory, so that a row is listed once."""
    with pytest.raises(ImageError, match="its format is unknown") as caught:
        load_image(b"version https://git-lfs.github.com/spec/v1")
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.asarray(load_image(encoded(gradient(), "PNG", exif=exif)))
    own = np.asarray(gradient())
    upright = {
        1: own,
        2: own[:, ::-1],
        3: own[::-1, ::-1],
        4: own[::-1],
        5: own.swapaxes(0, 1),
        6: own[::-1].swapaxes(0, 1),
        7: own[::-1, ::-1].swapaxes(0, 1),
        8: own[:, ::-1].swapaxes(0, 1),
    }
    assert np.array_equal(turned, upright[orientation])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0, 0, 0, 0] + [0] * 762)
        image.putpixel((1, 1), 1)
        image.info["transparency"] = 0
    loaded = load_image(encoded(image if mode == "P" else image.convert(mode)))
    assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((1, 1)) == (0, 0, 0)


def test_data_urls():
    url = "data:image/png;base64," + base64.b64encode(encoded(gradient())).decode()
    assert np.array_equal(load_image(url), gradient())
    assert np.array_equal(load_image(url.replace("data:image/png;base64", "DATA:image/png;BASE64")), gradient())
    for broken, message in (
        (url[:-5] + "?", "no base64"),
        (url.replace(";base64", ""), "not in base64"),
        ("data:", "base64"),
    ):
        with pytest.raises(ImageError, match=f"a data URL of {len(broken)} characters is .*{message}"):
            load_image(broken)


def test_pictures_of_a_row_wherever_they_are(tmp_path):
    gradient().save(tmp_path / "x.png")
    part = {"type": "image", "image": "x.png"}
    row = {
        "images": [encoded(gradient()), "x.png"],
        "image": {"path": "x.png", "bytes": None},
        "prompt": [{"role": "user", "content": [part, {"type": "text", "text": "x.png"}, {"type": "image"}]}],
        "completion": "x.png",
        "other": "x.png",
    }
    loaded = load_row_images(row, tmp_path)
    content = loaded["prompt"][0]["content"]
    for picture in (*loaded["images"], loaded["image"], content[0]["image"]):
        assert np.array_equal(picture, gradient())
    assert content[1:] == row["prompt"][0]["content"][1:] and loaded["other"] == loaded["completion"] == "x.png"
    assert row["images"][1] == "x.png" and part["image"] == "x.png"
    for column, where in (
        ("images", r"`images`\[0\]"),
        ("image", "`image`"),
        ("prompt", "the image of message 0 of `prompt`"),
    ):
        with pytest.raises(RowError, match=f"^Row 4: {where}: .*no `image_root`"):
            load_row_images({column: ["x.png"] if column == "images" else row[column], "_row": 4})
    assert load_row_images({"images": None, "prompt": 3, "messages": [1]}) == {
        "images": None,
        "prompt": 3,
        "messages": [1],
    }
    with pytest.raises(RowError, match=r"`images`\[1\]: An image must be .* got NoneType"):
        load_row_images({"images": [gradient(), None]})


def test_a_name_that_is_a_pictures_content_is_not_printed():
    for value in (base64.b64encode(encoded(Image.effect_noise((64, 64), 90))).decode(), "x" * 5000):
        with pytest.raises(ImageError) as caught:
            load_image(value, "/tmp")
        assert len(str(caught.value)) < 200
