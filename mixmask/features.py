"""Features of a frozen network on a whole data set: what k-NN and linear classifiers are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmask import datasets
from mixmask.config import Augment, Execution, Finetune, Linear
from mixmask.datasets.views import test_batches


@torch.no_grad()
def extract(
    model: nn.Module,
    dataset: datasets.Resident | datasets.Files,
    augment: Augment,
    resize: int,
    device: torch.device,
    workers: int = 0,
    batch_size: int = Execution.eval_batch,
) -> Tensor:
    """Features float32 (N, D) of the images in order, with the test transform.

    `model`: an encoder (the head's output) or its backbone (pooled features), in evaluation mode. `resize`: the
    shorter side before the centre crop, 0 for none. They are on the device, or in host memory if they would take
    more than half of what the device has free.
    """
    features, start = None, 0
    for images in test_batches(dataset, augment, resize, device, batch_size, workers):
        batch = model(images).float()
        if features is None:
            features = torch.empty(
                len(dataset), *batch.shape[1:], device=_storage(len(dataset) * batch[0].nbytes, device)
            )
        features[start : start + len(batch)] = batch
        start += len(batch)
    return features


def _storage(size: int, device: torch.device) -> torch.device:
    """The device that stores so many bytes."""
    if device.type == "cuda" and 2 * size > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def shorter_side(augment: Augment, dataset: datasets.Resident | datasets.Files) -> int:
    """The size to which test images are resized before the centre crop: 256 for 224 on image files, else the crop's.

    0: they stay as they are.
    """
    if isinstance(dataset, datasets.Files):
        return augment.size * 256 // 224
    return 0 if min(dataset.images.shape[2:]) == augment.size else augment.size


def resize_of(config: Linear | Finetune, dataset: datasets.Resident | datasets.Files) -> int:
    """The `test_resize` of a config; where it says -1, that of k-NN."""
    return config.test_resize if config.test_resize >= 0 else shorter_side(config.augment, dataset)


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """test_top1, and test_top5 if there are more than five classes, of scores (N, classes), in percent."""
    metrics = {"test_top1": accuracy(scores.argmax(dim=1), labels)}
    if scores.shape[1] > 5:
        hits = scores.topk(5, dim=1).indices == labels.to(scores.device)[:, None]
        metrics["test_top5"] = round(hits.any(dim=1).float().mean().item() * 100, 4)
    return metrics


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Top-1 of classes (N,), in percent."""
    return round((predictions == labels.to(predictions.device)).float().mean().item() * 100, 4)
