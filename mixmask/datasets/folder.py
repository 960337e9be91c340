"""Your own images: DIR/train/CLASS/* with DIR/val or DIR/test, DIR/CLASS/*, or images without labels in DIR.

Without test images of its own, a share of each class is held out, chosen by a hash of each file's path: adding files
moves no other. All formats and modes of `decoding` are read, and turned upright. Small images of equal size
are held in memory, others are read by workers.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch

from mixmask.datasets.base import DataError, Files, Listing, Resident
from mixmask.datasets.cache import decode_all, kept
from mixmask.datasets.decoding import read_shape
from mixmask.datasets.tree import class_folders, entries, entries_of, some

ENDINGS = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
ENDINGS += (".ppm", ".pgm", ".pnm", ".jp2", ".avif")
TEST = ("val", "test", "valid", "validation")  # names of the folder of test images; the first that is there
SMALL = 128  # pixels: the longest side of images that are held in memory
MEMORY = 2 * 2**30  # bytes that they may take


def read(root: Path, split: str, held_out: float) -> Resident | Files:
    """The images of a split; an empty `Files` where there are no test images. Raises DataError."""
    files = listing(root, split, held_out)
    everything = [*files.paths, *listing(root, "test" if split == "train" else "train", held_out).paths]
    shape = common_shape(everything)
    if shape and files.paths:
        cache = root / f".mixmask_{split}.pt"
        images = kept(cache, files.paths, lambda: decode_all(files.paths, shape, upright=True))
        return Resident(images, files.labels, files.classes, "folder", files.note)
    return Files(files.paths, files.labels, files.classes, "folder", files.note, upright=True)


def listing(root: Path, split: str, held_out: float) -> Listing:
    """The files of a split, of labelled images sorted by class and name. Raises DataError."""
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise DataError(f"run.data_root: '{root}' {what}; expected a folder of images")
    train, test = _parts(root)
    classes, loose = class_folders(train), _images_below(train, below=False)
    if classes and loose:
        raise DataError(
            f"{train} holds images beside class folders ({some(loose)} beside {some(classes)}); "
            "expected either folders, one a class, or images alone, which have no labels"
        )
    if len(classes) < 2:  # a single class is no label
        paths = [os.path.join(train, name) for name in _images_below(train)] if split == "train" else []
        if split == "train" and not paths:
            raise DataError(f"no images under {train} ({', '.join(ENDINGS)}); found: {entries_of(train)}")
        return Listing(paths, torch.zeros(len(paths), dtype=torch.long), (), root)
    members = _members(train, classes)
    if test is None:
        members = _shares(root, train, members, held_out)[split]
    elif split == "test":
        there = _members(test, _known(test, classes, train))
        members = {name: there.get(name, []) for name in classes}
    folder = test if test and split == "test" else train
    paths = [os.path.join(folder, name) for names in members.values() for name in names]
    counts = torch.tensor([len(names) for names in members.values()])
    return Listing(paths, torch.arange(len(classes)).repeat_interleave(counts), tuple(classes), root)


def _parts(root: Path) -> tuple[Path, Path | None]:
    """The folder of training images, and that of test images where there is one.

    `train` beside folders of other names is a class.
    """
    names = class_folders(root)
    tests = [name for name in TEST if name in names]
    if "train" in names and (tests or len(names) == 1):
        return root / "train", root / tests[0] if tests else None
    return root, None


def _known(folder: Path, classes: Sequence[str], train: Path) -> list[str]:
    """The class folders of the test images. Raises DataError for one that has no training images, and for none."""
    names = class_folders(folder)
    if strangers := sorted(set(names) - set(classes)):
        raise DataError(f"{folder}: class folders {some(strangers)} are not in {train}")
    if not names:
        raise DataError(f"{folder} has no class folders; expected those of {train}: {some(classes)}")
    return names


def _members(folder: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    """The images of each class, as paths below `folder`. Raises DataError for a class without any."""
    members = {name: [f"{name}/{path}" for path in _images_below(folder / name)] for name in classes}
    if empty := [name for name, paths in members.items() if not paths]:
        entries = entries_of(folder / empty[0])
        raise DataError(f"{folder}: no images in {some(empty)} (found: {entries}); remove what is not a class")
    return members


def _images_below(folder: Path, below: bool = True) -> list[str]:
    """Paths of the image files in a folder, relative to it, sorted; `below`: also in the folders in it."""
    paths = []
    for entry in entries(folder):
        if entry.is_dir():
            paths += [f"{entry.name}/{path}" for path in _images_below(Path(entry.path))] if below else []
        elif entry.name.lower().endswith(ENDINGS) and entry.is_file():
            paths.append(entry.name)
    return sorted(paths)


def _shares(root: Path, train: Path, members: dict[str, list[str]], held_out: float) -> dict[str, dict[str, list[str]]]:
    """The members of each split. Raises DataError for a class of which nothing is left for training."""
    places = {path: place((train / path).relative_to(root).as_posix()) for paths in members.values() for path in paths}
    shares = {
        "train": {name: [path for path in paths if places[path] >= held_out] for name, paths in members.items()},
        "test": {name: [path for path in paths if places[path] < held_out] for name, paths in members.items()},
    }
    if empty := [name for name, paths in shares["train"].items() if not paths]:
        raise DataError(
            f"folder.held_out: {held_out:g} leaves no training image of {some(empty)} "
            f"({len(members[empty[0]])} in all of {empty[0]}); expected less, or more images"
        )
    return shares


def place(path: str) -> float:
    """A number in [0, 1) that depends on the path alone, however the system writes its accents."""
    digest = hashlib.sha256(unicodedata.normalize("NFC", path).encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def common_shape(paths: Sequence[str]) -> tuple[int, int] | None:
    """(height, width) if all images have it, it is small, and they fit in memory; else None."""
    if not paths:
        return None
    shape = read_shape(paths[0])
    if max(shape) > SMALL or 3 * shape[0] * shape[1] * len(paths) > MEMORY:
        return None
    return shape if all(read_shape(path) == shape for path in paths[1:]) else None
