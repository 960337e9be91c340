"""Where the code bases that we know keep the backbone among their keys, where that is not the only backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from mixmask.formats.architectures import PART
from mixmask.formats.source import IMAGENET

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # Un-Mix, unmix_c100.py


@dataclass(frozen=True)
class Layout:
    """Where a code base keeps the backbone among its keys (without wrappers' prefixes, such as `module.`)."""

    format: str
    prefix: str  # of the backbone's keys
    drops: dict[str, str]  # beginnings of keys that are not the backbone -> what they are
    children: dict[str, str] = field(default_factory=dict)  # numbers of an nn.Sequential -> torchvision's names
    needs: str = ""  # the beginning of a key that must be there as well
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    def name(self, key: str) -> str | None:
        """torchvision's name of a key of the backbone; None for any other key."""
        if not key.startswith(self.prefix):
            return None
        name = key.removeprefix(self.prefix)
        if self.children:
            number, dot, rest = name.partition(".")
            name = f"{self.children.get(number, number)}{dot}{rest}"
        return name if PART.match(name) else None

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether something of the backbone is where this layout has it, and what else it needs."""
        keys = list(keys)
        needed = not self.needs or any(key.startswith(self.needs) for key in keys)
        return needed and any(self.name(key) for key in keys)

    def sort(self, keys: Iterable[str]) -> tuple[dict[str, str], dict[str, int], list[str]]:
        """torchvision's names -> keys of the backbone; what is dropped -> how many keys; keys that are not listed."""
        names, dropped, unlisted = {}, Counter(), []
        for key in keys:
            if name := self.name(key):
                names[name] = key
            elif what := next((what for start, what in self.drops.items() if key.startswith(start)), None):
                dropped[what] += 1
            else:
                unlisted.append(key)
        return names, dict(dropped), unlisted


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
    Layout("simsiam", "encoder.", {"encoder.fc.": "head", "predictor.": "predictor"}, needs="predictor."),
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
        needs="bn.",
    ),
    Layout("swav", "", {"projection_head.": "head", "prototypes": "prototypes"}, needs="pro"),  # either of the two
    Layout("torchvision", "", {"fc.": "classifier"}),  # timm's ResNets too, and Barlow Twins' resnet50.pth
)
