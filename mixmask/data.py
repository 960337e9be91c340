"""Data sets, each verified before anything else happens, and the readers that hand uint8 pixels to `augment.py`.

Small data sets (CIFAR-100, Tiny-ImageNet, the embedded `photos`) are held whole in memory (`Resident`); ImageNet-1K is
a list of files (`Files`) that workers decode. Whatever is drawn at random here (the order of images, crop boxes,
subsets) is a pure function of the seed, the epoch and the image's index: neither a resumed run nor another number of
workers changes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import signal
import tarfile
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import check_integrity, download_url
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mixmask.config import Augment, UserError
from mixmask.randomness import numpy_generator
from mixmask.runs import discard

log = logging.getLogger(__name__)


class DataError(UserError):
    """A data set is not what it should be; the text says what was found, where, what was expected, what to do."""


@dataclass(frozen=True)
class Resident:
    """A data set in memory: images uint8 (N, 3, H, W), labels int64 (N,). `note` says what is missing, if anything."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    note: str = ""

    def to(self, device: torch.device | str) -> Resident:
        """The same data set with images and labels on `device`."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Files:
    """A data set of N image files, decoded by workers; labels int64 (N,). `note` says what is missing, if anything."""

    paths: list[str]
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Expected:
    """What a complete data set holds: classes, images in each split, the side of an image in pixels (0: any)."""

    classes: int
    train: int
    test: int
    side: int = 0

    def images(self, split: str) -> int:
        """Images in the split."""
        return self.train if split == "train" else self.test


EXPECTED = {
    "cifar100": Expected(100, 50_000, 10_000, 32),
    "cifar100_reduced": Expected(100, 10_000, 5_000, 32),
    "tiny_imagenet": Expected(200, 100_000, 10_000, 64),
    "imagenet": Expected(1000, 1_281_167, 50_000),
    "photos": Expected(16, 2_000, 800, 32),
}


def load(
    name: str,
    root: str | Path,
    split: str,
    download: bool = True,
    allow_partial: bool = False,
    expected: Expected | None = None,
) -> Resident | Files:
    """The verified data set `name` (a key of DATASETS), split "train" or "test".

    `root` is the data set's own folder or the one that holds it; `photos` needs none. `download` fetches CIFAR-100
    into `root` where it is absent. `allow_partial` accepts missing classes and images of Tiny-ImageNet and ImageNet
    and says in `note` what is missing. `expected` replaces the counts of EXPECTED (for small trees in tests).
    Raises DataError when anything differs from the published data set.
    """
    if name not in DATASETS:
        raise DataError(f"dataset: unknown data set '{name}'; expected one of {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise DataError(f"unknown split '{split}'; expected train or test")
    return DATASETS[name](Path(root), split, download, allow_partial, expected or EXPECTED[name])


# ------------------------------------------------------------------------------------------------------ CIFAR-100


def _cifar100(root: Path, split: str, download: bool, allow_partial: bool, expected: Expected) -> Resident:
    """torchvision's CIFAR100, which unpickles nothing before the md5 of the official files has been checked."""
    base = CIFAR100.base_folder
    if not root.is_dir():
        hint = f"; `mkdir -p {root}` and CIFAR-100 is downloaded into it" if download else ""
        raise DataError(f"data root '{root}' does not exist; expected the folder that holds {base}/{hint}")
    parent = root.parent if root.name == base else root
    if download and not (parent / base).exists():
        _download_cifar100(parent)
    _check_cifar100_files(parent / base)
    data = CIFAR100(str(parent), train=split == "train", download=False)
    labels = torch.tensor(data.targets)
    _check_counts("CIFAR-100", split, parent / base, labels, len(data.classes), expected, allow_partial=False)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return Resident(images, labels, tuple(data.classes), "cifar100")


def _cifar100_reduced(root: Path, split: str, download: bool, allow_partial: bool, expected: Expected) -> Resident:
    """The first images of each class of CIFAR-100, in the order of its files: always the same, of all classes alike."""
    full = _cifar100(root, split, download, allow_partial, EXPECTED["cifar100"])
    one_hot = torch.nn.functional.one_hot(full.labels, expected.classes)
    rank = one_hot.cumsum(0).gather(1, full.labels[:, None])[:, 0]  # (N,): the how-maniest of its class, from 1
    keep = rank <= expected.images(split) // expected.classes
    return dataclasses.replace(full, images=full.images[keep], labels=full.labels[keep], name="cifar100_reduced")


