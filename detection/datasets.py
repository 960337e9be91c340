"""VOC and COCO on disk: found, whole, and the order in which training goes through them. No Detectron2 here.

DATA_ROOT/VOC2007, DATA_ROOT/VOC2012     (or below VOCdevkit/)   ImageSets/Main, Annotations, JPEGImages
DATA_ROOT/coco                                                   annotations, train2017, val2017
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detection import photos
from mixmask.config import ConfigError, Detection, flatten
from mixmask.datasets import DataError
from mixmask.randomness import numpy_generator


class Split(NamedTuple):
    """A part of a data set in one folder."""

    folder: str  # VOC2007, VOC2012, coco
    name: str  # trainval, test, train2017, val2017
    images: int  # of the whole data set


SPLITS = {  # task -> what is trained on, what is tested on
    "voc": (
        (Split("VOC2007", "trainval", 5_011), Split("VOC2012", "trainval", 11_540)),
        Split("VOC2007", "test", 4_952),
    ),
    "coco": ((Split("coco", "train2017", 118_287),), Split("coco", "val2017", 5_000)),
}


WANTED = {  # task -> keys of Detectron2, and what they must be
    "voc": {"MODEL.ROI_HEADS.NUM_CLASSES": 20, "MODEL.MASK_ON": False},
    "coco": {"MODEL.ROI_HEADS.NUM_CLASSES": 80, "MODEL.MASK_ON": True},
}
DEFAULTS = {"MODEL.ROI_HEADS.NUM_CLASSES": 80, "MODEL.MASK_ON": False}  # Detectron2's


class Found(NamedTuple):
    """A split that is there."""

    path: Path  # its folder
    split: str


def prepare(config: Detection, directory: Path) -> tuple[list[Found], Found, list[str]]:
    """What to train on, what to test on, and notes for people; `photos` are written into `directory` first.

    Raises DataError for splits that are absent or, unless `allow_partial_data`, not whole.
    """
    root = Path(config.run.data_root)
    if config.data == "photos":
        root = directory / "photos"
        photos.write(root, config.task)
    training, test = SPLITS[config.task]
    notes, found = [], []
    for split in (*training, test):
        found.append(Found(find_folder(root, split.folder), split.name))
        wanted = photos.IMAGES if config.data == "photos" else split.images
        images = (check_coco if config.task == "coco" else check_voc)(*found[-1])
        if images != wanted:
            text = f"{found[-1].path}, {split.name}: {images:,} images, expected {wanted:,}"
            if not config.allow_partial_data:
                raise DataError(f"{text}; to go on with a part, which is not the paper's data: allow_partial_data=true")
            notes.append(f"{text}: not the paper's data")
    return found[:-1], found[-1], notes


def find_folder(root: Path, name: str) -> Path:
    """`name` below `root`, or below what DETECTRON2_DATASETS says. Raises DataError."""
    roots = [root] + [Path(place) for place in (os.environ.get("DETECTRON2_DATASETS"),) if place]
    places = [place / below / name for place in roots for below in ("", "VOCdevkit")]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(
        f"no {name} in {' or '.join(map(str, roots))} (run.data_root); docs/detection.md says how to get it"
    )


def check_voc(folder: Path, split: str) -> int:
    """Number of images in the split. Raises DataError where an image or its annotation is not there."""
    names = _read(folder / "ImageSets" / "Main" / f"{split}.txt").split()
    for part, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        check_files(folder / part, [f"{name}{suffix}" for name in names])
    return len(names)


def check_coco(folder: Path, split: str) -> int:
    """Number of images in the split. Raises DataError where an image, or all annotations, are not there."""
    path = folder / "annotations" / f"instances_{split}.json"
    try:
        content = json.loads(_read(path))
        names = [image["file_name"] for image in content["images"]]
        annotations = content["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is cut off, or no COCO annotations ({error!r})") from None
    if not annotations:
        raise DataError(f"{path} holds no annotations")
    check_files(folder / split, names)
    return len(names)


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raises DataError unless every name is a file of the folder, and not an empty one."""
    try:
        there = {entry.name for entry in os.scandir(folder) if entry.stat().st_size}
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from None
    missing = [name for name in names if name not in there]
    if missing or not names:
        raise DataError(
            f"{folder}: {len(missing):,} of {len(names):,} files are missing or empty, first: {missing[:1]}"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


# ----------------------------------------------------------------------------------------------------- the order


class Position(NamedTuple):
    """An image's place in the endless stream of training images: its random crop size and flip hang on it."""

    place: int
    image: int


def batches(wide: Sequence[bool], size: int, group: int, seed: int, purpose: str) -> Iterator[list[Position]]:
    """Endless batches of `size` images, each `group` of them in a row all wide or all upright (Detectron2's grouping).

    Every epoch is a new permutation of all images; a group is complete when `group` images of its kind have come.
    The order depends on the arguments alone: a run that resumes skips what it has had, whatever its processes.
    """
    waiting: dict[bool, list[Position]] = {False: [], True: []}
    batch: list[Position] = []
    for epoch in itertools.count():
        order = numpy_generator(seed, "detection", purpose, epoch).permutation(len(wide))
        for rank, image in enumerate(order.tolist()):
            kind = waiting[wide[image]]
            kind.append(Position(epoch * len(wide) + rank, image))
            if len(kind) == group:
                batch += kind
                kind.clear()
            if len(batch) == size:
                yield batch
                batch = []


def check_task(task: str, detectron2: Mapping[str, Any]) -> None:
    """Raises ConfigError where the recipe's section `detectron2` is of a detector for the other task.

    With fewer classes than the data have, training breaks off; with more, or without masks, it says nothing.
    """
    found = DEFAULTS | flatten(detectron2)
    for key, wanted in WANTED[task].items():
        if found[key] != wanted:
            raise ConfigError(
                f"detectron2.{key}: expected {wanted} for task {task}, found {found[key]}; the recipe of {task} is "
                f"detection/configs/{task}.yaml"
            )


def check_batches(size: int, group: int, processes: int) -> None:
    """Raises ConfigError for a batch that groups or processes do not divide."""
    for parts, what in ((group, f"groups of {group} images"), (processes, f"{processes} processes")):
        if size % parts:
            raise ConfigError(f"detectron2.SOLVER.IMS_PER_BATCH: {size} images cannot be divided into {what}")
