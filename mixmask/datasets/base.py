"""What a data set is once it is read: images in memory or image files; what a complete one holds."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mixmask.config import UserError
from mixmask.registry import Dataset

Expected = Dataset  # what a complete data set holds


class DataError(UserError):
    """A data set is not what it should be; the text says what was found, where, what was expected, what to do."""


@dataclass(frozen=True)
class Resident:
    """A data set in memory: images uint8 (N, 3, H, W), labels int64 (N,). `note` says what is missing, if anything."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    note: str = ""

    def to(self, device: torch.device | str) -> Resident:
        """The same data set with images and labels on `device`."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: Tensor) -> Resident:
        """The images at `indices`, int64 (M,), in that order."""
        here = indices.to(self.labels.device)
        return dataclasses.replace(self, images=self.images[here], labels=self.labels[here])

    def __len__(self) -> int:
        return len(self.labels)


class Packed(Protocol):
    """Images that do not each have a file of their own, as in a tar archive."""

    def read(self, index: int) -> bytes:
        """The file of image `index`. Raises DataError where it cannot be read."""

    def size(self, index: int) -> int:
        """Its size in bytes."""

    def take(self, indices: Sequence[int]) -> Packed:
        """Those images alone."""


@dataclass(frozen=True)
class Files:
    """A data set of N image files, decoded by workers; labels int64 (N,). `note` says what is missing, if anything."""

    paths: Sequence[str]  # of an image in an archive: archive/class/name
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    note: str = ""
    upright: bool = False  # whether images are turned as EXIF says; not those of published sets, as in public code
    packed: Packed | None = None  # the archive that holds them

    def take(self, indices: Tensor) -> Files:
        """The images at `indices`, int64 (M,), in that order."""
        places = indices.tolist()
        packed = self.packed and self.packed.take(places)
        paths = [self.paths[i] for i in places]
        return dataclasses.replace(self, paths=paths, labels=self.labels[indices.to(self.labels.device)], packed=packed)

    def __len__(self) -> int:
        return len(self.labels)


def counts(dataset: Resident | Files) -> dict[str, int]:
    """How many images and classes it has, for a checkpoint: a run does not continue on other data."""
    return {"images": len(dataset), "classes": len(dataset.classes)}


@dataclass(frozen=True)
class Listing:
    """The images of a split before any is read: their files, labels int64 (N,), classes; the folder that holds them."""

    paths: Sequence[str]
    labels: Tensor
    classes: tuple[str, ...]  # none: unlabelled
    folder: Path
    note: str = ""
    packed: Packed | None = None

    def identity(self) -> str:
        """How many they are, and eight digits of the SHA-256 of their names and sizes. Raises DataError."""
        digest = hashlib.sha256()
        for index, path in enumerate(self.paths):
            size = file_size(path) if self.packed is None else self.packed.size(index)
            digest.update(os.fsencode(f"{path.removeprefix(str(self.folder))} {size}\n"))
        digest.update("\n".join(self.classes).encode(errors="surrogateescape"))
        return f"{len(self.paths):,} images in {len(self.classes)} classes, {digest.hexdigest()[:8]}"

    def __len__(self) -> int:
        return len(self.paths)


def file_size(path: str) -> int:
    """In bytes. Raises DataError for an image file that is not there."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise DataError(f"image file {path} is missing or unreadable: {error.strerror}") from None


def in_words(images: int, classes: Sequence[str]) -> str:
    """For a log: `1200 images, 10 classes`, or that they have no labels."""
    return f"{images} images, " + (f"{len(classes)} classes" if classes else "no labels")


def one_line(error: Exception) -> str:
    """An exception's text without its line breaks."""
    return " ".join(str(error).split())
