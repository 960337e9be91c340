"""The backbone among the tensors of a file that we did not write: by a layout that we know, or by structure.

By structure: of all that stands under one prefix, exactly one part is a complete backbone. Where there are several
(student and teacher, a momentum encoder), nothing is guessed: `--take` names one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixmask.config import Backbone
from mixmask.config.resnets import ARCHITECTURES
from mixmask.formats.architectures import (
    PART,
    check_complete,
    check_shapes,
    complete,
    lacking,
    names_of,
    nearest,
    own,
    shapes,
)
from mixmask.formats.detectron2_files import detectron2_name
from mixmask.formats.layouts import LAYOUTS, Layout
from mixmask.formats.source import IMAGENET, FormatError, Reading, Source, some

WRAPPERS = {  # words of a key that say how a network was run, not what it is
    *("module", "_module"),  # DataParallel, DistributedDataParallel, AveragedModel, DeepSpeed
    *("_orig_mod", "_forward_module"),  # torch.compile, Lightning Fabric
    *("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),
}
HEAD = re.compile(  # what may stand beside a backbone and never between its input and its features
    r"\w*(fc|head|classif|linear|logit|mlp|proj|pred|proto|queue|neck|contrast|center|loss)\w*|n_averaged|steps?|initted"
)
NEAR = 0.5  # the share of a backbone's names that makes something an incomplete one


class Naming(NamedTuple):
    """How a code base names the parts of a ResNet."""

    marks: tuple[str, ...]  # its first convolution, and those that the first and the last stage begin with
    name: Callable[[str], str | None]  # -> torchvision's name; None for what is no part
    pooled: bool = True


def _torchvision(key: str) -> str | None:
    """timm's and mmselfsup's names too; kuangliu/pytorch-cifar and its descendants say `shortcut`."""
    return key.replace(".shortcut.", ".downsample.") if PART.match(key) else None


def _sequence(first_stage: int) -> Callable[[str], str | None]:
    """A ResNet's children in an nn.Sequential, as in lightly: conv1, bn1, ReLU, (max pooling), four stages."""
    names = {"0": "conv1", "1": "bn1", **{str(first_stage + i): f"layer{i + 1}" for i in range(4)}}

    def name(key: str) -> str | None:
        number, _, rest = key.partition(".")
        return f"{names[number]}.{rest}" if number in names else None

    return name


DETECTRON2 = {detectron2_name(name): name for arch in ARCHITECTURES for name in names_of(arch)}
NAMINGS = (
    Naming(("conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"), _torchvision),
    Naming(("0.weight", "4.0.conv1.weight", "7.0.conv1.weight"), _sequence(4)),
    Naming(("0.weight", "3.0.conv1.weight", "6.0.conv1.weight"), _sequence(3), pooled=False),
    Naming(("stem.conv1.weight", "res2.0.conv1.weight", "res5.0.conv1.weight"), DETECTRON2.get),
)


