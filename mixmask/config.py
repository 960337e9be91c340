"""Recipes: YAML -> validated, frozen dataclasses; dotted overrides; a hash of everything that decides a number.

A recipe file lists every hyper-parameter of its table, so that no default decides a reported number. Fields that have
a default here were added after the recipes, or describe an operation that is absent; a field at its default is left
out of the hash, so that adding one does not rename the runs that exist. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml


class UserError(Exception):
    """Something the person at the keyboard can mend; its text is one clear line."""


class ConfigError(UserError, ValueError):
    """A recipe, an override or a setting is wrong; the text names the key, what was found and what was expected."""


def within(low: float | None = None, high: float | None = None, default: Any = MISSING, interval: bool = False) -> Any:
    """A dataclass field whose number (or each number of a tuple) lies in [low, high]; `interval`: smaller one first."""
    return field(default=default, metadata={"low": low, "high": high, "interval": interval})


def check_fields(config: Any) -> None:
    """The `__post_init__` of settings that other programs make themselves: each field is checked as a recipe's is.

    Raises ConfigError, which names the field. A whole number that stands for a float becomes one, a list a tuple.
    """
    hints = _hints(type(config))
    for spec in dataclasses.fields(config):
        where = f"{type(config).__name__}.{spec.name}"
        value = _check(convert(getattr(config, spec.name), hints[spec.name], where), spec, where)
        object.__setattr__(config, spec.name, value)


# ---------------------------------------------------------------------------------------------- pre-training

Permutation = Literal["reverse", "random", "derangement"]  # derangement: a random one that leaves nobody in place


@dataclass(frozen=True)
class Backbone:
    """ResNet and its stem (Tables 8, 9; stems: docs/fidelity.md)."""

    arch: Literal["resnet18", "resnet50"]
    stem: Literal["cifar", "tiny", "imagenet"]
    width: int = within(1)  # channels of the first stage; 64 in the paper
    bn_groups: int = within(1)  # split BatchNorm: how many parts of the batch have their own statistics


@dataclass(frozen=True)
class Mask:
    """Section 4.1 and Table 1: which cells of a grid show image i."""

    type: Literal["block", "discrete"]
    block_impl: Literal["repaired", "literal"]
    grid: int = within(2)  # cells along a side
    ratio: float | tuple[float, float] = within(0, 1, interval=True)  # lambda aimed at; [a, b]: U(a, b) per mask
    switch: bool = True  # the (1 - lambda) term of Eq. 6
    permutation: Permutation = "reverse"  # partner of image i in plain MixMask
    per_image: bool = False  # a mask and a lambda for each image; false: one for each mix group (Section 3.2)

    __post_init__ = check_fields


@dataclass(frozen=True)
class UnMix:
    """Un-Mix: probability of the global mixture (Mixup); otherwise CutMix (Tables 8, 9)."""

    prob: float = within(0, 1)

    __post_init__ = check_fields


@dataclass(frozen=True)
class Both:
    """Un-Mix and MixMask together (Algorithm 1, Table 2): `random` is "Different", `reverse` is "Same"."""

    permutation: Permutation


@dataclass(frozen=True)
class Erase:
    """The plain erase baseline (Figure 2, dashed box): what fills the cells that the mask removes."""

    fill: Literal["zero", "noise"]

    __post_init__ = check_fields


@dataclass(frozen=True)
class MSCN:
    """Our reconstruction of Masked Siamese ConvNets (Jing, Zhu, LeCun 2022), whose code is not public: see
    docs/fidelity.md for the source of each value. The defaults are those for views of 224 pixels."""

    grid: int = within(2, default=7)  # cells along a side, of views and of crops
    ratio: tuple[float, float] = within(0, 1, default=(0.05, 0.25), interval=True)  # share of the cells that is removed
    focal_prob: float = within(0, 1, default=0.2)  # a window stays, what surrounds it is removed; otherwise a grid mask
    focal_side: float = within(0, 1, default=200 / 224)  # of the window, as a share of the view's side
    spatial_prob: float = within(0, 1, default=0.3)  # a grid mask removes the same cells in every channel
    noise: float = within(0, default=1.0)  # standard deviation of the noise that fills what is removed
    crops: int = within(0, default=2)  # extra masked crops of the raw image
    crop_size: int = within(1, default=96)  # their side, pixels
    crop_scale: tuple[float, float] = within(1e-3, 1, default=(0.05, 0.2), interval=True)
    keep_clean: bool = False  # also the framework's own loss of the clean pair
    mean: bool = False  # the masked terms are averaged, not summed


@dataclass(frozen=True)
class Optimizer:
    """Tables 8, 9. `lr` is the rate that is used: nothing scales it by batch size or number of processes."""

    name: Literal["sgd", "adam"]
    lr: float = within(0)
    weight_decay: float = within(0)
    momentum: float = within(0, 1, default=0.0)  # of SGD; Adam takes none


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the iteration (see mixmask/schedules.py)."""

    kind: Literal["cosine", "step", "exponential"]
    unit: Literal["epoch", "iteration"] = "epoch"  # how often the rate changes
    first_epoch: int = within(0, 1, default=0)  # cosine by epoch: 0 ... E-1, or 1 ... E (Un-Mix's CIFAR script)
    warmup_epochs: int = within(0, default=0)  # linear, from 0
    warmup_iterations: int = within(0, default=0)  # linear, from lr / warmup_iterations
    milestones: tuple[int, ...] = ()  # step: epochs at which the rate is multiplied; negative ones count from the end
    gamma: float = within(0, 1, default=0.1)
    last_lr: float = within(0, default=0.0)  # exponential: falls by one ratio every epoch, to this after the last one

    def __post_init__(self) -> None:
        if self.kind == "exponential" and not self.last_lr:
            raise ConfigError("schedule.last_lr: an exponential schedule ends above 0, found 0")


