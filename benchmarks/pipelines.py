"""The input alone: two views of each image, from memory and from JPEG files; ours and torchvision's on Pillow."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from benchmarks import measure, plain
from benchmarks.steps import ROOT, images, recipe
from mixmask import config as configs
from mixmask import datasets
from mixmask.config import UserError
from mixmask.datasets import loading
from mixmask.datasets.views import train_batches

WORKERS = 2  # of torchvision's pipeline
CPU = torch.device("cpu")
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg")
SIZE = (500, 375)  # of a generated JPEG file: that of many ImageNet images


def cifar(device: torch.device, pairs: int, repeats: int) -> dict[str, Any]:
    """Our two augmented views of 32 x 32 pixels, pairs/s, in batches of 512."""
    config = recipe("cifar100", "moco", "vanilla", device, {"batch_size": 512})
    here = images("cifar100").to(device)

    def some() -> None:
        stream = train_batches(here, config.augment, 512, 0, 0, 2, device)
        for _ in itertools.islice(stream, pairs // 512):
            pass

    taken = measure.repeated(some, device, repeats)
    return {"per_second": pairs // 512 * 512 / measure.median(taken), "unit": "pairs/s", "repeats": repeats}


def cifar_plain(pairs: int, workers: int = WORKERS) -> dict[str, Any]:
    """The same by torchvision and Pillow in DataLoader workers, once they are running."""
    config = recipe("cifar100", "moco", "vanilla", CPU, {})
    dataset = plain.Pairs(images("cifar100").images.permute(0, 2, 3, 1).numpy(), plain.transform(config.augment))
    stream = plain.batches(dataset, 64, workers)
    for _ in range(4 * max(workers, 1)):  # what the workers had prepared while they started
        next(stream)
    taken = measure.seconds(lambda: [next(stream) for _ in range(pairs // 64)], CPU)
    return {"per_second": pairs // 64 * 64 / taken, "unit": "pairs/s", "workers": workers}


# ----------------------------------------------------------------------------------------------------------- JPEG


@contextlib.contextmanager
def jpeg_files(folder: str | None, number: int) -> Iterator[Path]:
    """A folder of classes of JPEG files: the user's, or one of photographs of scikit-image, for as long as it lasts.

    Raises UserError for a folder that holds no class folders with images.
    """
    if folder:
        if not any(Path(folder).glob("*/*.[jJ][pP]*[gG]")):
            raise UserError(f"--jpeg {folder}: no JPEG files in folders of classes, such as CLASS/IMAGE.JPEG")
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as root:
        for index in range(number):
            photograph(index).save(_file(Path(root), index), quality=90)
        yield Path(root)


def _file(root: Path, index: int) -> Path:
    folder = root / Path(PHOTOS[index % len(PHOTOS)]).stem
    folder.mkdir(exist_ok=True)
    return folder / f"{index}.JPEG"


def photograph(index: int) -> Image.Image:
    """One of scikit-image's photographs, a part of it, at SIZE: no two alike."""
    import skimage  # only here: `cifar` does without it

    source = Path(skimage.__file__).parent / "data" / PHOTOS[index % len(PHOTOS)]
    image = Image.open(source).convert("RGB")
    rng = np.random.Generator(np.random.PCG64(index))
    width = int(image.width * rng.uniform(0.7, 1))
    height = min(image.height, width * SIZE[1] // SIZE[0])
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)


def listed(root: Path, number: int) -> datasets.Files:
    """Up to `number` of the files, as our reader takes them."""
    paths = sorted(map(str, root.glob("*/*.[jJ][pP]*[gG]")))[:number]
    return datasets.Files(paths, torch.zeros(len(paths), dtype=torch.long), ("all",), "jpeg")


def jpeg(root: Path, number: int, repeats: int) -> dict[str, dict[str, Any]]:
    """images/s of one core that decodes a file and makes two views of it, for MoCo V2's ImageNet recipe.

    The workers' part decodes and crops; what comes after it is the device's. "whole": all of it on this core.
    """
    config = recipe_of_files()
    files = listed(root, number)
    folder = ImageFolder(str(root), plain.TwoViews(plain.transform(config.augment)))
    count, batch = len(files), min(16, len(files))
    crops = torch.arange(count // batch * batch).reshape(-1, batch)

    def workers_part() -> None:
        for _ in loading.loader(files, crops, 0, 0, [config.augment] * 2, workers=0):
            pass

    def whole() -> None:
        for _ in train_batches(files, config.augment, batch, 0, 0, 2, CPU, workers=0):
            pass

    def pillow() -> None:
        for index in range(crops.numel()):
            folder[index]

    with one_thread():
        rates = {
            name: crops.numel() / measure.median(measure.repeated(work, CPU, repeats))
            for name, work in {"workers": workers_part, "whole": whole, "plain": pillow}.items()
        }
    return {name: {"per_second": value, "unit": "images/s", "repeats": repeats} for name, value in rates.items()}


def recipe_of_files() -> Any:
    """MoCo V2's ImageNet recipe with its whole augmentation."""
    return configs.load(ROOT / "pretrain" / "configs" / "imagenet_moco.yaml")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one core, as in a DataLoader's worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def workers_here() -> int:
    """Workers for the plain reference's training: as many as cores, at most 16 (as Un-Mix has)."""
    return min(16, os.cpu_count() or 1)
