"""Every framework, method and data set: one line each, with all that is known of it.

Whatever validates, costs, launches, plots or documents reads these facts here, without torch; the code that a line
names is imported when it runs. Adding a framework, a method or a data set is its code, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from mixmask.config.errors import ConfigError
from mixmask.config.fields import nearest
from mixmask.config.resnets import ARCHITECTURES

T = TypeVar("T")


@dataclass(frozen=True)
class Framework:
    """A Siamese framework. Passes count encoder passes a training image needs for its clean pair."""

    title: str
    code: str  # MODULE:CLASS
    gradient: int  # passes that are differentiated
    forward: int  # passes that are not
    symmetric: tuple[int, int] | None = None  # both numbers, where a setting `symmetric` scores both directions
    metric: str = "top1"  # what Figure 5 shows: "knn", or the probe's "top1"
    crop_size: int = 0  # of the crops that its setting `crops` asks for, pixels, where `crop_size` is not set; 0: none

    def passes(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """(differentiated, not differentiated) under the settings of a recipe's section."""
        return self.symmetric if self.symmetric and settings.get("symmetric") else (self.gradient, self.forward)


@dataclass(frozen=True)
class Method:
    """What happens to x1. `added`: differentiated passes beside the clean pair's; extra crops are counted by area."""

    title: str
    function: str  # in mixmask/methods.py
    color: str
    linestyle: Any  # as matplotlib takes it
    marker: str
    added: int
    masks: bool = False  # draws the masks of the recipe's `mask:`
    mixes: bool = False  # an image needs a partner
    crops: bool = False  # takes extra crops, and no clean pair unless a key says so (MSCN)


@dataclass(frozen=True)
class Dataset:
    """What a complete data set holds: classes, images in each split, the side of an image in pixels (0: any)."""

    classes: int
    train: int
    test: int
    side: int = 0
    title: str = ""
    code: str | Callable = ""  # MODULE:FUNCTION of its reader, which takes by name what it uses of `load`'s arguments
    files: str | Callable = ""  # likewise of what lists its files, where these may be others than the published ones

    def images(self, split: str) -> int:
        """Images in the split."""
        return self.train if split == "train" else self.test


FRAMEWORKS = {  # in the paper's order; then those that it does not train
    "moco": Framework("MoCo", "mixmask.frameworks.moco:MoCo", 1, 1, (2, 2), metric="knn"),
    "simclr": Framework("SimCLR", "mixmask.frameworks.simclr:SimCLR", 2, 0),
    "byol": Framework("BYOL", "mixmask.frameworks.byol:BYOL", 2, 2),
    "simsiam": Framework("SimSiam", "mixmask.frameworks.simsiam:SimSiam", 2, 0),
    "barlow_twins": Framework("Barlow Twins", "mixmask.frameworks.barlow_twins:BarlowTwins", 2, 0),
    "swav": Framework("SwAV", "mixmask.frameworks.swav:SwAV", 2, 0, crop_size=96),
    "vicreg": Framework("VICReg", "mixmask.frameworks.vicreg:VICReg", 2, 0),
}

DASHED, DOTTED, DASH_DOT, SHORT = (0, (4, 1.6)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (2, 1))
METHODS = {  # colours differ in lightness too, so that they stay apart in greyscale and for the colour-blind
    "vanilla": Method("vanilla", "of_vanilla", "#123a63", DASHED, "o", 0),
    "mixmask": Method("MixMask", "of_mixmask", "#d55e00", "-", "s", 1, masks=True, mixes=True),
    "mscn": Method("MSCN (our reconstruction)", "of_mscn", "#5b2a86", DASHED, "^", 0, crops=True),
    "erase": Method("Erase", "of_erase", "#8c8c8c", DOTTED, "D", 1, masks=True),
    "unmix": Method("Un-Mix", "of_unmix", "#2a9d8f", DASH_DOT, "v", 1, mixes=True),
    "both": Method("MixMask with Un-Mix", "of_both", "#b8860b", SHORT, "P", 2, masks=True, mixes=True),
}

_CIFAR, _TINY, _IMAGENET, _FOLDER = (
    f"mixmask.datasets.{name}" for name in ("cifar100", "tiny_imagenet", "imagenet", "folder")
)
DATASETS = {
    "cifar100": Dataset(100, 50_000, 10_000, 32, "CIFAR-100", f"{_CIFAR}:read"),
    "cifar100_reduced": Dataset(100, 10_000, 5_000, 32, "a fifth of CIFAR-100", f"{_CIFAR}:read_reduced"),
    "tiny_imagenet": Dataset(200, 100_000, 10_000, 64, "Tiny-ImageNet", f"{_TINY}:read", f"{_TINY}:listing"),
    "imagenet": Dataset(1000, 1_281_167, 50_000, 0, "ImageNet-1K", f"{_IMAGENET}:read", f"{_IMAGENET}:listing"),
    "photos": Dataset(16, 2_000, 800, 32, "embedded photographs", "mixmask.datasets.photos:read"),
    "folder": Dataset(
        0, 0, 0, 0, "your own images", f"{_FOLDER}:read", f"{_FOLDER}:listing"
    ),  # the images say the rest
}


def find(known: Mapping[str, T], name: str, key: str) -> T:
    """The entry `name`. Raises ConfigError, which names the recipe's `key` and the nearest name there is."""
    if name not in known:
        raise ConfigError(f"{key}: unknown '{name}'{nearest(name, known)}")
    return known[name]


def features(backbone: Any) -> int:
    """Numbers in the pooled features of a `Backbone`. Raises ConfigError as `of_network`."""
    arch = ARCHITECTURES.get(backbone.arch)
    return arch.features(backbone.width) if arch else of_network("features", backbone)


def of_network(fact: str, backbone: Any, *arguments: Any) -> Any:
    """A fact about a network that is not listed here, from mixmask/networks.py. Raises ConfigError without torch."""
    try:
        networks = import_module("mixmask.networks")
    except ImportError as error:
        raise ConfigError(
            f"backbone.arch: the width and cost of {backbone.arch} come from the network itself; building it needs "
            f"PyTorch, and {error.name} is not installed here"
        ) from None
    return getattr(networks, fact)(backbone, *arguments)


def load(code: str | Callable) -> Any:
    """What MODULE:NAME names; a function or class is returned as it is."""
    if callable(code):
        return code
    module, _, name = code.partition(":")
    return getattr(import_module(module), name)
