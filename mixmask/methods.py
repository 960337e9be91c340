"""Methods turn a batch into anchors: what is embedded, with which weight, in which row order (Eq. 1, 2, Algorithm 1).

Every mixture is `m * x + (1 - m) * x[partner]` with a weight map m in [0, 1]: a binary mask (MixMask, CutMix) or a
constant (Mixup). Its coefficient lambda is the mean of m (Eq. 3). The same mixed images, read in the order that undoes
the permutation, are the switch images of Eq. 2: they contain image i with weight 1 - lambda and cost no forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mixmask import registry
from mixmask.config import MSCN, Augment, ConfigError, Erase, Mask, Pretrain, UnMix, nearest
from mixmask.masks import mixture_coefficient, mscn_masks, sample_mask
from mixmask.training.distributed import gather_with_gradient

Rngs = Sequence[np.random.Generator]  # one for each mix group


@dataclass(frozen=True)
class Anchor:
    """One term of the objective. Anchors that hold the same `images` object share one forward pass."""

    name: str
    images: Tensor  # (N, C, H, W)
    weight: Tensor | float = 1.0  # scalar, or (N,): one per scored row
    order: Tensor | None = None  # (N,): row i is scored with the embedding of images[order[i]]; None: as they are
    everywhere: bool = False  # `order` counts the rows of all processes
    clean: bool = False  # x1 itself, which the framework scores in all its directions

    def rows(self, embedding: Tensor) -> Tensor:
        """The rows of a network's output for `images`, (N, ...), in the anchor's order; row i is about image i."""
        if self.order is None:
            return embedding
        return (gather_with_gradient(embedding) if self.everywhere else embedding)[self.order]


def vanilla(x1: Tensor) -> list[Anchor]:
    """The framework's own loss, of x1 (N, C, H, W), and nothing else (Eq. 5)."""
    return [Anchor("clean", x1, clean=True)]


def mixmask(x1: Tensor, mask: Mask, rngs: Rngs, permutation: str = "") -> list[Anchor]:
    """The two terms of Eq. 6 for x1 (N, C, H, W), normalised. One generator for each mix group: its mask and its pairs.

    `permutation` goes before the mask's own. Raises ConfigError for a grid finer than the image, and where N cannot be
    split into as many equal parts as there are generators.
    """
    masks = batch_masks(mask, x1, rngs)
    partner = partners(len(x1), rngs, permutation or mask.permutation)
    return mixture("mixmask", x1, masks, partner, switch=mask.switch)


def unmix(x1: Tensor, settings: UnMix, rngs: Rngs) -> list[Anchor]:
    """Un-Mix (Shen et al. 2022; Algorithm 1, lines 2-11): Mixup with probability `prob`, or CutMix; reversed batch.

    The two terms of x1 (N, C, H, W). One generator for each mix group. Raises ConfigError where N cannot be split so.
    """
    maps = torch.cat([unmix_map(settings.prob, *x1.shape[-2:], rng) for rng in rngs])  # (G, 1, H, W)
    return mixture("unmix", x1, maps, partners(len(x1), rngs, "reverse"))


def erase(x1: Tensor, mask: Mask, settings: Erase, rngs: Rngs) -> list[Anchor]:
    """The erase baseline (Figure 2, dashed box): removed cells become zero (the data set's mean) or unit noise.

    One term, of x1 (N, C, H, W), whose row i has weight 1. One generator for each mix group. Raises ConfigError for a
    grid finer than the image, and where N cannot be split into as many equal parts as there are generators.
    """
    keep = per_row(batch_masks(mask, x1, rngs).to(x1, non_blocking=True), len(x1))
    erased = keep * x1
    if settings.fill == "noise":
        erased = erased + (1 - keep) * noise(x1, rngs)
    return [Anchor("erase", erased)]


