"""SwAV: each view predicts the other's code, its assignment to prototypes (Caron et al. 2020, Eq. 1 to 5).

Follows facebookresearch/swav, except that every batch of images has its own BatchNorm statistics: there, views of one
size share theirs. A mixture predicts the codes of the images that it shows, x2's; it is given none of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask import registry
from mixmask.backbones import Encoder
from mixmask.config import Augment, ConfigError, within
from mixmask.frameworks.base import Framework
from mixmask.frameworks.heads import cosine, projector, spread, unit
from mixmask.networks import feature_width
from mixmask.training.distributed import gather, local_slice


@dataclass(frozen=True)
class Settings:
    """The `swav:` section of a recipe."""

    dim: int = within(1)
    hidden: int = within(1)
    prototypes: int = within(1)
    temperature: float = within(1e-6)  # of predictions
    epsilon: float = within(1e-6)  # of codes: the weight of the entropy in Eq. 3
    sinkhorn: int = within(1)  # iterations
    frozen: int = within(0)  # iterations in which the prototypes take no gradient
    queue: int = within(0)  # outputs of each view that also shape the codes; 0: none
    queue_start: int = within(0, default=0)  # iteration from which on the queue is filled; it is used once it is full
    crops: int = within(0, default=0)  # multi-crop: smaller views that predict both codes and have none
    crop_size: int = within(1, default=registry.FRAMEWORKS["swav"].crop_size)  # their side, pixels
    crop_scale: tuple[float, float] = within(1e-3, 1, default=(0.05, 0.14), interval=True)
    mixture_codes: bool = False  # x2 also predicts a mixture's code, and the two losses are averaged


@dataclass
class Targets:
    """The second view, the extra crops, and what `embed` and the clean pair add."""

    x2: Tensor  # (N, C, H, W)
    crops: Sequence[Tensor]  # (N, C, S, S) each
    z: dict[int, Tensor] = field(default_factory=dict)  # outputs (N, dim) of views 0 and 1, for the queue
    scores: Tensor | None = None  # (N, prototypes) of x2, with gradient
    code: Tensor | None = None  # (N, prototypes) of x2, without
    crop_scores: list[Tensor] = field(default_factory=list)  # (N, prototypes) each
    metrics: dict[str, Tensor] = field(default_factory=dict)


class SwAV(Framework):
    """`encoder` and `prototypes`; `queue` (2, K, dim) holds earlier outputs of the views, the newest first."""

    Settings = Settings

    def __init__(self, backbone: nn.Module, settings: Settings):
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(backbone, projector(feature_width(backbone), settings.hidden, settings.dim, bias=True))
        self.prototypes = nn.Linear(settings.dim, settings.prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(2, settings.queue, settings.dim))
        self.step = 0  # the iteration under way

    def crops(self, augment: Augment) -> list[Augment]:
        """The augmentation of each crop of multi-crop. Raises ConfigError if no operation would crop them."""
        if self.settings.crops and "crop" not in augment.order:
            raise ConfigError("swav.crops: augment.order has no crop, which would cut them; expected swav.crops=0")
        crop = replace(augment.of_view(0), size=self.settings.crop_size, crop_scale=self.settings.crop_scale)
        return [crop] * self.settings.crops

    def before_step(self, step: int) -> None:
        """Take note of the iteration, which decides what is frozen and whether the queue is used."""
        self.step = step

    def targets(self, x1: Tensor, x2: Tensor, generator: torch.Generator | None = None, *crops: Tensor) -> Targets:
        """The second view (N, C, H, W) and the crops (N, C, S, S); the prototypes return to unit length first."""
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        return Targets(x2, crops)

    def embed(self, batches: Sequence[Tensor], targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """Per batch of images outputs (N, dim) of unit length, and their scores (N, prototypes)."""
        weight = self.prototypes.weight
        if self.step < self.settings.frozen:
            weight = weight.detach()
        outputs = [unit(output) for output in self.encoder.views([targets.x2, *batches, *targets.crops])]
        with torch.autocast(weight.device.type, enabled=False):  # float32
            (z2, targets.scores), *embeddings = [(z, F.linear(z, weight)) for z in outputs]
        targets.z[1], targets.code = z2.detach(), self.codes(targets.scores, view=1)
        targets.crop_scores = [scores for _, scores in embeddings[len(batches) :]]
        return embeddings[: len(batches)]

    def score(self, embedding: tuple[Tensor, Tensor], targets: Targets, clean: bool) -> Tensor:
        """Cross-entropy of predictions and codes (Eq. 2), per row (N,); its mean over all pairs where several are."""
        z, scores = embedding
        forward = self.cross_entropy(scores, targets.code)
        if not (clean or self.settings.mixture_codes):
            return forward
        code = self.codes(scores, view=0)
        both = forward + self.cross_entropy(targets.scores, code)
        if not clean:
            return both / 2
        targets.z[0] = z.detach()
        similarity = cosine(targets.z[0], targets.z[1]).mean()
        targets.metrics = {"positive_similarity": similarity, "output_spread": spread(gather(targets.z[0]))}
        for crop in targets.crop_scores:
            both = both + self.cross_entropy(crop, code) + self.cross_entropy(crop, targets.code)
        return both / (2 + 2 * len(targets.crop_scores))

    def cross_entropy(self, scores: Tensor, code: Tensor) -> Tensor:
        """Cross-entropy of softmax(scores / temperature) with a code, (N, prototypes) each; per row (N,)."""
        return -(code * F.log_softmax(scores / self.settings.temperature, dim=1)).sum(dim=1)

    @torch.no_grad()
    def codes(self, scores: Tensor, view: int) -> Tensor:
        """Codes (N, prototypes) of scores of that shape: balanced over the rows of all processes and the queue's."""
        s, rows = self.settings, gather(scores.detach())
        n = len(rows)
        with torch.autocast(scores.device.type, enabled=False):
            if s.queue and (self.step - s.queue_start) * n >= s.queue:
                rows = torch.cat((F.linear(self.queue[view], self.prototypes.weight), rows))
            return sinkhorn(rows, s.epsilon, s.sinkhorn)[-n:][local_slice(n)]

    @torch.no_grad()
    def after_step(self, targets: Targets, step: int, steps: int) -> None:
        """The outputs of all processes' views enter the queue, and the oldest leave it."""
        self.step = step + 1
        if self.settings.queue and step >= self.settings.queue_start:
            for view, z in targets.z.items():
                rows = torch.cat((gather(z).to(self.queue.dtype), self.queue[view]))
                self.queue[view] = rows[: self.settings.queue]


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes (N, K) of scores (N, K): each row sums to 1, each column nearly to N / K (Caron et al. 2020, Eq. 5)."""
    code = torch.exp(scores / epsilon)
    code = code / code.sum()
    for _ in range(iterations):
        code = code / code.sum(dim=0) / code.shape[1]
        code = code / code.sum(dim=1, keepdim=True) / len(code)
    return code * len(code)
