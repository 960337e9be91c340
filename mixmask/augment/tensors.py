"""Tensors that are made once, and what every operation needs of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixmask.paths import few_operations


def constants(values: Sequence[float], device: torch.device) -> Tensor:
    """The numbers as float32 on the device."""
    return once(as_tensor, tuple(map(float, values)), device)


def whole_numbers(n: int, device: torch.device) -> Tensor:
    """0 ... n - 1 as float32 on the device."""
    return once(as_tensor, range(n), device)


def once(make: Callable, *arguments: Hashable) -> Any:
    """make(*arguments), read-only tensors, cached: every copy to a GPU waits for it."""
    return make(*arguments) if torch.compiler.is_compiling() else _kept(make, *arguments)


_kept = functools.cache(lambda make, *arguments: make(*arguments))


def as_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def where_chosen(operation, images: Tensor, chosen: Tensor, *parameters: Tensor) -> Tensor:
    """operation(images, *parameters) where chosen (N,); every parameter has N rows."""
    if few_operations(images):
        return torch.where(column(chosen), operation(images, *parameters), images)
    index = chosen.nonzero()[:, 0]
    changed = operation(*(values.index_select(0, index) for values in (images, *parameters)))
    return images.index_copy(0, index, changed)


def column(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)"""
    return values[:, None, None, None]


def to_bytes(images: Tensor) -> Tensor:
    """Rounded to whole numbers 0..255, halves up, in place; any shape."""
    return images.add_(0.5).floor_().clamp_(0, 255)
