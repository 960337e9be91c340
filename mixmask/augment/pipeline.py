"""From uint8 images to normalised views: the operations in their order, in chunks and threads or in one graph."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mixmask.augment.blur import gaussian_blur
from mixmask.augment.colour import HUE, colour_jitter, grayscale, normalise, solarize
from mixmask.augment.resampling import center_crop, flip, resized, resized_crop
from mixmask.augment.sampling import Parameters, draw, parameters_of
from mixmask.config import Augment
from mixmask.paths import compiler, few_operations

CPU_PIXELS = 256 * 32 * 32  # per chunk of images that run through all operations together, in a core's caches
# Freeing a block this large once makes glibc keep up to twice as much freed memory. Otherwise the system would map
# fresh pages for every intermediate result, which costs as much as computing it.
FREED = 31 * 2**20


@torch.no_grad()
def augment_view(
    augment: Augment, images: Tensor, generator: torch.Generator, batch_size: int = 0, rows: slice = slice(None)
) -> Tensor:
    """One random view: uint8 (N, 3, H, W) -> normalised float32 (N, 3, size, size).

    If `images` are only the `rows` of a batch of `batch_size`, they are augmented as within the whole batch.
    """
    return augment_views([augment], [images], generator, batch_size, rows)[0]


def augment_views(
    augments: Sequence[Augment],
    images: Sequence[Tensor],
    generator: torch.Generator,
    batch_size: int = 0,
    rows: slice = slice(None),
    compiled: bool = False,
) -> list[Tensor]:
    """`augment_view` of each pair in turn. Consecutive views with the same augmentation share every operation.

    `compiled`: everything but the random draws runs as one graph.
    """
    views: list[Tensor] = []
    transform = _compiled_transform(*compiler().values()) if compiled else transformed
    pairs = zip(augments, images, strict=True)
    for (augment, shape), alike in itertools.groupby(pairs, key=lambda pair: (pair[0], pair[1].shape)):
        pixels = [images for _, images in alike]
        draws = draw(augment, batch_size or shape[0], generator, pixels[0].device, len(pixels))
        together = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
        views += transform(augment, together, draws, rows).chunk(len(pixels))
    return views


@torch.no_grad()
def transformed(augment: Augment, images: Tensor, draws: Tensor, rows: slice) -> Tensor:
    """The views that `draws` decide, concatenated: uint8 (N, 3, H, W) -> normalised (N, 3, size, size)."""
    return apply(augment, images, parameters_of(augment, draws, *images.shape[2:], rows))


@functools.cache
def _compiled_transform(backend: str | Callable, dynamic: bool) -> Callable[..., Tensor]:
    return torch.compile(transformed, backend=backend, dynamic=dynamic, fullgraph=True)


@torch.no_grad()
def apply(augment: Augment, images: Tensor, parameters: Parameters) -> Tensor:
    """The view that `parameters` describe: uint8 (N, 3, H, W) -> normalised float32 (N, 3, size, size)."""
    if few_operations(images):
        return normalise(apply_operations(augment, images.float(), parameters), augment.mean, augment.std)
    shape = (augment.size, augment.size) if "crop" in augment.order else images.shape[2:]
    views = torch.empty(len(images), 3, *shape)
    torch.empty(FREED, dtype=torch.uint8)

    def compute(rows: slice) -> None:
        view = apply_operations(augment, images[rows].float(), parameters[rows])
        normalise(view, augment.mean, augment.std, out=views[rows])

    pixels = max(math.prod(shape), math.prod(images.shape[2:]))
    in_threads(compute, chunks(len(images), pixels, torch.get_num_threads()))
    return views


def chunks(n: int, pixels: int, threads: int) -> list[slice]:
    """Split n images of so many pixels into equal parts: at least one per thread, at most CPU_PIXELS pixels each."""
    size = max(1, min(CPU_PIXELS // pixels, math.ceil(n / threads)))
    return [slice(start, start + size) for start in range(0, n, size)]


def in_threads(compute: Callable[[slice], None], parts: list[slice]) -> None:
    """compute(part) for each part, on as many threads as torch uses.

    Each thread computes its parts alone: operations on a few hundred images are too short to be split.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1:
        for part in parts:
            compute(part)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(compute, parts))
    finally:
        torch.set_num_threads(threads)  # the default of threads to come


def apply_operations(augment: Augment, images: Tensor, parameters: Parameters) -> Tensor:
    """The operations of `apply`, of all images at once: (N, 3, H, W) -> (N, 3, size, size), float32 and 0..255."""
    p = parameters
    # A flip commutes with every operation but the crop; after the crop it is free: the weights are reversed.
    folded = "flip" in augment.order[augment.order.index("crop") :] if "crop" in augment.order else False
    operations = {
        "crop": lambda x: resized_crop(
            x, (p.top, p.left, p.height, p.width), augment.size, augment.interpolation, p.flip if folded else None
        ),
        "flip": lambda x: x if folded else flip(x, p.flip),
        "jitter": lambda x: colour_jitter(x, p.order, p.factors, p.jitter, augment.jitter[HUE] > 0),
        "grayscale": lambda x: grayscale(x, p.grayscale),
        "blur": lambda x: gaussian_blur(x, p.sigma, p.blur, augment.blur_sigma[1]),
        "solarize": lambda x: solarize(x, p.solarize),
    }
    for name in augment.order:
        images = operations[name](images)
    return images


def test_view(images: Tensor, size: int, resize: int | None, mean, std, interpolation: str = "bilinear") -> Tensor:
    """The test transform: uint8 (N, 3, H, W) -> Resize(shorter side) -> CenterCrop -> normalised float32.

    `resize=None` leaves the resolution as it is; images that already measure `size` are only normalised. Raises
    ConfigError where the crop is larger than the image.
    """
    images = images.float()
    height, width = images.shape[2:]
    if resize is not None and resize != min(height, width):
        landscape = height <= width
        shape = (resize, int(resize * width / height)) if landscape else (int(resize * height / width), resize)
        images = resized(images, shape, interpolation)
    return normalise(center_crop(images, size), mean, std)


test_view.__test__ = False  # not a test, whatever its name says to pytest
