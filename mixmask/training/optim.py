"""Optimisers, devices and the small things every training stage sets up."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mixmask.config import ConfigError, Optimizer
from mixmask.paths import few_operations

# GPUs, as PyTorch names them, on which tests/unit/test_gpu.py has passed.
COMPILED: frozenset[str] = frozenset()
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's mallopt


def build_optimizer(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], fixed_lr_parameters: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """SGD, Adam or LARS, over the parameters that take gradients; those of `fixed_lr_parameters` stay at the base rate.

    Each update runs on all parameters at once (`foreach`); Adam on a GPU is one kernel (`fused`), so that the host
    never reads step counts parameter by parameter. Raises ConfigError if LARS's library is missing.
    """
    constant = list(fixed_lr_parameters)
    apart = {id(p) for p in constant}
    groups = [{"params": [p for p in parameters if p.requires_grad and id(p) not in apart]}]
    if constant:
        groups.append({"params": constant, "constant_rate": True})
    if optimizer.name == "lars":
        return _lars(optimizer, groups)
    if optimizer.name == "sgd":
        return torch.optim.SGD(
            groups, lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay, foreach=True
        )
    way = "fused" if few_operations(groups[0]["params"][0]) else "foreach"
    return torch.optim.Adam(groups, lr=optimizer.lr, weight_decay=optimizer.weight_decay, **{way: True})


def _lars(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """timm's LARS (You, Gitman, Ginsburg 2017). Biases and norms take plain steps without decay, unless `adapt_all`."""
    try:
        from timm.optim import Lars
    except ImportError:
        raise ConfigError("optimizer.name: lars is timm's, which is not installed; pip install timm") from None
    plain = {"weight_decay": 0.0, "always_adapt": False}
    if optimizer.bias_lr:
        plain["lr_scale"] = optimizer.bias_lr / optimizer.lr
    split = []
    for group in groups:
        vectors = [] if optimizer.adapt_all else [p for p in group["params"] if p.ndim <= 1]
        apart = {id(p) for p in vectors}
        split.append({**group, "params": [p for p in group["params"] if id(p) not in apart]})
        split.append({**group, "params": vectors, **plain})
    trust = {"trust_coeff": optimizer.trust, "trust_clip": optimizer.trust_clip, "always_adapt": True}
    return Lars(
        [group for group in split if group["params"]],
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        **trust,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate, times the group's `lr_scale`, for every parameter group but that of constant rate."""
    for group in optimizer.param_groups:
        if not group.get("constant_rate"):
            group["lr"] = rate * group.get("lr_scale", 1)


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU where there is one, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise ConfigError(f"run.device: no '{name}' here; expected auto, cpu or a GPU such as cuda") from None
    return torch.device(name)


def compiles(setting: bool | str, device: torch.device) -> bool:
    """Whether `run.compile` says so. `auto`: on the GPUs of COMPILED."""
    return device_name(device) in COMPILED if setting == "auto" else bool(setting)


def arithmetic(precision: str, device: torch.device, compiled: bool) -> str:
    """A step's arithmetic, for the header of a log. On a GPU, sets what PyTorch leaves to its defaults."""
    if device.type != "cuda":
        return precision + (", compiled" if compiled else "")
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    of_fp32 = "convolutions in TF32, matrix products in fp32" if precision == "fp32" else "the rest in fp32"
    return f"{precision} ({of_fp32}), {'compiled' if compiled else 'eager'}"


def device_name(device: torch.device) -> str:
    """What a result says it was made on: an NVIDIA GPU's name, or the kind of device (cpu, mps)."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def keep_freed_memory() -> None:
    """Let the C library keep up to 2 GiB that tensors on the CPU have freed, in place of returning it to the system.

    glibc returns a block of more than 32 MiB as soon as it is freed: every large intermediate result then gets its
    pages anew, which costs as much as computing with it. Changes no number; where the C library is another, nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
        mallopt(option, value)
