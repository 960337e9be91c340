"""BYOL: predict what a slowly moving target network makes of the other view (Grill et al. 2020, Eq. 2 and 3).

Recipe: Table 8, column 2; what it leaves open follows htdt/self-supervised (`methods/byol.py`). A mixture forms its
pair with x2, as in Un-Mix's core code, and goes through both networks: online(mixture) predicts target(x2), online(x2)
predicts target(mixture).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mixmask.backbones import Encoder
from mixmask.config import within
from mixmask.frameworks.base import Framework
from mixmask.frameworks.heads import cosine, mlp, spread
from mixmask.networks import feature_width
from mixmask.training.distributed import gather


@dataclass(frozen=True)
class Settings:
    """The `byol:` section of a recipe."""

    dim: int = within(1)
    hidden: int = within(1)  # of the head and of the predictor
    momentum: float = within(0, 1)  # of the target network, in the first iteration; 1 after the last
    symmetric_mixture: bool = True  # false: a mixture only predicts target(x2)


@dataclass
class Targets:
    """The second view, and what the clean pair showed. `embed` fills in its prediction and projection."""

    x2: Tensor  # (N, C, H, W)
    prediction: Tensor | None = None  # (N, dim) of x2, online network, with gradient
    projection: Tensor | None = None  # (N, dim) of x2, target network
    metrics: dict[str, Tensor] = field(default_factory=dict)


class BYOL(Framework):
    """The online network is `encoder` and `predictor`; `target_encoder` follows `encoder`."""

    Settings = Settings
    compiled = ("predicted", "loss")

    def __init__(self, backbone: nn.Module, settings: Settings):
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(backbone, mlp(feature_width(backbone), settings.hidden, settings.dim))
        self.predictor = mlp(settings.dim, settings.hidden, settings.dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def targets(self, x1: Tensor, x2: Tensor, generator: torch.Generator | None = None) -> Targets:
        """The second view x2 (N, C, H, W), which all pairs share; x1 is not needed."""
        return Targets(x2)

    def embed(self, batches: Sequence[Tensor], targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """Per batch of images the online prediction (N, dim), and the target network's projection (N, dim), which
        takes no gradient.

        The target network normalises by the batch, as the online one does: it stays in training mode.
        """
        views = [targets.x2, *batches]
        with torch.no_grad():
            projections = self.target_encoder.views(views)
        predictions = self.predicted(self.encoder.views(views))
        (targets.prediction, targets.projection), *embeddings = zip(predictions, projections, strict=True)
        return embeddings

    def predicted(self, projections: Sequence[Tensor]) -> list[Tensor]:
        """The prediction (N, dim) from each batch of projections (N, dim)."""
        return [self.predictor(z) for z in projections]

    def score(self, embedding: tuple[Tensor, Tensor], targets: Targets, clean: bool) -> Tensor:
        """2 - 2 cos in both directions, summed, per row (N,), in [0, 8]."""
        prediction, projection = embedding
        forward = 2 - 2 * cosine(prediction, targets.projection)
        if clean:
            targets.metrics = {
                "positive_similarity": 1 - forward.detach().mean() / 2,
                "output_spread": spread(gather(projection)),
            }
        elif not self.settings.symmetric_mixture:
            return forward
        return forward + 2 - 2 * cosine(targets.prediction, projection)

    @torch.no_grad()
    def after_step(self, targets: Targets, step: int, steps: int) -> None:
        """After the optimiser's step: target = tau * target + (1 - tau) * online, parameters only (BYOL, Eq. 1)."""
        tau = target_momentum(self.settings.momentum, step, steps)
        torch._foreach_lerp_(list(self.target_encoder.parameters()), list(self.encoder.parameters()), 1 - tau)


def target_momentum(base: float, step: int, steps: int) -> float:
    """From `base` at step 0 to 1 at `steps`, by half a cosine (Grill et al. 2020, Section 3.2).

    htdt/self-supervised holds it for an epoch: at 1000 epochs a difference below 2e-5.
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2
