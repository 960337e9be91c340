"""The order of the images in an epoch, and class-balanced shares of them."""

from __future__ import annotations

import torch
from torch import Tensor

from mixmask.randomness import numpy_generator


def batch_indices(n: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Indices of n images in an epoch's shuffled batches, int64 (n // batch_size, batch_size); the rest is dropped."""
    steps = n // batch_size
    order = numpy_generator(seed, "order", epoch).permutation(n)
    return torch.from_numpy(order[: steps * batch_size]).reshape(steps, batch_size)


def subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted indices, int64 (M,), of a class-balanced share of the images, whose classes are `labels` (N,).

    round(fraction * count) of each class, at least one; `fraction` in [0, 1].
    """
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = numpy_generator(seed, "subset", label).permutation(len(members))
        chosen.append(members[torch.from_numpy(order[: max(1, round(fraction * len(members)))])])
    return torch.cat(chosen).sort().values
