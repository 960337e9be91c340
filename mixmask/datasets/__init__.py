"""Data sets, each verified before anything else happens: `load` gives their uint8 images, one reader a file.

Small data sets (CIFAR-100, Tiny-ImageNet, the embedded `photos`) are held whole in memory (`Resident`); ImageNet-1K is
a list of files (`Files`) that workers decode (`loading`). `views` makes augmented batches of either. Whatever is drawn
at random is a pure function of the seed, the epoch and the image's index: neither a resumed run nor another number of
workers changes it.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from mixmask import registry
from mixmask.config import Finetune, KNNEval, Linear, Pretrain
from mixmask.config.schema import Folder
from mixmask.datasets.base import DataError, Expected, Files, Listing, Resident, counts
from mixmask.datasets.sampling import batch_indices, subset

__all__ = ["DataError", "Expected", "Files", "Listing", "Resident", "batch_indices", "counts", "list_split", "load"]
__all__ += ["load_split", "subset"]


def load(
    name: str,
    root: str | Path,
    split: str,
    download: bool = True,
    allow_partial: bool = False,
    expected: Expected | None = None,
    held_out: float = Folder.held_out,
) -> Resident | Files:
    """The verified data set `name` (of the registry), split "train" or "test".

    `root` is the data set's own folder or the one that holds it; `photos` needs none. `download` fetches CIFAR-100
    into `root` where it is absent. `allow_partial` accepts missing classes and images of Tiny-ImageNet and ImageNet
    and says in `note` what is missing. `expected` replaces the registry's counts (for small trees in tests).
    `held_out`: the share of a `folder` without test images that is kept for testing. Raises DataError when anything
    differs from the published data set.
    """
    options = {"download": download, "allow_partial": allow_partial, "held_out": held_out}
    return _call("code", name, root, split, expected, options)


def load_split(config: Pretrain | KNNEval | Linear | Finetune, split: str) -> Resident | Files:
    """The split of the data set that a stage's config names."""
    return _call("code", config.dataset, config.run.data_root, split, None, _options(config))


def list_split(config: Pretrain | KNNEval | Linear | Finetune, split: str) -> Listing:
    """The split's files, before any is read, of a data set that may differ from the published images."""
    return _call("files", config.dataset, config.run.data_root, split, None, _options(config))


def _options(config: Pretrain | KNNEval | Linear | Finetune) -> dict[str, Any]:
    return {
        "download": config.run.download,
        "allow_partial": config.allow_partial_data,
        "held_out": config.folder.held_out,
    }


def _call(what: str, name: str, root: str | Path, split: str, expected: Expected | None, options: dict) -> Any:
    """Call a reader (`code`) or listing (`files`) of the registry with those arguments that it takes by name."""
    if name not in registry.DATASETS:
        raise DataError(f"dataset: unknown data set '{name}'; expected one of {', '.join(registry.DATASETS)}")
    if split not in ("train", "test"):
        raise DataError(f"unknown split '{split}'; expected train or test")
    spec = registry.DATASETS[name]
    function = registry.load(getattr(spec, what))
    given = {"root": Path(root).expanduser(), "split": split, "expected": expected or spec, **options}
    return function(**{key: given[key] for key in inspect.signature(function).parameters})
