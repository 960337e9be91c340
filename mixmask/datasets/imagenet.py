"""ImageNet-1K (ILSVRC 2012): class folders, the official tar archives, or parquet shards."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from mixmask.datasets import imagenet_parquet, imagenet_tar
from mixmask.datasets.base import DataError, Expected, Files, Listing
from mixmask.datasets.tree import check_counts, class_folders, files_of, find_folder, image_names, some

BELOW = ("imagenet", "imagenette", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")  # folders in which it is looked for


def read(root: Path, split: str, expected: Expected, allow_partial: bool) -> Files:
    """What `listing` lists, to be read by workers."""
    images = listing(root, split, expected, allow_partial)
    return Files(images.paths, images.labels, images.classes, "imagenet", images.note, packed=images.packed)


def listing(root: Path, split: str, expected: Expected, allow_partial: bool) -> Listing:
    """Class folders, the official tar archives or parquet shards, whichever is there: the same images in one order."""
    images = _from_archives(root, split, allow_partial)
    images = _from_folders(root, split, expected) if images is None else images
    balanced = split == "test"  # 50 in each class; 732 to 1,300 for training
    counted = (images.folder, images.labels, images.classes, expected, allow_partial, balanced)
    return dataclasses.replace(images, note=check_counts("ImageNet", split, *counted))


def _from_archives(root: Path, split: str, allow_partial: bool) -> Listing | None:
    """None where there are none, or class folders beside them."""
    for folder in (root, *(root / name for name in (*BELOW, "data"))):
        if all(os.path.isdir(folder / name) for name in ("train", "val")):
            return None
        if imagenet_tar.here(folder):
            return imagenet_tar.listing(folder, split, allow_partial)
        if imagenet_parquet.here(folder):
            return imagenet_parquet.listing(folder, split)
    return None


def _from_folders(root: Path, split: str, expected: Expected) -> Listing:
    """train/<wnid>/ and val/<wnid>/; the class index is the wnid's rank among the folders of train/."""
    folder = find_folder(root, BELOW, ("train", "val"), "ImageNet")
    wnids = class_folders(folder / "train")
    part = folder / ("train" if split == "train" else "val")
    present = class_folders(part)
    if not present and (flat := image_names(part)):
        raise DataError(
            f"{part} is flat: {len(flat):,} images and no class folders, expected {expected.classes} folders "
            f"<wnid>/; read like this every image would have one label: sort the images into folders by their labels"
        )
    if part.name == "val" and (strangers := sorted(set(present) - set(wnids))):
        raise DataError(f"{part}: class folders {some(strangers)} are not in {folder / 'train'}")
    paths, labels = files_of([part / wnid for wnid in wnids])
    return Listing(paths, labels, tuple(wnids), part)
