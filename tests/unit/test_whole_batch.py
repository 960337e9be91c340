"""Losses of the whole batch: what weights of rows mean, in float64, against loops over rows and columns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixmask import config
from mixmask.frameworks.barlow_twins import BarlowTwins
from mixmask.frameworks.heads import BatchNorm
from mixmask.frameworks.vicreg import VICReg
from mixmask.methods import METHODS
from mixmask.objective import objective
from tests.reference import ROOT, SmallNet, views

SETTINGS = {
    BarlowTwins: {"dim": 4, "hidden": 7, "off_diagonal": 0.2, "scale": 0.5},
    VICReg: {"dim": 4, "hidden": 7, "invariance": 25, "variance": 12.5, "covariance": 1},
}


def build(cls: type) -> nn.Module:
    torch.manual_seed(0)
    return cls(SmallNet(), cls.Settings(**SETTINGS[cls])).double().train()


def outputs(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of two views that resemble each other, (n, 4)."""
    z, noise = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z, z + 0.5 * noise


def loss_of(framework: nn.Module, z: Tensor, z2: Tensor, weight: Tensor | float) -> Tensor:
    targets = framework.targets(z, z2)
    targets.z2 = z2
    return framework.loss((z,), targets, weight, clean=False)


def naive(framework: nn.Module, z: Tensor, z2: Tensor, weights: list[float]) -> float:
    """Every mean over rows takes each row by its share; VICReg's covariance is torch.cov's of weighted rows."""
    s, n, d = framework.settings, len(z), z.shape[1]
    share = [w / sum(weights) for w in weights]

    def mean(values: list[Tensor]) -> float:
        return sum(p * float(v) for p, v in zip(share, values, strict=True))

    def standard(x: Tensor) -> Tensor:
        columns = []
        for j in range(d):
            m = mean(list(x[:, j]))
            columns.append((x[:, j] - m) / (mean([(v - m) ** 2 for v in x[:, j]]) + 1e-5) ** 0.5)
        return torch.stack(columns, dim=1)

    total = 0.0
    if isinstance(framework, BarlowTwins):
        a, b = standard(z), standard(z2)
        for i, j in itertools.product(range(d), repeat=2):
            c = mean([a[k, i] * b[k, j] for k in range(n)])
            total += (1 - c) ** 2 if i == j else s.off_diagonal * c**2
        total *= s.scale
    else:
        total += s.invariance * mean([((z[k] - z2[k]) ** 2).mean() for k in range(n)])
        for x in (z, z2):
            c = torch.cov(x.T, aweights=torch.tensor(weights, dtype=torch.float64))
            total += s.variance * sum(max(0.0, 1 - (float(c[j, j]) + 1e-4) ** 0.5) for j in range(d)) / d
            total += s.covariance * sum(float(c[i, j]) ** 2 for i in range(d) for j in range(d) if i != j) / d
    return sum(weights) / n * total


@pytest.mark.parametrize("cls", SETTINGS)
def test_one_weight_for_all_rows_multiplies_the_loss_of_the_batch(cls: type):
    framework, (z, z2) = build(cls), outputs(9)
    whole = loss_of(framework, z, z2, 1.0).item()
    for weight in (0.3, torch.full((9,), 0.3, dtype=torch.float64)):
        assert loss_of(framework, z, z2, weight).item() == pytest.approx(0.3 * whole, rel=1e-12)


@pytest.mark.parametrize("weights", [[0.2, 1.0, 0.5, 0.9, 0.1, 0.7], [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]])
@pytest.mark.parametrize("cls", SETTINGS)
def test_rows_of_different_weights_enter_every_statistic_with_their_share(cls: type, weights: list[float]):
    framework, (z, z2) = build(cls), outputs(6)
    found = loss_of(framework, z, z2, torch.tensor(weights, dtype=torch.float64))
    assert found.item() == pytest.approx(naive(framework, z, z2, weights), rel=1e-12)
    kept = [i for i, w in enumerate(weights) if w]
    if set(weights) == {0.0, 1.0}:  # rows of weight 0 are absent
        expected = loss_of(framework, z[kept], z2[kept], 1.0) * len(kept) / 6
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_barlow_twins_takes_a_row_of_weight_two_for_two_rows():
    framework, (z, z2) = build(BarlowTwins), outputs(4)
    weights = torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    twice = [0, 1, 1, 2, 3, 3]
    expected = loss_of(framework, z[twice], z2[twice], 1.0) * 6 / 4
    assert loss_of(framework, z, z2, weights).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("weights", [[0.0] * 5, [0.0, 0.0, 1.0, 0.0, 0.0]])
@pytest.mark.parametrize("cls", SETTINGS)
def test_weights_that_leave_no_batch_give_finite_numbers(cls: type, weights: list[float]):
    framework, (z, z2) = build(cls), outputs(5)
    z.requires_grad_()
    loss = loss_of(framework, z, z2, torch.tensor(weights, dtype=torch.float64))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and (any(weights) or loss.item() == 0)


@pytest.mark.parametrize(("groups", "per_image"), [(2, False), (1, True)])
@pytest.mark.parametrize("cls", SETTINGS)
def test_a_mixture_with_several_lambdas_is_the_weighted_loss_in_both_orders(cls: type, groups: int, per_image: bool):
    framework, (x1, x2) = build(cls), views(8, 1)
    options = {"method": "mixmask", "mask.ratio": [0.1, 0.9], "mask.per_image": per_image}
    recipe = config.load(ROOT / "pretrain/configs/cifar100_barlow_twins.yaml", options)
    rngs = [np.random.default_rng(group) for group in range(groups)]
    anchors = METHODS["mixmask"](recipe, x1, rngs)
    assert len(set(anchors[1].weight.tolist())) > 1
    _, parts, _ = objective(framework, x1, x2, anchors)
    with torch.no_grad():
        z2, z = framework.encoder(x2), framework.encoder(anchors[1].images)
    for anchor in anchors[1:]:
        rows = z if anchor.order is None else z[anchor.order]
        expected = naive(framework, rows, z2, anchor.weight.tolist())
        assert parts[anchor.name].item() == pytest.approx(expected, rel=1e-10)


def test_batchnorm_is_pytorchs_in_one_process():
    mine, theirs = BatchNorm(4), nn.BatchNorm1d(4)
    for x in torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)):
        assert torch.equal(mine(x), theirs(x))
    assert torch.equal(mine.eval()(x), theirs.eval()(x)) and torch.equal(mine.running_var, theirs.running_var)
