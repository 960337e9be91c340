"""Image files read by workers: random crops for training, central crops for testing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mixmask.augment import CROP_TRIES, central_crop, crop_sides
from mixmask.config import Augment
from mixmask.datasets.base import Files, Packed
from mixmask.datasets.decoding import decode, read_image
from mixmask.datasets.workers import in_workers
from mixmask.randomness import numpy_generator


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
    read = RandomCrops(ImageReader.of(files), seed, epoch, tuple(views))
    return in_workers(read, batches, workers, pin_memory, tensors=len(views) + 1)


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
    read = CentreCrop(ImageReader.of(files), resize, size, interpolation)
    return in_workers(read, batches, workers, pin_memory)


@dataclass(frozen=True)
class ImageReader:
    """Image `index` of a data set, decoded: uint8 (3, H, W)."""

    paths: (
        np.ndarray
    )  # as one array of bytes: a list of a million strings would be copied, page by page, by each worker
    upright: bool
    packed: Packed | None

    @classmethod
    def of(cls, files: Files) -> ImageReader:
        """The reader of `files`."""
        return cls(np.array([os.fsencode(path) for path in files.paths]), files.upright, files.packed)

    def name(self, index: int) -> str:
        """Where the image is, for people."""
        return os.fsdecode(self.paths[index])

    def __getitem__(self, index: int) -> Tensor:
        if self.packed is None:
            return read_image(self.name(index), self.upright)
        return decode(self.packed.read(index), self.name(index), self.upright)


@dataclass(frozen=True)
class RandomCrops:
    """Reads image `index`: a random crop for each view, uint8 (3, size, size); boxes follow (seed, epoch, index)."""

    images: ImageReader
    seed: int
    epoch: int
    views: Sequence[Augment]

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.images[index]
        rng = numpy_generator(self.seed, "crops", self.epoch, index)
        return [random_crop(image, view, rng) for view in self.views]

    def name(self, index: int) -> str:
        """Where the image is, for people."""
        return self.images.name(index)


def random_crop(image: Tensor, view: Augment, rng: np.random.Generator) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): the `crop` of the view's augmentation, as torchvision's."""
    box = crop_box(view, image.shape[1], image.shape[2], rng)
    mode = InterpolationMode(view.interpolation)
    return F.resized_crop(image, *box, [view.size, view.size], mode, antialias=True)


@dataclass(frozen=True)
class CentreCrop:
    """Reads image `index` for testing: shorter side to `resize` (0: kept), central crop, uint8 (3, size, size)."""

    images: ImageReader
    resize: int
    size: int
    interpolation: str

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]
        if self.resize:
            image = F.resize(image, [self.resize], InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(image, [self.size, self.size])

    def name(self, index: int) -> str:
        """Where the image is, for people."""
        return self.images.name(index)


def crop_box(view: Augment, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of one image: as `augment.sample_crop`, drawn from `rng`."""
    for _ in range(CROP_TRIES):
        h, w = map(round, crop_sides(view, height, width, rng.random(), rng.random(), math))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return central_crop(view.crop_ratio, height, width)
