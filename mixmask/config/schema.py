"""Every key of every recipe: its type, its range, and the default of those that were added after the recipes.

A recipe file lists every hyper-parameter of its table, so that no default decides a reported number. Fields that have
a default here were added later, or describe an operation that is absent; a field at its default is left out of the
hash (`identity`), so that adding one does not rename the runs that exist.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from mixmask.config.errors import ConfigError
from mixmask.config.fields import check_fields, within
from mixmask.config.resnets import ARCHITECTURES

# ---------------------------------------------------------------------------------------------- pre-training

Permutation = Literal["reverse", "random", "derangement"]  # derangement: a random one without fixed points


@dataclass(frozen=True)
class Backbone:
    """ResNet and its stem (Tables 8, 9; stems: docs/fidelity.md), or a third-party backbone (mixmask/networks.py)."""

    arch: str = field(
        metadata={"words": ", ".join((*ARCHITECTURES, "timm/NAME", "torchvision/NAME, or MODULE:FUNCTION"))}
    )
    stem: Literal["cifar", "tiny", "imagenet"]
    width: int = within(1)  # channels of the first stage; 64 in the paper
    bn_groups: int = within(1)  # split BatchNorm: how many parts of the batch have their own statistics
    stem_init: Literal["default", "kaiming"] = "default"  # of a small stem: PyTorch's, or as elsewhere

    def __post_init__(self) -> None:
        if self.arch in ARCHITECTURES:
            return
        module = re.fullmatch(r"(?!\d)(\w+)(\.\w+)*:[^\W\d]\w*", self.arch)
        if module is None and not re.fullmatch(r"(timm|torchvision)/[\w.]+", self.arch):
            words = type(self).__dataclass_fields__["arch"].metadata["words"]
            hint = f"; torchvision/{self.arch}, or timm/{self.arch}?" if re.fullmatch(r"\w+", self.arch) else ""
            raise ConfigError(f"backbone.arch: expected {words}; found {self.arch!r}{hint}")
        if module and module[1] in sys.stdlib_module_names:  # a checkpoint names it: nothing of it may run
            raise ConfigError(f"backbone.arch: {self.arch} is part of Python, not a network")
        if self.width != 64:
            raise ConfigError(f"backbone.width: {self.arch} has a fixed width; expected 64, found {self.width}")


# Framework settings that a recipe may omit, and their defaults, which the hash leaves out.
OPTIONAL_SETTINGS = {"moco.own_view": True}


@dataclass(frozen=True)
class Mask:
    """Section 4.1 and Table 1: which cells of a grid show image i."""

    type: Literal["block", "discrete", "none"]  # none: nothing is mixed, x1 itself is scored a second time
    block_impl: Literal["repaired", "literal"]
    grid: int = within(2)  # cells along a side
    ratio: float | tuple[float, float] = within(0, 1, interval=True)  # target lambda; [a, b]: U(a, b) per mask
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

    name: Literal["sgd", "adam", "lars"]
    lr: float = within(0)
    weight_decay: float = within(0)
    momentum: float = within(0, 1, default=0.0)  # of SGD and LARS; Adam takes none
    trust: float = within(0, default=0.001)  # LARS: norm of an update over that of its weights, at rate 1
    trust_clip: bool = False  # LARS: no weight has a rate above lr (LARC, solo-learn)
    adapt_all: bool = False  # LARS: biases and norms too are adapted and decayed (SwAV); false: neither
    bias_lr: float = within(0, default=0.0)  # LARS: the rate of biases and norms, where they are not adapted; 0: lr


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the iteration (see mixmask/schedules.py)."""

    kind: Literal["cosine", "step", "exponential"]
    unit: Literal["epoch", "iteration"] = "epoch"  # how often the rate changes
    first_epoch: int = within(0, 1, default=0)  # cosine by epoch: 0 ... E-1, or 1 ... E (Un-Mix's CIFAR script)
    warmup_epochs: int = within(0, default=0)  # linear, from first_lr
    warmup_iterations: int = within(0, default=0)  # linear, from lr / warmup_iterations
    milestones: tuple[int, ...] = ()  # step: epochs at which the rate is multiplied; negative ones count from the end
    gamma: float = within(0, 1, default=0.1)
    last_lr: float = within(0, default=0.0)  # after the last epoch; exponential: falls by one ratio every epoch to it
    first_lr: float = within(0, default=0.0)  # where warmup_epochs begin

    def __post_init__(self) -> None:
        if self.kind == "exponential" and not self.last_lr:
            raise ConfigError("schedule.last_lr: an exponential schedule ends above 0, found 0")