@dataclass(frozen=True)
class Augment:
    """One view's augmentation: the operations, in the order in which they are applied, and their parameters."""

    order: tuple[Literal["crop", "flip", "jitter", "grayscale", "blur"], ...]
    size: int = within(1)  # side of a view, pixels
    crop_scale: tuple[float, float] = within(1e-3, 1, default=(1.0, 1.0), interval=True)
    crop_ratio: tuple[float, float] = within(1e-3, default=(0.75, 4 / 3), interval=True)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip_prob: float = within(0, 1, default=0.0)
    jitter: tuple[float, float, float, float] = within(0, default=(0.0, 0.0, 0.0, 0.0))  # b, c, s, hue
    jitter_prob: float = within(0, 1, default=0.0)
    grayscale_prob: float = within(0, 1, default=0.0)
    blur_prob: float = within(0, 1, default=0.0)
    blur_sigma: tuple[float, float] = within(0, default=(0.1, 2.0), interval=True)  # pixels
    mean: tuple[float, ...] = ()  # per channel, of pixels in [0, 1]; empty: those of the checkpoint that is evaluated
    std: tuple[float, ...] = within(1e-6, default=())

    def __post_init__(self) -> None:
        if len(set(self.order)) < len(self.order):
            raise ConfigError(f"augment.order: expected each operation once, found {list(self.order)}")
        if self.jitter[3] > 0.5:
            raise ConfigError(f"augment.jitter: expected a hue of at most 0.5 (half a turn), found {self.jitter[3]:g}")


@dataclass(frozen=True)
class KNN:
    """k-NN accuracy: weighted by cosine (Wu et al. 2018, as in MoCo's CIFAR demo), or a Euclidean majority (htdt)."""

    k: int = within(1)
    temperature: float = within(0, default=0.0)  # weighted: a neighbour's vote is exp(similarity / temperature)
    features: Literal["output", "backbone"] = field(kw_only=True)  # the head's output (MoCo: 128-d) or pooled features
    every: int = field(kw_only=True, metadata={"low": 0, "hashed": False})  # epochs between; 0: only after the last
    distance: Literal["cosine", "euclidean"] = "cosine"  # euclidean: of the features as they are, not of unit length
    vote: Literal["weighted", "majority"] = "weighted"  # majority: one neighbour, one vote; ties: the lowest class

    def __post_init__(self) -> None:
        if (self.vote == "weighted") != (self.temperature > 0):
            expected = "a number above 0 for a weighted vote" if self.vote == "weighted" else "none for a majority vote"
            raise ConfigError(f"knn.temperature: expected {expected}, found {self.temperature:g}")


