"""A complete backbone: which of our architectures a set of tensors is, none missing, with values that training leaves.

Everything that reads a checkpoint asks here, so that an architecture added to `mixmask.backbones` is recognised in
every format.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmask.backbones import build_backbone
from mixmask.config import Backbone
from mixmask.config.resnets import ARCHITECTURES
from mixmask.formats.source import FormatError, Reading, some, word

PART = re.compile(r"(conv1|bn1|layer[1-9])\.")  # how the name of each tensor of a ResNet begins
COUNTER = "num_batches_tracked"
CASTABLE = (torch.float16, torch.bfloat16, torch.float64)  # to float32, where asked for
STEMS = {(3, 7, 7): "imagenet", (3, 3, 3): "cifar"}  # conv1: channels, height, width


@functools.cache
def layout(backbone: Backbone) -> dict[str, Tensor]:
    """All tensors, without memory, in the order in which the network defines them (ResNets: torchvision's)."""
    with torch.device("meta"):
        return dict(build_backbone(backbone).state_dict())


def shapes(backbone: Backbone) -> dict[str, torch.Size]:
    """The names and shapes of all tensors."""
    return {name: tensor.shape for name, tensor in layout(backbone).items()}


def names_of(arch: str) -> Collection[str]:
    """torchvision's names of all tensors of an architecture."""
    return shapes(Backbone(arch, "imagenet", 64, 1)).keys()


def complete(names: Collection[str]) -> str | None:
    """The architecture that has exactly these tensors, with all counters of batches or with none; None for others."""
    for arch in ARCHITECTURES:
        expected = set(names_of(arch))
        if names in (expected, {name for name in expected if not name.endswith(COUNTER)}):
            return arch
    return None


def nearest(names: Collection[str]) -> tuple[str, int, int]:
    """The architecture that shares most of these names: how many of how many it finds here."""
    shared = {arch: len(names_of(arch) & names) for arch in ARCHITECTURES}
    arch = max(shared, key=lambda arch: (shared[arch], shared[arch] / len(names_of(arch))))
    return arch, shared[arch], len(names_of(arch))


def check_complete(
    weights: dict[str, Tensor], path: Path, options: Reading, prefix: str = "", pooled: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights under torchvision's names, each with memory of its own, and `Source`'s fields that follow from them.

    `prefix` is for the message; not `pooled`: the network has no max pooling. Raises FormatError.
    """
    arch = complete(weights.keys())
    if arch is None:
        raise FormatError(f"{path} {lacking(weights.keys(), prefix)}")
    counters = {name for name in names_of(arch) if name.endswith(COUNTER)}
    added = 0 if counters & weights.keys() else len(counters)
    weights = weights | {name: torch.tensor(0) for name in counters if added}
    backbone = Backbone(arch, _stem(weights["conv1.weight"], pooled, path), len(weights["conv1.weight"]), 1)
    weights = {name: weights[name] for name in shapes(backbone)}  # in one order, whatever the file's
    weights, cast = _cast(weights) if options.dtype else (weights, {})
    check_shapes(weights, backbone, path)
    weights = {name: own(value) for name, value in weights.items()}
    return weights, {"backbone": backbone, "added": added, "cast": cast}


def lacking(names: Collection[str], prefix: str) -> str:
    """What is missing from the nearest architecture, and what is extra."""
    arch, shared, count = nearest(names)
    missing, extra = names_of(arch) - names, set(names) - set(names_of(arch))
    where = f" under '{prefix}'" if prefix else ""
    return (
        f"holds no whole {arch}{where}: {shared} of {count} keys"
        + (f"; missing {some(missing)}" if missing else "")
        + (f"; unexpected {some(extra)}" if extra else "")
    )


def own(value: Tensor) -> Tensor:
    """The values alone: neither the input's storage nor its strides, which would show in the bytes of a file."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())


def _stem(conv1: Tensor, pooled: bool, path: Path) -> str:
    """7 x 7: ImageNet's. 3 x 3: CIFAR's or Tiny-ImageNet's (max pooling has no weights): CIFAR's is taken."""
    stem = STEMS.get(tuple(conv1.shape[1:]))
    if stem is None:
        raise FormatError(
            f"{path}: conv1.weight is {tuple(conv1.shape)}; expected (width, 3, 7, 7) or, for small images, "
            "(width, 3, 3, 3)"
        )
    if stem == "imagenet" and not pooled:
        raise FormatError(f"{path} has no max pooling after its 7 x 7 stem, unlike all of our networks")
    return stem


def _cast(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Floating point numbers to float32, counters to int64 where they are whole; type -> how many were cast from it."""
    result, cast = dict(weights), {}
    for name, value in weights.items():
        counter = name.endswith(COUNTER)
        whole = counter and value.dtype != torch.int64 and (not value.is_floating_point() or value == value.round())
        if whole or (not counter and value.dtype in CASTABLE):
            result[name] = value.to(torch.int64 if counter else torch.float32)
            cast[word(value.dtype)] = cast.get(word(value.dtype), 0) + 1
    return result, cast


def check_shapes(weights: Mapping[str, Tensor], backbone: Backbone, path: Path) -> None:
    """Raises FormatError for the first tensor of another shape or type."""
    for name, expected in layout(backbone).items():
        value, counter, shape, dtype = weights[name], name.endswith(COUNTER), expected.shape, expected.dtype
        if value.shape != shape or value.dtype != dtype:
            castable = value.shape == shape and (counter or value.dtype in CASTABLE)
            raise FormatError(
                f"{path}: '{name}' is {tuple(value.shape)} of {word(value.dtype)}; expected {tuple(shape)} of "
                f"{word(dtype)} ({backbone.arch}, width {backbone.width}, {backbone.stem} stem)"
                + ("; --dtype float32 casts" if castable else "")
            )


def check_values(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises FormatError for what no training leaves: not finite, a negative variance, a convolution of zeros."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise FormatError(f"{path}: {count} of the {value.numel()} values of '{name}' are not finite")
        if name.endswith(("running_var", COUNTER)) and (value < 0).any():
            raise FormatError(f"{path}: '{name}' has a negative value ({value.min().item():g}); expected 0 or more")
        if value.ndim == 4 and not value.any():
            raise FormatError(f"{path}: all {value.numel()} weights of the convolution '{name}' are zero")


def check_statistics(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises FormatError where the statistics of a BatchNorm were folded into its weight and bias, or never moved."""
    layers = [name.removesuffix("running_mean") for name in weights if name.endswith("running_mean")]
    unmoved = [
        layer
        for layer in layers
        if not weights[f"{layer}running_mean"].any() and len(weights[f"{layer}running_var"].unique()) == 1
    ]
    if unmoved:
        raise FormatError(
            f"{path}: {len(unmoved)} of {len(layers)} BatchNorms, first '{unmoved[0].removesuffix('.')}', have a "
            "running mean of 0 and one variance for all channels, which no training leaves: Caffe's form, made for BGR "
            "pixels with a standard deviation of 1, or a network that was never trained; if you know better: "
            "--allow-unit-statistics"
        )
