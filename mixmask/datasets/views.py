"""From a data set to augmented views on the device, for training, and to plain test images, for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from mixmask.augment import augment_views, test_view
from mixmask.config import Augment, ConfigError, Execution
from mixmask.datasets import loading
from mixmask.datasets.base import Files, Resident
from mixmask.datasets.sampling import batch_indices
from mixmask.numerics import exact_device
from mixmask.randomness import torch_generator


def train_batches(
    dataset: Resident | Files,
    augment: Augment,
    batch_size: int,
    seed: int,
    epoch: int,
    views: int,
    device: torch.device,
    workers: int = 0,
    skip: int = 0,
    crops: Sequence[Augment] = (),
    rows: slice = slice(None),
    compiled: bool = False,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """One epoch of (views, indices): `views` tensors float (N, 3, S, S) on the device, indices int64 (N,).

    After them comes an extra view for each augmentation in `crops`, which leaves the first ones unchanged.
    Which images and how they are augmented follow from (seed, epoch, position) alone; `skip` batches are passed over.
    `rows`: those of each batch that this process holds; only they are read and augmented. `compiled`: in one graph.
    Raises ConfigError as `check_augment` does.
    """
    augments = [augment.of_view(view) for view in range(views)] + list(crops)
    for each in augments:
        check_augment(dataset, each)
    batches = batch_indices(len(dataset), batch_size, seed, epoch)
    start, place = epoch * len(batches), exact_device(device)
    here = batches[skip:, rows]
    if isinstance(dataset, Resident):  # the same uint8 images for each view: all happens on the device
        here = here.to(dataset.images.device)
        stream = (([dataset.images[indices]] * len(augments), indices) for indices in here)
    else:  # workers decode and crop; each view is a uint8 crop of its own
        stream = loading.loader(dataset, here, seed, epoch, augments, workers, pin_memory=device.type == "cuda")
        augments = [without_crop(augment) for augment in augments]
    for position, (images, indices) in enumerate(stream, start + skip):
        generator = torch_generator(place, seed, "augment", position)
        pixels = [view.to(place, non_blocking=True) for view in images]  # uint8 (N, 3, H, W) each
        augmented = augment_views(augments, pixels, generator, batch_size, rows, compiled)
        yield [view.to(device) for view in augmented], indices


def check_augment(dataset: Resident | Files, augment: Augment) -> None:
    """Raises ConfigError for an augmentation that cannot be done, in its order, to these images."""
    if isinstance(dataset, Files) and augment.order[:1] != ("crop",):
        given = ", ".join(augment.order) or "nothing"
        raise ConfigError(
            f"augment.order: workers crop image files as they read them; expected crop first, found {given}"
        )
    if isinstance(dataset, Resident) and "crop" not in augment.order:
        height, width = dataset.images.shape[2:]
        if (height, width) != (augment.size, augment.size):
            given = f"{augment.size}, but no crop resizes the images of {width}x{height} pixels"
            raise ConfigError(f"augment.size: {given}")


def without_crop(augment: Augment) -> Augment:
    """For images that are cropped already."""
    return dataclasses.replace(augment, order=tuple(name for name in augment.order if name != "crop"))


def test_batches(
    dataset: Resident | Files,
    augment: Augment,
    resize: int,
    device: torch.device,
    batch_size: int = Execution.eval_batch,
    workers: int = 0,
    first: int | None = None,
) -> Iterator[Tensor]:
    """The test images float (N, 3, S, S) in order: shorter side to `resize` (0: kept), centre crop, normalised."""
    place = exact_device(device)
    if isinstance(dataset, Files):
        sizes = (batch_size, resize, augment.size)
        stream = loading.centre_loader(dataset, *sizes, augment.interpolation, workers, device.type == "cuda")
        pixels = (images.to(place, non_blocking=True) for images, _ in stream)
        resize = 0
    else:
        pixels = (images.to(place) for images in dataset.images.split(batch_size))
    for images in islice(pixels, first):
        view = test_view(images, augment.size, resize or None, augment.mean, augment.std, augment.interpolation)
        yield view.to(device)


test_batches.__test__ = False  # not a test, whatever its name says to pytest