@dataclass(frozen=True)
class Execution:
    """Where and how a run is carried out: nothing here changes a number, so nothing here is hashed."""

    data_root: str = "data"
    download: bool = True  # fetch CIFAR-100 where it is missing
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = within(0, default=8)  # processes that decode images (ImageNet)
    log_every: int = within(1, default=10)  # iterations between log lines
    checkpoint_every: int = within(1, default=1)  # epochs between checkpoints
    checkpoint_minutes: float = within(0, default=15.0)  # and within a long epoch: minutes between checkpoints
    channels_last: bool = True
    compile: bool = False  # torch.compile of the backbones: a minute at the start, and a C++ compiler on a CPU


@dataclass(frozen=True)
class Pretrain:
    """A pre-training run. `settings` is the section named after the framework (`moco:`), validated by its class."""

    recipe: str
    dataset: str
    framework: str
    method: str
    epochs: int = within(1)
    batch_size: int = within(1)  # total, over all processes
    seed: int = within(0)
    mix_groups: int = within(1)  # parts of the batch that draw their own mask, permutation and pairs
    precision: Literal["fp32", "bf16"]
    backbone: Backbone
    settings: Mapping[str, Any]
    mask: Mask
    unmix: UnMix
    both: Both
    erase: Erase
    optimizer: Optimizer
    schedule: Schedule
    augment: Augment
    knn: KNN
    mscn: MSCN = MSCN()
    allow_partial_data: bool = False  # accept an incomplete Tiny-ImageNet or ImageNet: not the paper\'s data
    run: Execution = Execution()


# ------------------------------------------------------------------------------------------------ evaluation


@dataclass(frozen=True)
class KNNEval:
    """Offline k-NN on a checkpoint (`eval/knn.py`)."""

    recipe: str
    dataset: str
    seed: int = within(0)
    knn: KNN
    checkpoint: str = ""  # the pre-training run's identity, filled in by eval/knn.py
    allow_partial_data: bool = False  # accept an incomplete Tiny-ImageNet or ImageNet: not the paper\'s data
    run: Execution = Execution()


@dataclass(frozen=True)
class Linear:
    """A linear probe (`eval/linear.py`): a frozen encoder, and a classifier on its pooled features."""

    recipe: str
    dataset: str
    epochs: int = within(1)
    batch_size: int = within(1)
    seed: int = within(0)
    optimizer: Optimizer
    schedule: Schedule
    augment: Augment
    test_resize: int = within(0)  # shorter side before the centre crop; 0: none
    features: Literal["augmented", "cached"] = "augmented"  # of views drawn anew each epoch, or of test views, once
    init: Literal["normal", "uniform"] = "normal"  # N(0, 0.01) and bias 0 (MoCo), or PyTorch's own (htdt, PatrickHua)
    checkpoint: str = ""  # the pre-training run's identity, filled in by eval/linear.py
    allow_partial_data: bool = False  # accept an incomplete Tiny-ImageNet or ImageNet: not the paper\'s data
    run: Execution = Execution()


