"""A backbone from any code's checkpoint: found by its key names, and every key used or dropped by name.

`read` never guesses: several backbones, one that is not whole, weights that are not finite and files that would run
code are refused. docs/checkpoints.md has the tables of layouts and of messages.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmask import checkpoint
from mixmask.backbones import Encoder, build_backbone
from mixmask.config import Backbone
from mixmask.config.resnets import ARCHITECTURES
from mixmask.formats.architectures import check_statistics, check_values
from mixmask.formats.detectron2_files import from_detectron2, is_detectron2, unpickle
from mixmask.formats.notes import read_sidecar, with_sidecar
from mixmask.formats.ours import ours
from mixmask.formats.safetensors_files import is_safetensors, read_safetensors
from mixmask.formats.source import FormatError, Reading, Source, check_file
from mixmask.formats.state_dicts import flat, network_of
from mixmask.formats.structure import backbone_of, titles
from mixmask.formats.torch_files import is_older_torch, torch_file
from mixmask.networks import feature_width
from mixmask.runs import file_identity, file_sha256

OTHER = {  # first bytes of files that people mistake for a checkpoint -> what they are
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: fetch it with git lfs pull",
    b"<": "an HTML or XML page, as a failed download leaves it: download the file again",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes: not PyTorch weights",
    b"\x93NUMPY": "a single NumPy array",
}


def read(path: str | Path, trust_pickle: bool = False, **options: Any) -> Source:
    """The backbone in a file of ours, of `detection/convert.py`, or of any code that saves a ResNet in PyTorch's or
    safetensors' form, or Detectron2's; what kind of file it is follows from its bytes. Options: those of `Reading`.

    Raises FormatError for anything that is not whole, finite and accounted for key by key, or not the only one.
    """
    path, options = Path(path), Reading(trust_pickle, **options)
    check_file(path)
    if (note := read_sidecar(path)) and note["arch"] not in ARCHITECTURES:
        options = replace(options, arch=note["arch"], stem=note["stem"])
    source = _read(path, options)
    if options.arch not in (None, source.backbone.arch):
        raise FormatError(f"{path} holds a {source.backbone.arch}; expected a {options.arch}")
    check_values(source.weights, path)
    source = replace(source, identity=source.identity or _identity(path, source.taken), sha256=file_sha256(path))
    noted = with_sidecar(source, path)
    if noted is source and source.recipe is None and not options.allow_unit_statistics:  # neither ours nor ours once
        check_statistics(source.weights, path)
    return noted


def load_backbone(
    path: str | Path, device: torch.device | str = "cpu", trust_pickle: bool = False, **options: Any
) -> nn.Module:
    """The network with the weights of `read(path, ...)`, images (N, 3, H, W) -> pooled features (N, D), in evaluation
    mode. Its `source` says where they are from and how images are normalised; it prints as one line."""
    source = read(path, trust_pickle, **options)
    model = build_backbone(source.backbone)
    checkpoint.load_weights(model, source.weights, path)
    model.line = f"{source.backbone.arch}, {feature_width(model)} features, of {source.identity} ({source.format})"
    model.__class__ = _one_line(type(model))
    model.source = replace(source, weights={})  # the network holds them
    return model.eval().to(device)


class _OneLine:
    """Added to a network that was read: it prints as its `line`, also when copied or unpickled."""

    def __repr__(self) -> str:
        return self.line

    def __reduce_ex__(self, _: int) -> tuple:
        return _blank, (type(self).__bases__[1],), self.__dict__


def _one_line(network: type[nn.Module]) -> type[nn.Module]:
    return type(network.__name__, (_OneLine, network), {})


def _blank(network: type[nn.Module]) -> nn.Module:
    """An empty network, from which unpickling starts."""
    return _one_line(network).__new__(_one_line(network))


def read_for(path: str | Path, backbone: Backbone) -> Source:
    """`read`, for a network that starts from the file's weights. Raises FormatError for another architecture."""
    source = read(path, arch=None if backbone.arch in ARCHITECTURES else backbone.arch, stem=backbone.stem)
    asked, held = ((b.arch, b.width, b.stem) for b in (backbone, source.backbone))
    if held[0] in ARCHITECTURES and source.recipe is None and held[2] != "imagenet" != asked[2]:
        held = (*held[:2], asked[2])  # a third-party file does not say which small stem it has
    if asked != held:
        words = "{} of width {} with the {} stem".format
        raise FormatError(f"{path} holds a {words(*held)}; expected a {words(*asked)}")
    return source


def frozen_encoder(path: Path, foreign: Source | None, device: torch.device) -> tuple[Encoder, tuple, tuple, str]:
    """The encoder in evaluation mode without gradients, mean and std of its images, and what it is, in words.

    `foreign`: what was read from the file, if it is a third party's; its head is missing.
    """
    if foreign is None:
        encoder, recipe, _ = checkpoint.load_encoder(path, device)
        return encoder, recipe.augment.mean, recipe.augment.std, f"{recipe.framework}, {recipe.method}"
    backbone = build_backbone(foreign.backbone)
    checkpoint.load_weights(backbone, foreign.weights, path)
    encoder = Encoder(backbone, nn.Identity()).requires_grad_(False).eval().to(device)
    return encoder, foreign.mean, foreign.std, f"{foreign.format}; {foreign.backbone.arch}"


def _read(path: Path, options: Reading) -> Source:
    with open(path, "rb") as file:
        head = file.read(512)
    if is_safetensors(path, head):
        return backbone_of(read_safetensors(path), path, options)
    if what := next((what for start, what in OTHER.items() if head.startswith(start)), None):
        raise FormatError(f"{path} is {what}")
    if head[257:262] == b"ustar":
        raise FormatError(f"{path} is a tar archive: unpack it first (PyTorch's own .pth.tar files are not)")
    zipped = head.startswith(b"PK\3\4")
    if not zipped and not is_older_torch(head) and (path.suffix == ".pkl" or head.startswith(b"\x80")):
        content = unpickle(path, options.trust_pickle)
        return from_detectron2(content, path, options) if is_detectron2(content) else _in(content, path, options)
    return _in(torch_file(path, options.trust_pickle), path, options)


def _in(content: Any, path: Path, options: Reading) -> Source:
    """The backbone in what a file holds."""
    if isinstance(content, dict) and "format" in content and isinstance(content.get("config"), dict):
        return ours(content, path)
    tensors, beside = _tensors(content, path, options)
    try:
        source = backbone_of(tensors, path, options)
    except FormatError as error:
        others = titles(flat(content, path)) if beside and options.take is None and not titles(tensors) else []
        if not others:
            raise
        names = ", ".join(f"'{name}'" for name in others)
        raise FormatError(f"{error}; beside it is {names}, which --take NAME reads") from None
    return replace(source, dropped=source.dropped | beside)


def _tensors(content: Any, path: Path, options: Reading) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Those among which to look for the backbone: the network's, or all where `options.take` names something else."""
    if options.take is not None and titles(everything := flat(content, path), options.take):
        return everything, {}
    return network_of(content, path)


def _identity(path: Path, taken: str) -> str:
    """Whose weights: NAME@SHA256; NAME.TAKEN@SHA256 where a file holds several."""
    name, _, digits = file_identity(path).rpartition("@")
    return f"{name}{'.' + re.sub(r'[^A-Za-z0-9_.]+', '_', taken) if taken else ''}@{digits}"
