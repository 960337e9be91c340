"""The library's interface: settings once, then anchors for each batch.

    mix = mixmask.MixMask(grid=4)
    anchors = mix(x1, generator)

A generator is torch's or NumPy's, or a list of them, one for each mix group (a part of the batch that draws its own
mask and pairs); without one torch's global generator is used, which torch.manual_seed sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mixmask import config, methods
from mixmask.config import ConfigError, Mask, Permutation, within
from mixmask.methods import Anchor

Generator = torch.Generator | np.random.Generator


@dataclass(frozen=True, kw_only=True)
class MixMask(Mask):
    """Eq. 1 to 3 and 6: the batch mixed along block or discrete masks of grid x grid cells; settings: `config.Mask`."""

    type: Literal["block", "discrete"] = "block"
    block_impl: Literal["repaired", "literal"] = "repaired"
    ratio: float | tuple[float, float] = within(0, 1, default=0.5, interval=True)
    switch: bool = True
    permutation: Permutation = "reverse"
    per_image: bool = False

    def __call__(self, x1: Tensor, generator: Generator | Sequence[Generator] | None = None) -> list[Anchor]:
        """Mixtures of normalised images (N, C, H, W) in normal order, weight lambda, and in the order of their
        fillings, weight 1 - lambda. Raises ConfigError for other inputs, a grid finer than the image, unequal groups.
        """
        return methods.mixmask(images(x1), self, generators(generator))


@dataclass(frozen=True)
class UnMix(config.UnMix):
    """Un-Mix (Shen et al. 2022): Mixup with probability `prob`, else CutMix, with the reversed batch."""

    prob: float = within(0, 1, default=0.5)

    def __call__(self, x1: Tensor, generator: Generator | Sequence[Generator] | None = None) -> list[Anchor]:
        """As `MixMask`'s."""
        return methods.unmix(images(x1), self, generators(generator))


@dataclass(frozen=True, kw_only=True)
class Erase(config.Erase):
    """The plain erase baseline (Figure 2, dashed box): cells of a mask become zero (the mean) or unit noise."""

    grid: int = field(metadata={"low": 2}, kw_only=False)
    fill: Literal["zero", "noise"] = "zero"
    ratio: float | tuple[float, float] = within(0, 1, default=0.5, interval=True)  # of the image, that stays
    type: Literal["block", "discrete"] = "block"

    def __call__(self, x1: Tensor, generator: Generator | Sequence[Generator] | None = None) -> list[Anchor]:
        """Normalised images (N, C, H, W) with cells erased, weight 1. Raises ConfigError as `MixMask`'s."""
        mask = MixMask(self.grid, ratio=self.ratio, type=self.type)
        return methods.erase(images(x1), mask, self, generators(generator))


def images(x1: Tensor) -> Tensor:
    """x1. Raises ConfigError unless it is (N, C, H, W), of floating-point numbers."""
    if not isinstance(x1, Tensor) or x1.ndim != 4 or not x1.is_floating_point():
        found = f"{x1.dtype} {tuple(x1.shape)}" if isinstance(x1, Tensor) else f"a {type(x1).__name__}"
        raise ConfigError(f"x1: expected normalised images (N, C, H, W), floating-point numbers; found {found}")
    return x1


def generators(given: Generator | Sequence[Generator] | None) -> list[np.random.Generator]:
    """A NumPy generator for each mix group; a torch one seeds each call. Raises ConfigError for anything else."""
    each = list(given) if isinstance(given, Sequence) else [given]
    return [_generator(generator) for generator in each]


def _generator(given: Generator | None) -> np.random.Generator:
    if isinstance(given, np.random.Generator):
        return given
    if given is not None and not isinstance(given, torch.Generator):
        what = f"{type(given).__module__}.{type(given).__name__}"
        raise ConfigError(f"generator: expected torch's or NumPy's, or a list of them; found a {what}")
    device = "cpu" if given is None else given.device
    seed = torch.randint(2**62, (), generator=given, device=device).item()
    return np.random.Generator(np.random.PCG64(seed))