@dataclass(frozen=True)
class Part:
    """Tensors under one prefix that are a backbone, or might be."""

    prefix: str
    names: dict[str, str]  # torchvision's names -> keys
    pooled: bool = True  # unless its numbers show that there is no max pooling

    @property
    def title(self) -> str:
        return self.prefix.removesuffix(".") or "."

    @property
    def whole(self) -> bool:
        return complete(self.names.keys()) is not None


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the words of wrappers in their names, as long as that keeps all names apart."""
    result = {_unwrapped(key): value for key, value in tensors.items()}
    return result if len(result) == len(tensors) else tensors


def _unwrapped(key: str) -> str:
    return ".".join(word for word in key.split(".") if word not in WRAPPERS)


def backbone_of(tensors: dict[str, Tensor], path: Path, options: Reading) -> Source:
    """The one backbone among `tensors`, or the one that `options.take` names. Raises FormatError."""
    tensors = unwrapped(tensors)
    if options.arch is not None and options.arch not in ARCHITECTURES:
        return of_network(tensors, path, options)
    before, layout = next(_listed(tensors), ("", None))
    if layout is not None and (options.take is None or _is(options.take, f"{before}{layout.prefix}")):
        names, dropped, _ = layout.sort(key.removeprefix(before) for key in tensors)
        part = Part(f"{before}{layout.prefix}", {name: f"{before}{key}" for name, key in names.items()})
        known = {"format": layout.format, "dropped": dropped}
        mean, std = layout.normalisation
    else:
        groups = _distinct(parts(tensors), tensors)
        part, taken = _only(groups, tensors, path) if options.take is None else _named(groups, path, options.take)
        known = {"format": "unlisted", "dropped": _dropped(part, tensors), "taken": taken}
        mean, std = IMAGENET
    weights = {name: tensors[key] for name, key in part.names.items()}
    weights, fields = check_complete(weights, path, options, part.prefix, part.pooled)
    return Source(weights=weights, mean=mean, std=std, identity="", sha256="", **known, **fields)


def of_network(tensors: dict[str, Tensor], path: Path, options: Reading) -> Source:
    """The complete network `options.arch`, with nothing beside it but a head. Raises FormatError."""
    backbone = Backbone(options.arch, options.stem, 64, 1)
    expected = shapes(backbone)
    strange = [key for key in tensors if key not in expected and not HEAD.fullmatch(key.split(".")[0])]
    if missing := expected.keys() - tensors.keys():
        strange = [key for key in tensors if key not in expected]
    if missing or strange:
        lacks = f"lacks {some(missing)}" if missing else "lacks nothing"
        has = f" and has {some(strange)} besides" if strange else ""
        raise FormatError(f"{path} is no {options.arch}: of its {len(expected)} tensors it {lacks}{has}")
    weights = {name: own(tensors[name]) for name in expected}
    check_shapes(weights, backbone, path)
    dropped = _dropped(Part("", {name: name for name in expected}), tensors)
    return Source("state dict", weights, backbone, dropped, *IMAGENET, identity="", sha256="")


def _listed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Layout]]:
    """The layouts that account for every key, and what stands before all keys; complete ones first."""
    fitting = []
    for before in _common(tensors):
        keys = [key.removeprefix(before) for key in tensors]
        fitting += [(before, layout) for layout in LAYOUTS if layout.fits(keys) and not layout.sort(keys)[2]]
    for whole in (True, False):
        for before, layout in fitting:
            names = layout.sort(key.removeprefix(before) for key in tensors)[0]
            if (complete(names.keys()) is not None) == whole:
                yield before, layout


def _common(keys: Iterable[str]) -> Iterator[str]:
    """ "" and each whole-word prefix that all keys share."""
    words = [key.split(".") for key in keys]
    yield ""
    for depth in range(1, min(map(len, words), default=0)):
        if any(other[:depth] != words[0][:depth] for other in words):
            return
        yield ".".join(words[0][:depth]) + "."


def parts(tensors: dict[str, Tensor]) -> list[Part]:
    """All complete backbones, and then what holds half of one or more."""
    by_prefix: dict[str, Part] = {}
    for naming in NAMINGS:
        marked = ((key, mark) for key in tensors for mark in naming.marks if f".{key}".endswith(f".{mark}"))
        for prefix in dict.fromkeys(key.removesuffix(mark) for key, mark in marked):
            inside = ((naming.name(key.removeprefix(prefix)), key) for key in tensors if key.startswith(prefix))
            part = Part(prefix, {name: key for name, key in inside if name}, naming.pooled)
            _, shared, count = nearest(part.names.keys())
            if shared >= NEAR * count and (prefix not in by_prefix or part.whole):
                by_prefix[prefix] = part
    return sorted(by_prefix.values(), key=lambda part: not part.whole)


def titles(tensors: dict[str, Tensor], take: str = "") -> list[str]:
    """The complete backbones among these tensors: all, or those that `take` names."""
    return [p.title for p in parts(unwrapped(tensors)) if p.whole and (not take or _is(take, p.prefix))]


def _distinct(backbones: list[Part], tensors: dict[str, Tensor]) -> list[list[Part]]:
    """Parts that hold the same values belong together: a network is often registered under two names."""
    groups: list[list[Part]] = []
    for part in backbones:
        group = next((group for group in groups if _same(group[0], part, tensors)), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    return groups


def _same(one: Part, two: Part, tensors: dict[str, Tensor]) -> bool:
    return one.names.keys() == two.names.keys() and all(
        torch.equal(tensors[key], tensors[two.names[name]]) for name, key in one.names.items()
    )


def _only(groups: list[list[Part]], tensors: dict[str, Tensor], path: Path) -> tuple[Part, str]:
    """The one backbone that a file holds. Raises FormatError if there are several or none, or if it is ambiguous."""
    misfit = _misfit(tensors)
    if not groups:
        reason = misfit or f"found {prefixes(tensors)}"
        if any(key.endswith("flat_param") for key in tensors):
            reason = "found FSDP's flattened parameters (save a full state dict)"
        raise FormatError(
            f"{path} holds no backbone that we know: {reason}; expected {_expected()}, or one complete ResNet"
        )
    part = groups[0][0]
    if not part.whole:
        raise FormatError(f"{path} {lacking(part.names.keys(), part.prefix)}")
    if len(groups) > 1:
        first = f"{misfit}; it " if misfit else ""
        raise FormatError(
            f"{path} {first}holds {len(groups)} backbones: {_listing(groups)}; choose one with --take NAME"
        )
    used = {key for copy in groups[0] for key in copy.names.values()}
    beside = [key for key in tensors if key.startswith(part.prefix) and key not in used]
    strange = [key for key in beside if not HEAD.fullmatch(key.removeprefix(part.prefix).split(".")[0])]
    if strange:
        what = misfit or f"has {len(strange)} keys beside its backbone that belong to no head; first: '{strange[0]}'"
        raise FormatError(f"{path} {what}; to leave them out: --take {part.title}")
    return part, ""


def _named(groups: list[list[Part]], path: Path, take: str) -> tuple[Part, str]:
    """The complete backbone that `take` names, and its title where there are others."""
    groups = [group for group in groups if group[0].whole]
    chosen = [group for group in groups if any(_is(take, part.prefix) for part in group)]
    if not groups:
        raise FormatError(f"{path} holds no complete backbone: there is nothing to --take")
    if len(chosen) != 1:
        how = "names several of" if chosen else "is none of"
        raise FormatError(f"{path}: --take {take} {how} its backbones: {_listing(chosen or groups)}")
    part = next(part for part in chosen[0] if _is(take, part.prefix))
    return part, part.title if len(groups) > 1 else ""


def _is(take: str, prefix: str) -> bool:
    """Whether NAME is the prefix, or the beginning of it, in whole words."""
    take = _unwrapped(take.removesuffix(".")) + "." if take != "." else ""
    return prefix == "" if take == "" else prefix.startswith(take)


def _listing(groups: list[list[Part]]) -> str:
    def one(part: Part) -> str:
        arch, shared, count = nearest(part.names.keys())
        return f"'{part.title}'" + ("" if part.whole else f" ({shared} of {count} keys of a {arch})")

    return ", ".join(" = ".join(map(one, group)) for group in groups)


def _dropped(part: Part, tensors: dict[str, Tensor]) -> dict[str, int]:
    """What is not of the part, by the beginning of its name up to the first word that differs from the part's."""
    used, own = set(part.names.values()), part.prefix.split(".")
    dropped = Counter()
    for key in tensors:
        if key in used:
            continue
        words = key.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(words, own, strict=False)) if a != b), 0)
        dropped[".".join(words[: shared + 1])] += 1
    return dict(dropped)


