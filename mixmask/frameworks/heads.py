"""The small networks on top of a backbone, and what is measured on their outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask.numerics import at_least_float32
from mixmask.training import distributed


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes: nn.BatchNorm1d where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C), normalised; same shape. Moves the running statistics while training."""
        if not self.training or distributed.size() == 1:
            return super().forward(x)
        var, mean = torch.var_mean(at_least_float32(x), dim=0, correction=0)
        mean, var = distributed.shared_statistics(mean, var, distributed.size())
        with torch.no_grad():
            n = len(x) * distributed.size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def mlp(features: int, hidden: int, dim: int) -> nn.Sequential:
    """Linear - BatchNorm - ReLU - Linear: rows of `features` numbers to rows of `dim`."""
    return nn.Sequential(nn.Linear(features, hidden), BatchNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def projector(features: int, *widths: int, bias: bool = False) -> nn.Sequential:
    """Linear - BatchNorm - ReLU to each width but the last, and a last Linear: (N, features) -> (N, widths[-1]).

    Barlow Twins and VICReg need no bias: the BatchNorm after it, or the loss, would cancel it.
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width, bias=bias), BatchNorm(width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, widths[-1], bias=bias))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of rows, in float32 or wider. (N, D), (N, D) -> (N,)"""
    return (unit(a) * unit(b)).sum(dim=1)


def unit(x: Tensor) -> Tensor:
    """Rows of unit Euclidean length, in float32 or wider. (N, D) -> (N, D)"""
    return F.normalize(at_least_float32(x), dim=1)


def spread(z: Tensor) -> Tensor:
    """(N, D) -> scalar: standard deviation over the batch of unit-length rows, mean over dimensions, times sqrt(D).

    0 when all rows agree (collapse), about 1 when they point everywhere (Chen and He 2021, Figure 2).
    """
    return unit(z.detach()).std(dim=0).mean() * z.shape[1] ** 0.5
