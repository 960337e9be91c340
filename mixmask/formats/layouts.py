"""Where each public code base keeps the backbone among its keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mixmask.formats.resnets import assemble
from mixmask.formats.source import IMAGENET, FormatError, Source

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # Un-Mix, unmix_c100.py


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


def foreign(tensors: dict[str, Tensor], path: Path) -> Source:
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
    return assemble(layout.format, weights, dict(dropped), layout.normalisation, path, layout.prefix)


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
