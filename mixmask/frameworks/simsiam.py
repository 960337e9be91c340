"""SimSiam: predict the other view's projection, which takes no gradient (Chen and He 2021, Eq. 1 to 4).

Recipe: Table 8, column 3; what it leaves open follows PatrickHua/SimSiam, whose CIFAR values the column repeats.
A mixture forms its pair with x2, as in Un-Mix's core code, in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mixmask.backbones import Encoder
from mixmask.config import within
from mixmask.frameworks.base import Framework
from mixmask.frameworks.heads import BatchNorm, cosine, mlp, spread
from mixmask.networks import feature_width
from mixmask.training.distributed import gather


@dataclass(frozen=True)
class Settings:
    """The `simsiam:` section of a recipe."""

    dim: int = within(1)
    hidden: int = within(1)
    predictor_hidden: int = within(1)
    predictor_constant_lr: bool = True  # Chen and He, Section 4.2: the predictor's rate is not decayed
    symmetric_mixture: bool = True  # false: a mixture only predicts x2


@dataclass
class Targets:
    """The second view, and what the clean pair showed. `embed` fills in its prediction and projection."""

    x2: Tensor  # (N, C, H, W)
    prediction: Tensor | None = None  # (N, dim) of x2, with gradient
    projection: Tensor | None = None  # (N, dim) of x2, without
    metrics: dict[str, Tensor] = field(default_factory=dict)


class SimSiam(Framework):
    """`encoder` (its head is the projector, which ends in a BatchNorm) and `predictor`."""

    Settings = Settings
    compiled = ("predicted", "loss")

    def __init__(self, backbone: nn.Module, settings: Settings):
        super().__init__()
        self.settings = settings
        projector = mlp(feature_width(backbone), settings.hidden, settings.dim)
        self.encoder = Encoder(backbone, nn.Sequential(*projector, BatchNorm(settings.dim)))
        self.predictor = mlp(settings.dim, settings.predictor_hidden, settings.dim)

    def targets(self, x1: Tensor, x2: Tensor, generator: torch.Generator | None = None) -> Targets:
        """The second view x2 (N, C, H, W), which all pairs share; x1 is not needed."""
        return Targets(x2)

    def embed(self, batches: Sequence[Tensor], targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """Per batch of images the prediction p (N, dim), and the projection z (N, dim) with the gradient stopped."""
        outputs = self.encoder.views([targets.x2, *batches])
        (targets.prediction, targets.projection), *embeddings = self.predicted(outputs)
        return embeddings

    def predicted(self, projections: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per batch of projections z (N, dim) the prediction, and z with the gradient stopped."""
        return [(self.predictor(z), z.detach()) for z in projections]

    def score(self, embedding: tuple[Tensor, Tensor], targets: Targets, clean: bool) -> Tensor:
        """-(cos(p, z2) + cos(p2, z)) / 2 per row (N,), in [-1, 1]."""
        prediction, projection = embedding
        forward = -cosine(prediction, targets.projection)
        if clean:
            targets.metrics = {
                "positive_similarity": -forward.detach().mean(),
                "output_spread": spread(gather(projection)),
            }
        elif not self.settings.symmetric_mixture:
            return forward
        return (forward - cosine(targets.prediction, projection)) / 2

    def fixed_lr_parameters(self) -> list[nn.Parameter]:
        """The predictor's parameters keep the base rate, through warm-up too."""
        return list(self.predictor.parameters()) if self.settings.predictor_constant_lr else []
