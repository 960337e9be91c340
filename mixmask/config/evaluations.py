"""The keys of the recipes that begin with a checkpoint: k-NN, linear probe, fine-tuning, conversion, detection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mixmask.config.errors import ConfigError
from mixmask.config.fields import OTHERWISE, flatten, within
from mixmask.config.schema import (
    KNN,
    Augment,
    Execution,
    Folder,
    Optimizer,
    Pretrain,
    Schedule,
)


def check_run(config: Any) -> None:
    """The `__post_init__` of evaluations. Raises ConfigError for what only a pre-training does."""
    for name, default in (("init", ""), ("accumulate", 1)):
        if getattr(config.run, name) != default:
            raise ConfigError(f"run.{name}: only a pre-training takes it; found {getattr(config.run, name)!r}")


@dataclass(frozen=True)
class KNNEval:
    """Offline k-NN on a checkpoint (`eval/knn.py`)."""

    stage: ClassVar[str] = "knn"

    recipe: str
    dataset: str
    seed: int = within(0)
    knn: KNN
    size: int = within(0, default=0)  # of test views, pixels; 0: that of the pre-training, 224 for a public checkpoint
    checkpoint: str = ""  # the identity of the weights, filled in by eval/knn.py
    allow_partial_data: bool = False  # accept an incomplete Tiny-ImageNet or ImageNet: not the paper's data
    folder: Folder = Folder()
    data: str = ""  # identity of the images, unless they are a verified published set; filled in (datasets/settle.py)
    run: Execution = Execution()

    __post_init__ = check_run


@dataclass(frozen=True)
class Linear:
    """A linear probe (`eval/linear.py`): a frozen encoder, and a classifier on its pooled features."""

    stage: ClassVar[str] = "linear"

    recipe: str
    dataset: str
    epochs: int = within(1)
    batch_size: int = within(1)
    seed: int = within(0)
    optimizer: Optimizer
    schedule: Schedule
    augment: Augment
    test_resize: int = within(-1, default=-1)  # shorter side before the centre crop; 0: none; -1: as for k-NN
    features: Literal["augmented", "cached"] = "augmented"  # of views drawn anew each epoch, or of test views, once
    init: Literal["normal", "uniform"] = "normal"  # N(0, 0.01) and bias 0 (MoCo), or PyTorch's own (htdt, PatrickHua)
    checkpoint: str = ""  # the pre-training run's identity, filled in by eval/linear.py
    allow_partial_data: bool = False  # accept an incomplete Tiny-ImageNet or ImageNet: not the paper's data
    folder: Folder = Folder()
    data: str = ""  # identity of the images, unless they are a verified published set; filled in (datasets/settle.py)
    run: Execution = Execution()

    def __post_init__(self) -> None:
        check_run(self)
        if self.features == "cached" and self.augment.order:
            order = ", ".join(self.augment.order)
            raise ConfigError(f"augment.order: cached features are those of test views; expected [], found {order}")


@dataclass(frozen=True)
class Finetune:
    """Fine-tuning of a whole network on some of the labels (`eval/finetune.py`; Table 10)."""

    stage: ClassVar[str] = "finetune"

    recipe: str
    dataset: str
    labels: float = within(0, 100)  # percent of the training labels, above 0
    epochs: int = within(1)
    batch_size: int = within(1)
    seed: int = within(0)
    backbone_lr: float = within(0)  # Table 10, "lr stem": of everything that the checkpoint holds
    optimizer: Optimizer  # its lr is the classifier's
    schedule: Schedule  # of both rates
    augment: Augment
    test_resize: int = within(-1, default=-1)  # shorter side before the centre crop; 0: none; -1: as for k-NN
    label_list: Literal["balanced", "simclr"] = "balanced"  # which images are labelled (mixmask/labels.py)
    subset_seed: int = within(0, default=0)  # balanced: which subset; the same one for every `seed`
    bn_groups: int = within(1, default=1)  # parts of the batch that have their own BatchNorm statistics
    init: Literal["checkpoint", "random"] = "checkpoint"  # random: the checkpoint gives the architecture alone
    checkpoint: str = ""  # the identity of the weights, filled in by eval/finetune.py
    allow_partial_data: bool = False  # accept an incomplete Tiny-ImageNet or ImageNet: not the paper's data
    folder: Folder = Folder()
    data: str = ""  # identity of the images, unless they are a verified published set; filled in (datasets/settle.py)
    run: Execution = Execution()

    def __post_init__(self) -> None:
        check_run(self)
        if not self.labels:
            raise ConfigError("labels: expected a percentage above 0 and at most 100, found 0")


@dataclass(frozen=True)
class Convert:
    """A backbone rewritten for other code (`detection/convert.py`)."""

    stage: ClassVar[str] = "convert"

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

    The section `detectron2` holds Detectron2's own keys, nested as in its config files.
    """

    stage: ClassVar[str] = "detection"

    recipe: str
    task: Literal["voc", "coco"]
    seed: int = within(0)
    group: int = within(1)  # consecutive images that are all landscape or all portrait: those of one GPU in Detectron2
    detectron2: Mapping[str, Any]
    data: Literal["full", "photos"] = "full"  # photos: small trees in the same form, made of embedded photographs
    checkpoint: str = ""  # the identity of the weights, filled in by detection/train.py
    eval_every: int = field(default=0, metadata={"low": 0, "hashed": False})  # iterations; 0: only after the last
    allow_partial_data: bool = False  # accept image counts other than VOC's and COCO's: not the paper's data
    content: str = ""  # identity of images and annotations, unless complete; filled in (detection/datasets.py)
    run: Execution = Execution()

    def __post_init__(self) -> None:
        check_run(self)
        for key, value in flatten({"detectron2": self.detectron2}).items():
            if key in GIVEN:
                raise ConfigError(f"{key}: is set by {GIVEN[key]}")
            if isinstance(value, str) and OTHERWISE.fullmatch(value):
                raise ConfigError(f"{key}: {value!r} is not a decimal number")


Config = Pretrain | KNNEval | Linear | Finetune | Convert | Detection  # of a stage
