"""Barlow Twins: the cross-correlation of two views' outputs is to be the identity (Zbontar et al. 2021, Eq. 1 and 2).

Follows facebookresearch/barlowtwins; solo-learn multiplies the loss by `scale`. A mixture forms its pair with x2, as in
Un-Mix's core code. The loss is one of the whole batch: `whole_batch.py` says what the weights of its rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixmask.backbones import Encoder
from mixmask.config import within
from mixmask.frameworks import whole_batch
from mixmask.frameworks.base import Framework
from mixmask.frameworks.heads import projector
from mixmask.frameworks.whole_batch import Targets, all_rows, centred, clean_metrics, off_diagonal, shares
from mixmask.networks import feature_width

EPS = 1e-5  # BatchNorm's, which the published code normalises with


@dataclass(frozen=True)
class Settings:
    """The `barlow_twins:` section of a recipe."""

    dim: int = within(1)
    hidden: int = within(1)  # of the projector's first two layers
    off_diagonal: float = within(0)  # the weight lambda of Eq. 1
    scale: float = within(0)  # of the whole loss


class BarlowTwins(Framework):
    """`encoder`, whose head is the projector of three layers."""

    Settings = Settings

    def __init__(self, backbone: nn.Module, settings: Settings):
        super().__init__()
        self.settings = settings
        head = projector(feature_width(backbone), settings.hidden, settings.hidden, settings.dim)
        self.encoder = Encoder(backbone, head)

    def targets(self, x1: Tensor, x2: Tensor, generator: torch.Generator | None = None) -> Targets:
        """The second view x2 (N, C, H, W), which all pairs share; x1 is not needed."""
        return Targets(x2)

    def embed(self, batches: Sequence[Tensor], targets: Targets) -> list[tuple[Tensor]]:
        """Projections (N, dim) of each batch of images."""
        return whole_batch.embed(self.encoder, batches, targets)

    def loss(self, embedding: tuple[Tensor], targets: Targets, weight: Tensor | float, clean: bool) -> Tensor:
        """Eq. 1 of the pair of `embedding` and x2, times the mean weight; a scalar."""
        z, z2 = all_rows(embedding[0]), targets.z2
        if clean:
            targets.metrics = clean_metrics(z, z2)
        share, mean_weight = shares(weight, z)
        with torch.autocast(z.device.type, enabled=False):  # float32
            correlation = (share[:, None] * standardised(z, share)).T @ standardised(z2, share)  # (dim, dim), Eq. 2
            redundant = off_diagonal(correlation).pow(2).sum()
            invariant = (correlation.diagonal() - 1).pow(2).sum()
        return mean_weight * self.settings.scale * (invariant + self.settings.off_diagonal * redundant)


def standardised(z: Tensor, share: Tensor) -> Tensor:
    """z (N, D) with mean 0 and variance 1 in each column, each row weighted by its share (N,)."""
    z = centred(z, share)
    return z * torch.rsqrt(share @ z.pow(2) + EPS)
