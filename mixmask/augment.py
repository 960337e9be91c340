"""Two-view augmentation in batches, on the device of the images, with parameters drawn per sample.

`sample` draws what torchvision's transforms would draw, `apply` computes what Pillow would compute: the same
weights, the same truncation to whole numbers after each operation. Images are (N, 3, H, W) with values 0..255, float32
holding whole numbers from the first operation to the last; a column is a per-sample number of shape (N, 1, 1, 1).
Sources: torchvision.transforms (v1) and Pillow, which all public recipes of the paper's baselines use.
"""

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mixmask.config import Augment, ConfigError
from mixmask.paths import compiler, few_operations

BRIGHTNESS, CONTRAST, SATURATION, HUE, NONE = range(5)
CROP_TRIES = 10
# The numbers that a sample draws: for crop, flip, jitter (whether, order, factors), grayscale, blur (whether, sigma).
DRAWS = ((CROP_TRIES, 4), (), (), (4,), (4,), (), (), ())
CPU_PIXELS = 256 * 32 * 32  # in a chunk: images that pass through all operations together, in the caches of a core
# glibc keeps as much freed memory as twice the largest block that was freed, up to 32 MiB. Otherwise every intermediate
# result would get its pages from the system anew, which costs as much as computing it.
FREED = 31 * 2**20
BOX_PASSES = 3


@dataclass(frozen=True)
class Parameters:
    """What one view of N images drew: a tensor of N rows for every parameter. Lengths are in pixels."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    jitter: Tensor
    order: Tensor  # (N, 4): which operation comes first, second, ...
    factors: Tensor  # (N, 4): of brightness, contrast, saturation, hue
    grayscale: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor

    def __getitem__(self, index: int | slice | Tensor) -> "Parameters":
        return Parameters(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


# ---------------------------------------------------------------------------------------------------- sampling


def sample(
    augment: Augment, n: int, height: int, width: int, generator: torch.Generator, device: torch.device
) -> Parameters:
    """Draw the parameters of n samples. Every call takes the same number of draws, whatever they are."""
    return parameters_of(augment, draw(augment, n, generator, device), height, width)


def draws_of(augment: Augment) -> list[tuple[int, ...]]:
    """The shape of what one sample draws for each parameter; that of solarization only where it may come."""
    return [*DRAWS, *([()] if "solarize" in augment.order else [])]


def draw(augment: Augment, n: int, generator: torch.Generator, device: torch.device, views: int = 1) -> Tensor:
    """Uniform numbers for several views of n samples, (views, numbers): each draws what it would draw alone."""
    return torch.rand(views, n * sum(map(math.prod, draws_of(augment))), generator=generator, device=device)


def parameters_of(augment: Augment, draws: Tensor, height: int, width: int, rows: slice = slice(None)) -> Parameters:
    """What `draw` decides, for images (height, width): of these `rows` of each view, one view behind the other."""
    shapes = draws_of(augment)
    n = draws.shape[1] // sum(map(math.prod, shapes))
    parts = draws.split([n * math.prod(shape) for shape in shapes], dim=1)
    crop, flip, jitter, order, factors, grayscale, blur, sigma, *solarize = (
        part.view(len(draws), n, *shape)[:, rows] for part, shape in zip(parts, shapes, strict=True)
    )
    top, left, crop_height, crop_width = sample_crop(augment, height, width, crop.flatten(0, 1))
    low, high = augment.blur_sigma
    decided = {
        "flip": flip < augment.flip_prob,
        "jitter": jitter < augment.jitter_prob,
        "order": order.argsort(dim=-1),
        "factors": sample_factors(augment.jitter, factors),
        "grayscale": grayscale < augment.grayscale_prob,
        "blur": blur < augment.blur_prob,
        "sigma": low + (high - low) * sigma,
        "solarize": solarize[0] < augment.solarize_prob if solarize else torch.zeros_like(flip, dtype=torch.bool),
    }
    box = {"top": top, "left": left, "height": crop_height, "width": crop_width}
    return Parameters(**box, **{name: values.flatten(0, 1) for name, values in decided.items()})


def sample_crop(augment: Augment, height: int, width: int, draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (top, left, height, width), each (N,), from uniform draws (N, tries, 4): the first try that fits the image.

    torchvision's RandomResizedCrop; if no try fits, the largest central crop with an admissible aspect ratio.
    """
    box_height, box_width = (s.round() for s in crop_sides(augment, height, width, draws[..., 0], draws[..., 1]))
    top = (draws[..., 2] * (height - box_height + 1)).floor()
    left = (draws[..., 3] * (width - box_width + 1)).floor()
    fits = (0 < box_height) & (box_height <= height) & (0 < box_width) & (box_width <= width)

    boxes = torch.stack([top, left, box_height, box_width], dim=-1)  # (N, tries, 4)
    first = fits.int().argmax(dim=1)[:, None, None].expand(-1, 1, 4)
    fallback = constants(central_crop(augment.crop_ratio, height, width), draws.device)
    boxes = torch.where(fits.any(dim=1)[:, None], boxes.gather(1, first)[:, 0], fallback)
    return boxes.long().unbind(dim=1)


