"""VOC and COCO on disk: found, whole, and the order in which training goes through them. No Detectron2 here.

DATA_ROOT/VOC2007, DATA_ROOT/VOC2012     (or below VOCdevkit/)   ImageSets/Main, Annotations, JPEGImages
DATA_ROOT/coco                                                   annotations, train2017, val2017
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detection import annotations, photos, pictures
from detection.annotations import Annotations
from mixmask.config import ConfigError, Detection, flatten
from mixmask.datasets import DataError
from mixmask.randomness import numpy_generator
from mixmask.runs import write_atomically


class Published(NamedTuple):
    """A split of a data set, as it is published."""

    folder: str  # VOC2007, VOC2012, coco
    name: str  # trainval, test, train2017, val2017
    images: int  # of the whole data set


SPLITS = {  # task -> what is trained on, what is tested on
    "voc": (
        (Published("VOC2007", "trainval", 5_011), Published("VOC2012", "trainval", 11_540)),
        Published("VOC2007", "test", 4_952),
    ),
    "coco": ((Published("coco", "train2017", 118_287),), Published("coco", "val2017", 5_000)),
}
WANTED = {  # task -> keys of Detectron2, and what they must be
    "voc": {"MODEL.ROI_HEADS.NUM_CLASSES": len(annotations.VOC_CLASSES), "MODEL.MASK_ON": False},
    "coco": {"MODEL.ROI_HEADS.NUM_CLASSES": annotations.COCO_CLASSES, "MODEL.MASK_ON": True},
}
NOTE = "data.json"  # in a run's directory
DEFAULTS = {"MODEL.ROI_HEADS.NUM_CLASSES": 80, "MODEL.MASK_ON": False}  # Detectron2's


class Split(NamedTuple):
    """A split that is there."""

    path: Path  # its folder
    name: str

    def __str__(self) -> str:
        return f"{self.path}, {self.name}"


class Data(NamedTuple):
    """What to train on, and what to test on."""

    training: list[Split]
    test: Split
    absent: list[str]  # VOC's classes without an object in the test split
    notes: list[str]  # for people


class NoFolderError(DataError):
    """A data set is not there at all."""


def prepare(config: Detection, directory: Path) -> Data:
    """The splits, whole and sound; `photos` are written into `directory` first.

    All annotations are parsed and all images opened. What was found is noted in `directory`/data.json, and nothing is
    opened again, in this run or in another beside it, while names, sizes and times of the files are the same.
    Raises DataError for splits that are absent or, unless `allow_partial_data`, not whole; for anything in them that
    would crash training or testing; and if a run continues on other data than it began with.
    """
    splits = find(config, directory)
    note = remembered(directory, splits) or check(config, splits)
    check_counts(config, splits, note["images"])
    before = _note(directory / NOTE)
    if before and (directory / "config.yaml").exists() and before["content"] != note["content"]:
        there, here = (_sum(one["images"]) for one in (before, note))
        raise DataError(
            f"{directory} is a run on other data: {there} images there, {here} now, or as many different ones; give "
            f"another --run-dir, or its original data as run.data_root"
        )
    if before != note:
        write_atomically(directory / NOTE, json.dumps(note, indent=1) + "\n")
    return Data(splits[:-1], splits[-1], note["absent"], _remarks(config, splits, note))


def settle(config: Detection) -> Detection:
    """The config with the identity of its images and annotations. Raises DataError."""
    content = identity(config)
    return config if content == config.content else dataclasses.replace(config, content=content)


def identity(config: Detection) -> str:
    """Which images and annotations the config's are: "" for as many as VOC and COCO have. Raises DataError.

    How many, and eight digits of the SHA-256 of the images' names and sizes and of the annotations.
    """
    if not config.allow_partial_data or config.data == "photos":
        return ""
    splits = find(config, Path())
    images = [_images(split) for split in splits]
    counts = [len(files) for files in images]
    return "" if counts == _wanted(config) else f"{_sum(counts)} images, {content(splits, images)[:8]}"


def _images(split: Split) -> list[Path]:
    """The image files of a split. Raises DataError where they cannot be listed."""
    if (split.path / "ImageSets").is_dir():
        return [split.path / "JPEGImages" / f"{name}.jpg" for name in annotations.voc_names(*split)]
    return annotations.coco_files(*split)


def _sum(counts: Sequence[int]) -> str:
    return " + ".join(f"{n:,}" for n in counts)


def find(config: Detection, directory: Path) -> list[Split]:
    """The training splits and, last, the test split. Raises NoFolderError."""
    root = Path(config.run.data_root)
    if config.data == "photos":
        root = directory / "photos"
        photos.write(root, config.task)
    training, test = SPLITS[config.task]
    return [Split(find_folder(root, split.folder), split.name) for split in (*training, test)]


def find_folder(root: Path, name: str) -> Path:
    """`name` below `root`, or below what DETECTRON2_DATASETS says. Raises NoFolderError."""
    roots = [root] + [Path(place) for place in (os.environ.get("DETECTRON2_DATASETS"),) if place]
    places = [place / below / name for place in roots for below in ("", "VOCdevkit")]
    for place in places:
        if place.is_dir():
            return place
    raise NoFolderError(
        f"no {name} in {' or '.join(map(str, roots))} (run.data_root); docs/detection.md says how to get it"
    )


# ------------------------------------------------------------------------------------------- are they sound?


def check(config: Detection, splits: Sequence[Split]) -> dict[str, Any]:
    """Parse all annotations and open all images; what data.json holds. Raises DataError naming file and object."""
    annotated = []
    for split in splits:
        testing = split is splits[-1]
        if config.task == "voc":
            for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
                names = [f"{name}{suffix}" for name in annotations.voc_names(*split)]
                pictures.check_names(split.path / folder, names)
            annotated.append(annotations.check_voc(*split, testing))
        else:
            polygons = flatten(config.detectron2).get("INPUT.MASK_FORMAT", "polygon") == "polygon"
            annotated.append(annotations.check_coco(*split, testing, polygons))
            pictures.check_names(split.path / split.name, [picture.file.name for picture in annotated[-1].pictures])
    _check_together(splits, annotated)
    check_counts(config, splits, [len(split.pictures) for split in annotated])
    pictures.open_all([picture for split in annotated for picture in split.pictures], config.run.workers)
    classes = annotations.VOC_CLASSES if config.task == "voc" else ()
    return {
        "stamp": stamp(splits),
        "content": content(splits, [[picture.file for picture in split.pictures] for split in annotated]),
        "images": [len(split.pictures) for split in annotated],
        "objects": [split.objects for split in annotated],
        "absent": [name for label, name in enumerate(classes) if label not in annotated[-1].counted],
    }


def check_counts(config: Detection, splits: Sequence[Split], counts: Sequence[int]) -> None:
    """Raises DataError for other numbers of images than the data set has, unless `allow_partial_data`."""
    for split, count, wanted in zip(splits, counts, _wanted(config), strict=True):
        if count != wanted and not config.allow_partial_data:
            raise DataError(
                f"{split}: {count:,} images, expected {wanted:,}; to go on with a part, which is not the paper's data: "
                "allow_partial_data=true"
            )


def _wanted(config: Detection) -> list[int]:
    training, test = SPLITS[config.task]
    return [photos.IMAGES if config.data == "photos" else split.images for split in (*training, test)]


def _check_together(splits: Sequence[Split], annotated: Sequence[Annotations]) -> None:
    """Raises DataError for splits that number classes differently, or share images."""
    for split, own in zip(splits[:-1], annotated[:-1], strict=True):
        if own.categories != annotated[-1].categories:
            number = min(set(own.categories.items()) ^ set(annotated[-1].categories.items()))[0]
            here, there = (a.categories.get(number) for a in (own, annotated[-1]))
            raise DataError(f"{split}: category {number} is {here!r}, in the test split {there!r}; expected the same")
        if shared := {p.file for p in own.pictures} & {p.file for p in annotated[-1].pictures}:
            raise DataError(f"{split}: {len(shared):,} images are in the test split too, first {min(shared).name}")


def _remarks(config: Detection, splits: Sequence[Split], note: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{split}: {count:,} images, expected {wanted:,}: not the paper's data"
        for split, count, wanted in zip(splits, note["images"], _wanted(config), strict=True)
        if count != wanted
    ]
    if absent := note["absent"]:
        left = f"its AP is the mean over the other {len(annotations.VOC_CLASSES) - len(absent)} classes"
        notes.append(f"{splits[-1]}: no object that counts of {', '.join(absent)}: {left}")
    return notes


# -------------------------------------------------------------------------------------- what is known of them


def remembered(directory: Path, splits: Sequence[Split]) -> dict[str, Any] | None:
    """What this run, or one beside it, has noted of these very files."""
    now = stamp(splits)
    notes = map(_note, [directory / NOTE, *sorted(directory.parent.glob(f"*/{NOTE}"))])
    return next((note for note in notes if note and note["stamp"] == now), None)


def _note(path: Path) -> dict[str, Any] | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return note if note.keys() == {"stamp", "content", "images", "objects", "absent"} else None
    except (OSError, ValueError, AttributeError):
        return None


def stamp(splits: Sequence[Split]) -> str:
    """SHA-256 of place, names, sizes and times of all files that belong to the splits."""
    digest = hashlib.sha256()
    for path, split in splits:
        lists, folders = path / "ImageSets" / "Main", [path / "Annotations", path / "JPEGImages"]
        if not lists.is_dir():
            lists, folders = path / "annotations", [path / split]
        files = [file for file in pictures.listing(lists) if file[0] in (f"{split}.txt", f"instances_{split}.json")]
        digest.update(repr((str(path.resolve()), files, *map(pictures.listing, folders))).encode())
    return digest.hexdigest()


def content(splits: Sequence[Split], images: Sequence[Sequence[Path]]) -> str:
    """SHA-256 of the images' names and sizes, and of the annotations, wherever they lie. Raises DataError."""
    digest = hashlib.sha256()
    try:
        for (path, split), own in zip(splits, images, strict=True):
            for file in own:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            files = [path / "annotations" / f"instances_{split}.json"]
            if (path / "ImageSets").is_dir():
                files = [path / "Annotations" / f"{file.stem}.xml" for file in own]
            for file in files:
                digest.update(file.read_bytes())
    except OSError as error:
        raise DataError(f"{error.filename} is missing or unreadable: {error.strerror}") from None
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- the order


class Position(NamedTuple):
    """An image's place in the endless stream of training images: its random size and flip depend on it."""

    place: int
    image: int


def batches(wide: Sequence[bool], size: int, group: int, seed: int, purpose: str) -> Iterator[list[Position]]:
    """Endless batches of `size` images, each `group` in a row all landscape or all portrait (as Detectron2 groups).

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

    With fewer classes than the data have, training crashes; with more, or without masks, it goes on silently.
    """
    settings = DEFAULTS | flatten(detectron2)
    for key, wanted in WANTED[task].items():
        if settings[key] != wanted:
            raise ConfigError(
                f"detectron2.{key}: expected {wanted} for task {task}, found {settings[key]}; the recipe of {task} is "
                f"detection/configs/{task}.yaml"
            )


def check_batches(size: int, group: int, processes: int) -> None:
    """Raises ConfigError for a batch that groups or processes do not divide."""
    for parts, what in ((group, f"groups of {group} images"), (processes, f"{processes} processes")):
        if size % parts:
            raise ConfigError(f"detectron2.SOLVER.IMS_PER_BATCH: {size} images cannot be divided into {what}")
