"""Features of a frozen network on a whole data set: what k-NN and linear classifiers are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmask import datasets
from mixmask.config import Augment, Finetune, Linear
from mixmask.datasets.views import test_batches


@torch.no_grad()
def extract(
    model: nn.Module,
    dataset: datasets.Resident | datasets.Files,
    augment: Augment,
    resize: int,
    device: torch.device,
    workers: int = 0,
) -> Tensor:
    """Features float32 (N, D) of the images in order, with the test transform, on the device.

    `model`: an encoder (the head's output) or its backbone (pooled features), in evaluation mode. `resize`: the
    shorter side before the centre crop, 0 for none.
    """
    batches = test_batches(dataset, augment, resize, device, workers=workers)
    return torch.cat([model(images).float() for images in batches])


def shorter_side(augment: Augment, dataset: datasets.Resident | datasets.Files) -> int:
    """To which test images are resized before the centre crop: 256 for 224 on image files; small images to the crop's.

    0: they stay as they are.
    """
    if isinstance(dataset, datasets.Files):
        return augment.size * 256 // 224
    return 0 if min(dataset.images.shape[2:]) == augment.size else augment.size


def resize_of(config: Linear | Finetune, dataset: datasets.Resident | datasets.Files) -> int:
    """The `test_resize` of a config; where it says -1, that of k-NN."""
    return config.test_resize if config.test_resize >= 0 else shorter_side(config.augment, dataset)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Top-1 of classes (N,), in percent."""
    return round((predictions == labels.to(predictions.device)).float().mean().item() * 100, 4)
