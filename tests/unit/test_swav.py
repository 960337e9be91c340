"""SwAV: what only it has: codes, frozen prototypes, the queue, multi-crop; in float64 against loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mixmask import config
from mixmask.config import ConfigError
from mixmask.frameworks.swav import SwAV, sinkhorn
from mixmask.loss import objective
from mixmask.methods import METHODS, vanilla
from tests import reference
from tests.reference import ROOT, SmallNet, unit, views

SETTINGS = SwAV.Settings(
    dim=5, hidden=7, prototypes=4, temperature=0.2, epsilon=0.3, sinkhorn=3, frozen=0, queue=0, crop_size=6
)


def build(**settings) -> SwAV:
    torch.manual_seed(0)
    return SwAV(SmallNet(), replace(SETTINGS, **settings)).double().train()


def entropy(framework: SwAV, scores: Tensor, code: Tensor) -> Tensor:
    """Mean over the rows of the cross-entropy of a code and a softmax."""
    weights = torch.exp(scores / framework.settings.temperature)
    return -(code * torch.log(weights / weights.sum(1, keepdim=True))).sum(1).mean()


def scores_of(framework: SwAV, x: Tensor) -> Tensor:
    return unit(framework.encoder(x)) @ unit(framework.prototypes.weight.detach()).T


def code_of(framework: SwAV, scores: Tensor) -> Tensor:
    return reference.sinkhorn(scores.detach().clone(), framework.settings.epsilon, framework.settings.sinkhorn)


def test_codes_are_balanced_over_prototypes_and_each_row_sums_to_one():
    scores = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(scores, 0.3, 3), reference.sinkhorn(scores, 0.3, 3), rtol=1e-12, atol=0)
    balanced = sinkhorn(scores, 0.3, 200)
    torch.testing.assert_close(balanced.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(balanced.sum(0), torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("permutation", ["reverse", "random"])
def test_a_mixture_predicts_the_codes_of_both_of_its_images_and_has_none(permutation: str):
    framework, (x1, x2) = build(), views(6, 0)
    options = {"method": "mixmask", "mask.permutation": permutation, "mask.ratio": 0.25}
    recipe = config.load(ROOT / "pretrain/configs/cifar100_simclr.yaml", options)
    anchors = METHODS["mixmask"](recipe, x1, [np.random.default_rng(0)])
    _, parts, _ = objective(framework, x1, x2, anchors)
    mixture, switch = anchors[1:]
    lam, partner = mixture.weight[0].item(), torch.argsort(switch.order).tolist()
    assert 0 < lam < 1
    scores, code = scores_of(framework, mixture.images), code_of(framework, scores_of(framework, x2))
    assert parts["mixmask"].item() == pytest.approx(lam * entropy(framework, scores, code).item(), rel=1e-9)
    of_partner = (1 - lam) * entropy(framework, scores, code[partner]).item()
    assert parts["mixmask_switch"].item() == pytest.approx(of_partner, rel=1e-9)


def test_multi_crop_every_crop_predicts_both_codes():
    framework, (x1, x2) = build(crops=2), views(6, 0)
    crops = [view[:, :, :6, :6] for view in views(6, 1)]
    loss, _, _ = objective(framework, x1, x2, vanilla(x1), crops=crops)
    scores = [scores_of(framework, x) for x in (x1, x2, *crops)]
    expected = 0
    for assigned in (0, 1):
        code = code_of(framework, scores[assigned])
        others = [entropy(framework, scores[v], code) for v in range(4) if v != assigned]
        expected = expected + sum(others) / len(others) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_crops_have_the_views_augmentation_at_their_own_size():
    augment = config.load(ROOT / "pretrain/configs/cifar100_simclr.yaml").augment
    crop, *others = build(crops=3).crops(augment)
    assert others == [crop] * 2 and crop == replace(augment, size=6, crop_scale=(0.05, 0.14))
    assert build().crops(augment) == []
    with pytest.raises(ConfigError, match=r"swav.crops: augment.order has no crop"):
        build(crops=1).crops(replace(augment, order=("flip",)))


def test_prototypes_are_frozen_at_first_and_of_unit_length_always():
    framework, (x1, x2) = build(frozen=2), views(6, 0)
    optimizer = torch.optim.SGD(framework.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    moved = []
    for step in range(4):
        framework.before_step(step)
        loss, _, targets = objective(framework, x1, x2, vanilla(x1))
        before = framework.prototypes.weight.detach().clone()
        torch.testing.assert_close(before.norm(dim=1), torch.ones(4, dtype=torch.float64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        framework.after_step(targets, step, 4)
        moved.append(not torch.equal(before, framework.prototypes.weight))
    assert moved == [False, False, True, True]


def test_the_queue_is_filled_from_its_start_and_shapes_the_codes_once_it_is_full():
    framework = build(queue=12, queue_start=1)
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(5):
        x1, x2 = views(6, step)
        framework.before_step(step)
        loss, _, targets = objective(framework, x1, x2, vanilla(x1))
        scores = [scores_of(framework, x) for x in (x1, x2)]
        codes = []
        for view in (0, 1):
            rows = scores[view]
            if step >= 3:  # two batches fill it
                earlier = torch.cat([pair[view] for pair in kept[::-1][:2]])
                rows = torch.cat((earlier @ framework.prototypes.weight.T, rows))
            codes.append(code_of(framework, rows)[-6:])
        expected = (entropy(framework, scores[0], codes[1]) + entropy(framework, scores[1], codes[0])) / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        framework.after_step(targets, step, 5)
        kept.append(tuple(unit(framework.encoder(x)).detach() for x in (x1, x2)))
        filled = min(12, 6 * step) if step >= 1 else 0
        assert (framework.queue.abs().sum(2) > 0).sum(1).tolist() == [filled, filled]


def test_a_loop_that_only_says_after_step_thaws_the_prototypes_too():
    framework, (x1, x2) = build(frozen=1), views(6, 0)
    for step in range(2):
        loss, _, targets = objective(framework, x1, x2, vanilla(x1))
        framework.zero_grad()
        loss.backward()
        assert (framework.prototypes.weight.grad is None) == (step == 0)
        framework.after_step(targets, step, 2)


def test_without_a_clean_pair_only_the_second_view_enters_the_queue():
    framework, (x1, x2) = build(queue=6), views(6, 0)
    anchors = METHODS["erase"](
        config.load(ROOT / "pretrain/configs/cifar100_simclr.yaml"), x1, [np.random.default_rng(0)]
    )
    _, _, targets = objective(framework, x1, x2, anchors[1:])
    framework.after_step(targets, 0, 1)
    assert (framework.queue.abs().sum(2) > 0).sum(1).tolist() == [0, 6]
