"""The pooled features of a folder of images, by any checkpoint that can be read (docs/checkpoints.md).

Example:
    python eval/features.py --checkpoint runs/pretrain/RUN/checkpoint.pt --data DIR features.npz

OUT.npz holds `features` float32 (N, D), `files` (N,), paths below DIR, `labels` int64 (N,) and the `classes` that they
index: the folders of DIR (docs/own-images.md), -1 where there are none. Images are resized, cropped and normalised as
for k-NN.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from mixmask import config as configs
from mixmask import formats
from mixmask.config import ConfigError, Execution, UserError
from mixmask.datasets import Files, Resident
from mixmask.datasets.base import in_words
from mixmask.datasets.cache import decode_all
from mixmask.datasets.folder import common_shape, listing
from mixmask.features import extract, shorter_side
from mixmask.networks import feature_width
from mixmask.runs import discard
from mixmask.training.optim import pick_device
from mixmask.training.progress import say


def images_of(root: Path) -> Files | Resident:
    """All images below a folder, in any of its layouts. Raises DataError as `dataset: folder`."""
    train, test = (listing(root, split, held_out=0.0) for split in ("train", "test"))
    paths, labels = [*train.paths, *test.paths], torch.cat([train.labels, test.labels])
    labels = labels if train.classes else torch.full_like(labels, -1)
    if shape := common_shape(paths):
        return Resident(decode_all(paths, shape, upright=True), labels, train.classes, "folder")
    return Files(paths, labels, train.classes, "folder", upright=True)


def names_of(root: Path) -> list[str]:
    """Their paths below the folder."""
    paths = [path for split in ("train", "test") for path in listing(root, split, held_out=0.0).paths]
    return [os.path.relpath(path, root) for path in paths]


def write(path: Path, **arrays: np.ndarray) -> None:
    """All of the file or nothing. Raises UserError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"OUT: cannot write {path}: {error.strerror}") from None
    finally:
        discard(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[formats.reading_options()],
    )
    parser.add_argument("out", type=Path, metavar="OUT.npz")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint.pt of ours or in a public format")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="a folder of images")
    parser.add_argument("--size", type=int, default=0, help="view size in pixels; default: the pre-training's, or 224")
    batch, workers = Execution.eval_batch, Execution.workers
    parser.add_argument("--batch", type=int, default=batch, help="images at a time; default: %(default)s")
    parser.add_argument("--workers", type=int, default=workers, help="processes that decode; default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...; default: auto")
    args = parser.parse_args()
    check(args)
    device = pick_device(args.device)
    model = formats.load_backbone(args.checkpoint, device, **formats.reading(args)).requires_grad_(False)
    augment = model.source.augment(args.size)
    feature_width(model, augment.size)
    dataset, root = images_of(args.data.expanduser()), args.data.expanduser()
    say(f"{model}\n  {args.data}: {in_words(len(dataset), dataset.classes)}; views of {augment.size} px")
    resize = shorter_side(augment, dataset)
    features = extract(model, dataset, augment, resize, device, args.workers, args.batch).cpu().numpy()
    labels, classes = dataset.labels.numpy(), np.array(dataset.classes, dtype=str)
    write(args.out, features=features, labels=labels, files=np.array(names_of(root), dtype=str), classes=classes)
    say(f"{args.out}: features {features.shape}, labels, files, classes")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for invalid options, before anything is computed."""
    if args.out.suffix != ".npz":
        raise ConfigError(f"OUT: expected a name that ends in .npz, found {args.out}")
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"OUT: no such directory: {args.out.parent}")
    if not args.data.expanduser().is_dir():
        raise ConfigError(f"--data: no such folder: {args.data}")
    for name, low in (("size", 0), ("batch", 1), ("workers", 0)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name}: expected at least {low}, found {getattr(args, name)}")


if __name__ == "__main__":
    configs.main_guard(main)
