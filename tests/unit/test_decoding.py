"""Every kind of image file becomes the same RGB bytes, and whatever is damaged one line."""

import functools
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mixmask.datasets import DataError
from mixmask.datasets.decoding import FORMATS, decode, read_image, read_shape

LOSSLESS = ("PNG", "BMP", "TIFF", "PPM", "JPEG2000")
RGB = np.zeros((24, 36, 3), np.uint8)
RGB[..., 0], RGB[..., 1], RGB[:8, :8] = np.arange(36) * 6, np.arange(24)[:, None] * 9, 255
GRAY = np.arange(24 * 36, dtype=np.uint16).reshape(24, 36) * 75  # 16 bits, to 64,725


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixels(content: bytes, upright: bool = False) -> np.ndarray:
    """uint8 (H, W, 3)"""
    image = decode(content, "a.JPEG", upright)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("form", FORMATS)
def test_every_mode_becomes_rgb_as_pillow_has_it(form):
    held = []
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        image = Image.fromarray(RGB)
        try:
            content = encoded((image.convert("P") if mode == "PA" else image).convert(mode), form)
        except (OSError, KeyError, ValueError):
            continue  # a format that has no such mode
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(pixels(content), expected), mode
        if form in LOSSLESS and mode in ("RGB", "RGBA"):
            assert np.array_equal(expected, RGB)
        held.append(mode)
    assert len(held) >= 4 and {"L", "RGB"} <= set(held)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_upper_eight_of_sixteen_bits_are_taken(form):
    assert np.array_equal(pixels(encoded(Image.fromarray(GRAY), form)), np.repeat(GRAY[..., None] >> 8, 3, 2))


def test_sixteen_bits_a_channel_of_a_colour_png():
    """Written by hand: Pillow has no such mode."""
    import zlib

    wide = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], axis=2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 36, 24, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(pixels(content), wide >> 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(dtype):
    with pytest.raises(DataError, match=r"image file a.JPEG .* 32 bits a pixel \(mode [IF]\); expected 8 or 16"):
        pixels(encoded(Image.fromarray(GRAY.astype(dtype)), "TIFF"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_where_it_is_asked_for(orientation, form):
    exif = Image.Exif()
    exif[0x112] = orientation
    content = encoded(Image.fromarray(RGB), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert np.array_equal(pixels(content, upright=True), upright)
    assert np.array_equal(pixels(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_counts(form):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert np.abs(pixels(content).astype(int) - (255, 0, 0)).max() <= 3


def test_immense_image_is_refused_before_it_is_decoded():
    jpeg = bytearray(encoded(Image.fromarray(RGB), "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(DataError, match=r"4294836225 pixels.* exceeds limit"):
        pixels(bytes(jpeg))


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff\xd8\xff"]
)
def test_no_image_is_one_line(content, tmp_path):
    path = tmp_path / "grüße 1.JPEG"
    path.write_bytes(content)
    for read in (read_image, functools.partial(read_image, upright=True), read_shape):
        with pytest.raises(
            DataError, match=r"^image file .*grüße 1.JPEG is missing, truncated or no image: .+$"
        ) as error:
            read(path)
        assert "BytesIO" not in str(error.value) and str(error.value).count(str(path)) == 1


def test_missing_file_and_folder_are_one_line(tmp_path):
    for path, reason in ((tmp_path / "a.png", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=f"^image file {path} is missing, truncated or no image: {reason}$"):
            read_image(str(path))


# ----------------------------------------------------------------------------------------------------- mutations

EIGHT = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")


def seeds(form: str) -> list[bytes]:
    """Small files of a format, in several of its kinds."""
    rgb = Image.fromarray(RGB)
    images = {"rgb": rgb, "gray": rgb.convert("L"), "palette": rgb.convert("P"), "alpha": rgb.convert("RGBA")}
    options = {"JPEG": [{}, {"progressive": True}], "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}]}
    options |= {"GIF": [{}, {"save_all": True, "append_images": [rgb.convert("P").rotate(180)]}], "PNG": [{}]}
    found = []
    for image in [*images.values(), rgb.convert("CMYK"), Image.fromarray(GRAY)]:
        for option in options.get(form, [{}]):
            try:
                found.append(encoded(image, form, **option))
            except (OSError, KeyError, ValueError):
                continue  # a format that has no such mode
    return found


def mutated(content: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Cut off, bytes changed (often in the header), a piece removed, repeated, blanked, or taken from another file."""
    data, places = bytearray(content), rng.integers(0, len(content), 2)
    first, last = sorted(places.tolist())
    kind = rng.integers(7)
    if kind == 0:
        return bytes(data[:last])
    if kind == 1:
        del data[first:last]
    elif kind == 2:
        data[last:last] = data[first:last]
    elif kind == 3:
        data[first:last] = bytes([rng.choice([0, 255])]) * (last - first)
    elif kind == 4:
        data[first:last] = other[first:last]
    else:
        reach = len(data) if kind == 5 else min(len(data), 64)
        for place in rng.integers(0, reach, rng.integers(1, 9)).tolist():
            data[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
    return bytes(data)


def fuzz(count: int, seed: int) -> dict[str, int]:
    """How many of `count` mutated files were read as images, and how many refused in one line."""
    files, outcome = {form: seeds(form) for form in EIGHT}, {"read": 0, "refused": 0}
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        form, foreign = EIGHT[index % len(EIGHT)], EIGHT[rng.integers(len(EIGHT))]
        content = mutated(rng.choice(np.array(files[form], dtype=object)), rng, files[foreign][0])
        try:
            image = decode(content, f"{form} {index}", upright=bool(index % 2))
        except DataError as error:
            assert str(error).startswith(f"image file {form} {index} is missing, truncated or no image: ")
            assert "\n" not in str(error)
            outcome["refused"] += 1
        else:
            assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0
            outcome["read"] += 1
    return outcome


def test_mutated_files_are_read_or_refused_in_one_line():
    outcome = fuzz(400, seed=1)
    assert min(outcome.values()) > 50


@pytest.mark.slow
def test_twenty_thousand_mutated_files():
    outcome = fuzz(20_000, seed=0)
    print(outcome)
    assert sum(outcome.values()) == 20_000 and min(outcome.values()) > 2000
