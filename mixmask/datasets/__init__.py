"""Data sets, each verified before anything else happens: `load` gives their uint8 images, one reader a file.

Small data sets (CIFAR-100, Tiny-ImageNet, the embedded `photos`) are held whole in memory (`Resident`); ImageNet-1K is
a list of files (`Files`) that workers decode (`loading`). `views` makes augmented batches of either. Whatever is drawn
at random is a pure function of the seed, the epoch and the image's index: neither a resumed run nor another number of
workers changes it.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from mixmask import registry
from mixmask.datasets.base import DataError, Expected, Files, Resident
from mixmask.datasets.sampling import batch_indices, subset

__all__ = ["DataError", "Expected", "Files", "Resident", "batch_indices", "load", "subset"]


def load(
    name: str,
    root: str | Path,
    split: str,
    download: bool = True,
    allow_partial: bool = False,
    expected: Expected | None = None,
) -> Resident | Files:
    """The verified data set `name` (of the registry), split "train" or "test".

    `root` is the data set's own folder or the one that holds it; `photos` needs none. `download` fetches CIFAR-100
    into `root` where it is absent. `allow_partial` accepts missing classes and images of Tiny-ImageNet and ImageNet
    and says in `note` what is missing. `expected` replaces the registry's counts (for small trees in tests).
    Raises DataError when anything differs from the published data set.
    """
    if name not in registry.DATASETS:
        raise DataError(f"dataset: unknown data set '{name}'; expected one of {', '.join(registry.DATASETS)}")
    if split not in ("train", "test"):
        raise DataError(f"unknown split '{split}'; expected train or test")
    expected = expected or registry.DATASETS[name]
    reader = registry.load(registry.DATASETS[name].code)
    given = {
        "root": Path(root).expanduser(),
        "split": split,
        "expected": expected,
        "download": download,
        "allow_partial": allow_partial,
    }
    return reader(**{key: given[key] for key in inspect.signature(reader).parameters})
