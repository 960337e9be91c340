"""ImageNet-1K (ILSVRC 2012) in class folders."""

from __future__ import annotations

from pathlib import Path

from mixmask.datasets.base import DataError, Expected, Files, Listing
from mixmask.datasets.tree import check_counts, class_folders, files_of, find_folder, image_names, some

BELOW = ("imagenet", "imagenette", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")  # folders in which it is looked for


def read(root: Path, split: str, expected: Expected, allow_partial: bool) -> Files:
    """What `listing` lists, to be read by workers."""
    images = listing(root, split, expected, allow_partial)
    return Files(images.paths, images.labels, images.classes, "imagenet", images.note, packed=images.packed)


def listing(root: Path, split: str, expected: Expected, allow_partial: bool) -> Listing:
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
    balanced = split == "test"  # 50 in each class; 732 to 1,300 for training
    note = check_counts("ImageNet", split, part, labels, wnids, expected, allow_partial, balanced)
    return Listing(paths, labels, tuple(wnids), part, note)
