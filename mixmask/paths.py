"""Two ways to the same numbers: few operations, each on all images, or many operations that stay in a CPU's caches.

A GPU waits for the host between operations, and a compiler fuses them: both take the way of few operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_on_every_device = False


def few_operations(x: Tensor) -> bool:
    """Whether what is computed from x takes the way of few operations: on a GPU, and in a compiled graph.

    That way never asks for a number on the device: it would wait for a GPU, and break a graph.
    """
    return x.device.type != "cpu" or _on_every_device or torch.compiler.is_compiling()


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, a CPU takes the way of few operations, too: to count them, and to compare what both ways compute."""
    global _on_every_device
    before, _on_every_device = _on_every_device, True
    try:
        yield
    finally:
        _on_every_device = before
