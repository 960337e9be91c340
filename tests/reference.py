"""Naive references, written from the paper: loops over cells, pixels, rows and queue entries, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixmask import config
from mixmask.frameworks.moco import MoCo

ROOT = Path(__file__).parents[1]


def recipe(**overrides: Any) -> config.Pretrain:
    """The CIFAR-100 recipe, with overrides such as mask__grid=4."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return config.load(ROOT / "pretrain/configs/cifar100_moco.yaml", dotted)


class SmallNet(nn.Module):
    """Enough of a backbone for a loss to depend on all of a batch: convolution, BatchNorm, ReLU, pooling."""

    features = 6

    def __init__(self, channels: int = 3, norm: nn.Module | None = None):
        super().__init__()
        self.conv = nn.Conv2d(channels, self.features, 3)
        self.norm = norm or nn.BatchNorm2d(self.features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean(dim=(2, 3))


def views(n: int, seed: int, channels: int = 3, side: int = 8) -> tuple[Tensor, Tensor]:
    """Two views that resemble each other, (N, C, S, S), float64."""
    generator = torch.Generator().manual_seed(seed)
    x1, noise = torch.randn(2, n, channels, side, side, generator=generator, dtype=torch.float64)
    return x1, x1 + 0.3 * noise


# ----------------------------------------------------------------------------------------------------- masks


def place_blocks(grid: int, target: int, min_cells: int, rng: np.random.Generator) -> np.ndarray:
    """BEiT's algorithm, cell by cell; draws area, aspect, then (for a block that fits) top and left."""
    shown: set[tuple[int, int]] = set()
    attempts = 0
    while len(shown) < target and attempts < 10:
        attempts += 1
        budget = target - len(shown)
        area = min_cells * (1 - (u := rng.random())) + budget * u
        aspect = 0.3 ** (1 - 2 * rng.random())
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < grid and width < grid:
            top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
            block = {(int(top) + y, int(left) + x) for y in range(height) for x in range(width)}
            if 0 < len(block - shown) <= budget:
                shown |= block
                attempts = 0
    return np.array([[(y, x) in shown for x in range(grid)] for y in range(grid)])


# -------------------------------------------------------------------------------------------------- mixtures


def mix(x: Tensor, masks: Sequence[Tensor], partner: Sequence[int]) -> Tensor:
    """Eq. 1, pixel by pixel: x (N, C, H, W); masks: one (H, W) for each image."""
    mixed = torch.empty_like(x)
    for i, c, h, w in np.ndindex(*x.shape):
        m = float(masks[i][h, w])
        mixed[i, c, h, w] = m * x[i, c, h, w] + (1 - m) * x[partner[i], c, h, w]
    return mixed


def pixel_share(mask: Tensor) -> float:
    """Eq. 3, pixel by pixel."""
    height, width = mask.shape
    return sum(float(mask[h, w]) for h in range(height) for w in range(width)) / (height * width)


@dataclass
class Mixture:
    """Mixed (or erased) images, lambda of each image, and each image's partner (None: no switch term)."""

    images: Tensor
    lam: list[float]
    partner: list[int] | None


# ------------------------------------------------------------------------------------------------------ MoCo


def unit(rows: Tensor) -> Tensor:
    return torch.stack([row / row.pow(2).sum().sqrt() for row in rows])


def info_nce(q: Tensor, key: Tensor, queue: Sequence[Tensor], temperature: float) -> Tensor:
    """Eq. 5 for one query: a scalar, by the sum over the positive and each entry of the queue."""
    positive = torch.exp((q * key).sum() / temperature)
    negatives = sum(torch.exp((q * u).sum() / temperature) for u in queue)
    return -torch.log(positive / (positive + negatives))


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """SwAV's codes (n, K) of scores (n, K): every prototype gets n / K of the rows' weight, every row 1, in turn."""
    code = torch.exp(scores / epsilon)
    n, k = code.shape
    for _ in range(iterations):
        for j in range(k):
            code[:, j] = code[:, j] / sum(code[i, j] for i in range(n)) * n / k
        for i in range(n):
            code[i] = code[i] / sum(code[i, j] for j in range(k))
    return code


def moved(keys: nn.Module, queries: nn.Module, momentum: float) -> nn.Module:
    """A copy of the key encoder after theta_k <- m theta_k + (1 - m) theta_q, parameters only."""
    keys = copy.deepcopy(keys)
    with torch.no_grad():
        for k, q in zip(keys.parameters(), queries.parameters(), strict=True):
            k.copy_(momentum * k + (1 - momentum) * q)
    return keys


def moco_loss(
    moco: MoCo, encoder: nn.Module, x1: Tensor, x2: Tensor, mixtures: Sequence[Mixture], queue: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Eq. 4 to 6 for one iteration, and the keys it leaves for the queue, oldest first.

    `encoder` takes the place of `moco.encoder`. Without split BatchNorm, shuffling the keys changes nothing.
    """
    s = moco.settings
    n = len(x1)
    key_encoder = moved(moco.key_encoder, encoder, s.momentum)
    with torch.no_grad():
        k1, k2 = unit(key_encoder(x1)), unit(key_encoder(x2))

    def term(q: Tensor, i: int) -> Tensor:  # one mixture's query, the image that it stands for
        loss = info_nce(q, k2[i], queue, s.temperature)
        return loss + info_nce(q, k1[i], queue, s.temperature) if s.symmetric else loss

    q1 = unit(encoder(x1))
    loss = sum(info_nce(q1[i], k2[i], queue, s.temperature) for i in range(n)) / n
    if s.symmetric:
        q2 = unit(encoder(x2))
        loss = loss + sum(info_nce(q2[i], k1[i], queue, s.temperature) for i in range(n)) / n
    for mixture in mixtures:
        q = unit(encoder(mixture.images))
        for j in range(n):  # mixture j shows image j with weight lambda and its partner with 1 - lambda
            loss = loss + mixture.lam[j] * term(q[j], j) / n
            if mixture.partner is not None:
                loss = loss + (1 - mixture.lam[j]) * term(q[j], mixture.partner[j]) / n
    return loss, [*k1, *k2] if s.symmetric else [*k2]
