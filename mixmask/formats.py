"""A backbone out of anybody's checkpoint: recognised by its key names, and every key used or dropped by name.

`read` never guesses: a key that no layout lists, a backbone that is not whole, weights that are not finite and files
that would run code are refused. docs/checkpoints.md has the table of layouts and of messages.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixmask import checkpoint
from mixmask import config as configs
from mixmask.backbones import ResNet, build_backbone
from mixmask.checkpoint import CheckpointError
from mixmask.config import Backbone, ConfigError, Convert, Detection, Finetune, KNNEval, Linear, Pretrain
from mixmask.frameworks import build_framework
from mixmask.runs import file_identity, file_sha256

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of pixels in [0, 1]: all public ImageNet models
NOTED = frozenset(("target", "sha256", "identity", "source", "tensors", "arch", "stem", "width", "mean", "std"))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # Un-Mix, unmix_c100.py


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


@dataclass(frozen=True)
class Layout:
    """Where a code base keeps the backbone among its keys (after `module.`, DistributedDataParallel's prefix)."""

    format: str
    prefix: str  # of the backbone's keys
    drops: dict[str, str]  # beginnings of keys that are not the backbone -> what they are
    children: dict[str, str] = field(default_factory=dict)  # numbers of an nn.Sequential -> torchvision's names
    needs: str = ""  # the beginning of a key that must be there as well
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


QUEUE = {"queue": "queue"}
LAYOUTS = (
    Layout(
        "unmix",  # CIFAR: the children of a ResNet in an nn.Sequential, without max pooling
        "encoder_q.net.",
        {"encoder_q.net.9.": "head", "encoder_k.": "momentum encoder", **QUEUE},
        {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"},
        normalisation=CIFAR,
    ),
    Layout("moco", "encoder_q.", {"encoder_q.fc.": "head", "encoder_k.": "momentum encoder", **QUEUE}),
    Layout(
        "moco-v3",
        "base_encoder.",
        {"base_encoder.fc.": "head", "momentum_encoder.": "momentum encoder", "predictor.": "predictor"},
    ),
    Layout(
        "byol",  # a wrapper that holds the network as `net`
        "online_encoder.net.",
        {
            "online_encoder.net.fc.": "classifier",
            "online_encoder.projector.": "head",
            "online_predictor.": "predictor",
            "target_encoder.": "target network",
            "net.": "copy of the backbone",
        },
    ),
    Layout(
        "byol",
        "online_encoder.",
        {"online_encoder.fc.": "head", "target_encoder.": "target network", "predictor.": "predictor"},
    ),
    Layout("simsiam", "encoder.", {"encoder.fc.": "head", "predictor.": "predictor"}),
    Layout(
        "byol",  # one that also holds backbone and projector as a sequence
        "backbone.",
        {
            "backbone.fc.": "classifier",
            "projector.": "head",
            "online_encoder.": "copy of backbone and head",
            "online_predictor.": "predictor",
            "target_encoder.": "target network",
        },
        needs="target_encoder.",
    ),
    Layout(
        "simsiam",
        "backbone.",
        {
            "backbone.fc.": "classifier",
            "projector.": "head",
            "encoder.": "copy of backbone and head",
            "predictor.": "predictor",
        },
        needs="predictor.",
    ),
    Layout(
        "barlowtwins",
        "backbone.",
        {"backbone.fc.": "classifier", "projector.": "head", "bn.": "normalisation of the loss"},
    ),
    Layout("swav", "", {"projection_head.": "head", "prototypes": "prototypes"}, needs="pro"),  # either of the two
    Layout("torchvision", "", {"fc.": "classifier"}),  # timm's ResNets too, and Barlow Twins' resnet50.pth
)

PART = re.compile(r"(conv1|bn1|layer[1-9])\.")  # how the name of each tensor of a ResNet begins


def read(path: str | Path, trust_pickle: bool = False) -> Source:
    """The backbone in a file of ours, of MoCo, Un-Mix, BYOL, SimSiam, SwAV, Barlow Twins, torchvision, timm, or of
    `detection/convert.py`. `trust_pickle` runs whatever code a file of torch.save holds.

    Raises FormatError for anything that is not whole, finite and accounted for key by key.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix == ".safetensors":
        source = _foreign(read_safetensors(path), path)
    elif path.suffix == ".pkl":
        source = _from_detectron2(path)
    else:
        state = _torch_file(path, trust_pickle)
        ours = isinstance(state, dict) and "format" in state and isinstance(state.get("config"), dict)
        source = _ours(state, path) if ours else _foreign(_tensors(state, path), path)
        source = source if ours else replace(source, dropped=source.dropped | _entries(state))
    _check_values(source.weights, path)
    source = replace(source, identity=source.identity or file_identity(path), sha256=file_sha256(path))
    return _with_sidecar(source, path)


def load_backbone(
    path: str | Path, device: torch.device | str = "cpu", trust_pickle: bool = False
) -> tuple[ResNet, Source]:
    """A ResNet with the weights of `read(path)`, in training mode, and where they are from."""
    source = read(path, trust_pickle)
    model = build_backbone(source.backbone)
    checkpoint.load_weights(model, source.weights, path)
    return model.to(device), source


def sidecar(path: str | Path) -> Path:
    """Where `detection/convert.py` writes what a file it wrote does not hold itself."""
    return Path(f"{path}.json")


def read_sidecar(path: str | Path) -> dict[str, Any] | None:
    """What `detection/convert.py` noted of the file at `path`; None where it wrote none.

    Raises FormatError for a note that cannot be read, or that is of another file.
    """
    try:
        note = json.loads(sidecar(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {sidecar(path)}: {_one_line(error)}") from None
    missing = sorted(NOTED - note.keys()) if isinstance(note, dict) else sorted(NOTED)
    if missing:
        raise FormatError(f"{sidecar(path)} is no note of a conversion: it has no '{missing[0]}'")
    _check_note(note, sidecar(path))
    if note["sha256"] != file_sha256(path):
        raise FormatError(f"{path} is not the file that {sidecar(path)} describes (another SHA-256): convert again")
    return note


def _check_note(note: dict[str, Any], path: Path) -> None:
    """Raises FormatError for values that `detection/convert.py` does not write."""
    triple = tuple[float, float, float]
    hints = {"target": str, "sha256": str, "identity": str, "tensors": int, "mean": triple, "std": triple}
    try:
        configs.build(Backbone, {key: note[key] for key in ("arch", "stem", "width")} | {"bn_groups": 1})
        values = {key: configs.convert(note[key], hint, key) for key, hint in hints.items()}
        if not isinstance(note["source"], dict) or not isinstance(note["source"].get("sha256"), str):
            raise ConfigError(f"source: expected a section with 'sha256', found {note['source']!r}")
        if min(values["std"]) <= 0:
            raise ConfigError(f"std: expected numbers above 0, found {note['std']}")
    except ConfigError as error:
        raise FormatError(f"{path} is no note of a conversion: {error}") from None


def _with_sidecar(source: Source, path: Path) -> Source:
    """Whose weights, the kind of stem and the normalisation, of a file that we converted."""
    note = read_sidecar(path)
    if note is None:
        return source
    backbone = Backbone(note["arch"], note["stem"], note["width"], 1)
    if _shapes(backbone) != _shapes(source.backbone):
        what = " of width {0.width} with the {0.stem} stem".format
        raise FormatError(
            f"{sidecar(path)} describes a {backbone.arch}{what(backbone)}, but {path} holds a "
            f"{source.backbone.arch}{what(source.backbone)}"
        )
    return replace(
        source, backbone=backbone, mean=tuple(note["mean"]), std=tuple(note["std"]), identity=note["identity"]
    )


def _check_file(path: Path) -> None:
    if path.is_dir():
        inside = path / "checkpoint.pt"
        raise FormatError(f"{path} is a directory; expected a file" + (f": {inside}?" if inside.is_file() else ""))
    if not path.is_file():
        raise FormatError(f"no such file: {path}")


# ------------------------------------------------------------------------------------------- from keys to a backbone


def _ours(state: dict[str, Any], path: Path) -> Source:
    """A pre-training checkpoint: the recipe says what every key must be."""
    if state["format"] != checkpoint.FORMAT:
        raise FormatError(f"{path} is of format {state['format']!r}; this version reads {checkpoint.FORMAT}")
    if stage := _other_stage(state["config"]):
        raise FormatError(f"{path} is not a pre-training checkpoint: it is a checkpoint of a {stage} run")
    recipe, identity = checkpoint.pretraining(state, path)
    prefix, model = "encoder.backbone.", _tensors({"model": state["model"]}, path)
    with torch.device("meta"):
        expected = build_framework(recipe).state_dict().keys()
    for what, keys in (("lacks", expected - model.keys()), ("has unlisted", model.keys() - expected)):
        if keys:
            raise FormatError(f"{path} is not whole: it {what} {_some(keys)} for a run of {recipe.framework}")
    weights = {k.removeprefix(prefix): v.contiguous() for k, v in model.items() if k.startswith(prefix)}
    dropped = Counter(re.match(r"(encoder\.)?[^.]+", k)[0] for k in model if not k.startswith(prefix))
    backbone = replace(recipe.backbone, bn_groups=1)
    _check_shapes(weights, backbone, path)
    return Source(
        "mixmask", weights, backbone, dict(dropped), recipe.augment.mean, recipe.augment.std, identity, "", recipe
    )


def _other_stage(config: dict[str, Any]) -> str | None:
    """Which stage's config this is, unless it is the pre-training's or nobody's."""
    stages = {"kNN": KNNEval, "linear": Linear, "finetune": Finetune, "convert": Convert, "detection": Detection}
    for stage, cls in stages.items():
        with contextlib.suppress(ConfigError):
            configs.build(cls, config)
            return stage
    return None


def _foreign(tensors: dict[str, Tensor], path: Path) -> Source:
    """The first layout that the keys fit; `module.` in front of all of them is DistributedDataParallel's."""
    if tensors and all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    layout = next((layout for layout in LAYOUTS if _fits(layout, tensors)), None)
    if layout is None:
        raise FormatError(
            f"{path} holds no backbone that we know: found {_prefixes(tensors)}; expected {_expected()}, or none"
        )
    weights, dropped, unlisted = {}, Counter(), []
    for key, value in tensors.items():
        name = _name(layout, key)
        what = next((what for start, what in layout.drops.items() if key.startswith(start)), None)
        if name:
            weights[name] = value.contiguous()
        elif what:
            dropped[what] += 1
        else:
            unlisted.append(key)
    if unlisted:
        raise FormatError(
            f"{path} looks like {layout.format} ('{layout.prefix}'), but {len(unlisted)} of its {len(tensors)} keys "
            f"are not in that layout: {_prefixes(unlisted)}; first: '{unlisted[0]}'"
        )
    return _assemble(layout.format, weights, dict(dropped), layout.normalisation, path, layout.prefix)


def _fits(layout: Layout, tensors: Mapping[str, Tensor]) -> bool:
    needed = not layout.needs or any(k.startswith(layout.needs) for k in tensors)
    return needed and any(_name(layout, key) for key in tensors)


def _name(layout: Layout, key: str) -> str | None:
    """torchvision's name of a key of the backbone; None for any other key."""
    if not key.startswith(layout.prefix):
        return None
    name = key.removeprefix(layout.prefix)
    if layout.children:
        number, dot, rest = name.partition(".")
        name = f"{layout.children.get(number, number)}{dot}{rest}"
    return name if PART.match(name) else None


def _assemble(
    name: str, weights: dict[str, Tensor], dropped: dict[str, int], normalisation: tuple, path: Path, prefix: str = ""
) -> Source:
    """A Source of what is not ours: the architecture follows from the keys and shapes."""
    arch = "resnet50" if any(re.match(r"layer\d\.\d+\.conv3", k) for k in weights) else "resnet18"
    counters = {k for k in _shapes(Backbone(arch, "imagenet", 64, 1)) if k.endswith("num_batches_tracked")}
    added = 0 if counters & weights.keys() else len(counters)
    weights |= {k: torch.tensor(0) for k in counters if added}
    _check_keys(weights, arch, path, prefix)
    backbone = Backbone(arch, _stem(weights["conv1.weight"], path), len(weights["conv1.weight"]), 1)
    _check_shapes(weights, backbone, path)
    weights = {k: weights[k] for k in _shapes(backbone)}  # in one order, whatever the file's
    return Source(name, weights, backbone, dropped, *normalisation, identity="", sha256="", added=added)


def _from_detectron2(path: Path) -> Source:
    """A ResNet-50 under Detectron2's names: what `detection/convert.py` writes."""
    file = read_detectron2(path)
    names = {detectron2_name(k): k for k in _shapes(Backbone("resnet50", "imagenet", 64, 1))}
    unlisted = file.weights.keys() - names.keys()
    if unlisted:
        raise FormatError(
            f"{path} has {_some(unlisted)} of {len(file.weights)} keys that no ResNet-50 of Detectron2 has"
        )
    return _assemble("detectron2", {names[k]: v for k, v in file.weights.items()}, {}, IMAGENET, path)


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
def _shapes(backbone: Backbone) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in build_backbone(backbone).state_dict().items()}


def _check_keys(weights: Mapping[str, Tensor], arch: str, path: Path, prefix: str) -> None:
    expected = _shapes(Backbone(arch, "imagenet", 64, 1)).keys()
    missing, extra = expected - weights.keys(), weights.keys() - expected
    if missing or extra:
        found = len(expected & weights.keys())
        where = f" under '{prefix}'" if prefix else ""
        raise FormatError(
            f"{path} holds no whole {arch}{where}: {found} of {len(expected)} keys"
            + (f"; missing {_some(missing)}" if missing else "")
            + (f"; unexpected {_some(extra)}" if extra else "")
        )


def _check_shapes(weights: Mapping[str, Tensor], backbone: Backbone, path: Path) -> None:
    for key, shape in _shapes(backbone).items():
        value, dtype = weights[key], torch.int64 if key.endswith("num_batches_tracked") else torch.float32
        if value.shape != shape or value.dtype != dtype:
            raise FormatError(
                f"{path}: '{key}' is {tuple(value.shape)} of {_word(value.dtype)}; expected {tuple(shape)} of "
                f"{_word(dtype)} ({backbone.arch}, width {backbone.width}, {backbone.stem} stem)"
            )


def _check_values(weights: Mapping[str, Tensor], path: Path) -> None:
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise FormatError(f"{path}: {count} of the {value.numel()} values of '{key}' are not finite")
        if key.endswith(("running_var", "num_batches_tracked")) and (value < 0).any():
            raise FormatError(f"{path}: '{key}' has a negative value ({value.min().item():g}); expected 0 or more")
        if value.ndim == 4 and not value.any():
            raise FormatError(f"{path}: all {value.numel()} weights of the convolution '{key}' are zero")


def _word(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _some(keys: Any) -> str:
    """The number of keys and the first three."""
    first = ", ".join(f"'{k}'" for k in sorted(keys)[:3])
    return f"{len(keys)} ({first}{', ...' if len(keys) > 3 else ''})"


def _prefixes(keys: Any) -> str:
    """What stands before the names of a ResNet's tensors, or else the first word of each key; with counts."""
    found = Counter()
    for key in keys:
        inside = re.search(r"(^|\.)(conv1|bn1|layer[1-9])\.", key)
        found[key[: inside.start() + len(inside[1])] if inside else key.split(".")[0]] += 1
    parts = [f"'{prefix}' ({count} keys)" for prefix, count in found.most_common(6)]
    return ", ".join(parts) + (", ..." if len(found) > 6 else "") if parts else "no keys at all"


def _expected() -> str:
    prefixes = dict.fromkeys(layout.prefix for layout in LAYOUTS if layout.prefix)
    return ", ".join(f"'{p}' ({'/'.join(sorted({x.format for x in LAYOUTS if x.prefix == p}))})" for p in prefixes)


# ----------------------------------------------------------------------------------------------- files of torch.save


def _torch_file(path: Path, trust_pickle: bool) -> Any:
    """What torch.save wrote, in either of its two file formats."""
    _check_archive(path)
    try:
        with warnings.catch_warnings():  # about sparse and quantized tensors, which are refused by name
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except (ImportError, AttributeError) as error:
        raise FormatError(f"{path} needs code that is not here ({_one_line(error)})") from None
    except Exception as error:  # bytes that are no checkpoint end in any error of torch's reader
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is None:
            what = f"is cut off or damaged, or no checkpoint at all ({_reason(error)})"
            raise FormatError(f"{path} {what}{checkpoint.remedy(path)}") from None
        raise FormatError(
            f"{path} holds pickled objects besides tensors and plain types ({name[1]}); refused, and nothing in it was "
            "run; if you trust whoever made the file: --trust-pickle"
        ) from None


def _check_archive(path: Path) -> None:
    """The newer of the two formats, a zip archive, has checksums, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        what = f"{path} is cut off or damaged ({_one_line(error)}){checkpoint.remedy(path)}"
        raise FormatError(what) from None
    what = f"is damaged: the checksum of {damaged} is wrong" if damaged else checkpoint.damage(path)
    if what:
        raise FormatError(f"{path} {what}{checkpoint.remedy(path)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _reason(error: Exception) -> str:
    """The first sentence of an error of somebody's reader; its type where it says nothing."""
    text = _one_line(error).split(". ")[0]
    return text if " " in text else type(error).__name__


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The state dict: the file's content itself, or its entry `state_dict` or `model`."""
    if isinstance(state, dict):
        inner = _state_dicts(state)
        if len(inner) > 1:
            raise FormatError(f"{path} has both 'state_dict' and 'model'; expected one of them")
        state = state[inner[0]] if inner else state
    if not isinstance(state, dict):
        raise FormatError(f"{path} holds a {type(state).__name__}; expected names and tensors (a state dict)")
    other = [k for k, v in state.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if other or not state:
        found = f"{other[0]!r} is a {type(state[other[0]]).__name__}" if other else "nothing in it"
        raise FormatError(
            f"{path} holds no state dict ({found}; entries: {', '.join(map(str, list(state)[:6])) or 'none'}); "
            "expected tensors by name, as such or under 'state_dict' or 'model'"
        )
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "on the meta device" if value.is_meta else _word(value.layout)
            raise FormatError(f"{path}: '{key}' is {kind}; expected a dense tensor with its values")
    return {key: value.detach() for key, value in state.items()}


def _state_dicts(state: dict[str, Any]) -> list[str]:
    return [name for name in ("state_dict", "model") if isinstance(state.get(name), dict)]


def _entries(state: dict[str, Any]) -> dict[str, int]:
    """What stands beside the state dict and is more than a plain value: "entry NAME" -> how many entries it has."""
    used = _state_dicts(state)
    parts = {k: v for k, v in state.items() if used and k not in used and isinstance(v, dict | list | Tensor)}
    return {f"entry {k}": 1 if isinstance(v, Tensor) else len(v) for k, v in parts.items()}


# ------------------------------------------------------------------------------------------------------- safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Names -> tensors, of the shapes and types in the header, of a safetensors file on the CPU.

    The file is a length (8 bytes), a JSON header, and the bytes of all tensors.

    Raises FormatError unless the tensors follow one another and fill the file exactly.
    """
    content = Path(path).read_bytes()
    size = int.from_bytes(content[:8], "little")
    try:
        if not 2 <= size <= len(content) - 8:
            raise ValueError(f"a header of {size} bytes in a file of {len(content)}")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        return _cut(header, content[8 + size :])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # RuntimeError: of reshape
        raise FormatError(f"{path} is cut off or damaged, or no safetensors file ({_one_line(error)})") from None


def _cut(header: dict[str, Any], data: bytes) -> dict[str, Tensor]:
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
        if start != position or end > len(data) or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"'{name}' is at {start}:{end} of {len(data)} bytes, for {shape} of {_word(dtype)}")
        raw = torch.frombuffer(bytearray(data[start:end]), dtype=dtype) if end > start else torch.empty(0, dtype=dtype)
        tensors[name], position = raw.reshape(shape), end
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes belong to no tensor")
    return tensors


# -------------------------------------------------------------------------------------------------------- Detectron2


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


def read_detectron2(path: str | Path) -> Detectron2File:
    """A `.pkl` of Detectron2, whose pickle may build NumPy arrays and plain types: anything else is refused, unrun.

    Raises FormatError.
    """
    path = Path(path)
    _check_file(path)
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file).load()
    except _NotAnArray as error:
        raise FormatError(f"{path} holds pickled objects besides arrays ({error}); refused, and not run") from None
    except Exception as error:  # bytes that are no pickle end in any error of the unpickler
        raise FormatError(f"{path} is cut off or damaged, or no pickle at all ({_reason(error)})") from None
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
