"""A complete backbone: which architecture a set of names and shapes is, and what its values may be."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mixmask.backbones import build_backbone
from mixmask.config import Backbone
from mixmask.formats.source import FormatError, Source, some, word


def assemble(
    name: str, weights: dict[str, Tensor], dropped: dict[str, int], normalisation: tuple, path: Path, prefix: str = ""
) -> Source:
    """A Source of what is not ours: the architecture follows from the keys and shapes."""
    arch = "resnet50" if any(re.match(r"layer\d\.\d+\.conv3", k) for k in weights) else "resnet18"
    counters = {k for k in shapes(Backbone(arch, "imagenet", 64, 1)) if k.endswith("num_batches_tracked")}
    added = 0 if counters & weights.keys() else len(counters)
    weights |= {k: torch.tensor(0) for k in counters if added}
    _check_keys(weights, arch, path, prefix)
    backbone = Backbone(arch, _stem(weights["conv1.weight"], path), len(weights["conv1.weight"]), 1)
    check_shapes(weights, backbone, path)
    weights = {k: weights[k] for k in shapes(backbone)}  # in one order, whatever the file's
    return Source(name, weights, backbone, dropped, *normalisation, identity="", sha256="", added=added)


def _stem(conv1: Tensor, path: Path) -> str:
    """7 x 7: ImageNet's. 3 x 3: CIFAR's or Tiny-ImageNet's (max pooling has no weights): CIFAR's is taken."""
    stem = {(3, 7, 7): "imagenet", (3, 3, 3): "cifar"}.get(tuple(conv1.shape[1:]))
    if stem is None:
        raise FormatError(
            f"{path}: conv1.weight is {tuple(conv1.shape)}; expected (width, 3, 7, 7) or, for small images, "
            "(width, 3, 3, 3)"
        )
    return stem


@functools.cache
def shapes(backbone: Backbone) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in build_backbone(backbone).state_dict().items()}


def _check_keys(weights: Mapping[str, Tensor], arch: str, path: Path, prefix: str) -> None:
    expected = shapes(Backbone(arch, "imagenet", 64, 1)).keys()
    missing, extra = expected - weights.keys(), weights.keys() - expected
    if missing or extra:
        found = len(expected & weights.keys())
        where = f" under '{prefix}'" if prefix else ""
        raise FormatError(
            f"{path} holds no whole {arch}{where}: {found} of {len(expected)} keys"
            + (f"; missing {some(missing)}" if missing else "")
            + (f"; unexpected {some(extra)}" if extra else "")
        )


def check_shapes(weights: Mapping[str, Tensor], backbone: Backbone, path: Path) -> None:
    for key, shape in shapes(backbone).items():
        value, dtype = weights[key], torch.int64 if key.endswith("num_batches_tracked") else torch.float32
        if value.shape != shape or value.dtype != dtype:
            raise FormatError(
                f"{path}: '{key}' is {tuple(value.shape)} of {word(value.dtype)}; expected {tuple(shape)} of "
                f"{word(dtype)} ({backbone.arch}, width {backbone.width}, {backbone.stem} stem)"
            )


def check_values(weights: Mapping[str, Tensor], path: Path) -> None:
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise FormatError(f"{path}: {count} of the {value.numel()} values of '{key}' are not finite")
        if key.endswith(("running_var", "num_batches_tracked")) and (value < 0).any():
            raise FormatError(f"{path}: '{key}' has a negative value ({value.min().item():g}); expected 0 or more")
        if value.ndim == 4 and not value.any():
            raise FormatError(f"{path}: all {value.numel()} weights of the convolution '{key}' are zero")
