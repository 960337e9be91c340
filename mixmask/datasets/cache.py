"""Small images decoded once: held in memory, and kept in one file beside them."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mixmask.datasets.base import DataError, one_line
from mixmask.datasets.decoding import read_image
from mixmask.runs import discard

log = logging.getLogger(__name__)


def decode_all(paths: Sequence[str], shape: tuple[int, int], upright: bool = False) -> Tensor:
    """Every file as uint8 (N, 3, *shape), shape (H, W). Raises DataError for a broken file or one of another size."""
    images = torch.empty(len(paths), 3, *shape, dtype=torch.uint8)

    def decode(i: int) -> None:
        image = read_image(paths[i], upright)
        if image.shape != images.shape[1:]:
            size = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(f"image file {paths[i]} has {size} pixels, expected {shape[1]}x{shape[0]}")
        images[i] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    return images


def kept(cache: Path, paths: Sequence[str], decode: Callable[[], Tensor]) -> Tensor:
    """`decode()`, cached in the file `cache` until the files' paths below its folder, sizes or times change."""
    key = _listing_hash(paths, f"{cache.parent}/")
    try:
        stored = torch.load(cache, weights_only=True)
        if stored["key"] == key and stored["crc32"] == zlib.crc32(stored["images"].numpy()):
            return stored["images"]
        log.warning("%s no longer matches the image files (or is damaged): decoding them again", cache)
    except FileNotFoundError:
        log.info("decoding %d images once into %s", len(paths), cache)
    except Exception as error:  # a cut-off or foreign file raises many types, all with one remedy
        log.warning("%s is unreadable (%s): decoding the images again", cache, type(error).__name__)
    images = decode()
    _save(cache, {"key": key, "crc32": zlib.crc32(images.numpy()), "images": images})
    return images


def _save(cache: Path, content: dict) -> None:
    partial = cache.with_name(f".{cache.name}.{uuid.uuid4().hex[:8]}")
    try:
        torch.save(content, partial)
        os.replace(partial, cache)
    except (OSError, RuntimeError) as error:
        log.warning("cannot write %s (%s): the images are decoded anew in every run", cache, one_line(error))
        discard(partial)


def _listing_hash(paths: Sequence[str], folder: str) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise DataError(f"image file {path} is missing or unreadable: {error.strerror}") from None
        digest.update(os.fsencode(f"{path.removeprefix(folder)} {stat.st_size} {stat.st_mtime_ns}\n"))
    return digest.hexdigest()
