"""ImageNet-1K in parquet shards, as it is published today: an image's bytes, its name and its label in each row.

An image is read with its row group, the least that parquet gives: about a hundred images for one. Folders or the tar
archives are many times faster (docs/performance.md).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixmask.datasets.base import DataError, Listing, one_line
from mixmask.datasets.tree import by_class

NAMES = {"train": "train-*.parquet", "test": "validation-*.parquet"}


@dataclass(frozen=True)
class ParquetRows:
    """Images in parquet files, each by its file, row group and row, int64 (N, 3)."""

    files: tuple[str, ...]
    rows: np.ndarray

    def read(self, index: int) -> bytes:
        """The file of image `index`. Raises DataError where its shard cannot be read."""
        file, group, row = self.rows[index].tolist()
        return _group(self.files[file], group)[row].as_py()

    def size(self, index: int) -> int:
        """The size of its shard, in bytes: only the row group knows an image's own."""
        return os.stat(self.files[self.rows[index, 0]]).st_size

    def take(self, indices: Sequence[int]) -> ParquetRows:
        """Those images alone."""
        return ParquetRows(self.files, self.rows[indices])


@functools.cache
def _opened(path: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None


@functools.lru_cache(maxsize=2)
def _group(path: str, group: int) -> Any:
    return _column(path, group, "image.bytes").field("bytes")


def _column(path: str, group: int, name: str) -> Any:
    """One column of a row group, of one chunk."""
    file = _opened(path)
    from pyarrow import ArrowException

    try:
        table = file.read_row_group(group, columns=[name], use_threads=False)
        return table.column(0).combine_chunks()
    except (OSError, ArrowException, KeyError, IndexError) as error:
        raise DataError(f"{path}, row group {group}: no column '{name}' can be read ({one_line(error)})") from None


def here(folder: Path) -> bool:
    """Whether shards of both splits lie in `folder`."""
    return os.path.isdir(folder) and all(any(folder.glob(name)) for name in NAMES.values())


def listing(folder: Path, split: str) -> Listing:
    """The images of a split by class and name, as in class folders. Raises DataError for other shards."""
    classes = sorted({name.split("/")[0] for name in _names(folder, "train")[0]})
    names, files, rows = _names(folder, split)
    order, labels = by_class(names, classes, folder)
    packed = ParquetRows(files, rows[order])
    paths = [f"{files[packed.rows[k, 0]]}/{names[i]}" for k, i in enumerate(order)]
    return Listing(paths, labels, tuple(classes), folder, packed=packed)


@functools.lru_cache(maxsize=2)
def _names(folder: Path, split: str) -> tuple[list[str], tuple[str, ...], np.ndarray]:
    """<wnid>/<name> of each image, the shards, and where it is in them, (N, 3)."""
    files, names, rows = tuple(str(path) for path in sorted(folder.glob(NAMES[split]))), [], []
    for number, file in enumerate(files):
        for group in range(_opened(file).num_row_groups):
            paths = _column(file, group, "image.path").field("path").to_pylist()
            names += [_class_and_name(file, name) for name in paths]
            rows += [(number, group, row) for row in range(len(paths))]
    return names, files, np.array(rows, dtype=np.int64).reshape(-1, 3)


def _class_and_name(file: str, name: str | None) -> str:
    """n01440764_10026_n01440764.JPEG -> n01440764/n01440764_10026.JPEG: the published name, and whose it is."""
    match = re.fullmatch(r"(?:.*/)?(.+)_(n\d+)(\.\w+)", name or "")
    if not match:
        raise DataError(f"{file}: expected names such as n01440764_10026_n01440764.JPEG, found {name!r}")
    return f"{match[2]}/{match[1]}{match[3]}"