def mscn(x1: Tensor, crops: Sequence[Tensor], settings: MSCN, rngs: Rngs) -> list[Anchor]:
    """Our reconstruction of MSCN (Jing, Zhu, LeCun 2022): a masked x1, and masked extra crops (N, C, S, S) of their own
    size; noise fills what is removed. No lambda: the objective stays symmetric (Section 3.4)."""
    views = {"mscn": x1, **{f"mscn_crop{number}": crop for number, crop in enumerate(crops, 1)}}
    weight = 1 / len(views) if settings.mean else 1.0
    anchors = [Anchor(name, mscn_view(view, settings, rngs), weight) for name, view in views.items()]
    return (vanilla(x1) if settings.keep_clean else []) + anchors


def mscn_view(x: Tensor, settings: MSCN, rngs: Rngs) -> Tensor:
    """x (N, C, H, W), each image with a mask of its own, and noise where it is removed."""
    group = (len(x) // len(rngs), *x.shape[1:])
    keep = torch.cat([mscn_masks(settings, group, rng, x.device) for rng in rngs])
    return torch.where(keep, x, settings.noise * noise(x, rngs))


def extra_crops(recipe: Pretrain) -> list[Augment]:
    """The augmentation of each extra crop that the method takes: the views', except for size and share of the image."""
    crop = replace(recipe.augment.of_view(0), size=recipe.mscn.crop_size, crop_scale=recipe.mscn.crop_scale)
    return [crop] * recipe.mscn.crops if registry.METHODS[recipe.method].crops else []


def noise(x: Tensor, rngs: Rngs) -> Tensor:
    """Standard normal numbers of x's shape, each mix group's part from its own generator."""
    seeds = [int(rng.integers(2**62)) for rng in rngs]
    generators = [torch.Generator(x.device).manual_seed(seed) for seed in seeds]
    group = (len(x) // len(rngs), *x.shape[1:])
    return torch.cat([torch.randn(group, generator=g, device=x.device, dtype=x.dtype) for g in generators])


def group_size(n: int, rngs: Rngs) -> int:
    """Images in each mix group of a batch of n. Raises ConfigError where the groups would not be equal."""
    if not rngs or n % len(rngs):
        raise ConfigError(f"a batch of {n} images cannot be split into {len(rngs)} equal mix groups, one a generator")
    return n // len(rngs)


def batch_masks(mask: Mask, x1: Tensor, rngs: Rngs) -> Tensor:
    """One mask for each mix group, (G, 1, H, W), or for each image, (N, 1, H, W). Raises ConfigError as `mixmask`."""
    size = group_size(len(x1), rngs)
    each = size if mask.per_image else 1
    return torch.cat([sample_mask(mask, *x1.shape[-2:], rng) for rng in rngs for _ in range(each)])


def mixture(name: str, x1: Tensor, maps: Tensor, partner: Tensor, switch: bool = True) -> list[Anchor]:
    """Eq. 1 and 2: mixed images in normal order, weight lambda, and in reverse order, weight 1 - lambda.

    x1 (N, C, H, W); maps (G, 1, H, W), one for each of G equal parts of the batch; partner (N,) within the parts.
    """
    lam = mixture_coefficient(maps).repeat_interleave(len(x1) // len(maps))  # (N,) Eq. 3
    lam, maps = lam.to(x1, non_blocking=True), maps.to(x1, non_blocking=True)
    partner = partner.to(x1.device, non_blocking=True)
    m = per_row(maps, len(x1))
    mixed = m * x1 + (1 - m) * x1[partner]  # Eq. 1
    anchors = [Anchor(name, mixed, weight=lam)]
    if switch:
        inverse = torch.argsort(partner)  # mixture inverse[i] is the one whose filling is image i: Eq. 2
        anchors.append(Anchor(f"{name}_switch", mixed, weight=(1 - lam)[inverse], order=inverse))
    return anchors


def per_row(maps: Tensor, n: int) -> Tensor:
    """(G, 1, H, W) -> one map per image (N, 1, H, W); a single one is left to broadcast."""
    return maps if len(maps) == 1 else maps.repeat_interleave(n // len(maps), dim=0)


def partners(n: int, rngs: Rngs, permutation: str) -> Tensor:
    """The partner of each image, inside its mix group: n-1-i ("reverse"), or a random permutation. Long (N,).

    Raises ConfigError for an unknown permutation, and where n cannot be split into as many equal parts as generators.
    """
    size = group_size(n, rngs)
    if permutation not in PERMUTATIONS:
        raise ConfigError(f"permutation: unknown '{permutation}'{nearest(permutation, PERMUTATIONS)}")
    groups = [PERMUTATIONS[permutation](size, rng) for rng in rngs]
    return torch.from_numpy(np.concatenate([group + size * g for g, group in enumerate(groups)]))


def derangement(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation without fixed points, uniform over all of them: int (size,).

    Raises ConfigError for fewer than two: there is none.
    """
    if size < 2:
        raise ConfigError(f"derangement: expected mix groups of two images or more, found {size}")
    order = rng.permutation(size)
    while (order == np.arange(size)).any():
        order = rng.permutation(size)
    return order


PERMUTATIONS = {
    "reverse": lambda size, rng: np.arange(size)[::-1],
    "random": lambda size, rng: rng.permutation(size),
    "derangement": derangement,
}


def unmix_map(prob: float, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Algorithm 1, lines 3-11: lambda everywhere (Mixup), or 1 outside a box and 0 inside (CutMix). (1, 1, H, W)."""
    lam = rng.random()  # Beta(1, 1) is the uniform distribution
    if rng.random() < prob:
        return torch.full((1, 1, height, width), lam)
    top, bottom, left, right = cutmix_box(lam, height, width, rng)
    outside = torch.ones(1, 1, height, width)
    outside[..., top:bottom, left:right] = 0
    return outside


def cutmix_box(lam: float, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """CutMix's box: sides sqrt(1 - lambda), uniform centre, clipped. Pixels: (top, bottom, left, right)."""
    half_height, half_width = int(height * np.sqrt(1 - lam)) // 2, int(width * np.sqrt(1 - lam)) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return max(y - half_height, 0), min(y + half_height, height), max(x - half_width, 0), min(x + half_width, width)


# ------------------------------------------------------------------------- a recipe's method (mixmask/registry.py)


def of_vanilla(recipe: Pretrain, x1: Tensor, rngs: Rngs) -> list[Anchor]:
    """The clean pair alone."""
    return vanilla(x1)


def of_unmix(recipe: Pretrain, x1: Tensor, rngs: Rngs) -> list[Anchor]:
    """The clean pair and Un-Mix."""
    return vanilla(x1) + unmix(x1, recipe.unmix, rngs)


def of_mixmask(recipe: Pretrain, x1: Tensor, rngs: Rngs) -> list[Anchor]:
    """The clean pair and MixMask (Eq. 6)."""
    return vanilla(x1) + mixmask(x1, recipe.mask, rngs)


def of_both(recipe: Pretrain, x1: Tensor, rngs: Rngs) -> list[Anchor]:
    """The clean pair, Un-Mix and MixMask (Algorithm 1)."""
    return of_unmix(recipe, x1, rngs) + mixmask(x1, recipe.mask, rngs, recipe.both.permutation)


def of_erase(recipe: Pretrain, x1: Tensor, rngs: Rngs) -> list[Anchor]:
    """The clean pair and an erased view."""
    return vanilla(x1) + erase(x1, recipe.mask, recipe.erase, rngs)


def of_mscn(recipe: Pretrain, x1: Tensor, rngs: Rngs, *crops: Tensor) -> list[Anchor]:
    """Masked views; `crops`: the views that `extra_crops` asks for."""
    return mscn(x1, crops, recipe.mscn, rngs)


# Anchors of (recipe, x1, one generator for each mix group).
METHODS: dict[str, Callable[..., list[Anchor]]] = {
    name: globals()[method.function] for name, method in registry.METHODS.items()
}
