"""Pillow's GaussianBlur: three box blurs along rows, then three along columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from mixmask.augment.tensors import column, to_bytes, where_chosen

BOX_PASSES = 3


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