def crop_sides(augment: Augment, height: int, width: int, area: Tensor, aspect: Tensor, maths=torch):
    """RandomResizedCrop's (height, width), not yet rounded, from two uniform draws: area, log aspect ratio.

    The draws are tensors of one shape, or floats with `maths` = math.
    """
    scale, (low, high) = augment.crop_scale, map(math.log, augment.crop_ratio)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = maths.exp(low + (high - low) * aspect)
    return maths.sqrt(area / aspect), maths.sqrt(area * aspect)


def central_crop(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """The largest central box (top, left, height, width) whose aspect ratio lies in `ratio`."""
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_height = round(width / aspect) if width / height < aspect else height
    box_width = round(height * aspect) if width / height > aspect else width
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def sample_factors(jitter: tuple[float, float, float, float], draws: Tensor) -> Tensor:
    """Factors (..., 4) from uniform draws (..., 4): 1 +- strength, at least 0; for hue +- strength of a turn."""
    *strengths, hue = jitter
    low = constants((*(max(0.0, 1.0 - strength) for strength in strengths), -hue), draws.device)
    high = constants((*(1.0 + strength for strength in strengths), hue), draws.device)
    return low + (high - low) * draws


# -------------------------------------------------------------------------------------------------- the pipeline


@torch.no_grad()
def augment_view(
    augment: Augment, images: Tensor, generator: torch.Generator, batch_size: int = 0, rows: slice = slice(None)
) -> Tensor:
    """One random view: uint8 (N, 3, H, W) -> normalised float32 (N, 3, size, size).

    Where `images` are only the `rows` of a batch of `batch_size`, they are changed as they are in the whole batch.
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
    """`augment_view` of each pair in turn. Views of one augmentation that follow each other share every operation.

    `compiled`: all of them but the draws in one graph.
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
    """The views, one behind the other, that `draws` decide: uint8 (N, 3, H, W) -> normalised (N, 3, size, size)."""
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
    """n images of so many pixels in equal parts: at least one for each thread, at most CPU_PIXELS pixels in one."""
    size = max(1, min(CPU_PIXELS // pixels, math.ceil(n / threads)))
    return [slice(start, start + size) for start in range(0, n, size)]


def in_threads(compute: Callable[[slice], None], parts: list[slice]) -> None:
    """compute(part) for each part, on as many threads as torch uses.

    Each thread computes its parts alone: operations on some hundred images are too short to be divided.
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
    # A flip commutes with every operation but the crop; behind the crop it costs nothing: its weights are reversed.
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


# ------------------------------------------------------------------------------------------------- the operations


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor | None = None) -> Tensor:
    """(N, 3, H, W) with values 0..255 -> (value / 255 - mean) / std, of each channel its own; same shape."""
    scale, shift = once(_scale_and_shift, tuple(mean), tuple(std), images.device)
    return torch.mul(images, scale, out=out).sub_(shift)


def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (_tensor(values, device)[:, None, None] for values in (mean, std))
    return 1 / (255 * std), mean / std


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen (N,) images left to right."""
    return torch.where(column(chosen), images.flip(-1), images)


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    """Invert the values from 128 up of the chosen (N,) images, as Pillow's `ImageOps.solarize`."""
    return torch.where(column(chosen) & (images >= 128), 255 - images, images)


def resized_crop(images: Tensor, box, size: int, interpolation: str = "bilinear", flipped: Tensor | None = None):
    """Crop (top, left, height, width), each (N,), and resize to (N, 3, size, size); mirror where flipped (N,).

    Two passes, each a small matrix per sample, with whole numbers in between, as in Pillow.
    """
    top, left, height, width = box
    weights = enlarging_weights if enlarges_exactly(images.shape[2:], size, interpolation) else resize_weights
    if images.shape[2] == images.shape[3]:  # rows and columns at once
        both = None if flipped is None else torch.cat((torch.zeros_like(flipped), flipped))
        ends = torch.cat((top, left)), torch.cat((height, width))
        rows, columns = weights(*ends, images.shape[2], size, interpolation, both).chunk(2)
    else:
        rows = weights(top, height, images.shape[2], size, interpolation)  # (N, size, H)
        columns = weights(left, width, images.shape[3], size, interpolation, flipped)  # (N, size, W)
    return two_passes(images, rows, columns, (height, width))


def two_passes(images: Tensor, rows: Tensor, columns: Tensor, extent: tuple[Tensor, Tensor]) -> Tensor:
    """rows @ images @ columns^T, rounded after each product.

    rows: (N, h, H), columns: (N, w, W), images: (N, 3, H, W) -> (N, 3, h, w). Computed in the dtype of the weights.
    `extent`: height and width, (N,) each, of what is resized; they decide which product comes first.
    """
    images, rows, columns = images.to(rows.dtype), rows[:, None], columns.transpose(1, 2)
    resized = to_bytes(rows @ to_bytes(times_columns(images, columns)))
    if images.shape[2] > rows.shape[2]:  # else no height shrinks
        first = column(rows_first(*extent, rows.shape[2], columns.shape[2]))
        resized = torch.where(first, to_bytes(times_columns(to_bytes(rows @ images), columns)), resized)
    return resized.float()


def times_columns(images: Tensor, columns: Tensor) -> Tensor:
    """(N, 3, H, W) @ (N, W, w) -> (N, 3, H, w): one product for the three channels."""
    return (images.flatten(1, 2) @ columns).unflatten(1, images.shape[1:3])


def rows_first(height: Tensor, width: Tensor, new_height: int, new_width: int) -> Tensor:
    """Bool (N,): where Pillow (13 and later) resizes the height (N,) first, before the width (N,).

    It does so where the height loses more than twice what the width loses.
    """
    return (height > new_height) & (height - new_height > 2 * (width - new_width))


def resize_weights(
    start: Tensor, length: Tensor, extent: int, size: int, interpolation: str, flipped: Tensor | None = None
) -> Tensor:
    """(N, size, extent): how each of `size` output pixels weighs the pixels start ... start + length - 1.

    Pillow's resampling: the filter is widened when shrinking (antialias), cut off at the ends of the crop and
    normalised to sum 1. In float64, and rounded to Pillow's 22 bits: every product is then exact, ties included.
    """
    start, length = start[:, None, None].double(), length[:, None, None].double()
    pixel = torch.arange(extent, device=start.device) - start  # (N, 1, extent)
    output = output_pixels(size, flipped, start)[:, :, None]  # (N or 1, size, 1)
    distance = ((2 * pixel + 1) * size - (2 * output + 1) * length).abs_()
    weights = FILTERS[interpolation](distance.div_(2 * length.clamp(min=size)))
    weights.mul_((0 <= pixel) & (pixel < length))
    return weights.mul_(2**22 / weights.sum(dim=2, keepdim=True)).round_().div_(2**22)


def enlarging_weights(
    start: Tensor, length: Tensor, extent: int, size: int, interpolation: str, flipped: Tensor | None = None
) -> Tensor:
    """`resize_weights` where `enlarges_exactly`: an output pixel lies between two of the crop. In float32."""
    start, length = start[:, None].float(), length[:, None].float()
    centres = (output_pixels(size, flipped, start) + 0.5).div_(size)  # as shares of the crop
    position = (centres * length).sub_(0.5).clamp_(min=0)
    position = torch.minimum(position, length - 1).add_(start)  # (N, size)
    return triangle((whole_numbers(extent, start.device) - position[:, :, None]).abs_())


def enlarges_exactly(shape: tuple[int, int], size: int, interpolation: str) -> bool:
    """Whether the weights of any crop of an image of `shape` = (height, width) are multiples of 1/256.

    They and bytes have 8 bits then: products are exact even where a device multiplies float32 as TF32 or bfloat16.
    """
    return interpolation == "bilinear" and max(shape) <= size and size in (2, 4, 8, 16, 32, 64, 128)


def output_pixels(size: int, flipped: Tensor | None, like: Tensor) -> Tensor:
    """0 ... size - 1 as (1, size) in the dtype of `like`; or (N, size), in reverse where flipped (N,)."""
    pixels = whole_numbers(size, like.device).to(like.dtype)[None]
    return pixels if flipped is None else torch.where(flipped[:, None], size - 1 - pixels, pixels)


def triangle(distance: Tensor) -> Tensor:
    """Bilinear: the weight at each distance from 0 up, which is 0 from distance 1 on; any shape."""
    return (1 - distance).clamp_(min=0)


def cubic(distance: Tensor) -> Tensor:
    """Bicubic with a = -0.5 (Keys 1981): the weight at each distance from 0 up, 0 from 2 on; any shape."""
    x = distance
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


FILTERS = {"bilinear": triangle, "bicubic": cubic}


def resized(images: Tensor, shape: tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """Resize whole images to `shape` = (height, width), with antialias. (N, 3, H, W) -> (N, 3, height, width)."""
    height, width = torch.tensor(images.shape[2:], device=images.device)[:, None]
    rows = resize_weights(0 * height, height, images.shape[2], shape[0], interpolation)
    columns = resize_weights(0 * width, width, images.shape[3], shape[1], interpolation)
    return two_passes(images, rows, columns, (height, width))


def center_crop(images: Tensor, size: int) -> Tensor:
    """The central pixels: (N, 3, H, W) -> (N, 3, size, size). Raises ConfigError where there are fewer."""
    if size > min(images.shape[2:]):
        raise ConfigError(f"size: a crop of {size} pixels does not fit images of {tuple(images.shape[2:])} pixels")
    top, left = (round((extent - size) / 2) for extent in images.shape[2:])
    return images[..., top : top + size, left : left + size]


def colour_jitter(images: Tensor, order: Tensor, factors: Tensor, chosen: Tensor, with_hue: bool = True) -> Tensor:
    """Brightness, contrast, saturation and hue by factors (N, 4), in each image's own order (N, 4), where chosen (N,).

    Slot by slot: on a CPU each image has its own operation, elsewhere every image has all and keeps one.
    """
    for_all = jitter_by_selection if few_operations(images) else jitter_by_group
    return for_all(images, order, factors, chosen, with_hue)


def jitter_by_group(images: Tensor, order: Tensor, factors: Tensor, chosen: Tensor, with_hue: bool) -> Tensor:
    """`colour_jitter` for a CPU: each slot sorts the images by their operation, and each group has only its own."""
    adjust = [adjust_brightness_, adjust_contrast_, adjust_saturation_] + [adjust_hue_] * with_hue
    row = torch.arange(len(images))  # of each image, as they are sorted at present
    for operation in torch.where(chosen[:, None], order, NONE).unbind(dim=1):
        image = operation.argsort()  # of each row, as they are sorted from here on
        images, row = images.index_select(0, row[image]), image.argsort()
        sizes = operation.bincount(minlength=NONE + 1).tolist()
        groups = zip(images.split(sizes), factors[image].split(sizes), strict=True)
        for i, (adjust_, (group, factor)) in enumerate(zip(adjust, groups, strict=False)):
            adjust_(group, factor[:, i])
    return images.index_select(0, row)


def jitter_by_selection(images: Tensor, order: Tensor, factors: Tensor, chosen: Tensor, with_hue: bool) -> Tensor:
    """`colour_jitter` without a wait for the device: every image passes through every step.

    Hue takes the most operations, so all images have it at once: before it come the blends that precede it in an
    image's own order, behind it those that follow. A blend of factor 1 leaves an image as it is.
    """
    images, hue = images.clone(), order == HUE
    slots, turns = [slice(0, 4)], [~hue]
    if with_hue:
        passed = hue.cumsum(dim=1)  # (N, 4): 1 from hue's slot on
        slots, turns = [slice(0, 3), slice(1, 4)], [passed == 0, passed > hue]
    operation, own = torch.cat([order[:, s] for s in slots], 1), factors.gather(1, order)
    turn = torch.cat([turn[:, s] for turn, s in zip(turns, slots, strict=True)], 1) & chosen[:, None]
    factor = torch.where(turn, torch.cat([own[:, s] for s in slots], 1), 1.0)
    steps = zip(
        (operation != BRIGHTNESS).float().unbind(1), (operation == CONTRAST).unbind(1), factor.unbind(1), strict=True
    )
    for number, step in enumerate(steps):
        if with_hue and number == 3:
            changed = adjust_hue_(images, factors[:, HUE], out=torch.empty_like(images))
            images = torch.where(column(chosen), changed, images)
        blend_by_selection_(images, *step)
    return images


def blend_by_selection_(images: Tensor, with_grey: Tensor, with_mean: Tensor, factor: Tensor) -> None:
    """`blend_` with black where `with_grey` is 0, with the mean grey where `with_mean`, else with the grey image."""
    grey, weight = luminance(images), column(with_grey)
    other = torch.where(column(with_mean), mean_grey(grey), grey)
    images.addcmul_(other, weight, value=-1).mul_(column(factor)).addcmul_(other, weight)  # weights 0 and 1: exact
    images.clamp_(0, 255).floor_()


def blend_(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend, in place: other + factor * (images - other), clipped to 0..255 and cut to whole numbers."""
    return images.sub_(other).mul_(column(factor)).add_(other).clamp_(0, 255).floor_()


def adjust_brightness_(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black, by factor (N,), in place: (N, 3, H, W), 0..255; as torchvision's, on Pillow."""
    return images.mul_(column(factor)).clamp_(0, 255).floor_()


def adjust_contrast_(images: Tensor, factor: Tensor) -> Tensor:
    """The same with the mean grey of each image."""
    return blend_(images, mean_grey(luminance(images)), factor)


def adjust_saturation_(images: Tensor, factor: Tensor) -> Tensor:
    """The same with the grey image."""
    return blend_(images, luminance(images), factor)


def grayscale(images: Tensor, chosen: Tensor) -> Tensor:
    """Grey in three equal channels, where chosen (N,)."""
    return where_chosen(lambda x: luminance(x).expand_as(x), images, chosen)


def luminance(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma with Pillow's 16-bit weights, rounded: (N, 1, H, W). Exact in float32."""
    red, green, blue = images.split(1, dim=1)
    grey = torch.add(constants((0.5,), images.device), red, alpha=19595 / 65536)
    return grey.add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536).floor_()


def mean_grey(grey: Tensor) -> Tensor:
    """Rounded mean of grey images (N, 1, H, W): (N, 1, 1, 1)."""
    return grey.mean(dim=(2, 3), keepdim=True).add_(0.5).floor_()


def adjust_hue_(images: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """Shift hues by factor (N,) of a turn in Pillow's HSV, in place or into `out`.

    Hue is a byte there: shifts wrap at 256.
    """
    hue, saturation, value = rgb_to_hsv(images)
    shift = (factor * 255).int().to(torch.uint8)[:, None, None]
    return hsv_to_rgb((hue.to(torch.uint8) + shift).float(), saturation, value, images if out is None else out)


def rgb_to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, saturation and value, each (N, H, W) in whole numbers 0..255, cut off as Pillow does.

    Hue in sixths of a turn is |sector + (largest - middle) / chroma|, where the order of the channels has a sector: -1
    for rgb, 1 for grb, -3 for gbr, 3 for bgr, -5 for brg; rbg is the mirror image of rgb. The roundings are Pillow's.
    Greys (saturation 0) get some hue, without effect.
    """
    red, green, blue = images.unbind(dim=1)
    more, less = torch.maximum(green, blue), torch.minimum(green, blue)
    value, least, middle = torch.maximum(red, more), torch.minimum(red, less), torch.minimum(red, more)
    chroma = value - least
    rest = (value - torch.maximum(middle, less)).div_(chroma.clamp(min=1))

    swapped, not_first, last = is_less(green, blue), is_less(red, more), is_less(red, less)  # the latter two: red
    turned = swapped * not_first
    sector = last.mul(12).sub_(6).mul_(turned).add_(not_first, alpha=2).sub_(last, alpha=4).sub_(1)
    turn = rest.add_(sector).abs_().div_(6).sub_(swapped.sub_(turned)).abs_()
    return turn.mul_(255).floor_(), chroma.div_(value.clamp(min=1)).mul_(255).floor_(), value


def is_less(a: Tensor, b: Tensor) -> Tensor:
    """1 where a < b, otherwise 0, as numbers: many times faster than bools on a CPU."""
    return torch.lt(a, b, out=torch.empty_like(a))


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """(N, H, W) each, 0..255 -> images (N, 3, H, W): value * (1 - saturation * distance from the channel's sector)."""
    centre, sign, add = (constants(n, out.device)[:, None, None] for n in ((3, 2, 4), (-1, 1, 1), (2, -1, -1)))
    depth = value * saturation / -255
    torch.sub((hue * (6 / 255))[:, None], centre, out=out).abs_().mul_(sign).add_(add)
    return out.clamp_(0, 1).mul_(depth[:, None]).add_(value[:, None]).add_(0.5).floor_()


def gaussian_blur(images: Tensor, sigma: Tensor, chosen: Tensor, largest: float) -> Tensor:
    """Blur with standard deviation sigma (N,) <= largest, in pixels, where chosen (N,).

    Pillow's GaussianBlur: three box blurs along rows, then three along columns, whole numbers after each.
    """
    reach = int((math.sqrt(12 * largest**2 / BOX_PASSES + 1) - 1) / 2) + 1  # box_radius, without a tensor to read

    def blur(images: Tensor, sigma: Tensor) -> Tensor:
        weights = box_weights(sigma, reach)
        for _ in range(2):
            for _ in range(BOX_PASSES):
                images = box_blur(images, weights)
            images = images.transpose(2, 3)
        return images

    return where_chosen(blur, images, chosen, sigma)


def box_radius(sigma: Tensor) -> Tensor:
    """Radius, in pixels, of the box that blurs like a Gaussian of deviation `sigma` when applied three times.

    With a fraction; of sigma's shape (Gwosdek et al. 2011).
    """
    variance = sigma * sigma / BOX_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + rest / (6 * (variance - (whole + 1) ** 2))


def box_weights(sigma: Tensor, reach: int) -> Tensor:
    """Weight of the pixels at distance 0, 1, ..., reach, for boxes that blur by sigma (N,): (reach + 1, N).

    The outermost of a box counts in part; a box's own weights, both sides together, sum to 1.
    """
    radius = box_radius(sigma)
    distance = torch.arange(reach + 1, device=sigma.device)[:, None]
    return (radius + 1 - distance).clamp(0, 1) / (2 * radius + 1)


def box_blur(images: Tensor, weights: Tensor) -> Tensor:
    """One box blur along rows, (N, 3, H, W); the image continues with its edge pixels."""
    reach, width = len(weights) - 1, images.shape[3]
    padded = functional.pad(images, (reach, reach, 0, 0), mode="replicate")
    total = images * column(weights[0])
    for distance in range(1, reach + 1):
        before = padded[..., reach - distance : reach - distance + width]
        after = padded[..., reach + distance : reach + distance + width]
        total.add_((before + after).mul_(column(weights[distance])))
    return to_bytes(total)


def constants(values: Sequence[float], device: torch.device) -> Tensor:
    """The numbers as float32 on the device."""
    return once(_tensor, tuple(map(float, values)), device)


def whole_numbers(n: int, device: torch.device) -> Tensor:
    """0 ... n - 1 as float32 on the device."""
    return once(_tensor, range(n), device)


def once(make: Callable, *arguments: Hashable) -> Any:
    """make(*arguments), tensors that are only read: made once, for every copy to a GPU waits for it."""
    return make(*arguments) if torch.compiler.is_compiling() else _kept(make, *arguments)


_kept = functools.cache(lambda make, *arguments: make(*arguments))


def _tensor(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def where_chosen(operation, images: Tensor, chosen: Tensor, *parameters: Tensor) -> Tensor:
    """operation(images, *parameters) where chosen (N,); every parameter has N rows."""
    if few_operations(images):
        return torch.where(column(chosen), operation(images, *parameters), images)
    index = chosen.nonzero()[:, 0]
    changed = operation(*(values.index_select(0, index) for values in (images, *parameters)))
    return images.index_copy(0, index, changed)


def column(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)"""
    return values[:, None, None, None]


def to_bytes(images: Tensor) -> Tensor:
    """Rounded to whole numbers 0..255, halves up, in place; any shape."""
    return images.add_(0.5).floor_().clamp_(0, 255)
