"""Is it collapsing? Four measures of the features that k-NN compares, and a warning if they say so.

`feature_std`: standard deviation of the unit features over the images, mean over their D numbers (Chen and He 2021,
    Figure 2): 0 if all images share one feature, 1 / sqrt(D) if they point everywhere evenly.
`effective_rank`: RankMe (Garrido et al. 2023, Eq. 1), the exponential of the entropy of the singular values: 1 to D.
`alignment`: mean squared distance of the unit features of two views of an image, 0 to 4; and
`uniformity`: logarithm of the mean of exp(-2 |x - y|^2) over pairs of images, from 0 (one feature) to about -4 (both of
    Wang and Isola 2020, with alpha = 2 and t = 2).

All but alignment are measured on k-NN's bank (test views of the training images), or on SAMPLE (PAIRS) spread evenly
over it. Alignment needs two views: of VIEWS images spread evenly over the training set, augmented as the recipe says,
with the same draws at every evaluation, and seen by the network as it is evaluated (running statistics).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask.config import Augment, Execution
from mixmask.datasets import Files, Resident
from mixmask.datasets.views import train_batches
from mixmask.numerics import wide

SAMPLE, PAIRS, VIEWS = 25_600, 2_048, 1_024  # images; the first is RankMe's
EPSILON = 1e-7  # RankMe's

# Of unit features with s = std * sqrt(D) the mean cosine of two images is 1 - s^2 where the D numbers vary alike, and
# less elsewhere: below 0.1 the features of different images agree to 0.99, or vary in a hundredth of their numbers. An
# effective rank below 2 is less than two directions for all images. Neither depends on D or on the features' scale.
LEAST_SPREAD, LEAST_RANK = 0.1, 2.0


def evenly(rows: int, most: int) -> Tensor:
    """The indices of at most `most` of so many rows, spread evenly: rows are often sorted by class. (M,)"""
    return torch.arange(min(rows, most)) * rows // min(rows, most)


@torch.no_grad()
def measures(bank: Tensor) -> dict[str, float]:
    """`feature_std`, `effective_rank` and `uniformity` of features (N, D), in float64; {} if one is not finite."""
    sample = wide(bank[evenly(len(bank), SAMPLE).to(bank.device)])
    if not sample.isfinite().all():
        return {}
    unit = F.normalize(sample, dim=1)
    return {
        "feature_std": unit.std(dim=0, correction=0).mean().item(),
        "effective_rank": effective_rank(sample),
        "uniformity": uniformity(unit[evenly(len(unit), PAIRS).to(unit.device)]),
    }


def effective_rank(features: Tensor) -> float:
    """RankMe of (N, D). The singular values are roots of the eigenvalues of the smaller product of the two."""
    product = features.T @ features if len(features) > features.shape[1] else features @ features.T
    values = torch.linalg.eigvalsh(product).clamp_(min=0).sqrt_()
    shares = values / values.sum().clamp_(min=torch.finfo(values.dtype).tiny) + EPSILON
    return torch.exp(-(shares * shares.log()).sum()).item()


def uniformity(unit: Tensor) -> float:
    """log E exp(-2 |x - y|^2) over the pairs of different rows of (N, D)."""
    squares = (unit * unit).sum(dim=1)
    distances = (squares[:, None] + squares - 2 * unit @ unit.T).clamp_(min=0)  # (N, N), squared
    potentials = distances.mul_(-2).exp_().fill_diagonal_(0)
    return (potentials.sum() / max(1, len(unit) * (len(unit) - 1))).log().item() if len(unit) > 1 else 0.0


@torch.no_grad()
def alignment(
    model: nn.Module,
    dataset: Resident | Files,
    augment: Augment,
    seed: int,
    device: torch.device,
    workers: int = 0,
    batch_size: int = Execution.eval_batch,
) -> float:
    """E |f(x) - f(y)|^2 of unit features of two views x, y of an image. `model` in evaluation mode."""
    images = dataset.take(evenly(len(dataset), VIEWS))
    batches = train_batches(images, augment, min(len(images), batch_size), seed, 0, 2, device, workers)
    distances = []
    for views, _ in batches:
        one, other = (F.normalize(wide(model(view)), dim=1) for view in views)
        distances.append((one - other).square().sum(dim=1))
    return torch.cat(distances).mean().item()


def warning(values: dict[str, float], dim: int) -> str:
    """A line if `measures` of `dim`-dimensional features show collapse or are empty; otherwise ""."""
    if not values:
        return "warning: a feature that k-NN compares is not finite"
    std, rank, faults = values["feature_std"], values["effective_rank"], []
    if (spread := std * dim**0.5) < LEAST_SPREAD:
        faults += [
            f"feature_std is {std:.2g}, {spread:.2g} of 1 / sqrt({dim}), expected at least {LEAST_SPREAD:g} of it"
        ]
    if rank < LEAST_RANK:
        faults += [f"effective_rank is {rank:.3g} of {dim}, expected at least {LEAST_RANK:g}"]
    return f"warning: the features look collapsed: {'; '.join(faults)}" if faults else ""
