"""Weights for Detectron2's R50-C4: wrong files and wrong recipes, on which it would train silently, are refused.

Detectron2 itself loads what it can match and trains on with the rest at random: of the usual mistakes only one stops
it (docs/detection.md has the table). Nothing here needs Detectron2.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixmask.backbones import build_backbone
from mixmask.config import Backbone, ConfigError, flatten
from mixmask.formats import Detectron2File, FormatError, detectron2_name, read_detectron2, read_sidecar

HEAD = "stem.fc."  # what MoCo's converter leaves in the file: the pre-training's head, which no detector has
NEW = (  # what a detector adds to a backbone: initialised at random
    "proposal_generator.rpn_head.",
    "roi_heads.box_predictor.",
    "roi_heads.mask_head.",
    "roi_heads.res5.norm.",
)
MISTAKES = (  # pattern of a key -> what it gives away
    (r"^module\.", "the prefix 'module.' (DistributedDataParallel's) is left: Detectron2 would load nothing"),
    (r"^(conv1|bn1|layer\d)\.", "torchvision's names: Detectron2 would load next to nothing"),
    (
        r"^(?!stem\.|res\d\.)\w+\.(.*\.)?(stem|res\d|conv1|bn1|layer\d)\.",
        "an unknown prefix: Detectron2 would load nothing",
    ),
    (r"^res1\.", "stages off by one (torchvision's layer1 is res2): Detectron2 would fill the wrong ones"),
    (r"^stem\.bn1\.", "the stem's BatchNorm is 'stem.bn1' (expected 'stem.conv1.norm'): it would not be loaded"),
    (r"\.downsample\.", "shortcuts are called 'downsample' (expected 'shortcut'): they would not be loaded"),
    (r"\.bn\d\.", "BatchNorms are called 'bn1' (expected 'conv1.norm', ...): they would not be loaded"),
)
PARTS = (  # pattern of a key -> the part of the network that it belongs to
    (r"^stem\.conv1\.weight$", "the stem's convolution"),
    (r"^stem\.conv1\.norm\.", "the stem's BatchNorm"),
    (r"\.shortcut\.", "the shortcuts"),
    (r"num_batches_tracked$", "BatchNorm's counters"),
    (r"running_(mean|var)$", "BatchNorm's running statistics"),
)


class Weights(NamedTuple):
    """A backbone for R50-C4, and where it is from."""

    tensors: dict[str, Tensor]  # under the detector's names
    dropped: dict[str, int]  # what was dropped -> how many keys
    note: dict[str, Any]  # what detection/convert.py noted: identity, sha256, mean, std, ...


def read(path: str | Path) -> Weights:
    """The backbone that `detection/convert.py` wrote to `path`. Raises FormatError naming the mistake otherwise."""
    path = Path(path)
    hint = "write it with: python detection/convert.py CHECKPOINT OUTPUT.pkl"
    if path.suffix != ".pkl" or zipfile.is_zipfile(path):
        raise FormatError(f"{path} is no Detectron2 .pkl: Detectron2 would load nothing of it; {hint}")
    file = read_detectron2(path)
    tensors, dropped = check_file(file, path)
    note = read_sidecar(path)
    if note is None:
        raise FormatError(
            f"{path} has no {path.name}.json beside it, which says how its pixels were normalised; {hint}"
        )
    return Weights(tensors, dropped, note)


def check_file(file: Detectron2File, path: str | Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """All of a ResNet-50 under the detector's names, and what was dropped. Raises FormatError for less, more, other."""
    if not file.weights:
        raise FormatError(f"{path} is empty: no tensor in it; its converter recognised no key")
    check_names(file.weights, path)
    if not file.matching_heuristics:
        raise FormatError(f"{path} lacks 'matching_heuristics': Detectron2 would load nothing of it")
    if file.author in (None, "", "Caffe2"):
        raise FormatError(
            f"{path}: __author__ is {file.author!r}: Detectron2 would take it for its own old models and lose "
            "BatchNorm's running statistics"
        )
    shapes = expected_shapes()
    for name, shape in shapes.items():
        value = file.weights[name]
        if value.shape != shape:
            raise FormatError(
                f"{path}: '{name}' is {tuple(value.shape)}; expected {tuple(shape)} (ResNet-50, 7 x 7 stem)"
            )
        if not torch.isfinite(value).all() or (name.endswith("running_var") and (value < 0).any()):
            raise FormatError(f"{path}: '{name}' is not finite, or a variance is negative")
        if value.ndim == 4 and not value.any():
            raise FormatError(f"{path}: all weights of the convolution '{name}' are zero")
    head = sum(name.startswith(HEAD) for name in file.weights)
    return {detector_name(name): file.weights[name] for name in shapes}, {"head": head} if head else {}


