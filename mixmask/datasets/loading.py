"""Image files read by workers: random crops for training, central crops for testing."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mixmask.augment import CROP_TRIES, central_crop, crop_sides
from mixmask.config import Augment
from mixmask.datasets.base import DataError, Files
from mixmask.datasets.decoding import read_image
from mixmask.randomness import numpy_generator


def crop_box(view: Augment, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of one image: as `augment.sample_crop`, drawn from `rng`."""
    for _ in range(CROP_TRIES):
        h, w = map(round, crop_sides(view, height, width, rng.random(), rng.random(), math))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return central_crop(view.crop_ratio, height, width)


@dataclass(frozen=True)
class RandomCrops:
    """Reads image `index`: a random crop for each view, uint8 (3, size, size); boxes follow (seed, epoch, index)."""

    paths: np.ndarray
    seed: int
    epoch: int
    views: Sequence[Augment]

    def __getitem__(self, index: int) -> list[Tensor]:
        image = read_image(os.fsdecode(self.paths[index]))
        rng = numpy_generator(self.seed, "crops", self.epoch, index)
        return [random_crop(image, view, rng) for view in self.views]


def random_crop(image: Tensor, view: Augment, rng: np.random.Generator) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): the `crop` of the view's augmentation, as torchvision's."""
    box = crop_box(view, image.shape[1], image.shape[2], rng)
    mode = InterpolationMode(view.interpolation)
    return F.resized_crop(image, *box, [view.size, view.size], mode, antialias=True)


@dataclass(frozen=True)
class CentreCrop:
    """Reads image `index` for testing: shorter side to `resize` (0: kept), central crop, uint8 (3, size, size)."""

    paths: np.ndarray
    resize: int
    size: int
    interpolation: str

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(os.fsdecode(self.paths[index]))
        if self.resize:
            image = F.resize(image, [self.resize], InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(image, [self.size, self.size])


def loader(
    files: Files,
    batches: Iterable[Sequence[int]] | Tensor,
    seed: int,
    epoch: int,
    views: Sequence[Augment],
    workers: int = 8,
    pin_memory: bool = False,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Training batches: for each view random crops uint8 (N, 3, size, size), and indices int64 (N,).

    Of a view's augmentation only the crop is done here. `pin_memory`: in memory that is copied to a GPU beside its
    work. Raises DataError naming the file that cannot be read.
    """
    return _iterate(RandomCrops(_packed(files.paths), seed, epoch, tuple(views)), batches, workers, pin_memory)


def centre_loader(
    files: Files,
    batch_size: int,
    resize: int = 256,
    size: int = 224,
    interpolation: str = "bilinear",
    workers: int = 8,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Test batches in the order of the files: central crops uint8 (N, 3, size, size) and indices int64 (N,)."""
    batches = torch.arange(len(files)).split(batch_size)
    return _iterate(CentreCrop(_packed(files.paths), resize, size, interpolation), batches, workers, pin_memory)


def _packed(paths: Sequence[str]) -> np.ndarray:
    """Paths as one array of bytes: a list of a million strings would be copied, page by page, into every worker."""
    return np.array([os.fsencode(path) for path in paths])


@dataclass(frozen=True)
class _Reader:
    """A reader for DataLoader: a DataError travels as a value, since an exception would arrive as a traceback."""

    read: RandomCrops | CentreCrop

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], int] | DataError:
        try:
            return self.read[index], index
        except DataError as error:
            return error


def _collate(items: list) -> list | DataError:
    errors = [item for item in items if isinstance(item, DataError)]
    return errors[0] if errors else torch.utils.data.default_collate(items)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and SLURM signal every process of a job: a worker goes on until its training loop is done with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _iterate(
    read: RandomCrops | CentreCrop, batches: Iterable[Sequence[int]], workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    data = torch.utils.data.DataLoader(
        _Reader(read),
        batch_sampler=[torch.as_tensor(batch).tolist() for batch in batches],
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # of its own: the loader draws a number, which must not touch the run's state
    )
    for batch in data:
        if isinstance(batch, DataError):
            raise batch
        yield batch