def _check_cifar100_files(folder: Path) -> None:
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


def _download_cifar100(parent: Path) -> None:
    """Download beside the destination and move the folder in one step, so that a cut connection leaves nothing."""
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".cifar100-") as scratch:
            download_url(CIFAR100.url, scratch, CIFAR100.filename, CIFAR100.tgz_md5)
            unpack(Path(scratch) / CIFAR100.filename, Path(scratch))
            _move_folder(Path(scratch) / CIFAR100.base_folder, parent / CIFAR100.base_folder)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-100 is not under {parent} and its download failed ({_one_line(error)}); "
            f"unpack cifar-100-python.tar.gz into {parent} by hand"
        ) from None


def unpack(archive: Path, folder: Path) -> None:
    """A tar archive of files and folders. Raises DataError, and unpacks nothing, for a link or one that leaves."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
                if not inside or not (member.isfile() or member.isdir()):
                    kind = "is a link or a device" if inside else "leaves the folder that it is unpacked into"
                    raise DataError(f"{archive} is refused, nothing is unpacked: its member '{member.name}' {kind}")
            tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(f"{archive} is cut off or no tar archive ({_one_line(error)})") from None


def _move_folder(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process has just put the same folder there
            raise


# -------------------------------------------------------------------------------------------------- Tiny-ImageNet


def _tiny_imagenet(root: Path, split: str, download: bool, allow_partial: bool, expected: Expected) -> Resident:
    """The original layout: wnids.txt (class order), train/<wnid>/images/, val/images/ with val_annotations.txt."""
    folder = _find_folder(root, ("tiny-imagenet-200",), ("wnids.txt", "train", "val"), "Tiny-ImageNet")
    wnids = tuple((folder / "wnids.txt").read_text().split())
    if len(set(wnids)) != expected.classes:
        raise DataError(f"{folder / 'wnids.txt'}: found {len(set(wnids))} classes, expected {expected.classes}")
    paths, labels = (_tiny_train if split == "train" else _tiny_val)(folder, wnids)
    note = _check_counts("Tiny-ImageNet", split, folder, labels, len(wnids), expected, allow_partial, wnids)
    images = _cached(folder / f"mixmask_{split}.pt", paths, lambda: _decode_all(paths, expected.side))
    return Resident(images, labels, wnids, "tiny_imagenet", note)


def _tiny_train(folder: Path, wnids: Sequence[str]) -> tuple[list[str], Tensor]:
    found = _class_folders(folder / "train")
    if strangers := sorted(set(found) - set(wnids)):
        raise DataError(f"{folder / 'train'}: class folders {_some(strangers)} are not in wnids.txt")
    return _files_of([folder / "train" / wnid / "images" for wnid in wnids])


def _tiny_val(folder: Path, wnids: Sequence[str]) -> tuple[list[str], Tensor]:
    images, annotations = folder / "val" / "images", folder / "val" / "val_annotations.txt"
    expected = "expected the original layout: val/images/ and val/val_annotations.txt, which holds the labels"
    for path, kind in ((images, "folder"), (annotations, "file")):
        if not path.exists():
            raise DataError(f"Tiny-ImageNet: {kind} {path} is missing (found {_entries(folder / 'val')}); {expected}")
    index = {wnid: i for i, wnid in enumerate(wnids)}
    labels = _read_annotations(annotations, index)
    names = _image_names(images)
    if unlabelled := sorted(set(names) - set(labels)):
        raise DataError(f"{annotations}: no label for {_some(unlabelled)} of {images}")
    if absent := sorted(set(labels) - set(names)):
        raise DataError(f"{images}: {_some(absent)}, named in {annotations.name}, are missing")
    return [str(images / name) for name in names], torch.tensor([labels[name] for name in names], dtype=torch.long)


def _read_annotations(path: Path, index: dict[str, int]) -> dict[str, int]:
    """Lines of "file <tab> wnid <tab> box" as {file: class index}."""
    labels = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in index:
            raise DataError(
                f"{path}, line {number}: expected 'file<tab>wnid<tab>...' with a wnid of wnids.txt: {line!r}"
            )
        labels[fields[0]] = index[fields[1]]
    return labels


def _decode_all(paths: Sequence[str], side: int) -> Tensor:
    """Every file as uint8 (N, 3, side, side). Raises DataError for a broken file or one of another size."""
    images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)

    def decode(i: int) -> None:
        image = read_image(paths[i])
        if image.shape != images.shape[1:]:
            size = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(f"image file {paths[i]} has {size} pixels, expected {side}x{side}")
        images[i] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    return images


def _cached(cache: Path, paths: Sequence[str], decode: Callable[[], Tensor]) -> Tensor:
    """`decode()`, kept in the file `cache` for as long as names, sizes and times of the files stay the same."""
    key = _listing_hash(paths)
    try:
        stored = torch.load(cache, weights_only=True)
        if stored["key"] == key and stored["crc32"] == zlib.crc32(stored["images"].numpy()):
            return stored["images"]
        log.warning("%s no longer matches the image files (or is damaged): decoding them again", cache)
    except FileNotFoundError:
        log.info("decoding %d images once into %s", len(paths), cache)
    except Exception as error:  # a cut-off or foreign file raises many types, all with one remedy
        log.warning("%s is unreadable (%s): decoding the images again", cache, type(error).__name__)
    images = decode()
    _save_cache(cache, {"key": key, "crc32": zlib.crc32(images.numpy()), "images": images})
    return images


def _save_cache(cache: Path, content: dict) -> None:
    partial = cache.with_name(f".{cache.name}.{uuid.uuid4().hex[:8]}")
    try:
        torch.save(content, partial)
        os.replace(partial, cache)
    except (OSError, RuntimeError) as error:
        log.warning("cannot write %s (%s): the images are decoded anew in every run", cache, _one_line(error))
        discard(partial)


def _listing_hash(paths: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{os.path.basename(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- ImageNet-1K


def _imagenet(root: Path, split: str, download: bool, allow_partial: bool, expected: Expected) -> Files:
    """train/<wnid>/ and val/<wnid>/; the class index is the wnid's rank among the folders of train/."""
    below = ("imagenet", "imagenette", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
    folder = _find_folder(root, below, ("train", "val"), "ImageNet")
    wnids = _class_folders(folder / "train")
    part = folder / ("train" if split == "train" else "val")
    found = _class_folders(part)
    if not found and (flat := _image_names(part)):
        raise DataError(
            f"{part} is flat: {len(flat):,} images and no class folders, expected {expected.classes} folders "
            f"<wnid>/; read like this every image would have one label: sort the images into folders by their labels"
        )
    if part.name == "val" and (strangers := sorted(set(found) - set(wnids))):
        raise DataError(f"{part}: class folders {_some(strangers)} are not in {folder / 'train'}")
    paths, labels = _files_of([part / wnid for wnid in wnids])
    note = _check_counts("ImageNet", split, part, labels, len(wnids), expected, allow_partial, wnids)
    return Files(paths, labels, tuple(wnids), "imagenet", note)


# --------------------------------------------------------------------------------------- the embedded default

# Photographs inside scikit-image's wheel. The first part of a photograph's longer side is for training, the rest for
# testing, and a patch lies wholly in one of them: no pixel is seen both in training and in testing.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
PATCH = 48  # pixels of the photograph along a patch's side, shrunk to Expected.side
PARTS = {"train": (0.0, 0.7), "test": (0.7, 1.0)}  # shares of the longer side


def _photos(root: Path, split: str, download: bool, allow_partial: bool, expected: Expected) -> Resident:
    """Patches of photographs, the photograph as class: 125 a class for training, 50 for testing, always the same."""
    per_class = expected.images(split) // len(PHOTOS)
    patches = []
    for index, name in enumerate(PHOTOS):
        photo = _photo(name)
        for x, y in photo_corners(photo.size, index, split, per_class):
            patch = photo.crop((x, y, x + PATCH, y + PATCH))  # cropped first: resizing sees no pixel outside
            patches.append(np.asarray(patch.resize((expected.side, expected.side), Image.Resampling.BILINEAR)))
    images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    labels = torch.arange(len(PHOTOS)).repeat_interleave(per_class)
    return Resident(images, labels, tuple(Path(name).stem for name in PHOTOS), "photos")


def photo_corners(size: tuple[int, int], index: int, split: str, count: int) -> np.ndarray:
    """Top-left corners (count, 2) as (x, y) of the patches of photograph `index` of `size` (width, height)."""
    low, high = np.zeros(2, dtype=np.int64), np.array(size)
    longer = int(size[1] > size[0])
    low[longer], high[longer] = (round(share * size[longer]) for share in PARTS[split])
    return numpy_generator("photos", index, split).integers(low, high - PATCH + 1, (count, 2))


def _photo(name: str) -> Image.Image:
    """A photograph as RGB, read as a file of the installed package: no download, no cache."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise DataError(f"scikit-image {skimage.__version__} lacks {path} ({error}); install the locked one") from None


DATASETS = {
    "cifar100": _cifar100,
    "cifar100_reduced": _cifar100_reduced,
    "tiny_imagenet": _tiny_imagenet,
    "imagenet": _imagenet,
    "photos": _photos,
}


# ----------------------------------------------------------------------------------------- finding and counting


def _find_folder(root: Path, below: Sequence[str], holds: Sequence[str], title: str) -> Path:
    """`root`, or the folder in it, that has the entries `holds`. Raises DataError listing the places tried."""
    if not root.is_dir():
        raise DataError(f"data root '{root}' does not exist; expected the folder of {title} or the one that holds it")
    tried = [root, *(root / name for name in below)]
    for folder in tried:
        if all((folder / name).exists() for name in holds):
            return folder
    raise DataError(
        f"{title} not found: expected {', '.join(holds)} in one of {', '.join(map(str, tried))}; "
        f"found in {root}: {_entries(root)}"
    )


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _image_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith((".jpeg", ".jpg", ".png")))


def _files_of(folders: Sequence[Path]) -> tuple[list[str], Tensor]:
    """The image files of each class's folder, and their labels (N,); a missing folder is an empty class."""
    names = [_image_names(folder) for folder in folders]
    paths = [os.path.join(folder, name) for folder, some in zip(folders, names, strict=True) for name in some]
    return paths, torch.arange(len(folders)).repeat_interleave(torch.tensor([len(some) for some in names]))


def _check_counts(
    title: str,
    split: str,
    where: Path,
    labels: Tensor,
    classes: int,
    expected: Expected,
    allow_partial: bool,
    names: Sequence[str] = (),
) -> str:
    """Compare with the published counts; returns a note on what is missing, "" if nothing is. Raises DataError."""
    counts = torch.bincount(labels, minlength=classes)  # (classes,)
    total, present = len(labels), int((counts > 0).sum())
    found = f"{title} {split}: found {total:,} images in {present} classes under {where}, " + (
        f"expected {expected.images(split):,} in {expected.classes}"
    )
    if (total, present) == (expected.images(split), expected.classes):
        return _check_balance(found, title, split, counts, expected, names)
    if total > expected.images(split) or classes > expected.classes or total == 0:
        raise DataError(f"{found}; unpack the official archive anew")
    found += _least(counts, names)
    if not allow_partial:
        raise DataError(f"{found}; complete it, or say allow_partial_data=true (results are then not comparable)")
    log.warning("%s: a partial data set; results are not comparable", found)
    return f"partial: {found}"


def _check_balance(found: str, title: str, split: str, counts: Tensor, expected: Expected, names: Sequence[str]) -> str:
    """All published splits have equally many images a class, but for ImageNet's training images."""
    if (title, split) != ("ImageNet", "train") and int(counts.min()) != int(counts.max()):
        each = expected.images(split) // expected.classes
        raise DataError(f"{found}, but not {each} in each class{_least(counts, names)}; unpack it anew")
    return ""


def _least(counts: Tensor, names: Sequence[str]) -> str:
    if not len(names):
        return ""
    if missing := [names[i] for i in (counts == 0).nonzero().flatten().tolist()]:
        return f"; no image of {_some(missing)}"
    low, high = int(counts.min()), int(counts.max())
    if low == high:
        return f"; {low} images in each class"
    return f"; {low} to {high} images a class, fewest in {names[int(counts.argmin())]}"


def _some(names: Sequence[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _entries(folder: Path) -> str:
    return _some(sorted(os.listdir(folder)), 5) if folder.is_dir() and os.listdir(folder) else "nothing"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------ orders, subsets


def batch_indices(n: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Indices of n images in an epoch's shuffled batches, int64 (n // batch_size, batch_size); the rest is dropped."""
    steps = n // batch_size
    order = numpy_generator(seed, "order", epoch).permutation(n)
    return torch.from_numpy(order[: steps * batch_size]).reshape(steps, batch_size)


def subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted indices, int64 (M,), of a class-balanced share of the images, whose classes are `labels` (N,).

    round(fraction * count) of each class, at least one; `fraction` in [0, 1].
    """
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = numpy_generator(seed, "subset", label).permutation(len(members))
        chosen.append(members[torch.from_numpy(order[: max(1, round(fraction * len(members)))])])
    return torch.cat(chosen).sort().values


# -------------------------------------------------------------------------------------------------- image files


def read_image(path: str) -> Tensor:
    """An image file as RGB uint8 (3, H, W): torchvision's decoder, then Pillow for what that one refuses.

    Raises DataError naming a file that is missing, truncated or no image.
    """
    try:
        return decode_image(read_file(path), mode=ImageReadMode.RGB)
    except RuntimeError:
        return _read_with_pillow(path)


def _read_with_pillow(path: str) -> Tensor:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image file {path} is missing, truncated or no image: {_one_line(error)}") from None


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, drawn as torchvision's RandomResizedCrop draws it.

    Area share from U(scale), log of the aspect ratio (width / height) from U(log ratio), ten attempts, then the
    central crop whose ratio is the nearest allowed one.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class RandomCrops:
    """Reads image `index`: a random crop for each view, uint8 (3, size, size); boxes follow (seed, epoch, index)."""

    paths: np.ndarray
    seed: int
    epoch: int
    views: Sequence[Augment]

    def __getitem__(self, index: int) -> list[Tensor]:
        image = read_image(os.fsdecode(self.paths[index]))
        rng = numpy_generator(self.seed, "crops", self.epoch, index)
        return [random_crop(image, view, rng) for view in self.views]


def random_crop(image: Tensor, view: Augment, rng: np.random.Generator) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): the `crop` of the view's augmentation, as torchvision's."""
    box = crop_box(image.shape[1], image.shape[2], view.crop_scale, view.crop_ratio, rng)
    mode = InterpolationMode(view.interpolation)
    return F.resized_crop(image, *box, [view.size, view.size], mode, antialias=True)


@dataclass(frozen=True)
class CentreCrop:
    """Reads image `index` for testing: shorter side to `resize` (0: kept), central crop, uint8 (3, size, size)."""

    paths: np.ndarray
    resize: int
    size: int
    interpolation: str

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(os.fsdecode(self.paths[index]))
        if self.resize:
            image = F.resize(image, [self.resize], InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(image, [self.size, self.size])


def loader(
    files: Files,
    batches: Iterable[Sequence[int]] | Tensor,
    seed: int,
    epoch: int,
    views: Sequence[Augment],
    workers: int = 8,
    pin_memory: bool = False,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Training batches: for each view random crops uint8 (N, 3, size, size), and indices int64 (N,).

    Of a view's augmentation only the crop is done here. `pin_memory`: in memory that is copied to a GPU beside its
    work. Raises DataError naming the file that cannot be read.
    """
    return _iterate(RandomCrops(_packed(files.paths), seed, epoch, tuple(views)), batches, workers, pin_memory)


def centre_loader(
    files: Files,
    batch_size: int,
    resize: int = 256,
    size: int = 224,
    interpolation: str = "bilinear",
    workers: int = 8,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Test batches in the order of the files: central crops uint8 (N, 3, size, size) and indices int64 (N,)."""
    batches = torch.arange(len(files)).split(batch_size)
    return _iterate(CentreCrop(_packed(files.paths), resize, size, interpolation), batches, workers, pin_memory)


def _packed(paths: Sequence[str]) -> np.ndarray:
    """Paths as one array of bytes: a list of a million strings would be copied, page by page, into every worker."""
    return np.array([os.fsencode(path) for path in paths])


@dataclass(frozen=True)
class _Reader:
    """A reader for DataLoader: a DataError travels as a value, since an exception would arrive as a traceback."""

    read: RandomCrops | CentreCrop

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], int] | DataError:
        try:
            return self.read[index], index
        except DataError as error:
            return error


def _collate(items: list) -> list | DataError:
    errors = [item for item in items if isinstance(item, DataError)]
    return errors[0] if errors else torch.utils.data.default_collate(items)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and SLURM signal every process of a job: a worker goes on until its training loop is done with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _iterate(
    read: RandomCrops | CentreCrop, batches: Iterable[Sequence[int]], workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    data = torch.utils.data.DataLoader(
        _Reader(read),
        batch_sampler=[torch.as_tensor(batch).tolist() for batch in batches],
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # of its own: the loader draws a number, which must not touch the run's state
    )
    for batch in data:
        if isinstance(batch, DataError):
            raise batch
        yield batch