def check_names(names: Iterable[str], path: str | Path) -> None:
    """Raises FormatError unless the names are those of a whole ResNet-50, and perhaps of a pre-training's head."""
    names, expected = {name for name in names if not name.startswith(HEAD)}, expected_shapes().keys()
    unlisted, missing = sorted(names - expected), sorted(expected - names)
    found = f"{len(names & expected)} of a ResNet-50's {len(expected)} tensors under Detectron2's names"
    for pattern, mistake in MISTAKES:
        if wrong := [name for name in unlisted if re.search(pattern, name)]:
            raise FormatError(f"{path}: {mistake}; {len(wrong)} such keys, first '{wrong[0]}'; it holds {found}")
    if unlisted:
        raise FormatError(
            f"{path}: {len(unlisted)} keys belong to no ResNet-50, first '{unlisted[0]}'; it holds {found}"
        )
    if missing:
        what = f"{_parts(missing)} would stay at random; {len(missing)} missing, first '{missing[0]}'"
        raise FormatError(f"{path}: {what}; it holds {found}")


def _parts(missing: list[str]) -> str:
    """The part of the network that holds all of these tensors, or the parts that hold one each."""
    for pattern, part in PARTS:
        if all(re.search(pattern, name) for name in missing):
            return part
    first = (next((part for pattern, part in PARTS if re.search(pattern, n)), n.split(".")[0]) for n in missing)
    return ", ".join(dict.fromkeys(first))


def expected_shapes() -> dict[str, torch.Size]:
    """Names, in Detectron2's words, and shapes of the 318 tensors of a ResNet-50 without classifier."""
    with torch.device("meta"):
        model = build_backbone(Backbone("resnet50", "imagenet", 64, 1))
    return {detectron2_name(name): value.shape for name, value in model.state_dict().items()}


def detector_name(name: str) -> str:
    """Where R50-C4 keeps a tensor: the last stage is part of the box head."""
    return f"{'roi_heads' if name.startswith('res5.') else 'backbone'}.{name}"


def placed(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detector's state dict with the backbone in it. Raises ConfigError unless exactly `NEW` stays at random."""
    homeless = sorted(tensors.keys() - own.keys())
    left = sorted(name for name in own.keys() - tensors.keys() if not name.startswith(NEW))
    shapes = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    for what, names in (("has no", homeless), ("would keep at random", left), ("has another shape for", shapes)):
        if names:
            raise ConfigError(
                f"the recipe's detector {what} {len(names)} of a ResNet-50's tensors, first '{names[0]}'; expected "
                "R50-C4 with a BatchNorm that has statistics"
            )
    return {name: tensors.get(name, value) for name, value in own.items()}


# ------------------------------------------------------------------------------------ do recipe and weights agree?

DEFAULTS = {"MODEL.RESNETS.STRIDE_IN_1X1": True, "INPUT.FORMAT": "BGR", "MODEL.RESNETS.NORM": "FrozenBN"}
DEFAULTS |= {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
}
WANTED = {  # key -> values that fit, and why others do not
    "MODEL.RESNETS.DEPTH": ((50,), "the weights are a ResNet-50's"),
    "MODEL.RESNETS.STRIDE_IN_1X1": ((False,), "the weights have their stride in the 3 x 3 convolutions"),
    "MODEL.RESNETS.NORM": (("SyncBN", "naiveSyncBN", "BN"), "the weights were trained with BatchNorm"),
    "INPUT.FORMAT": (("RGB",), "the weights were trained on RGB; Detectron2's own models are BGR"),
}


def check_recipe(detectron2: Mapping[str, Any], note: Mapping[str, Any]) -> None:
    """Raises ConfigError where the recipe's section `detectron2` does not fit the weights; `note` is theirs.

    A key that the recipe lacks has Detectron2's default, which is wrong for each of these but the depth.
    """
    settings = {**DEFAULTS, **flatten(detectron2)}
    for key, (fitting, reason) in WANTED.items():
        if settings[key] not in fitting:
            expected, what = " or ".join(map(str, fitting)), f"{settings[key]}{_default(key, settings)}"
            raise ConfigError(f"detectron2.{key}: expected {expected} ({reason}), found {what}")
    for key, name in (("MODEL.PIXEL_MEAN", "mean"), ("MODEL.PIXEL_STD", "std")):
        wanted = [round(255 * value, 3) for value in note[name]]
        if not _near(settings[key], wanted):
            order = "; these are the right values in BGR order" if _near(settings[key][::-1], wanted) else ""
            raise ConfigError(
                f"detectron2.{key}: expected {wanted} (255 times the {name} that the weights were trained with, RGB), "
                f"found {list(settings[key])}{order or _default(key, settings)}"
            )


def _near(values: list[float], wanted: list[float]) -> bool:
    return len(values) == len(wanted) and all(abs(a - b) <= 0.1 for a, b in zip(values, wanted, strict=True))


def _default(key: str, settings: Mapping[str, Any]) -> str:
    return " (Detectron2's default)" if settings[key] == DEFAULTS[key] else ""
