"""The images of a data set as Detectron2 takes them, in an order that depends on the seed alone. Needs Detectron2."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

with warnings.catch_warnings():  # about pkg_resources, which it still uses
    warnings.simplefilter("ignore")
    from detectron2.config import CfgNode
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
    from detectron2.data.common import DatasetFromList
    from detectron2.data.datasets import register_coco_instances
    from detectron2.data.samplers import InferenceSampler
    from detectron2.structures import BoxMode

from detection.annotations import VOC_CLASSES, read_voc
from detection.datasets import Data, Position, Split, batches
from mixmask.config import Detection
from mixmask.datasets import DataError
from mixmask.datasets.workers import ignore_signals
from mixmask.randomness import seed_of
from mixmask.training import distributed


@dataclass(frozen=True)
class Task:
    """A recipe on the data sets that were found."""

    config: Detection
    cfg: CfgNode  # the recipe over Detectron2's defaults
    images: list[dict]  # all training images with annotations, in Detectron2's form
    test: str  # under which name Detectron2 knows the test split
    absent: Sequence[str] = ()  # VOC's classes without an object in it


def task(config: Detection, cfg: CfgNode, data: Data) -> Task:
    """Reads the training images' annotations."""
    names = [register(split, config.task) for split in data.training]
    images = get_detection_dataset_dicts(names, filter_empty=True)
    return Task(config, cfg, images, register(data.test, config.task), data.absent)


def register(split: Split, task: str) -> str:
    """The name under which Detectron2 finds the split from now on."""
    name = f"{split.path.resolve()} {split.name}"
    if name in DatasetCatalog.list():
        return name
    if task == "voc":
        DatasetCatalog.register(name, lambda: voc_images(split))
        about = {"dirname": str(split.path), "split": split.name, "year": int(split.path.name.removeprefix("VOC"))}
        MetadataCatalog.get(name).set(thing_classes=list(VOC_CLASSES), **about)
    else:
        json_file = split.path / "annotations" / f"instances_{split.name}.json"
        register_coco_instances(name, {}, str(json_file), str(split.path / split.name))
    return name


def voc_images(split: Split) -> list[dict[str, Any]]:
    """As Detectron2's `load_voc_instances`, which cannot read a split of one image."""
    images = read_voc(*split)
    for image in images:
        for thing in image["annotations"]:
            thing["bbox_mode"] = BoxMode.XYXY_ABS
    return images


class Training(Dataset):
    """Training images, resized and flipped by the random numbers of their place in the stream of images."""

    def __init__(self, images: list[dict], cfg: CfgNode, seed: int, purpose: str):
        self.images, self.mapper = DatasetFromList(images), DatasetMapper(cfg, is_train=True)
        self.seed, self.purpose = seed, purpose

    def __getitem__(self, position: Position) -> dict[str, Any] | DataError:
        np.random.seed(seed_of(self.seed, "detection", self.purpose, "view", position.place) % 2**32)
        return mapped(self.mapper, self.images[position.image])


class Test(Dataset):
    """Test images, resized."""

    def __init__(self, images: list[dict], cfg: CfgNode):
        self.images, self.mapper = DatasetFromList(images), DatasetMapper(cfg, is_train=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any] | DataError:
        return mapped(self.mapper, self.images[index])


def mapped(mapper: DatasetMapper, image: dict) -> dict[str, Any] | DataError:
    """The image for Detectron2. An error is returned: raised in a worker, it would arrive as a traceback."""
    try:
        return mapper(image)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return DataError(f"{image['file_name']} cannot be used ({reason})")


class Loader:
    """Batches, decoded in `workers` processes, which end with `close`. Raises DataError for an unusable image."""

    def __init__(self, dataset: Dataset, batches: Iterable[list], workers: int):
        options = {"num_workers": workers, "collate_fn": as_list, "worker_init_fn": ignore_signals}
        self.loader = DataLoader(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
        self.iterator = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Loader:
        self.close()
        self.iterator = iter(self.loader)
        return self

    def __next__(self) -> list[dict]:
        batch = next(self.iterator)
        if errors := [item for item in batch if isinstance(item, DataError)]:
            raise errors[0]
        return batch

    def close(self) -> None:
        """End the processes, which ignore signals: Python's exit would wait for them forever."""
        if hasattr(self.iterator, "_shutdown_workers"):
            self.iterator._shutdown_workers()
        self.iterator = None


@contextlib.contextmanager
def training_batches(task: Task, purpose: str, first: int = 0) -> Iterator[Loader]:
    """This process's images of each batch, endlessly, from batch `first` on. Raises DataError for a damaged file."""
    rows = distributed.local_slice(task.cfg.SOLVER.IMS_PER_BATCH)
    own = (batch[rows] for batch in itertools.islice(order(task, purpose), first, None))
    dataset = Training(task.images, task.cfg, task.config.seed, purpose)
    with contextlib.closing(Loader(dataset, own, task.config.run.workers)) as loader:
        yield iter(loader)


@contextlib.contextmanager
def test_batches(task: Task) -> Iterator[Loader]:
    """This process's test images, one a batch, as in Detectron2. Raises DataError as above."""
    dataset = Test(get_detection_dataset_dicts([task.test], filter_empty=False), task.cfg)
    own = BatchSampler(InferenceSampler(len(dataset)), 1, drop_last=False)
    with contextlib.closing(Loader(dataset, own, task.config.run.workers)) as loader:
        yield loader


def order(task: Task, purpose: str) -> Iterator[list[Position]]:
    """Which images each batch has, all processes' together; endlessly."""
    wide = [image["width"] > image["height"] for image in task.images]
    return batches(wide, task.cfg.SOLVER.IMS_PER_BATCH, task.config.group, task.config.seed, purpose)


def files(task: Task, purpose: str, step: int) -> list[str]:
    """The files of the images of batch `step`, all processes' together."""
    batch = next(itertools.islice(order(task, purpose), step, None))
    return [task.images[position.image]["file_name"] for position in batch]


def as_list(images: list) -> list:
    """Detectron2's batch is a list of images of different sizes."""
    return images
