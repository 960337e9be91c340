"""Detectron2's `.pkl` files: its names for a ResNet's tensors, and a pickle that may build arrays and nothing else."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmask.formats.architectures import check_complete, names_of
from mixmask.formats.source import IMAGENET, FormatError, Reading, Source, check_file, reason, some
from mixmask.formats.torch_files import TRUST, TrustingUnpickler

HEAD = "stem.fc."  # the pre-training's head, which MoCo's and MixMask's script leaves in its files


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


def unpickle(path: Path, trust_pickle: bool = False) -> Any:
    """What a pickle that torch.save did not write holds: arrays and plain types. Raises FormatError for others."""
    try:
        with open(path, "rb") as file:  # latin1: arrays that Python 2 wrote
            content = (TrustingUnpickler if trust_pickle else _ArrayUnpickler)(file, encoding="latin1").load()
    except _NotAnArray as error:
        raise FormatError(
            f"{path} holds pickled objects besides arrays ({error}); refused, and not run; {TRUST}"
        ) from None
    except Exception as error:  # bytes that are no pickle end in any error of the unpickler
        raise FormatError(f"{path} is cut off or damaged, or no pickle at all ({reason(error)})") from None
    blobs = content.get("blobs", content) if isinstance(content, dict) else {}
    if isinstance(blobs, dict) and any(re.fullmatch(r"res\d_\d_branch2a_w", str(key)) for key in blobs):
        raise FormatError(
            f"{path} is in Caffe2's form: made for BGR pixels with a standard deviation of 1, BatchNorm's statistics "
            "folded into its weights; expected weights that PyTorch trained"
        )
    return content


def is_detectron2(content: Any) -> bool:
    """Whether a pickle holds what Detectron2's checkpointer looks for."""
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, dict) and any(isinstance(value, np.ndarray) for value in model.values())


def from_detectron2(content: Any, path: Path, options: Reading) -> Source:
    """A ResNet-50 under Detectron2's names: what `detection/convert.py` writes, and MoCo's and MixMask's script."""
    file = as_detectron2(content, path)
    names = {detectron2_name(name): name for name in names_of("resnet50")}
    head = [name for name in file.weights if name.startswith(HEAD)]
    unlisted = file.weights.keys() - names.keys() - set(head)
    if unlisted:
        raise FormatError(
            f"{path} has {some(unlisted)} of {len(file.weights)} keys that no ResNet-50 of Detectron2 has"
        )
    weights = {names[name]: value for name, value in file.weights.items() if name not in head}
    weights, fields = check_complete(weights, path, options)
    dropped = {"head": len(head)} if head else {}
    return Source("detectron2", weights, dropped=dropped, mean=IMAGENET[0], std=IMAGENET[1], identity="", sha256="",
                  **fields)  # fmt: skip


def read_detectron2(path: str | Path) -> Detectron2File:
    """A `.pkl` of Detectron2, whose pickle may build NumPy arrays and plain types: anything else is refused, unrun.

    Raises FormatError.
    """
    check_file(Path(path))
    return as_detectron2(unpickle(Path(path)), Path(path))


def as_detectron2(content: Any, path: Path) -> Detectron2File:
    """The arrays of a pickle that `unpickle` read. Raises FormatError where they are none, or not Detectron2's."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model:
        raise FormatError(f"{path} is no Detectron2 file: no entry 'model' with names and arrays")
    other = [k for k, v in model.items() if not isinstance(v, np.ndarray) or v.dtype.kind not in "fiu"]
    if other:
        raise FormatError(f"{path}: {other[0]!r} is no array of numbers")
    weights = {
        str(k): torch.from_numpy(np.array(v, dtype=v.dtype.newbyteorder("="), order="C")) for k, v in model.items()
    }
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
