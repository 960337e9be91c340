"""What every training stage sets up."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from mixmask.config import Optimizer
from mixmask.training import optim
from mixmask.training.optim import arithmetic, build_optimizer, compiles

FAULTS = """
import resource, torch
from mixmask.training.optim import keep_freed_memory
if {keep}: keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # freed blocks are too small for the next one, by its alignment, until neighbours have merged
    before = faults()
    torch.empty(2**24).fill_(1)  # 64 MiB, freed at once
    found = faults() - before
print(found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    found = {}
    for keep in (False, True):
        run = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
        )
        found[keep] = int(run.stdout)
    assert found[True] <= found[False] / 10


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimisers_on_all_parameters_at_once_compute_what_they_compute_one_by_one(name: str):
    settings = Optimizer(name, lr=0.1, weight_decay=1e-3, momentum=0.9 if name == "sgd" else 0.0)
    results = []
    for foreach in (True, False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
        optimizer = build_optimizer(settings, weights)
        assert [group["foreach"] for group in optimizer.param_groups] == [True]
        optimizer.param_groups[0]["foreach"] = foreach
        for _ in range(3):
            sum((w**3).sum() for w in weights).backward()
            optimizer.step()
        results.append(weights)
    assert all(map(torch.equal, *results))


def test_each_optimiser_decays_weights_and_remembers_by_its_settings():
    """Two steps from a weight of 2, with gradients 0 and 1, worked out by hand."""
    found = {}
    for name in ("sgd", "adam"):
        weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        settings = Optimizer(name, lr=0.1, weight_decay=0.01, momentum=0.9 if name == "sgd" else 0.0)
        optimizer = build_optimizer(settings, [weight])
        for gradient in (0.0, 1.0):
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
        found[name] = weight.item()
    first = 2 - 0.1 * 0.02
    assert found["sgd"] == pytest.approx(first - 0.1 * (0.9 * 0.02 + 1 + 0.01 * first), rel=1e-12)
    first, gradients = 2 - 0.1, (0.02, 1 + 0.01 * 1.9)  # Adam's first step: the rate, in the direction of the decay
    mean = (0.9 * 0.1 * gradients[0] + 0.1 * gradients[1]) / (1 - 0.9**2)
    square = (0.999 * 0.001 * gradients[0] ** 2 + 0.001 * gradients[1] ** 2) / (1 - 0.999**2)
    assert found["adam"] == pytest.approx(first - 0.1 * mean / square**0.5, rel=1e-6)


def test_only_what_takes_gradients_is_trained():
    frozen, moving = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    assert build_optimizer(Optimizer("sgd", lr=0.1, weight_decay=0.0), [frozen, moving]).param_groups[0]["params"] == [
        moving
    ]


def test_compile_auto_is_for_gpus_on_which_it_was_tested(monkeypatch: pytest.MonkeyPatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(optim, "device_name", lambda device: "cpu" if device.type == "cpu" else "NVIDIA Thing")
    assert [compiles(setting, device) for setting in (True, False, "auto") for device in (cpu, gpu)] == [
        *(True, True, False, False, False, False)
    ]
    monkeypatch.setattr(optim, "COMPILED", frozenset({"NVIDIA Thing"}))
    assert compiles("auto", gpu) and not compiles("auto", cpu)


def test_the_header_says_in_what_a_step_computes():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert arithmetic("fp32", cpu, False) == "fp32" and arithmetic("bf16", cpu, True) == "bf16, compiled"
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        assert arithmetic("fp32", gpu, True) == "fp32 (convolutions in TF32, matrix products in fp32), compiled"
        assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_result_names_the_kind_of_device_that_has_no_name_of_its_own():
    assert [optim.device_name(torch.device(kind)) for kind in ("cpu", "mps")] == ["cpu", "mps"]
