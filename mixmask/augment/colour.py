"""Colours as Pillow computes them: jitter, grey, solarization; and the final normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from mixmask.augment.tensors import as_tensor, column, constants, once, where_chosen
from mixmask.paths import few_operations

BRIGHTNESS, CONTRAST, SATURATION, HUE, NONE = range(5)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor | None = None) -> Tensor:
    """(N, 3, H, W) with values 0..255 -> (value / 255 - mean) / std per channel; same shape."""
    scale, shift = once(_scale_and_shift, tuple(mean), tuple(std), images.device)
    return torch.mul(images, scale, out=out).sub_(shift)


def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (as_tensor(values, device)[:, None, None] for values in (mean, std))
    return 1 / (255 * std), mean / std


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    """Invert the values from 128 up of the chosen (N,) images, as Pillow's `ImageOps.solarize`."""
    return torch.where(column(chosen) & (images >= 128), 255 - images, images)


def colour_jitter(images: Tensor, order: Tensor, factors: Tensor, chosen: Tensor, with_hue: bool = True) -> Tensor:
    """Brightness, contrast, saturation and hue by factors (N, 4), in each image's own order (N, 4), where chosen (N,).

    Slot by slot: on a CPU each image runs its own operation; elsewhere every image runs all and keeps one.
    """
    for_all = jitter_by_selection if few_operations(images) else jitter_by_group
    return for_all(images, order, factors, chosen, with_hue)


def jitter_by_group(images: Tensor, order: Tensor, factors: Tensor, chosen: Tensor, with_hue: bool) -> Tensor:
    """`colour_jitter` for a CPU: each slot groups the images by operation, and runs only that one on each group."""
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
    """`colour_jitter` without synchronising with the device: every image passes through every step.

    Hue takes the most operations, so it runs once, on all images: after the blends that precede it in an image's own
    order, before those that follow. A blend of factor 1 leaves an image unchanged.
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

    Hue in sixths of a turn is |sector + (largest - middle) / chroma|, where the channel order gives the sector: -1
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
