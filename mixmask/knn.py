"""k-NN classification of frozen embeddings: the same code during pre-training and in `eval/knn.py`.

Weighted: by cosine similarity (Wu et al. 2018, Section 3.4), as in MoCo's CIFAR demo, Un-Mix's `unmix_c100.py` and
PatrickHua/SimSiam. Majority: the nearest by Euclidean distance, one vote each, as in htdt/self-supervised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mixmask import datasets
from mixmask.backbones import Encoder
from mixmask.config import KNN, Augment, ConfigError
from mixmask.features import accuracy, extract, shorter_side
from mixmask.metrics import knn_metric


@torch.no_grad()
def predict(knn: KNN, bank: Tensor, labels: Tensor, queries: Tensor, classes: int, chunk: int = 512) -> Tensor:
    """Classes (M,) of `queries` (M, D) by their k nearest of `bank` (N, D) with labels (N,); ties: the lowest class.

    Raises ConfigError for k larger than the bank.
    """
    if knn.k > len(bank):
        raise ConfigError(f"knn.k: {knn.k} neighbours, but there are only {len(bank)} training images")
    similarities = cosine(bank) if knn.distance == "cosine" else minus_euclidean(bank)
    predictions = []
    for part in queries.split(chunk):
        similarity, index = similarities(part).topk(knn.k, dim=1)  # (chunk, k), the nearest first
        weights = torch.ones_like(similarity)
        if knn.vote == "weighted":
            weights = ((similarity - similarity[:, :1]) / knn.temperature).exp()
        votes = weights.new_zeros(len(part), classes).scatter_add_(1, labels[index], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def cosine(bank: Tensor) -> Callable[[Tensor], Tensor]:
    """Queries (M, D) -> their cosine with each entry of the bank, (M, N)."""
    bank = F.normalize(bank, dim=1)
    return lambda queries: F.normalize(queries, dim=1) @ bank.T


def minus_euclidean(bank: Tensor) -> Callable[[Tensor], Tensor]:
    """Queries (M, D) -> minus their distance to each entry of the bank, (M, N).

    From products, in float64: in float32 the differences of large products would misplace near neighbours.
    """
    bank = bank.double()
    squares = (bank * bank).sum(dim=1)  # (N,)

    def similarities(queries: Tensor) -> Tensor:
        queries = queries.double()
        squared = torch.addmm(squares, queries, bank.T, alpha=-2).add_((queries * queries).sum(dim=1, keepdim=True))
        return squared.clamp_(min=0).sqrt_().neg_()

    return similarities


def evaluate(
    encoder: Encoder,
    train: datasets.Resident | datasets.Files,
    test: datasets.Resident | datasets.Files,
    augment: Augment,
    knn: KNN,
    device: torch.device,
    workers: int = 0,
) -> dict[str, float]:
    """Top-1 accuracy in percent under its full name, {metric: percent}. Leaves the encoder in its mode."""
    training = encoder.training
    encoder.eval()
    model = encoder if knn.features == "output" else encoder.backbone
    bank, queries = (extract(model, d, augment, shorter_side(augment, d), device, workers) for d in (train, test))
    encoder.train(training)
    predictions = predict(knn, bank, train.labels.to(device), queries, len(train.classes))
    return {knn_metric(knn, bank.shape[1]): accuracy(predictions, test.labels)}
