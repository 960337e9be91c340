"""MoCo v1 and v2: a queue of keys from a slowly moving encoder (He et al. 2020; Chen et al. 2020).

Paper: Eq. 5 and 6; recipes: Table 8, column 1 (v1, symmetric loss) and Table 9 (v2: MLP head, one direction).
In the symmetric form a mixture of x1 is scored against k2 and k1 and is never a key (as in Un-Mix's CIFAR code).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask.backbones import Encoder
from mixmask.config import ConfigError, within
from mixmask.frameworks.base import Framework
from mixmask.frameworks.heads import unit
from mixmask.networks import feature_width
from mixmask.training.distributed import gather, local_slice


@dataclass(frozen=True)
class Settings:
    """The `moco:` section of a recipe."""

    dim: int = within(1)
    queue: int = within(1)
    momentum: float = within(0, 1)
    temperature: float = within(1e-6)
    mlp: bool = False
    symmetric: bool = False
    shuffle_bn: bool = True
    own_view: bool = True  # symmetric: a mixture is scored against the key of x1 too, as in Un-Mix's CIFAR code


@dataclass
class Targets:
    """What one iteration's queries are scored against."""

    x1: Tensor  # (N, C, H, W)
    x2: Tensor  # (N, C, H, W)
    k2: Tensor  # (N, dim), unit length
    k1: Tensor | None  # (N, dim), unit length; None when the loss has one direction
    q2: tuple[Tensor, Tensor] | None = None  # the embedding of x2, where x1 is scored in both directions
    positive_similarity: Tensor | None = None  # mean cosine of q(x1) and k(x2)


