"""CIFAR-100 (Krizhevsky 2009), and its reduced form, by torchvision: nothing is unpickled before its md5 is checked."""

from __future__ import annotations

import dataclasses
import tarfile
import tempfile
import zlib
from pathlib import Path

import torch
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import check_integrity, download_url

from mixmask import registry
from mixmask.datasets.base import DataError, Expected, Resident, one_line
from mixmask.datasets.tree import check_counts


def read(root: Path, split: str, expected: Expected, download: bool) -> Resident:
    """The python version, under `root` or in it; with `download` it is fetched where it is absent."""
    base = CIFAR100.base_folder
    if not root.is_dir():
        hint = f"; `mkdir -p {root}` and CIFAR-100 is downloaded into it" if download else ""
        raise DataError(f"data root '{root}' does not exist; expected the folder that holds {base}/{hint}")
    parent = root.parent if root.name == base else root
    if download and not (parent / base).exists():
        _download(parent)
    _check_files(parent / base)
    data = CIFAR100(str(parent), train=split == "train", download=False)
    labels = torch.tensor(data.targets)
    check_counts("CIFAR-100", split, parent / base, labels, data.classes, expected)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return Resident(images, labels, tuple(data.classes), "cifar100")


def read_reduced(root: Path, split: str, expected: Expected, download: bool) -> Resident:
    """The first images of each class of CIFAR-100, in the order of its files: always the same, of all classes alike."""
    full = read(root, split, registry.DATASETS["cifar100"], download)
    one_hot = torch.nn.functional.one_hot(full.labels, expected.classes)
    rank = one_hot.cumsum(0).gather(1, full.labels[:, None])[:, 0]  # (N,): 1 for the first of its class, then 2, ...
    keep = rank <= expected.images(split) // expected.classes
    return dataclasses.replace(full, images=full.images[keep], labels=full.labels[keep], name="cifar100_reduced")


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"CIFAR-100 not found: no folder {folder}; unpack cifar-100-python.tar.gz there")
    for name, md5 in [*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])]:
        path = folder / name
        if not path.is_file():
            raise DataError(f"CIFAR-100: file {path} is missing; delete {folder} and unpack or download it again")
        if not check_integrity(str(path), md5):
            raise DataError(
                f"CIFAR-100: file {path} is truncated or altered ({path.stat().st_size:,} bytes, md5 is not {md5}); "
                f"delete {folder} and unpack or download it again"
            )


def _download(parent: Path) -> None:
    """Download beside the destination and move the folder in one step, so that a cut connection leaves nothing."""
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".cifar100-") as scratch:
            download_url(CIFAR100.url, scratch, CIFAR100.filename, CIFAR100.tgz_md5)
            unpack(Path(scratch) / CIFAR100.filename, Path(scratch))
            _move_folder(Path(scratch) / CIFAR100.base_folder, parent / CIFAR100.base_folder)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-100 is not under {parent} and its download failed ({one_line(error)}); "
            f"unpack cifar-100-python.tar.gz into {parent} by hand"
        ) from None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive. Raises DataError, and unpacks nothing, for links and for paths that leave the folder."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
                if not inside or not (member.isfile() or member.isdir()):
                    kind = "is a link or a device" if inside else "leaves the folder that it is unpacked into"
                    raise DataError(f"{archive} is refused, nothing is unpacked: its member '{member.name}' {kind}")
            tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"{archive} is truncated or not a tar archive ({one_line(error)})") from None


def _move_folder(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process has just put the same folder there
            raise
