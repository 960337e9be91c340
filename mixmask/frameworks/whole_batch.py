"""What losses of the whole batch share: the rows of all processes, what the weights of rows mean, a projector.

A mixture's anchor gives each row a weight w_i, its lambda or 1 - lambda. Where all are one number w, the anchor's
part is w times the loss of the batch. Where they differ, row i takes the share w_i / sum(w) in every mean and
correlation, in place of 1 / N, and the loss is multiplied by the mean weight: a row of weight 0 is absent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmask.training import distributed
from mixmask.training.distributed import gather_with_gradient


def all_rows(z: Tensor) -> Tensor:
    """The rows (N, D) of all processes, with gradient, in float32 or wider."""
    return gather_with_gradient(z.float() if z.dtype in (torch.bfloat16, torch.float16) else z)


def shares(weight: Tensor | float, z: Tensor) -> tuple[Tensor, Tensor]:
    """Of the weights, none below 0, of this process's rows or of each of them: each row's share of their sum, (N,) over
    all processes, like z (N, D), and the mean weight, a scalar.

    Where every weight is 0, so are the shares.
    """
    rows = len(z) // distributed.size()
    weights = distributed.gather(torch.as_tensor(weight, dtype=z.dtype, device=z.device).expand(rows))
    return weights / weights.sum().clamp(min=torch.finfo(z.dtype).tiny), weights.mean()


def centred(z: Tensor, share: Tensor) -> Tensor:
    """z (N, D) without the mean of its rows, each counted by its share (N,)."""
    return z - share @ z


def off_diagonal(matrix: Tensor) -> Tensor:
    """A square matrix (D, D) with zeros on its diagonal."""
    return matrix - torch.diag(matrix.diagonal())


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes: nn.BatchNorm1d where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C), normalised; same shape. Moves the running statistics while training."""
        if not self.training or distributed.size() == 1:
            return super().forward(x)
        var, mean = torch.var_mean(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, dim=0, correction=0)
        mean, var = distributed.shared_statistics(mean, var, distributed.size())
        with torch.no_grad():
            n = len(x) * distributed.size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def projector(features: int, *widths: int, bias: bool = False) -> nn.Sequential:
    """Linear - BatchNorm - ReLU to each width but the last, and a last Linear: (N, features) -> (N, widths[-1]).

    Barlow Twins and VICReg need no bias: a BatchNorm or the loss behind it would take it away again.
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width, bias=bias), BatchNorm(width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, widths[-1], bias=bias))
