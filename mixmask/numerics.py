"""Where float64 is available: on the device itself, or on the CPU for a Mac's GPU (mps), which lacks it."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)


def exact_device(device: torch.device) -> torch.device:
    """The nearest device that computes in float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is wider."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def wide(x: Tensor) -> Tensor:
    """x in float64."""
    return x.to(exact_device(x.device)).double()
