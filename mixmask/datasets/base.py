"""What a data set is once it is read: images in memory or image files; what a complete one holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

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


def one_line(error: Exception) -> str:
    """An exception's text without its line breaks."""
    return " ".join(str(error).split())