@dataclass(frozen=True)
class Finetune:
    """Fine-tuning of a whole network on some of the labels (`eval/finetune.py`; Table 10)."""

    recipe: str
    dataset: str
    labels: float = within(0, 100)  # percent of the training labels, above 0
    epochs: int = within(1)
    batch_size: int = within(1)
    seed: int = within(0)
    backbone_lr: float = within(0)  # Table 10, "lr stem": of all that the checkpoint holds
    optimizer: Optimizer  # its lr is the classifier's
    schedule: Schedule  # of both rates
    augment: Augment
    test_resize: int = within(0)  # shorter side before the centre crop; 0: none
    label_list: Literal["balanced", "simclr"] = "balanced"  # which images are labelled (mixmask/labels.py)
    subset_seed: int = within(0, default=0)  # balanced: which subset; the same one for every `seed`
    bn_groups: int = within(1, default=1)  # parts of the batch that have their own BatchNorm statistics
    init: Literal["checkpoint", "random"] = "checkpoint"  # random: the checkpoint gives the architecture alone
    checkpoint: str = ""  # the identity of the weights, filled in by eval/finetune.py
    allow_partial_data: bool = False  # accept an incomplete Tiny-ImageNet or ImageNet: not the paper's data
    run: Execution = Execution()

    def __post_init__(self) -> None:
        if not self.labels:
            raise ConfigError("labels: expected a percentage above 0 and at most 100, found 0")


@dataclass(frozen=True)
class Convert:
    """A backbone rewritten for other code (`detection/convert.py`)."""

    recipe: str
    target: Literal["detectron2", "torchvision", "timm"]
    seed: int = within(0)  # the pre-training's; nothing here is random
    checkpoint: str = ""  # whose weights, filled in by detection/convert.py
    run: Execution = Execution()


GIVEN = {  # keys of Detectron2 -> what gives their value here
    "detectron2.MODEL.DEVICE": "run.device",
    "detectron2.MODEL.WEIGHTS": "--weights",
    "detectron2.DATALOADER.NUM_WORKERS": "run.workers",
    "detectron2.SEED": "seed",
    "detectron2.OUTPUT_DIR": "--run-dir",
    "detectron2.DATASETS.TRAIN": "task",
    "detectron2.DATASETS.TEST": "task",
}


@dataclass(frozen=True)
class Detection:
    """Transfer to object detection (`detection/train.py`; Section 4.5, Table 7).

    `detectron2` is a section in Detectron2's own words: its keys, nested as in its config files.
    """

    recipe: str
    task: Literal["voc", "coco"]
    seed: int = within(0)
    group: int = within(1)  # images in a row that are all wide or all upright: those of one GPU in Detectron2
    detectron2: Mapping[str, Any]
    data: Literal["full", "photos"] = "full"  # photos: small trees in the same form, made of embedded photographs
    checkpoint: str = ""  # the identity of the weights, filled in by detection/train.py
    eval_every: int = field(default=0, metadata={"low": 0, "hashed": False})  # iterations; 0: only after the last
    allow_partial_data: bool = False  # accept other numbers of images than VOC's and COCO's: not the paper's data
    run: Execution = Execution()

    def __post_init__(self) -> None:
        for key in flatten({"detectron2": self.detectron2}):
            if key in GIVEN:
                raise ConfigError(f"{key}: is given by {GIVEN[key]}")


Config = Pretrain | KNNEval | Linear | Finetune | Convert | Detection  # of a stage


# ------------------------------------------------------------------------------------- from mapping to dataclass

T = TypeVar("T")

