"""ImageNet-1K in the official archives, read in place: few cluster quotas allow a file for each image.

Each archive is checked once and indexed once: names, places and sizes of its images are kept in NAME.tar.index.npz
beside it (where that is not allowed, in the user's cache folder). An image is then one read at its place.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.imagenet import ARCHIVE_META

from mixmask.datasets.base import DataError, Listing, one_line
from mixmask.datasets.tree import by_class
from mixmask.runs import discard
from mixmask.training.progress import say

Entries = tuple[list[str], list[int], list[int]]  # names, places, sizes


@dataclass(frozen=True)
class TarMembers:
    """Images inside a tar archive by their places (N,) in it and their sizes (N,), in bytes."""

    path: str
    places: np.ndarray
    sizes: np.ndarray

    def read(self, index: int) -> bytes:
        """The file of image `index`. Raises DataError where the archive has become shorter or cannot be read."""
        size = self.size(index)
        try:
            content = os.pread(_opened(self.path), size, int(self.places[index]))
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise DataError(f"{self.path} is cut off: an image at {self.places[index]:,} bytes is not whole")
        return content

    def size(self, index: int) -> int:
        """Its size in bytes."""
        return int(self.sizes[index])

    def take(self, indices: Sequence[int]) -> TarMembers:
        """Those images alone."""
        return TarMembers(self.path, self.places[indices], self.sizes[indices])


@functools.cache
def _opened(path: str) -> int:
    """A descriptor of the archive, one per process: positioned reads do not interfere."""
    return os.open(path, os.O_RDONLY)


def here(folder: Path) -> bool:
    """Whether the official archives lie in `folder`."""
    return all(os.path.isfile(folder / ARCHIVE_META[name][0]) for name in ("train", "val"))


def listing(folder: Path, split: str, allow_partial: bool) -> Listing:
    """The images of a split by class and name, as in class folders.

    Raises DataError for archives that are not the official ones; with `allow_partial` any will do.
    """
    archive = folder / ARCHIVE_META["train"][0]
    names, places, sizes = _index(archive, ARCHIVE_META["train"][1], allow_partial, _training_images)
    classes = sorted({name.split("/")[0] for name in names})
    if split == "test":
        archive = folder / ARCHIVE_META["val"][0]
        names, places, sizes = _index(archive, ARCHIVE_META["val"][1], allow_partial, _images)
        wnids = _validation_wnids(folder, names, allow_partial)
        names = [f"{wnid}/{name}" for wnid, name in zip(wnids, names, strict=True)]
    order, labels = by_class(names, classes, archive)
    packed = TarMembers(str(archive), places[order], sizes[order])
    return Listing([f"{archive}/{names[i]}" for i in order], labels, tuple(classes), archive, packed=packed)


def _validation_wnids(folder: Path, names: Sequence[str], allow_partial: bool) -> list[str]:
    """The class of each validation image, from the development kit: the n-th line is that of image n."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{folder}: the validation labels are in a MATLAB file; reading it needs scipy") from None
    name, md5 = ARCHIVE_META["devkit"]
    path = folder / name
    if not os.path.isfile(path):
        raise DataError(f"{path} is missing: it holds the labels of the validation images")
    if not allow_partial and (actual := _md5(path)) != md5:
        raise DataError(f"{path} is not the official archive: md5 {actual}, expected {md5}; download it again")
    try:
        with tarfile.open(path) as tar:
            members = {os.path.basename(member.name): member for member in tar if member.isfile()}
            synsets = loadmat(io.BytesIO(tar.extractfile(members["meta.mat"]).read()), squeeze_me=True)["synsets"]
            truth = tar.extractfile(members["ILSVRC2012_validation_ground_truth.txt"]).read().split()
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [wnids[int(truth[int(image.rsplit("_", 1)[1].split(".")[0]) - 1])] for image in names]
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{path} does not say the class of each validation image ({one_line(error)})") from None


# ---------------------------------------------------------------------------------------------------- the index


def _index(
    path: Path, md5: str, allow_partial: bool, images: Callable[[Path], Entries]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, places (N,) and sizes (N,) of the images in an archive, whose md5 is checked the first time."""
    stat = os.stat(path)
    stamp = f"{stat.st_size} {stat.st_mtime_ns}"
    kept = _kept(path, stamp)
    if kept is None:
        say(f"{path}: {stat.st_size / 1e9:.1f} GB are checked and indexed once")
        names, places, sizes = images(path)
        kept = {"stamp": stamp, "md5": _md5(path), "names": names, "places": places, "sizes": sizes}
        kept = {name: np.array(value) for name, value in kept.items()}
        _keep(path, kept)
    if str(kept["md5"]) != md5 and not allow_partial:
        raise DataError(
            f"{path} is not the official archive: md5 {kept['md5']}, expected {md5}; download it again, or say "
            "allow_partial_data=true (results are then not comparable)"
        )
    return kept["names"].tolist(), kept["places"], kept["sizes"]


def _places_of_index(path: Path) -> list[Path]:
    """Beside the archive, or else in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return [path.with_name(f"{path.name}.index.npz"), cache / "mixmask" / f"{key}.index.npz"]


def _kept(path: Path, stamp: str) -> dict[str, np.ndarray] | None:
    for place in _places_of_index(path):
        try:
            with np.load(place) as stored:
                content = dict(stored)
            if str(content["stamp"]) == stamp and {"md5", "names", "places", "sizes"} <= content.keys():
                return content
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, cut off, or another file
            continue
    return None


def _keep(path: Path, content: dict[str, np.ndarray]) -> None:
    reasons = []
    for place in _places_of_index(path):
        partial = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.npz")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(partial, **content)
            os.replace(partial, place)
            return
        except OSError as error:
            discard(partial)
            reasons.append(f"{place}: {error.strerror}")
    say(f"note: the index of {path} cannot be kept ({'; '.join(reasons)}); every run rebuilds it")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _images(path: Path) -> Entries:
    """Of an archive of images."""
    return _members(path, lambda tar: [(m.name, m.offset_data, m.size) for m in tar if m.isfile()])


def _training_images(path: Path) -> Entries:
    """Of an archive of archives, one a class: <wnid>.tar."""

    def walk(tar: tarfile.TarFile) -> list[tuple[str, int, int]]:
        members = []
        for member in tar:
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                wnid, start = member.name.removesuffix(".tar"), member.offset_data
                members += [(f"{wnid}/{m.name}", start + m.offset_data, m.size) for m in inner if m.isfile()]
        return members

    return _members(path, walk)


def _members(path: Path, walk: Callable[[tarfile.TarFile], list[tuple[str, int, int]]]) -> Entries:
    try:
        with tarfile.open(path, mode="r:") as tar:
            members = walk(tar)
    except (tarfile.TarError, OSError, EOFError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is truncated or not an archive of ImageNet ({one_line(error)})") from None
    if not members:
        raise DataError(f"{path} holds no images")
    names, places, sizes = zip(*members, strict=True)
    return list(names), list(places), list(sizes)
