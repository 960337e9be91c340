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

from mixmask.config import Finetune, KNNEval, Linear, Pretrain
from mixmask.datasets import cifar100, folder, imagenet, photos, tiny_imagenet
from mixmask.datasets.base import EXPECTED, DataError, Expected, Files, Listing, Resident, counts
from mixmask.datasets.sampling import batch_indices, subset

__all__ = ["EXPECTED", "LISTINGS", "READERS", "DataError", "Expected", "Files", "Listing", "Request", "Resident"]
__all__ += ["batch_indices", "counts", "list_split", "load", "load_split", "subset"]


@dataclass(frozen=True)
class Request:
    """What `load` was asked for; a reader takes of it what it uses."""

    root: Path
    split: str
    download: bool
    allow_partial: bool
    expected: Expected | None
    held_out: float


READERS: dict[str, Callable[[Request], Resident | Files]] = {
    "cifar100": lambda ask: cifar100.read(ask.root, ask.split, ask.expected, ask.download),
    "cifar100_reduced": lambda ask: cifar100.read_reduced(ask.root, ask.split, ask.expected, ask.download),
    "tiny_imagenet": lambda ask: tiny_imagenet.read(ask.root, ask.split, ask.expected, ask.allow_partial),
    "imagenet": lambda ask: imagenet.read(ask.root, ask.split, ask.expected, ask.allow_partial),
    "photos": lambda ask: photos.read(ask.split, ask.expected),
    "folder": lambda ask: folder.read(ask.root, ask.split, ask.held_out),
}
LISTINGS: dict[str, Callable[[Request], Listing]] = {  # of those that can be other images than the published ones
    "tiny_imagenet": lambda ask: tiny_imagenet.listing(ask.root, ask.split, ask.expected, ask.allow_partial),
    "imagenet": lambda ask: imagenet.listing(ask.root, ask.split, ask.expected, ask.allow_partial),
    "folder": lambda ask: folder.listing(ask.root, ask.split, ask.held_out),
}


def load(
    name: str,
    root: str | Path,
    split: str,
    download: bool = True,
    allow_partial: bool = False,
    expected: Expected | None = None,
    held_out: float = 0.1,
) -> Resident | Files:
    """The verified data set `name` (a key of READERS), split "train" or "test".

    `root` is the data set's own folder or the one that holds it; `photos` needs none. `download` fetches CIFAR-100
    into `root` where it is absent. `allow_partial` accepts missing classes and images of Tiny-ImageNet and ImageNet
    and says in `note` what is missing. `expected` replaces the counts of EXPECTED (for small trees in tests).
    `held_out`: the share of a `folder` without test images that is kept for testing. Raises DataError when anything
    differs from the published data set.
    """
    return READERS[name](_request(name, root, split, download, allow_partial, expected, held_out))


def load_split(config: Pretrain | KNNEval | Linear | Finetune, split: str) -> Resident | Files:
    """The split of the data set that a stage's config names."""
    options = (config.run.download, config.allow_partial_data)
    return load(config.dataset, config.run.data_root, split, *options, held_out=config.folder.held_out)


def list_split(config: Pretrain | KNNEval | Linear | Finetune, split: str) -> Listing:
    """The split's files before any is read, of a data set in LISTINGS."""
    name, options = config.dataset, (config.run.download, config.allow_partial_data, None, config.folder.held_out)
    return LISTINGS[name](_request(name, config.run.data_root, split, *options))


def _request(
    name: str,
    root: str | Path,
    split: str,
    download: bool,
    allow_partial: bool,
    expected: Expected | None,
    held_out: float,
) -> Request:
    if name not in READERS:
        raise DataError(f"dataset: unknown data set '{name}'; expected one of {', '.join(READERS)}")
    if split not in ("train", "test"):
        raise DataError(f"unknown split '{split}'; expected train or test")
    root = Path(root).expanduser()
    return Request(root, split, download, allow_partial, expected or EXPECTED.get(name), held_out)
