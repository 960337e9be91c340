"""Image files as RGB bytes: one decoder for every reader.

JPEG, known by its first bytes, is decoded by torchvision, all other formats by Pillow; file names are ignored.
(torchvision decodes PNG, too, but 0.29.2 ends the process at some damaged files.)
Every image becomes RGB as with the `convert("RGB")` of public code: gray is repeated, a palette is looked
up, CMYK is converted, transparency is dropped, and of an animation the first frame counts. Of 16 bits the upper 8 are
taken. Images of 32 bits are refused, since their white is unknown. EXIF orientation is applied where it is asked for.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mixmask.datasets.base import DataError, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # Pillow's names; all others refused
JPEG = b"\xff\xd8\xff"
FLIPPED_AND_TURNED = {  # EXIF orientation -> mirrored left to right, then turned so many times to the left
    1: (False, 0), 2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1)
}  # fmt: skip
TURNED = (5, 6, 7, 8)  # orientations in which width and height change places

warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")  # of EXIF data that are damaged, in every worker


def read_image(path: str | os.PathLike[str], upright: bool = False) -> Tensor:
    """An image file as RGB uint8 (3, H, W); `upright`: turned as its EXIF orientation says.

    Raises DataError naming a file that is missing, truncated or no image.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise _unreadable(os.fspath(path), error.strerror) from None
    return decode(content, os.fspath(path), upright)


def read_shape(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image file, turned upright, of which only the header is read. Raises DataError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # as in `decode`
        raise _unreadable(os.fspath(path), getattr(error, "strerror", None) or _reason(error)) from None


def decode(content: bytes, name: str, upright: bool = False) -> Tensor:
    """The bytes of an image file called `name` as RGB uint8 (3, H, W). Raises DataError where they are none."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # its header alone; refuses immense images
            pixels = _decoded(content, image)
            orientation = (
                image.getexif().get(ExifTags.Base.Orientation) if upright else 1
            )  # gone where Pillow turned it
    except Exception as error:  # of a damaged file decoders raise nearly every type; all have one remedy
        raise _unreadable(name, _reason(error)) from None
    flipped, turns = FLIPPED_AND_TURNED.get(orientation, (False, 0))
    return (pixels.flip(2) if flipped else pixels).rot90(turns, (1, 2)) if flipped or turns else pixels


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow names the file, or an object in memory
        return f"not one of {', '.join(FORMATS)}"
    return one_line(error) or type(error).__name__


def _unreadable(name: str, reason: str) -> DataError:
    return DataError(f"image file {name} is missing, truncated or no image: {reason}")


def _decoded(content: bytes, image: Image.Image) -> Tensor:
    if content.startswith(JPEG):
        with contextlib.suppress(RuntimeError):  # Pillow reads some of these, and says more clearly what is wrong
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
            if pixels.shape == (3, image.height, image.width):
                return pixels
    return torch.from_numpy(_by_pillow(image)).permute(2, 0, 1)


def _by_pillow(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3). Raises ValueError for 32 bits, and whatever Pillow raises."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # scaled to 65,535 there
    if not sixteen:
        if image.mode in ("I", "F"):
            raise ValueError(f"32 bits a pixel (mode {image.mode}); expected 8 or 16")
        return np.array(image.convert("RGB"))
    bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))[0]  # 12 in some TIFF files
    gray = (np.asarray(image).astype(np.int64) >> (bits - 8)).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)
