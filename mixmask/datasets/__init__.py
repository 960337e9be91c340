"""Data sets, each verified before anything else happens: `load` gives their uint8 images, one reader a file.

Small data sets (CIFAR-100, Tiny-ImageNet, the embedded `photos`) are held whole in memory (`Resident`); ImageNet-1K is
a list of files (`Files`) that workers decode (`loading`). `views` makes augmented batches of either. Whatever is drawn
at random is a pure function of the seed, the epoch and the image's index: neither a resumed run nor another number of
workers changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixmask.datasets import cifar100, imagenet, photos, tiny_imagenet
from mixmask.datasets.base import EXPECTED, DataError, Expected, Files, Resident
from mixmask.datasets.sampling import batch_indices, subset

__all__ = ["EXPECTED", "READERS", "DataError", "Expected", "Files", "Request", "Resident", "batch_indices"]
__all__ += ["load", "subset"]


@dataclass(frozen=True)
class Request:
    """What `load` was asked for; a reader takes of it what it uses."""

    root: Path
    split: str
    download: bool
    allow_partial: bool
    expected: Expected


READERS: dict[str, Callable[[Request], Resident | Files]] = {
    "cifar100": lambda ask: cifar100.read(ask.root, ask.split, ask.expected, ask.download),
    "cifar100_reduced": lambda ask: cifar100.read_reduced(ask.root, ask.split, ask.expected, ask.download),
    "tiny_imagenet": lambda ask: tiny_imagenet.read(ask.root, ask.split, ask.expected, ask.allow_partial),
    "imagenet": lambda ask: imagenet.read(ask.root, ask.split, ask.expected, ask.allow_partial),
    "photos": lambda ask: photos.read(ask.split, ask.expected),
}


def load(
    name: str,
    root: str | Path,
    split: str,
    download: bool = True,
    allow_partial: bool = False,
    expected: Expected | None = None,
) -> Resident | Files:
    """The verified data set `name` (a key of READERS), split "train" or "test".

    `root` is the data set's own folder or the one that holds it; `photos` needs none. `download` fetches CIFAR-100
    into `root` where it is absent. `allow_partial` accepts missing classes and images of Tiny-ImageNet and ImageNet
    and says in `note` what is missing. `expected` replaces the counts of EXPECTED (for small trees in tests).
    Raises DataError when anything differs from the published data set.
    """
    if name not in READERS:
        raise DataError(f"dataset: unknown data set '{name}'; expected one of {', '.join(READERS)}")
    if split not in ("train", "test"):
        raise DataError(f"unknown split '{split}'; expected train or test")
    return READERS[name](Request(Path(root).expanduser(), split, download, allow_partial, expected or EXPECTED[name]))
