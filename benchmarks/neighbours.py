"""k-NN at the size of CIFAR-100: 50,000 labelled vectors, 10,000 queries, 128 numbers each, k = 200."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure, plain
from benchmarks.steps import images, recipe
from mixmask import knn
from pretrain import train

CLASSES = 100


def vectors(bank: int, queries: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Bank (N, 128), labels (N,), queries (M, 128): noise around a centre for each class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 128, generator=generator)
    labels, asked = (torch.randint(CLASSES, (n,), generator=generator) for n in (bank, queries))
    drawn = [centres[of] + torch.randn(len(of), 128, generator=generator) for of in (labels, asked)]
    return drawn[0].to(device), labels.to(device), drawn[1].to(device)


def predict(device: torch.device, repeats: int, bank: int = 50_000, queries: int = 10_000) -> dict[str, dict[str, Any]]:
    """Seconds of our classifier and of the usual one (Un-Mix's, batches of 512), and how often they agree."""
    settings = recipe("cifar100", "moco", "vanilla", device, {}).knn
    train_vectors, labels, test_vectors = vectors(bank, queries, device)

    def ours() -> Tensor:
        return knn.predict(settings, train_vectors, labels, test_vectors, CLASSES)

    def usual() -> Tensor:
        unit = F.normalize(train_vectors, dim=1).T.contiguous()
        parts = F.normalize(test_vectors, dim=1).split(512)
        return torch.cat(
            [plain.knn_predict(part, unit, labels, CLASSES, settings.k, settings.temperature) for part in parts]
        )

    agreement = (ours() == usual()).float().mean().item()  # and a warm-up of both
    rows = {}
    for name, work in (("predict", ours), ("predict/plain", usual)):
        taken = measure.median(measure.repeated(work, device, repeats, warm=0))
        rows[name] = {"seconds": taken, "queries": queries, "bank": bank, "repeats": repeats, "agreement": agreement}
    return rows


def whole(device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds of the k-NN that pre-training runs: features of 60,000 images by a ResNet-18, then the classes."""
    config = recipe("cifar100", "moco", "vanilla", device, {})
    framework, _ = train.build(config, device)
    train_set = images("cifar100").to(device)
    test_set = train_set.__class__(train_set.images[:10_000], train_set.labels[:10_000], train_set.classes, "synthetic")
    taken = measure.repeated(lambda: train.evaluate(framework, train_set, test_set, config, device), device, repeats)
    return {"seconds": measure.median(taken), "queries": len(test_set), "bank": len(train_set), "repeats": repeats}
