"""Opens all images of a data set before training: a damaged one is named in one line."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import ExifTags, Image

from detection.annotations import Picture
from mixmask.datasets import DataError
from mixmask.datasets.decoding import TURNED
from mixmask.training.progress import Progress, say

DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits, which become white in Detectron2
BLOCK = 1000  # images between two looks at errors


def check_names(folder: Path, names: Sequence[str]) -> None:
    """Raises DataError unless every name is a file of the folder, and not an empty one."""
    there = {name for name, size, _ in listing(folder) if size}
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{folder}: {len(missing):,} of {len(names):,} files are missing or empty, first: {missing[:1]}"
        )


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time (ns) of each file in a folder, in order; broken links are left out.

    Raises DataError where it cannot be read.
    """
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if os.path.isfile(entry.path):  # false for links that lead nowhere, or in circles
                    stat = entry.stat()
                    files.append((entry.name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from None
    return sorted(files)


def open_all(pictures: Sequence[Picture], threads: int) -> None:
    """Decode every image. Raises DataError for the first that cannot be used, or has another size than annotated."""
    say(f"opening {len(pictures):,} images, to know before training that none is damaged")
    start, progress = time.perf_counter(), Progress(len(pictures), "opening images")
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for first in range(0, len(pictures), BLOCK):  # a few at a time: Ctrl-C and errors need not wait for the rest
            for error in pool.map(fault, pictures[first : first + BLOCK]):
                progress.step()
                if error:
                    raise DataError(error)
            if first and first % (20 * BLOCK) == 0:
                say(f"  {first:,} of {len(pictures):,}")
    progress.close()
    say(f"  all are whole ({time.perf_counter() - start:.0f} s)")


def fault(picture: Picture) -> str:
    """What is wrong with an image, in one line; nothing for one that Detectron2 can use."""
    try:
        with Image.open(picture.file) as image:
            size, mode = image.size, image.mode
            if _turned(image):
                size = size[::-1]
            image.draft(None, (1, 1))  # JPEG: all bytes are read, and few pixels made
            image.load()
    except Exception as error:  # whatever Pillow's readers raise: OSError, SyntaxError, struct.error, ...
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return f"{picture.file} cannot be used ({' '.join(reason.split())})"
    if mode in DEEP:
        return f"{picture.file} has more than 8 bits a channel ({mode}); expected 8"
    if size != (picture.width, picture.height):
        return f"{picture.file} has {size[0]} x {size[1]} pixels; annotated are {picture.width} x {picture.height}"
    return ""


def _turned(image: Image.Image) -> bool:
    """Whether width and height change places where Detectron2 turns the image."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in TURNED
    except Exception:  # EXIF that cannot be read is none, as in Detectron2
        return False
