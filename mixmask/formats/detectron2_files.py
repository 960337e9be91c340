"""Detectron2's `.pkl` files: its names for a ResNet's tensors, and a pickle that may build arrays and nothing else."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmask.config import Backbone
from mixmask.formats.resnets import assemble, shapes
from mixmask.formats.source import IMAGENET, FormatError, Source, check_file, reason, some


class Detectron2File(NamedTuple):
    """What a Detectron2 `.pkl` holds."""

    weights: dict[str, Tensor]  # under the names in the file
    author: str | None  # "Caffe2" or none: Detectron2 renames as for its old models, and loses running statistics
    matching_heuristics: bool  # without it, names that lack `backbone.` are not matched: nothing is loaded


def detectron2_name(name: str) -> str:
    """torchvision's name of a tensor -> that of Detectron2's ResNet: layer1.0.bn2.bias -> res2.0.conv2.norm.bias."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def from_detectron2(path: Path) -> Source:
    """A ResNet-50 under Detectron2's names: what `detection/convert.py` writes."""
    file = read_detectron2(path)
    names = {detectron2_name(k): k for k in shapes(Backbone("resnet50", "imagenet", 64, 1))}
    unlisted = file.weights.keys() - names.keys()
    if unlisted:
        raise FormatError(
            f"{path} has {some(unlisted)} of {len(file.weights)} keys that no ResNet-50 of Detectron2 has"
        )
    return assemble("detectron2", {names[k]: v for k, v in file.weights.items()}, {}, IMAGENET, path)


def read_detectron2(path: str | Path) -> Detectron2File:
    """A `.pkl` of Detectron2, whose pickle may build NumPy arrays and plain types: anything else is refused, unrun.

    Raises FormatError.
    """
    path = Path(path)
    check_file(path)
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file).load()
    except _NotAnArray as error:
        raise FormatError(f"{path} holds pickled objects besides arrays ({error}); refused, and not run") from None
    except Exception as error:  # bytes that are no pickle end in any error of the unpickler
        raise FormatError(f"{path} is cut off or damaged, or no pickle at all ({reason(error)})") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model:
        raise FormatError(f"{path} is no Detectron2 file: no entry 'model' with names and arrays")
    other = [k for k, v in model.items() if not isinstance(v, np.ndarray) or v.dtype.kind not in "fiu"]
    if other:
        raise FormatError(f"{path}: {other[0]!r} is no array of numbers")
    weights = {str(k): torch.from_numpy(np.array(v, order="C")) for k, v in model.items()}
    return Detectron2File(weights, content.get("__author__"), bool(content.get("matching_heuristics", False)))


class _NotAnArray(Exception):
    """The name of what a pickle wanted to call."""


class _ArrayUnpickler(pickle.Unpickler):
    """Looks up what NumPy 1 and 2 need to rebuild an array, and nothing else."""

    ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise _NotAnArray(f"{module}.{name}")
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)
