"""What a view draws: torchvision's parameters, one row per sample, from uniform numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mixmask.augment.tensors import constants
from mixmask.config import Augment

CROP_TRIES = 10
# The numbers that a sample draws: for crop, flip, jitter (whether, order, factors), grayscale, blur (whether, sigma).
DRAWS = ((CROP_TRIES, 4), (), (), (4,), (4,), (), (), ())


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

    def __getitem__(self, index: int | slice | Tensor) -> Parameters:
        return Parameters(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def sample(
    augment: Augment, n: int, height: int, width: int, generator: torch.Generator, device: torch.device
) -> Parameters:
    """Draw the parameters of n samples. Every call takes the same number of draws, whatever they are."""
    return parameters_of(augment, draw(augment, n, generator, device), height, width)


def draws_of(augment: Augment) -> list[tuple[int, ...]]:
    """The shape of what one sample draws for each parameter; solarization's only if it can occur."""
    return [*DRAWS, *([()] if "solarize" in augment.order else [])]


def draw(augment: Augment, n: int, generator: torch.Generator, device: torch.device, views: int = 1) -> Tensor:
    """Uniform numbers for several views of n samples, (views, numbers): each draws what it would draw alone."""
    return torch.rand(views, n * sum(map(math.prod, draws_of(augment))), generator=generator, device=device)


def parameters_of(augment: Augment, draws: Tensor, height: int, width: int, rows: slice = slice(None)) -> Parameters:
    """What `draw` decides for images of (height, width): these `rows` of each view, the views concatenated."""
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
