"""Tiny-ImageNet-200 in its original layout: wnids.txt, train/<wnid>/images/, val/images/ with val_annotations.txt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixmask.datasets.base import DataError, Expected, Listing, Resident
from mixmask.datasets.cache import decode_all, kept
from mixmask.datasets.tree import (
    check_counts,
    class_folders,
    entries_of,
    files_of,
    find_folder,
    image_names,
    read_text,
    some,
)


def read(root: Path, split: str, expected: Expected, allow_partial: bool) -> Resident:
    """The images in memory; once decoded they are kept beside, in mixmask_<split>.pt."""
    files = listing(root, split, expected, allow_partial)
    paths, cache = files.paths, files.folder / f"mixmask_{split}.pt"
    images = kept(cache, paths, lambda: decode_all(paths, (expected.side, expected.side)))
    return Resident(images, files.labels, files.classes, "tiny_imagenet", files.note)


def listing(root: Path, split: str, expected: Expected, allow_partial: bool) -> Listing:
    """The image files; the order of wnids.txt is that of the classes."""
    folder = find_folder(root, ("tiny-imagenet-200",), ("wnids.txt", "train", "val"), "Tiny-ImageNet")
    wnids = tuple(read_text(folder / "wnids.txt").split())
    if len(set(wnids)) != expected.classes:
        raise DataError(f"{folder / 'wnids.txt'}: found {len(set(wnids))} classes, expected {expected.classes}")
    paths, labels = (_train if split == "train" else _val)(folder, wnids)
    note = check_counts("Tiny-ImageNet", split, folder, labels, wnids, expected, allow_partial)
    return Listing(paths, labels, wnids, folder, note)


def _train(folder: Path, wnids: Sequence[str]) -> tuple[list[str], Tensor]:
    present = class_folders(folder / "train")
    if strangers := sorted(set(present) - set(wnids)):
        raise DataError(f"{folder / 'train'}: class folders {some(strangers)} are not in wnids.txt")
    return files_of([folder / "train" / wnid / "images" for wnid in wnids])


def _val(folder: Path, wnids: Sequence[str]) -> tuple[list[str], Tensor]:
    images, annotations = folder / "val" / "images", folder / "val" / "val_annotations.txt"
    expected = "expected the original layout: val/images/ and val/val_annotations.txt, which holds the labels"
    for path, kind in ((images, "folder"), (annotations, "file")):
        if not path.exists():
            raise DataError(f"Tiny-ImageNet: {kind} {path} is missing (found {entries_of(folder / 'val')}); {expected}")
    index = {wnid: i for i, wnid in enumerate(wnids)}
    labels = _read_annotations(annotations, index)
    names = image_names(images)
    if unlabelled := sorted(set(names) - set(labels)):
        raise DataError(f"{annotations}: no label for {some(unlabelled)} of {images}")
    if absent := sorted(set(labels) - set(names)):
        raise DataError(f"{images}: {some(absent)}, named in {annotations.name}, are missing")
    return [str(images / name) for name in names], torch.tensor([labels[name] for name in names], dtype=torch.long)


def _read_annotations(path: Path, index: dict[str, int]) -> dict[str, int]:
    """Lines of "file <tab> wnid <tab> box" as {file: class index}."""
    labels = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in index:
            raise DataError(
                f"{path}, line {number}: expected 'file<tab>wnid<tab>...' with a wnid of wnids.txt: {line!r}"
            )
        labels[fields[0]] = index[fields[1]]
    return labels