class MoCo(Framework):
    """The query encoder is `encoder`; `queue` (K, dim) is a ring buffer, `pointer` the next row to be overwritten."""

    Settings = Settings
    compiled = ("with_negatives", "loss")

    def __init__(self, backbone: nn.Module, settings: Settings):
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(backbone, _head(feature_width(backbone), settings))
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(settings.queue, settings.dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def targets(self, x1: Tensor, x2: Tensor, generator: torch.Generator | None = None) -> Targets:
        """Views (N, C, H, W) -> keys (N, dim), without gradient; the key encoder moves first."""
        self.move_key_encoder()
        k2, *k1 = self.keys([x2, x1] if self.settings.symmetric else [x2], generator)
        return Targets(x1, x2, k2, *(k1 or [None]))

    def embed(self, batches: Sequence[Tensor], targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """Per batch of images (N, C, H, W) queries (N, dim) of unit length, and the log-sum-exp (N,) of their
        logits against the queue, in float32.

        The second depends on no target, so every direction and row order of a mixture shares it. Where x1 itself is
        scored in both directions, x2 is embedded right after it, into `targets.q2`.
        """
        views = list(batches)
        clean = [place for place, images in enumerate(views, 1) if images is targets.x1 and self.settings.symmetric]
        for place in clean:
            views.insert(place, targets.x2)
        embeddings = self.with_negatives(self.encoder.views(views))
        for place in clean:
            targets.q2 = embeddings.pop(place)
        return embeddings

    def with_negatives(self, outputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per batch of outputs queries q (N, dim), and the log-sum-exp (N,) of q.u / T over the queue's keys u: the
        negatives of Eq. 5."""
        queries = [unit(output) for output in outputs]
        with torch.autocast(queries[0].device.type, enabled=False):
            return [(q, torch.logsumexp(q @ self.queue.T / self.settings.temperature, dim=1)) for q in queries]

    def score(self, embedding: tuple[Tensor, Tensor], targets: Targets, clean: bool) -> Tensor:
        """Eq. 5 (a clean query) or one term of Eq. 6 (a mixture), per row (N,); summed over directions if symmetric."""
        loss = self.infonce(embedding, targets.k2)
        if clean:
            targets.positive_similarity = (embedding[0] * targets.k2).sum(dim=1).mean().detach()
        if self.settings.symmetric and (clean or self.settings.own_view):
            loss = loss + self.infonce(targets.q2 if clean else embedding, targets.k1)
        return loss

    def part(self, targets: Targets, rows: slice | Tensor) -> Targets:
        """The targets of some rows; the queue, which all rows share, is not among them."""
        k1 = None if targets.k1 is None else targets.k1[rows]
        return Targets(targets.x1[rows], targets.x2[rows], targets.k2[rows], k1)

    def joined(self, targets: Targets, parts: Sequence[Targets]) -> None:
        """The mean similarity."""
        similarities = [part.positive_similarity for part in parts if part.positive_similarity is not None]
        targets.positive_similarity = torch.stack(similarities).mean() if similarities else None

    def infonce(self, embedding: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        """-log of exp(q.k / T) over itself plus the sum over the queue of exp(q.u / T) (Eq. 5). (N,)"""
        q, negatives = embedding
        positive = (q * keys).sum(dim=1) / self.settings.temperature
        return torch.logaddexp(positive, negatives) - positive

    @torch.no_grad()
    def keys(self, views: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """Keys (N, dim) of unit length of each view (N, C, H, W). Rows are shuffled before the key encoder and put back
        after it, so that a key's BatchNorm group is not its query's (shuffle-BN, He et al. Section 3.3). Of several
        processes, each embeds its share of the shuffled rows of all of them."""
        if not self.settings.shuffle_bn:
            return [unit(output) for output in self.key_encoder.views(views)]
        views = [gather(view) for view in views]
        own = local_slice(len(views[0]))
        orders = [torch.randperm(len(view), generator=generator, device=view.device) for view in views]
        shuffled = self.key_encoder.views([view[order[own]] for view, order in zip(views, orders, strict=True)])
        return [gather(unit(keys))[torch.argsort(o)[own]] for keys, o in zip(shuffled, orders, strict=True)]

    @torch.no_grad()
    def move_key_encoder(self) -> None:
        """key = m * key + (1 - m) * query (He et al., Eq. 2), parameters only; before the keys are made."""
        keys, queries = list(self.key_encoder.parameters()), list(self.encoder.parameters())
        torch._foreach_lerp_(keys, queries, 1 - self.settings.momentum)

    @torch.no_grad()
    def after_step(self, targets: Targets, step: int, steps: int) -> None:
        """Enqueue all processes' keys of both views, once both directions have used the queue as it was."""
        views = [targets.k2] if targets.k1 is None else [targets.k1, targets.k2]
        self.enqueue(torch.cat([gather(keys) for keys in views]))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Keys (n, dim), any number of them, overwrite the oldest rows, wrapping around the end of the buffer."""
        size = len(self.queue)
        skipped = max(len(keys) - size, 0)  # of more keys than rows only the newest can stay
        index = (self.pointer + skipped + torch.arange(len(keys) - skipped, device=keys.device)) % size
        self.queue.index_copy_(0, index, keys[skipped:].to(self.queue.dtype))
        self.pointer.copy_((self.pointer + len(keys)) % size)

    def metrics(self, targets: Targets) -> dict[str, Tensor]:
        """positive_similarity, a scalar: mean cosine between a query and its key, in [-1, 1]."""
        return {} if targets.positive_similarity is None else {"positive_similarity": targets.positive_similarity}

    def check_data(self, images: int) -> None:
        """Raises ConfigError for a queue longer than the data set: its older keys would be copies of the positive."""
        if self.settings.queue > images:
            raise ConfigError(
                f"moco.queue: {self.settings.queue} keys, but the data set has only {images} images; "
                "a queue must not be larger than the data set"
            )


def _head(features: int, settings: Settings) -> nn.Module:
    """v1: one linear layer. v2: Linear - ReLU - Linear, as wide as the features."""
    last = nn.Linear(features, settings.dim)
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), last) if settings.mlp else last