@dataclass(frozen=True)
class Augment:
    """One view's augmentation: the operations, in the order in which they are applied, and their parameters."""

    order: tuple[Literal["crop", "flip", "jitter", "grayscale", "blur", "solarize"], ...]
    size: int = within(0)  # side of a view, pixels; 0, in a probe: that of the pre-training
    crop_scale: tuple[float, float] = within(1e-3, 1, default=(1.0, 1.0), interval=True)
    crop_ratio: tuple[float, float] = within(1e-3, default=(0.75, 4 / 3), interval=True)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip_prob: float = within(0, 1, default=0.0)
    jitter: tuple[float, float, float, float] = within(0, default=(0.0, 0.0, 0.0, 0.0))  # b, c, s, hue
    jitter_prob: float = within(0, 1, default=0.0)
    grayscale_prob: float = within(0, 1, default=0.0)
    blur_prob: float | tuple[float, float] = within(0, 1, default=0.0)  # [a, b]: of the first view and of the second
    blur_sigma: tuple[float, float] = within(0, default=(0.1, 2.0), interval=True)  # pixels
    solarize_prob: float | tuple[float, float] = within(0, 1, default=0.0)  # values from 128 up turn into 255 - value
    mean: tuple[float, ...] = ()  # per channel, of pixels in [0, 1]; empty: those of the checkpoint that is evaluated
    std: tuple[float, ...] = within(1e-6, default=())

    def __post_init__(self) -> None:
        if len(set(self.order)) < len(self.order):
            raise ConfigError(f"augment.order: expected each operation once, found {list(self.order)}")
        if self.jitter[3] > 0.5:
            raise ConfigError(f"augment.jitter: expected a hue of at most 0.5 (half a turn), found {self.jitter[3]:g}")

    def of_view(self, view: int) -> Augment:
        """The augmentation of view 0 or 1, where the two differ in a probability."""
        pairs = {name: getattr(self, name) for name in ("blur_prob", "solarize_prob")}
        own = {name: pair[view] for name, pair in pairs.items() if isinstance(pair, tuple)}
        return replace(self, **own) if own else self


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
class Folder:
    """Of `dataset: folder`, your own images (mixmask/datasets/folder.py)."""

    held_out: float = within(0, 0.9, default=0.1)  # share kept for testing where there are no test images


@dataclass(frozen=True)
class Execution:
    """Where and how a run is carried out: nothing here changes a number, so nothing here is hashed."""

    data_root: str = "data"
    download: bool = True  # fetch CIFAR-100 where it is missing
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = within(0, default=8)  # processes that decode images (ImageNet)
    eval_batch: int = within(1, default=500)  # batch size of feature extraction: fewer images take less memory
    log_every: int = within(1, default=10)  # iterations between log lines
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # also log there (mixmask/runs/trackers.py)
    checkpoint_every: int = within(1, default=1)  # epochs between checkpoints
    checkpoint_minutes: float = within(0, default=15.0)  # and within a long epoch: minutes between checkpoints
    keep_every: int = within(0, default=0)  # epochs between checkpoints that stay, checkpoint.epochN.pt; 0: none
    accumulate: int = within(1, default=1)  # pre-training: gradient accumulation over this many parts of a batch
    init: str = ""  # pre-training: file of the initial backbone, whose weights are part of the run's identity
    channels_last: bool = True
    # torch.compile of augmentation, backbones and loss: a minute at the start, and a C++ compiler on a CPU.
    compile: Literal["auto", True, False] = "auto"  # auto: on GPUs where it was tested (training/optim.py)

    def __post_init__(self) -> None:
        for name in ("data_root", "init"):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))


@dataclass(frozen=True)
class Pretrain:
    """A pre-training run. `settings` is the section named after the framework (`moco:`), validated by its class."""

    stage: ClassVar[str] = "pretrain"

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
    allow_partial_data: bool = False  # accept an incomplete Tiny-ImageNet or ImageNet: not the paper's data
    folder: Folder = Folder()
    data: str = ""  # identity of the images, unless they are a verified published set; filled in (datasets/settle.py)
    init: str = ""  # a digest of the weights of run.init, filled in
    run: Execution = Execution()
