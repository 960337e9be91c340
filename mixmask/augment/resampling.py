"""Crops and resizing with Pillow's weights, as small matrix products; flips."""

from __future__ import annotations

import torch
from torch import Tensor

from mixmask.augment.tensors import column, to_bytes, whole_numbers
from mixmask.config import ConfigError


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen (N,) images left to right."""
    return torch.where(column(chosen), images.flip(-1), images)


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
