"""What losses of the whole batch share: the rows of all processes, what the weights of rows mean.

A mixture's anchor gives each row a weight w_i, its lambda or 1 - lambda. Where all are one number w, the anchor's
part is w times the loss of the batch. Where they differ, row i takes the share w_i / sum(w) in every mean and
correlation, in place of 1 / N, and the loss is multiplied by the mean weight: a row of weight 0 is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixmask.backbones import Encoder
from mixmask.frameworks.heads import cosine, spread
from mixmask.numerics import at_least_float32
from mixmask.training import distributed
from mixmask.training.distributed import gather_with_gradient


@dataclass
class Targets:
    """The second view, which all pairs share, and what the clean pair showed. `embed` fills in its output."""

    x2: Tensor  # (N, C, H, W)
    z2: Tensor | None = None  # (N, dim) of x2, of all processes, with gradient
    metrics: dict[str, Tensor] = field(default_factory=dict)


def embed(encoder: Encoder, batches: Sequence[Tensor], targets: Targets) -> list[tuple[Tensor]]:
    """Outputs (N, dim) of each batch of images (N, C, H, W); those of x2 go into `targets`."""
    z2, *outputs = encoder.views([targets.x2, *batches])
    targets.z2 = all_rows(z2)
    return [(z,) for z in outputs]


def clean_metrics(z: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """What the log says of the clean pair's outputs (N, dim)."""
    return {"positive_similarity": cosine(z, z2).detach().mean(), "output_spread": spread(z)}


def all_rows(z: Tensor) -> Tensor:
    """The rows (N, D) of all processes, with gradient, in float32 or wider."""
    return gather_with_gradient(at_least_float32(z))


def shares(weight: Tensor | float, z: Tensor) -> tuple[Tensor, Tensor]:
    """From the weights (>= 0; a scalar or one per row of this process): each row's share of their sum, (N,) over all
    processes, like z (N, D), and the mean weight, a scalar.

    Where every weight is 0, so are the shares.
    """
    rows = len(z) // distributed.size()
    weights = distributed.gather(torch.as_tensor(weight, dtype=z.dtype, device=z.device).expand(rows))
    return weights / weights.sum().clamp(min=torch.finfo(z.dtype).tiny), weights.mean()


def centred(z: Tensor, share: Tensor) -> Tensor:
    """z (N, D) without the mean of its rows, each weighted by its share (N,)."""
    return z - share @ z


def off_diagonal(matrix: Tensor) -> Tensor:
    """A square matrix (D, D) with zeros on its diagonal."""
    return matrix - torch.diag(matrix.diagonal())
