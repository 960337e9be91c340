"""A backbone that was read, the options for reading it, and the error for a file without one."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmask.checkpoint import CheckpointError, one_line
from mixmask.config import Augment, Backbone, Pretrain

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of pixels in [0, 1]: all public ImageNet models


class FormatError(CheckpointError):
    """A file that holds no backbone we can use; the text names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Source:
    """A backbone as it was read. `weights` has torchvision's names, without `fc`; bit for bit what the file holds,
    but for a cast that was asked for. Each tensor has memory of its own."""

    format: str  # mixmask, moco, unmix, simsiam, byol, swav, barlowtwins, torchvision, detectron2, ..., or unlisted
    weights: dict[str, Tensor]
    backbone: Backbone  # bn_groups 1: evaluation and fine-tuning use plain BatchNorm
    dropped: dict[str, int]  # what was dropped -> how many keys; "entry NAME": what the file has beside its state dict
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    identity: str  # a run of ours (RUN or RUN@STEP), or NAME@SHA256 (8 digits); NAME.TAKEN@SHA256 where --take chose
    sha256: str  # of the file
    recipe: Pretrain | None = None  # ours alone have one
    added: int = 0  # counters of batches that the file lacks (written before PyTorch 0.4.1), set to 0
    cast: dict[str, int] = field(default_factory=dict)  # type in the file -> how many tensors were cast from it
    taken: str = ""  # what --take named, of several backbones

    def augment(self, size: int = 0) -> Augment:
        """For test views of `size` pixels; 0: of as many as in the pre-training, of 224 for a public checkpoint."""
        known = self.recipe.augment if self.recipe else Augment(order=(), size=224, mean=self.mean, std=self.std)
        return replace(known, size=size or known.size)


@dataclass(frozen=True)
class Reading:
    """The user's choices; each refusal names the option that would read the file."""

    trust_pickle: bool = False  # run whatever code the file holds
    take: str | None = None  # which of several backbones: what stands before its names; "." for nothing
    dtype: str | None = None  # "float32": cast what is of another precision
    allow_unit_statistics: bool = False  # accept BatchNorms whose statistics no training leaves
    arch: str | None = None  # the architecture, if it is not one of our ResNets: timm/NAME, ...
    stem: str = "imagenet"  # of that network


def reading_options() -> argparse.ArgumentParser:
    """The parent of scripts that read a foreign checkpoint: `Reading`'s options."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--trust-pickle", action="store_true", help="run the code in the file: only if you trust it")
    parser.add_argument("--take", metavar="NAME", help="which backbone of a file that holds several")
    parser.add_argument("--dtype", choices=("float32",), help="cast weights of another precision")
    parser.add_argument(
        "--allow-unit-statistics",
        action="store_true",
        help="accept running means of 0 and variances of 1, as in Caffe's form (BGR) or before training",
    )
    parser.add_argument("--arch", metavar="NAME", help="the architecture: timm/NAME, torchvision/NAME")
    return parser


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The options as they were given, for `read`."""
    return {spec.name: getattr(args, spec.name) for spec in fields(Reading) if hasattr(args, spec.name)}


def check_file(path: Path) -> None:
    """Raises FormatError for anything but a file that can be opened."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            open(path, "rb").close()
    except FileNotFoundError:
        raise FormatError(f"no such file: {path}") from None
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        inside = path / "checkpoint.pt"
        raise FormatError(f"{path} is a directory; expected a file" + (f": {inside}?" if inside.is_file() else ""))
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path} is a device or a pipe; expected a file")


def word(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def some(keys: Iterable[str]) -> str:
    """The number of keys and the first three."""
    keys = sorted(keys)
    first = ", ".join(f"'{k}'" for k in keys[:3])
    return f"{len(keys)} ({first}{', ...' if len(keys) > 3 else ''})"


def reason(error: Exception) -> str:
    """The first sentence of another library's error, or its type if it has no text."""
    text = one_line(error).split(". ")[0]
    return text if " " in text else type(error).__name__
