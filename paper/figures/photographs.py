"""Photographs that ship inside scikit-image's wheel, and what the training code makes of them. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps

from mixmask.config import Mask
from mixmask.formats import IMAGENET
from mixmask.masks import mixture_coefficient, sample_mask
from mixmask.methods import mixture, partners

SIDE = 224  # pixels, as on ImageNet
GRID = 8  # the captions of Figures 1 and 8
MEAN, STD = map(np.array, IMAGENET)
CENTRES = {"stereo_motorcycle": (0.62, 0.5), "rocket": (0.5, 0.9)}  # where the object is, if not in the middle


def photograph(name: str) -> np.ndarray:
    """A square of a bundled photograph, shrunk: float (224, 224, 3) in [0, 1]."""
    pixels = getattr(skimage.data, name)()
    image = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")
    centre = CENTRES.get(name, (0.5, 0.5))
    return np.asarray(ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC, centering=centre)) / 255


def recipe(kind: str = "block", grid: int = GRID, ratio: float = 0.5) -> Mask:
    """The masks of the figures."""
    return Mask(type=kind, block_impl="repaired", grid=grid, ratio=ratio)


def batch(photographs: Sequence[np.ndarray]) -> torch.Tensor:
    """N pictures (H, W, 3) -> normalised (N, 3, H, W), as an encoder gets them."""
    return torch.from_numpy((np.stack(photographs) - MEAN) / STD).permute(0, 3, 1, 2).float()


def pictures(images: torch.Tensor) -> np.ndarray:
    """Normalised (N, 3, H, W) -> N pictures (H, W, 3) in [0, 1]; zero is the mean colour, a grey."""
    return (images.permute(0, 2, 3, 1).numpy() * STD + MEAN).clip(0, 1)


def masked_pair(first: np.ndarray, second: np.ndarray, masks: Mask, seed: int):
    """The pixel mask (H, W), the mixture and the switch image of a pair of pictures (H, W, 3), and lambda."""
    mask = sample_mask(masks, SIDE, SIDE, np.random.default_rng(seed))  # (1, 1, H, W)
    anchor, _ = mixture("mixmask", batch([first, second]), mask, partners(2, [None], "reverse"))
    mixed, switched = pictures(anchor.images)
    return mask[0, 0].numpy(), mixed, switched, mixture_coefficient(mask).item()