_hints = functools.cache(typing.get_type_hints)


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """`values` as an instance of the dataclass `cls`. Raises ConfigError for an unknown, missing or wrong key."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the recipe'}: expected a section of keys, found {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key '{_dot(where, key)}'{nearest(key, fields, where)}")
    hints = _hints(cls)
    result = {}
    for name, spec in fields.items():
        if name in values:
            result[name] = _check(convert(values[name], hints[name], _dot(where, name)), spec, _dot(where, name))
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ConfigError(f"missing key '{_dot(where, name)}'")
    return cls(**result)


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type; YAML's `1e-4` (a string) and whole-numbered floats are understood.

    Raises ConfigError, which names the key (`where`, dotted), for any other value.
    """
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, args))}; found {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        hint = args[1] if isinstance(value, list | tuple) else args[0]
        return convert(value, hint, where)
    if origin is tuple:
        return _convert_tuple(value, args, where)
    if hint is float and type(value) in (int, float, str):
        with contextlib.suppress(ValueError):  # not a number: the message below
            if math.isfinite(float(value)):
                return float(value)
    elif hint is Any or type(value) is hint or (origin in (Mapping, dict) and isinstance(value, Mapping)):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    raise ConfigError(f"{where}: expected {names.get(hint, hint)}, found {value!r}")


def _convert_tuple(value: Any, args: tuple, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list, found {value!r}")
    many = args[-1] is Ellipsis
    if not many and len(value) != len(args):
        raise ConfigError(f"{where}: expected {len(args)} values, found {len(value)}")
    return tuple(convert(v, args[0] if many else args[i], f"{where}[{i}]") for i, v in enumerate(value))


def _check(value: Any, spec: dataclasses.Field, where: str) -> Any:
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    for number in value if isinstance(value, tuple) else (value,):
        if (low is not None and not number >= low) or (high is not None and not number <= high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{where}: expected {bounds}, found {number!r}")
    if spec.metadata.get("interval") and isinstance(value, tuple) and value[0] > value[1]:
        raise ConfigError(f"{where}: expected the smaller number first, found {list(value)}")
    return value


def _dot(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def nearest(key: str, known: typing.Iterable[str], where: str = "") -> str:
    """A hint: '; did you mean X?', or the list of what there is (in the section `where`)."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean '{_dot(where, close[0])}'?" if close else f"; known keys: {', '.join(known)}"


# ------------------------------------------------------------------------------------------ files and overrides


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError naming the file (and line) when it does not."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such config file: {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def parse_overrides(items: typing.Iterable[str]) -> dict[str, Any]:
    """`["mask.grid=4", "method=mixmask"]` -> {"mask.grid": 4, "method": "mixmask"}; values are YAML.

    Raises ConfigError for an item that has no key or no "=", or whose value is not YAML.
    """
    overrides = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: expected key=value")
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {item}: '{text}' is not a YAML value") from None
    return overrides


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, _dot(where, key)) if isinstance(value, Mapping) else {_dot(where, key): value})
    return flat


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """A copy of `values` with dotted keys replaced.

    Raises ConfigError for a key that is neither in the recipe nor a field of `cls`, or that goes through a plain value.
    """
    result = copy.deepcopy(values)
    known = set(flatten(result)) | _dotted_fields(cls)
    for key, value in overrides.items():
        if key not in known and key not in GIVEN:  # those are refused with their reason
            raise ConfigError(f"unknown key '{key}'{nearest(key, known)}")
        *sections, last = key.split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{section}: expected a section of keys, found {target!r}")
        target[last] = value
    return result


@functools.cache
def _dotted_fields(cls: type, where: str = "") -> frozenset[str]:
    names, hints = set(), _hints(cls)
    for spec in dataclasses.fields(cls):
        name = _dot(where, spec.name)
        names |= _dotted_fields(hints[spec.name], name) if dataclasses.is_dataclass(hints[spec.name]) else {name}
    return frozenset(names - {"settings"})


def resolve(values: Mapping[str, Any], overrides: Mapping[str, Any], cls: type[T]) -> T:
    """A recipe's mapping and dotted overrides -> a validated config of type `cls`."""
    original = dict(values)
    values = apply_overrides(values, overrides, cls)
    if cls is Pretrain:
        values = _take_settings(values, original)
    return build(cls, values)


def load(path: str | Path, overrides: Mapping[str, Any] | None = None, cls: type[T] = Pretrain) -> T:
    """Read a recipe file and apply overrides. Raises ConfigError naming file and key."""
    values = read_yaml(path)
    try:
        return resolve(values, overrides or {}, cls)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None


def _take_settings(values: dict[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """Move the section named after the framework to `settings`; `build_framework` checks it against the framework."""
    if "framework" not in values:  # missing or misspelt: build() says which
        build(Pretrain, {k: v for k, v in values.items() if not isinstance(v, Mapping)})
    name = values["framework"]
    if not isinstance(name, str) or not isinstance(values.get(name), Mapping):
        fields = {spec.name for spec in dataclasses.fields(Pretrain)}
        sections = [key for key, value in values.items() if isinstance(value, Mapping) and key not in fields]
        missing = f"framework: the recipe has no section '{name}:' with its settings"
        raise ConfigError(f"{missing}{nearest(name, sections)}")
    section, given = values.pop(name), original.get(name, {})
    values["settings"] = {k: _setting(v, given.get(k, v), f"{name}.{k}") for k, v in section.items()}
    return values


def _setting(value: Any, given: Any, where: str) -> Any:
    """`value` as a number where the recipe's `given` is one, however written; otherwise in the type of `given`.

    1 and 1.0, 5e-1 (a string to YAML) and 0.5 are the same setting, and have the same hash.
    """
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            number = math.isfinite(float(given))
    if not number:
        return convert(value, type(given), where)
    value = convert(value, float, where)
    return int(value) if value.is_integer() else value


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain types, in a recipe file's layout (what `config.yaml` of a run holds)."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    if isinstance(config, Pretrain):
        values[config.framework] = values.pop("settings")
    return values


def identity(config: Any) -> dict[str, Any]:
    """What decides the run's numbers: everything but `run`, `seed` and fields that are at their default."""
    values = _without_defaults(config)
    return {k: v for k, v in values.items() if k not in ("run", "seed")}


def _without_defaults(config: Any) -> dict[str, Any]:
    result = {}
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if not spec.metadata.get("hashed", True) or (spec.default is not MISSING and value == spec.default):
            continue
        result[spec.name] = _without_defaults(value) if dataclasses.is_dataclass(value) else value
    return result


def hash8(config: Any) -> str:
    """Eight hexadecimal digits of the SHA-256 of `identity(config)`: equal digits are one run, whichever table asks."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------------------------- several processes


def fitting_processes(config: Any) -> tuple[int, ...]:
    """Numbers of processes that compute what one process computes, the smallest first.

    Of MoCo: those that split neither a BatchNorm group nor a mix group; of detection, those that split no `group` of
    images (docs/detection.md says what is not equal there). The other frameworks normalise in their heads, or compare
    rows, over the whole batch, and the other stages are small: one process.
    """
    groups = 1
    if isinstance(config, Pretrain) and config.framework == "moco":
        groups = math.gcd(config.backbone.bn_groups, config.mix_groups)
    elif isinstance(config, Detection):
        groups = config.detectron2["SOLVER"]["IMS_PER_BATCH"] // config.group
    return tuple(n for n in range(1, groups + 1) if groups % n == 0)


def check_processes(config: Any, processes: int) -> None:
    """Raises ConfigError for a number of processes that does not fit, naming those that do."""
    fitting = fitting_processes(config)
    if processes in fitting:
        return
    reason = "only pre-training with MoCo can be shared"
    if isinstance(config, Pretrain) and config.framework == "moco":
        reason = f"backbone.bn_groups={config.backbone.bn_groups} and mix_groups={config.mix_groups} must be multiples"
    elif isinstance(config, Pretrain):
        reason = f"the head or the loss of {config.framework} spans the whole batch"
    raise ConfigError(f"{processes} processes do not fit ({reason}); numbers that do: {', '.join(map(str, fitting))}")


# ----------------------------------------------------------------------------------------------- entry scripts


def main_guard(main: Callable[[], Any]) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit status 1, Ctrl-C status 130.

    So does the end of a process that decodes images, which PyTorch reports wherever the program happens to be.
    """
    try:
        main()
    except UserError as error:
        _complain(f"error: {error}\n")
        sys.exit(1)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = "out of memory, or of space in /dev/shm (fewer: --set run.workers=2)?"
        _complain(f"error: {str(error).split('. ')[0]}: {reason} The last checkpoint is intact\n")
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("\ninterrupted: all up to the last checkpoint is kept; the same command continues\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    """To stderr in one write: the lines of several processes do not run together."""
    sys.stderr.write(text)
    sys.stderr.flush()
