"""LARS as solo-learn, Barlow Twins, VICReg and SwAV use it: each tensor's update against the formula, in float64."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from mixmask import config
from mixmask.config import ConfigError, Optimizer, Schedule
from mixmask.schedules import learning_rate
from mixmask.training.optim import build_optimizer, set_learning_rate
from tests.reference import ROOT

pytest.importorskip("timm")

CASES = {
    "solo-learn": Optimizer("lars", 0.3, 1e-2, 0.9, trust=0.02, trust_clip=True),
    "barlow_twins": Optimizer("lars", 1.6, 1e-2, 0.9, trust=0.001, bias_lr=0.0384),
    "swav": Optimizer("lars", 4.8, 1e-2, 0.9, trust=0.001, adapt_all=True),
    "no decay": Optimizer("lars", 0.3, 0.0, 0.9, trust=0.02),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


def gradients(model: nn.Module, step: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    model.zero_grad()
    (model(x) ** 2).sum().backward()


def naive_step(o: Optimizer, p: Tensor, gradient: Tensor, buffer: Tensor | None, rate: float) -> tuple[Tensor, Tensor]:
    """You et al. 2017, Algorithm 1, with momentum outside of the rate; biases and norms as plain SGD."""
    update, scale = gradient, 1.0
    if p.ndim > 1 or o.adapt_all:
        ratio = o.trust * p.norm() / (gradient.norm() + o.weight_decay * p.norm() + 1e-8)
        ratio = torch.where((p.norm() > 0) & (gradient.norm() > 0), ratio, 1.0)
        if o.trust_clip:
            ratio = min(float(ratio) / rate, 1.0)
        update = (gradient + o.weight_decay * p) * ratio
    elif o.bias_lr:
        scale = o.bias_lr / o.lr
    buffer = update if buffer is None else o.momentum * buffer + update
    return p - rate * scale * buffer, buffer


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_formula_and_biases_and_norms_are_left_out_where_said(case: str):
    settings, model = CASES[case], network()
    optimizer = build_optimizer(settings, model.parameters())
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers: dict[str, Tensor | None] = dict.fromkeys(expected)
    for step, rate in enumerate((0.1, settings.lr, settings.lr / 2)):
        set_learning_rate(optimizer, rate)
        if step == 2:  # what is resumed goes on
            state, optimizer = copy.deepcopy(optimizer.state_dict()), build_optimizer(settings, model.parameters())
            optimizer.load_state_dict(state)
        gradients(model, step)
        for name, p in model.named_parameters():
            expected[name], buffers[name] = naive_step(settings, expected[name], p.grad, buffers[name], rate)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14, msg=name)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ConfigError, match=r"optimizer.name: lars .* pip install timm"):
        build_optimizer(CASES["swav"], network().parameters())


def test_warm_up_and_cosine_between_the_rates_of_swav():
    """Caron et al.: 0.3 to 4.8 in ten epochs, then half a cosine to 0.0048."""
    schedule = Schedule("cosine", "iteration", warmup_epochs=10, first_lr=0.3, last_lr=0.0048)
    rates = [learning_rate(schedule, 4.8, step, 5, 30) for step in range(150)]
    assert rates[0] == pytest.approx(0.3) and rates[25] == pytest.approx(2.55) and rates[50] == pytest.approx(4.8)
    assert rates[100] == pytest.approx((4.8 + 0.0048) / 2) and rates == rates[:51] + sorted(rates[51:], reverse=True)
    last = 0.0048 + (4.8 - 0.0048) * (1 + math.cos(math.pi * 0.99)) / 2
    assert rates[-1] == pytest.approx(last)


RATES = {  # weights; biases and norms
    "cifar100_barlow_twins": (0.3, 0.3),
    "cifar100_swav": (0.6, 0.6),
    "cifar100_vicreg": (0.3, 0.3),
    "imagenet_barlow_twins": (0.2 * 2048 / 256, 0.0048 * 2048 / 256),
    "imagenet_swav": (4.8, 4.8),
    "imagenet_vicreg": (0.2 * 2048 / 256, 0.2 * 2048 / 256),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_and_exclusions_of_the_recipes(name: str):
    optimizer = build_optimizer(config.load(ROOT / f"pretrain/configs/{name}.yaml").optimizer, network().parameters())
    set_learning_rate(optimizer, optimizer.defaults["lr"])
    of_dimension = {p.ndim: group for group in optimizer.param_groups for p in group["params"]}
    assert (of_dimension[2]["lr"], of_dimension[1]["lr"]) == pytest.approx(RATES[name])
    decay = 1e-4 if name in ("cifar100_barlow_twins", "cifar100_vicreg") else 1e-6
    assert of_dimension[2]["weight_decay"] == decay
    assert of_dimension[1]["weight_decay"] == (decay if name == "imagenet_swav" else 0)
