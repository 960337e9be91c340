"""A backbone as it was read, and what a file that holds none is refused with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmask.checkpoint import CheckpointError
from mixmask.config import Backbone, Pretrain

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of pixels in [0, 1]: all public ImageNet models


class FormatError(CheckpointError):
    """A file that holds no backbone we can use; the text names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Source:
    """A backbone as it was read. `weights` has torchvision's names, without `fc`; bit for bit what the file holds."""

    format: str  # mixmask, moco, unmix, simsiam, byol, swav, barlowtwins, torchvision, detectron2, ...
    weights: dict[str, Tensor]
    backbone: Backbone  # bn_groups 1: evaluation and fine-tuning use plain BatchNorm
    dropped: dict[str, int]  # what was dropped -> how many keys; "entry NAME": what the file has beside its state dict
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    identity: str  # a run of ours (RUN or RUN@STEP), or NAME@SHA256 (8 digits)
    sha256: str  # of the file
    recipe: Pretrain | None = None  # ours alone have one
    added: int = 0  # counters of batches that the file lacks (written before PyTorch 0.4.1), set to 0


def word(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def some(keys: Any) -> str:
    """The number of keys and the first three."""
    first = ", ".join(f"'{k}'" for k in sorted(keys)[:3])
    return f"{len(keys)} ({first}{', ...' if len(keys) > 3 else ''})"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def reason(error: Exception) -> str:
    """The first sentence of an error of somebody's reader; its type where it says nothing."""
    text = one_line(error).split(". ")[0]
    return text if " " in text else type(error).__name__


def check_file(path: Path) -> None:
    if path.is_dir():
        inside = path / "checkpoint.pt"
        raise FormatError(f"{path} is a directory; expected a file" + (f": {inside}?" if inside.is_file() else ""))
    if not path.is_file():
        raise FormatError(f"no such file: {path}")
