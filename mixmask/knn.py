"""k-NN classification of frozen embeddings: the same code during pre-training and in `eval/knn.py`.

Weighted k-NN (Wu et al. 2018, Section 3.4), as in MoCo's CIFAR demo and Un-Mix's `unmix_c100.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixmask import data
from mixmask.backbones import Encoder
from mixmask.config import KNN, Augment, ConfigError
from mixmask.views import test_batches


def metric_name(knn: KNN, dim: int) -> str:
    """The protocol, for the metric's name: knn_k200_t0.1_out128, or knn_k200_t0.1_backbone512."""
    return f"knn_k{knn.k}_t{knn.temperature:g}_{'out' if knn.features == 'output' else 'backbone'}{dim}"


def test_resize(augment: Augment, dataset: data.Resident | data.Files) -> int:
    """The shorter side before the centre crop: 256 for 224 on image files; small images stay as they are."""
    return augment.size * 256 // 224 if isinstance(dataset, data.Files) else 0


test_resize.__test__ = False  # not a test, whatever its name says to pytest


@torch.no_grad()
def embed(
    encoder: Encoder, dataset: data.Resident | data.Files, augment: Augment, features: str, device, workers: int = 0
) -> Tensor:
    """Embeddings of all images with the test transform: unit length, float32 (N, dim), on the device.

    `encoder` must be in evaluation mode; `features`: "output" (after the head) or "backbone" (pooled features).
    """
    model = encoder if features == "output" else encoder.backbone
    batches = test_batches(dataset, augment, test_resize(augment, dataset), device, workers=workers)
    return torch.cat([F.normalize(model(images).float(), dim=1) for images in batches])


@torch.no_grad()
def predict(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int, chunk: int = 512
) -> Tensor:
    """Classes (M,) of unit-length `queries` (M, D): each of the k nearest bank entries votes exp(similarity / T).

    bank (N, D) of unit length, labels (N,). Raises ConfigError for k larger than the bank.
    """
    if k > len(bank):
        raise ConfigError(f"knn.k: {k} neighbours, but there are only {len(bank)} training images")
    predictions = []
    for part in queries.split(chunk):
        similarity, index = (part @ bank.T).topk(k, dim=1)  # (chunk, k)
        votes = similarity.new_zeros(len(part), classes)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def evaluate(
    encoder: Encoder,
    train: data.Resident | data.Files,
    test: data.Resident | data.Files,
    augment: Augment,
    knn: KNN,
    device: torch.device,
    workers: int = 0,
) -> dict[str, float]:
    """Top-1 accuracy in percent under its full name, {metric: percent}. Leaves the encoder in its mode."""
    training = encoder.training
    encoder.eval()
    bank, queries = (embed(encoder, d, augment, knn.features, device, workers) for d in (train, test))
    encoder.train(training)
    predictions = predict(bank, train.labels.to(device), queries, knn.k, knn.temperature, len(train.classes))
    accuracy = (predictions == test.labels.to(device)).float().mean().item() * 100
    return {metric_name(knn, bank.shape[1]): round(accuracy, 4)}
