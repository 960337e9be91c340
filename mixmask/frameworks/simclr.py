"""SimCLR: each view of a pair finds the other among all views of the batch (Chen, Kornblith et al. 2020, Eq. 1).

Recipe: Table 8, column 2; what it leaves open follows htdt/self-supervised (`methods/contrastive.py`): a BatchNorm
behind the head, and head and BatchNorm over both views of a pair at once. A mixture forms its pair with x2, as in
Un-Mix's core code; its negatives are the other mixtures and the other second views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask.backbones import Encoder, views
from mixmask.config import within
from mixmask.frameworks.base import Framework
from mixmask.frameworks.heads import BatchNorm, cosine, mlp, spread, unit
from mixmask.networks import feature_width
from mixmask.training import distributed
from mixmask.training.distributed import gather, gather_with_gradient


@dataclass(frozen=True)
class Settings:
    """The `simclr:` section of a recipe."""

    dim: int = within(1)
    hidden: int = within(1)
    temperature: float = within(1e-6)


@dataclass
class Targets:
    """The second view, and what the clean pair showed."""

    x2: Tensor  # (N, C, H, W)
    features: Tensor | None = None  # (N, features) of x2, before the head, with gradient; `embed` fills it in
    metrics: dict[str, Tensor] = field(default_factory=dict)


class SimCLR(Framework):
    """`encoder.head` ends in a BatchNorm, so its output for a row depends on both halves of the pair."""

    Settings = Settings
    compiled = ("loss",)

    def __init__(self, backbone: nn.Module, settings: Settings):
        super().__init__()
        self.settings = settings
        head = mlp(feature_width(backbone), settings.hidden, settings.dim)
        self.encoder = Encoder(backbone, nn.Sequential(*head, BatchNorm(settings.dim)))

    def targets(self, x1: Tensor, x2: Tensor, generator: torch.Generator | None = None) -> Targets:
        """The second view x2 (N, C, H, W), which all pairs share; x1 is not needed."""
        return Targets(x2)

    def embed(self, batches: Sequence[Tensor], targets: Targets) -> list[tuple[Tensor]]:
        """Backbone features (N, features) of each batch of images: the head runs once for each pair, in `score`."""
        targets.features, *features = views(self.encoder.backbone, [targets.x2, *batches])
        return [(each,) for each in features]

    def score(self, embedding: tuple[Tensor], targets: Targets, clean: bool) -> Tensor:
        """NT-Xent of the pair of `embedding` and x2, per image (N,)."""
        z = self.encoder.head(torch.cat([embedding[0], targets.features]))  # (2N, dim)
        if clean:
            targets.metrics = {
                "positive_similarity": cosine(*z.detach().chunk(2)).mean(),
                "output_spread": spread(gather(z)),
            }
        z = unit(z)
        if distributed.size() == 1:
            return nt_xent(z, self.settings.temperature)
        everyones = torch.cat([gather_with_gradient(half) for half in z.chunk(2)])  # as in one process
        return nt_xent(everyones, self.settings.temperature)[distributed.local_slice(len(everyones) // 2)]


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Rows i and N + i of z (2N, dim), of unit length, are one pair; the 2N - 2 others are negatives of both.

    Mean of the pair's two cross-entropies, (N,): the mean over pairs is SimCLR's loss.
    """
    n = len(z) // 2
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):  # float32
        logits = (z @ z.T / temperature).masked_fill(itself, float("-inf"))  # (2N, 2N)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(logits, partner, reduction="none").view(2, n).mean(dim=0)