def _misfit(tensors: dict[str, Tensor]) -> str:
    """Which layout a file looks like, and what does not belong to it."""
    for before in _common(tensors):
        keys = [key.removeprefix(before) for key in tensors]
        for layout in LAYOUTS:
            if layout.fits(keys):
                unlisted = layout.sort(keys)[2]
                return (
                    f"looks like {layout.format} ('{layout.prefix}'), but {len(unlisted)} of its {len(keys)} keys are "
                    f"not in that layout: {prefixes(unlisted)}; first: '{unlisted[0]}'"
                )
    return ""


def prefixes(keys: Iterable[str]) -> str:
    """What stands before the names of a ResNet's tensors, or else the first word of each key; with counts."""
    counts = Counter()
    for key in keys:
        inside = re.search(r"(^|\.)(conv1|bn1|layer[1-9])\.", key)
        counts[key[: inside.start() + len(inside[1])] if inside else key.split(".")[0]] += 1
    parts = [f"'{prefix}' ({count} keys)" for prefix, count in counts.most_common(6)]
    return ", ".join(parts) + (", ..." if len(counts) > 6 else "") if parts else "no keys at all"


def _expected() -> str:
    prefixes = dict.fromkeys(layout.prefix for layout in LAYOUTS if layout.prefix)
    return ", ".join(f"'{p}' ({'/'.join(sorted({x.format for x in LAYOUTS if x.prefix == p}))})" for p in prefixes)
