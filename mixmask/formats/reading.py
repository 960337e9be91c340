"""A backbone out of anybody's checkpoint: recognised by its key names, and every key used or dropped by name.

`read` never guesses: a key that no layout lists, a backbone that is not whole, weights that are not finite and files
that would run code are refused. docs/checkpoints.md has the table of layouts and of messages.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixmask import checkpoint
from mixmask.backbones import ResNet, build_backbone
from mixmask.formats.detectron2_files import from_detectron2
from mixmask.formats.layouts import foreign
from mixmask.formats.notes import with_sidecar
from mixmask.formats.ours import ours
from mixmask.formats.resnets import check_values
from mixmask.formats.safetensors_files import read_safetensors
from mixmask.formats.source import Source, check_file
from mixmask.formats.torch_files import entries, tensors, torch_file
from mixmask.runs import file_identity, file_sha256


def read(path: str | Path, trust_pickle: bool = False) -> Source:
    """The backbone in a file of ours, of MoCo, Un-Mix, BYOL, SimSiam, SwAV, Barlow Twins, torchvision, timm, or of
    `detection/convert.py`. `trust_pickle` runs whatever code a file of torch.save holds.

    Raises FormatError for anything that is not whole, finite and accounted for key by key.
    """
    path = Path(path)
    check_file(path)
    if path.suffix == ".safetensors":
        source = foreign(read_safetensors(path), path)
    elif path.suffix == ".pkl":
        source = from_detectron2(path)
    else:
        source = _of_torch_file(torch_file(path, trust_pickle), path)
    check_values(source.weights, path)
    source = replace(source, identity=source.identity or file_identity(path), sha256=file_sha256(path))
    return with_sidecar(source, path)


def _of_torch_file(state: Any, path: Path) -> Source:
    if isinstance(state, dict) and "format" in state and isinstance(state.get("config"), dict):
        return ours(state, path)
    source = foreign(tensors(state, path), path)
    return replace(source, dropped=source.dropped | entries(state))


def load_backbone(
    path: str | Path, device: torch.device | str = "cpu", trust_pickle: bool = False
) -> tuple[ResNet, Source]:
    """A ResNet with the weights of `read(path)`, in training mode, and where they are from."""
    source = read(path, trust_pickle)
    model = build_backbone(source.backbone)
    checkpoint.load_weights(model, source.weights, path)
    return model.to(device), source
