"""Two ways to the same numbers: few operations, each on all images, or many operations that stay in a CPU's caches.

A GPU waits for the host between operations, and a compiler fuses them: both take the way of few operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_on_every_device = False
_backend: str | Callable = "inductor"


def few_operations(x: Tensor) -> bool:
    """Whether what is computed from x takes the way of few operations: on a GPU, and in a compiled graph.

    That way never asks for a number on the device: it would wait for a GPU, and break a graph.
    """
    return x.device.type != "cpu" or _on_every_device or torch.compiler.is_compiling()


def compiler() -> dict[str, Any]:
    """What every torch.compile here is called with: shapes are those of the recipe."""
    return {"backend": _backend, "dynamic": False}


@contextlib.contextmanager
def as_on_a_gpu(backend: str | Callable = "inductor") -> Iterator[None]:
    """Inside, a CPU takes the way of few operations, too: to count them, and to compare what both ways compute.

    `backend` compiles what is compiled there: "aot_eager" needs no compiler.
    """
    global _on_every_device, _backend
    before, _on_every_device, _backend = (_on_every_device, _backend), True, backend
    try:
        yield
    finally:
        _on_every_device, _backend = before
