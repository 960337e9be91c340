"""The tensors in a file: a bare state dict, one in an entry, or several nested ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixmask.formats.source import FormatError, word

USUAL = ("state_dict", "model")  # the entries that hold the network, where a file has one of them


def network_of(state: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of the file's network by name; and what stands beside them: "entry NAME" -> how many it has.

    The network is the content itself, or its entry `state_dict` or `model` (or that one's). What is nested otherwise
    (`student`, `teacher`) comes as `student.NAME`. Raises FormatError.
    """
    beside: dict[str, int] = {}
    state = _mapping(state, path)
    while inner := [name for name in USUAL if isinstance(state.get(name), Mapping | nn.Module)]:
        if len(inner) > 1:
            raise FormatError(f"{path} has both 'state_dict' and 'model'; expected one of them, or --take NAME")
        beside |= _entries(state, inner[0])
        state = _mapping(state[inner[0]], path)
    if any(_is_kernel(value) for value in state.values()):  # what is nested in a state dict is something else
        beside |= _entries({k: v for k, v in state.items() if isinstance(v, Mapping | list)})
        state = {k: v for k, v in state.items() if not isinstance(v, Mapping)}
    return flat(state, path), beside


def flat(state: Any, path: Path) -> dict[str, Tensor]:
    """Every tensor in the file by its whole name, `state_dict.encoder_q.conv1.weight`. Raises FormatError."""
    state = _mapping(state, path)
    tensors = dict(_tensors(state, ""))
    if not tensors:
        entries = ", ".join(map(str, list(state)[:6])) or "none"
        other = next((f"{k!r} is a {type(v).__name__}" for k, v in state.items()), "nothing in it")
        raise FormatError(
            f"{path} holds no state dict ({other}; entries: {entries}); expected tensors by name, as such or under "
            "'state_dict' or 'model'"
        )
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "on the meta device" if value.is_meta else word(value.layout)
            raise FormatError(f"{path}: '{name}' is {kind}; expected a dense tensor with its values")
    return {name: value.detach() for name, value in tensors.items()}


def _mapping(state: Any, path: Path) -> Mapping[Any, Any]:
    if isinstance(state, nn.Module):
        return state.state_dict()
    if not isinstance(state, Mapping):
        raise FormatError(f"{path} holds a {type(state).__name__}; expected names and tensors (a state dict)")
    return state


def _tensors(state: Mapping[Any, Any], before: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        name = f"{before}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            yield name, torch.from_numpy(np.array(value))
        elif isinstance(value, Mapping | nn.Module):
            yield from _tensors(value if isinstance(value, Mapping) else value.state_dict(), f"{name}.")


def _is_kernel(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 4


def _entries(state: Mapping[Any, Any], used: str = "") -> dict[str, int]:
    """What is more than a plain value."""
    parts = {k: v for k, v in state.items() if k != used and isinstance(v, Mapping | list | Tensor)}
    return {f"entry {k}": 1 if isinstance(v, Tensor) else len(v) for k, v in parts.items()}
