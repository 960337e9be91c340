"""What a data set is once it is read: images in memory or image files; what a complete one holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mixmask.config import UserError


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

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Files:
    """A data set of N image files, decoded by workers; labels int64 (N,). `note` says what is missing, if anything."""

    paths: list[str]
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Expected:
    """What a complete data set holds: classes, images in each split, the side of an image in pixels (0: any)."""

    classes: int
    train: int
    test: int
    side: int = 0

    def images(self, split: str) -> int:
        """Images in the split."""
        return self.train if split == "train" else self.test


EXPECTED = {
    "cifar100": Expected(100, 50_000, 10_000, 32),
    "cifar100_reduced": Expected(100, 10_000, 5_000, 32),
    "tiny_imagenet": Expected(200, 100_000, 10_000, 64),
    "imagenet": Expected(1000, 1_281_167, 50_000),
    "photos": Expected(16, 2_000, 800, 32),
}


def one_line(error: Exception) -> str:
    """An exception's text without its line breaks."""
    return " ".join(str(error).split())
