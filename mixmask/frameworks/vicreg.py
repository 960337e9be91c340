"""VICReg: invariance of a pair, variance and covariance of a batch (Bardes, Ponce, LeCun 2022, Eq. 1 to 6).

Follows facebookresearch/vicreg; solo-learn sums the variance terms of both views, which the published code averages. A
mixture forms its pair with x2, as in Un-Mix's core code. The loss is one of the whole batch: `whole_batch.py` says what
the weights of its rows mean.
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

EPS = 1e-4  # under the root of the variance (Eq. 2)


@dataclass(frozen=True)
class Settings:
    """The `vicreg:` section of a recipe."""

    dim: int = within(1)
    hidden: int = within(1)  # of the expander's first two layers
    invariance: float = within(0)  # lambda of Eq. 6
    variance: float = within(0)  # mu of Eq. 6, of each view's term; the published code gives each half of its own
    covariance: float = within(0)  # nu of Eq. 6, of each view's term


class VICReg(Framework):
    """`encoder`, whose head is the expander of three layers."""

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
        """The expander's outputs (N, dim) for each batch of images."""
        return whole_batch.embed(self.encoder, batches, targets)

    def loss(self, embedding: tuple[Tensor], targets: Targets, weight: Tensor | float, clean: bool) -> Tensor:
        """Eq. 6 of the pair of `embedding` and x2, times the mean weight; a scalar."""
        s, z, z2 = self.settings, all_rows(embedding[0]), targets.z2
        if clean:
            targets.metrics = clean_metrics(z, z2)
        share, mean_weight = shares(weight, z)
        with torch.autocast(z.device.type, enabled=False):  # float32
            invariance = share @ (z - z2).pow(2).mean(dim=1)  # Eq. 5, per dimension
            of_each = [regularisers(view, share) for view in (z, z2)]
            variance, covariance = (sum(terms) for terms in zip(*of_each, strict=True))
        return mean_weight * (s.invariance * invariance + s.variance * variance + s.covariance * covariance)


def regularisers(z: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """For outputs (N, D), each row weighted by its share (N,), the hinge on standard deviation (Eq. 1), and the mean
    square covariance (Eq. 3 and 4); scalars.

    The covariance is the unbiased one of weighted rows, which divides by 1 - sum of share^2, for equal shares by
    (N - 1) / N, as `torch.cov(aweights=...)`.
    """
    z = centred(z, share)
    unbiased = share / (1 - share.pow(2).sum()).clamp(min=torch.finfo(z.dtype).eps)
    covariance = (unbiased[:, None] * z).T @ z  # (D, D)
    deviation = torch.sqrt(covariance.diagonal() + EPS)
    return torch.relu(1 - deviation).mean(), off_diagonal(covariance).pow(2).sum() / z.shape[1]
