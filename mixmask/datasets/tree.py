"""Trees of class folders: where they are, which image files they hold, and whether these are all there are."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixmask.datasets.base import DataError, Expected, one_line

log = logging.getLogger(__name__)

ENDINGS = (".jpeg", ".jpg", ".png")


def find_folder(root: Path, below: Sequence[str], holds: Sequence[str], title: str) -> Path:
    """`root`, or the folder in it, that has the entries `holds`. Raises DataError listing the places tried."""
    if not os.path.isdir(root):
        raise DataError(f"data root '{root}' does not exist; expected the folder of {title} or the one that holds it")
    tried = [root, *(root / name for name in below)]
    for folder in tried:
        if all(os.path.exists(folder / name) for name in holds):
            return folder
    raise DataError(
        f"{title} not found: expected {', '.join(holds)} in one of {', '.join(map(str, tried))}; "
        f"found in {root}: {entries_of(root)}"
    )


def entries(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, by name, without hidden entries (macOS adds a ._NAME to each file).

    Raises DataError for a folder that cannot be read, and for a link that leads nowhere or in a circle.
    """
    try:
        with os.scandir(folder) as listing:
            visible = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from None
    for entry in visible:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise DataError(f"{entry.path} is a broken link ({os.readlink(entry.path)}); fix or remove it")
        if entry.is_symlink() and entry.is_dir() and Path(folder).resolve().is_relative_to(Path(entry.path).resolve()):
            raise DataError(f"{entry.path} is a link to a folder that holds it; remove it")
    return visible


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones. Raises DataError as `entries` does."""
    return [entry.name for entry in entries(folder) if entry.is_dir()]


def image_names(folder: Path) -> list[str]:
    """Names of the image files in `folder`, sorted; none where there is no such folder. Raises DataError likewise."""
    if not os.path.isdir(folder):
        return []
    return [entry.name for entry in entries(folder) if entry.name.lower().endswith(ENDINGS) and entry.is_file()]


def read_text(path: Path) -> str:
    """The text of one of a data set's own files. Raises DataError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None


def files_of(folders: Sequence[Path]) -> tuple[list[str], Tensor]:
    """The image files of each class's folder, and their labels (N,); a missing folder is an empty class."""
    names = [image_names(folder) for folder in folders]
    paths = [os.path.join(folder, name) for folder, some in zip(folders, names, strict=True) for name in some]
    return paths, torch.arange(len(folders)).repeat_interleave(torch.tensor([len(some) for some in names]))


def by_class(names: Sequence[str], classes: Sequence[str], where: Path) -> tuple[list[int], Tensor]:
    """For images <class>/<name> in any order: the order that class folders have, and the labels (N,) in it.

    Raises DataError for a class that is not among `classes`.
    """
    index = {name: i for i, name in enumerate(classes)}
    wnids = [name.split("/", 1)[0] for name in names]
    if strangers := sorted(set(wnids) - set(classes)):
        raise DataError(f"{where}: images of {some(strangers)}, of which there are none for training")
    order = sorted(range(len(names)), key=lambda i: (index[wnids[i]], names[i]))
    return order, torch.tensor([index[wnids[i]] for i in order], dtype=torch.long)


def check_counts(
    title: str,
    split: str,
    where: Path,
    labels: Tensor,
    classes: Sequence[str],
    expected: Expected,
    allow_partial: bool = False,
    balanced: bool = True,
) -> str:
    """Compare with the published counts; returns a note on what is missing, "" if nothing is.

    `balanced`: the published split has equally many images in each class. Raises DataError.
    """
    counts = torch.bincount(labels, minlength=len(classes))  # (classes,)
    total, present = len(labels), int((counts > 0).sum())
    difference = f"{title} {split}: found {total:,} images in {present} classes under {where}, " + (
        f"expected {expected.images(split):,} in {expected.classes}"
    )
    if (total, present) == (expected.images(split), expected.classes):
        if balanced and int(counts.min()) != int(counts.max()):
            each = expected.images(split) // expected.classes
            raise DataError(f"{difference}, but not {each} in each class{_least(counts, classes)}; unpack it anew")
        return ""
    if total > expected.images(split) or len(classes) > expected.classes or total == 0:
        raise DataError(f"{difference}; unpack the official archive anew")
    difference += _least(counts, classes)
    if not allow_partial:
        raise DataError(f"{difference}; complete it, or say allow_partial_data=true (results are then not comparable)")
    log.warning("%s: a partial data set; results are not comparable", difference)
    return f"partial: {difference}"


def _least(counts: Tensor, classes: Sequence[str]) -> str:
    if missing := [classes[i] for i in (counts == 0).nonzero().flatten().tolist()]:
        return f"; no image of {some(missing)}"
    low, high = int(counts.min()), int(counts.max())
    if low == high:
        return f"; {low} images in each class"
    return f"; {low} to {high} images a class, fewest in {classes[int(counts.argmin())]}"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def entries_of(folder: Path) -> str:
    """The first few entries of a folder, for an error's text."""
    return some([entry.name for entry in entries(folder)], 5) or "nothing" if os.path.isdir(folder) else "nothing"
