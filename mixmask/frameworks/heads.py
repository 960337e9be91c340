"""The small networks behind a backbone, and what is measured on their outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask.frameworks.whole_batch import BatchNorm


def mlp(features: int, hidden: int, dim: int) -> nn.Sequential:
    """Linear - BatchNorm - ReLU - Linear: rows of `features` numbers to rows of `dim`."""
    return nn.Sequential(nn.Linear(features, hidden), BatchNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of rows, in float32 or wider. (N, D), (N, D) -> (N,)"""
    return (unit(a) * unit(b)).sum(dim=1)


def unit(x: Tensor) -> Tensor:
    """Rows of unit Euclidean length, in float32 or wider. (N, D) -> (N, D)"""
    return F.normalize(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, dim=1)


def spread(z: Tensor) -> Tensor:
    """(N, D) -> scalar: standard deviation over the batch of unit-length rows, mean over dimensions, times sqrt(D).

    0 when all rows agree (collapse), about 1 when they point everywhere (Chen and He 2021, Figure 2).
    """
    return unit(z.detach()).std(dim=0).mean() * z.shape[1] ** 0.5
