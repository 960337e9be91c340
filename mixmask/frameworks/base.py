"""What every framework is: how an image is embedded, and what its embedding is scored against.

A framework has a class `Settings` (its section of a recipe), an `encoder` (backbone and head), and writes

    targets(x1, x2, generator)             what the images are scored against, once per iteration
    embed(batches, targets)                what the gradient flows through: per batch a tuple of (N, ...)
    score(embedding, targets, clean)       one loss per row, (N,)

or, where the loss is one of the whole batch, in place of `score`

    loss(embedding, targets, weight, clean)       the anchor's part of the objective, a scalar

The other hooks have defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixmask.backbones import Encoder, compile_encoders
from mixmask.config import Augment
from mixmask.paths import compiler


class Framework(nn.Module):
    """The hooks that a training loop calls."""

    Settings: type  # a frozen dataclass
    encoder: Encoder
    compiled: tuple[str, ...] = ()  # the methods that `compile_parts` compiles

    def crops(self, augment: Augment) -> list[Augment]:
        """Beside the views, the augmentation of each crop that `targets` takes (multi-crop): by default none."""
        return []

    def targets(self, x1: Tensor, x2: Tensor, generator: torch.Generator | None = None) -> Any:
        """What the images are scored against, of the two views (N, C, H, W); once in every iteration."""
        raise TypeError(f"{type(self).__name__} defines no targets()")

    def embed(self, batches: Sequence[Tensor], targets: Any) -> list[tuple[Tensor, ...]]:
        """For each batch of images (N, C, H, W) a tuple of tensors (N, ...), with gradient."""
        raise TypeError(f"{type(self).__name__} defines no embed()")

    def score(self, embedding: tuple[Tensor, ...], targets: Any, clean: bool) -> Tensor:
        """One loss per row, (N,). `clean`: of x1 itself, in all the framework's directions."""
        raise TypeError(f"{type(self).__name__} defines no score()")

    def part(self, targets: Any, rows: Any) -> Any:
        """The targets of some rows (a slice, or indices), for gradient accumulation; by default unsupported."""
        raise TypeError(f"{type(self).__name__} takes the whole batch at once")

    def joined(self, targets: Any, parts: Sequence[Any]) -> None:
        """Set the metrics of a batch's targets from those of its equal `parts`: by default none."""

    def compile_parts(self) -> None:
        """torch.compile of the encoders and of what `compiled` names, in place."""
        compile_encoders(self)
        for name in self.compiled:
            setattr(self, name, torch.compile(getattr(self, name), **compiler()))

    def loss(self, embedding: tuple[Tensor, ...], targets: Any, weight: Tensor | float, clean: bool) -> Tensor:
        """An anchor's part of the objective, a scalar: by default the mean over the rows of weight times score.

        weight: one for all rows, or one for each (N,); of the rows in the order of `embedding`.
        """
        return (weight * self.score(embedding, targets, clean)).mean()

    def before_step(self, step: int) -> None:
        """Before anything is embedded in iteration `step`, counted from 0: by default nothing depends on it."""

    def after_step(self, targets: Any, step: int, steps: int) -> None:
        """After the optimiser's step number `step` of `steps`: by default only the gradient moves anything."""

    def fixed_lr_parameters(self) -> list[nn.Parameter]:
        """Parameters whose learning rate no schedule changes: by default none."""
        return []

    def metrics(self, targets: Any) -> dict[str, Tensor]:
        """Scalars worth a line in the log: by default those that `score` left in `targets.metrics`.

        There they are positive_similarity, the clean pair's mean cosine, and output_spread, 0 (collapse) to about 1.
        """
        return targets.metrics

    def check_data(self, images: int) -> None:
        """Raises ConfigError for settings that do not fit so many training images: by default all do."""
