"""k-NN classification of frozen embeddings: the same code during pre-training and in `eval/knn.py`.

Weighted: by cosine similarity (Wu et al. 2018, Section 3.4), as in MoCo's CIFAR demo, Un-Mix's `unmix_c100.py` and
PatrickHua/SimSiam. Majority: the nearest by Euclidean distance, one vote each, as in htdt/self-supervised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask import datasets
from mixmask.backbones import Encoder
from mixmask.config import KNN, Augment, ConfigError, Execution
from mixmask.features import accuracy, extract, shorter_side
from mixmask.metrics import knn_metric
from mixmask.numerics import wide

BLOCK = 2**27  # values of the bank compared with the queries at a time: half a GiB in float32


@torch.no_grad()
def predict(knn: KNN, bank: Tensor, labels: Tensor, queries: Tensor, classes: int, chunk: int = 512) -> Tensor:
    """Classes (M,) of `queries` (M, D) by their k nearest of `bank` (N, D) with labels (N,); ties: the lowest class.

    The bank is processed in blocks, on the queries' device: it may be in host memory, and is never copied whole.
    Raises ConfigError for k larger than the bank.
    """
    if knn.k > len(bank):
        raise ConfigError(f"knn.k: {knn.k} neighbours, but there are only {len(bank)} training images")
    predictions = []
    for part in queries.split(chunk):
        similarity, index = nearest(knn, bank, part)  # (chunk, k), the nearest first
        weights = torch.ones_like(similarity)
        if knn.vote == "weighted":
            weights = ((similarity - similarity[:, :1]) / knn.temperature).exp()
        votes = weights.new_zeros(len(part), classes)
        predictions.append(votes.scatter_add_(1, labels.to(index.device)[index], weights).argmax(dim=1))
    return torch.cat(predictions)


def nearest(knn: KNN, bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity to, and index of, the k nearest entries of the bank (N, D) for each query: (M, k), (M, k)."""
    similarity = cosine if knn.distance == "cosine" else minus_euclidean
    best, index, start = None, None, 0
    for block in bank.split(max(knn.k, BLOCK // bank.shape[1])):
        values, places = similarity(queries, block.to(queries.device)).topk(min(knn.k, len(block)), dim=1)
        places += start
        if best is not None:
            values, places = torch.cat([best, values], dim=1), torch.cat([index, places], dim=1)
            values, order = values.topk(knn.k, dim=1)
            places = places.gather(1, order)
        best, index, start = values, places, start + len(block)
    return best, index


def cosine(queries: Tensor, bank: Tensor) -> Tensor:
    """The cosine of each query (M, D) with each entry of the bank (N, D): (M, N)."""
    return F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T


def minus_euclidean(queries: Tensor, bank: Tensor) -> Tensor:
    """Minus the distance of each query (M, D) to each entry of the bank (N, D): (M, N).

    From products, in float64: in float32 the differences of large products would misplace near neighbours.
    """
    queries, bank = wide(queries), wide(bank)
    squared = torch.addmm((bank * bank).sum(dim=1), queries, bank.T, alpha=-2)
    return squared.add_((queries * queries).sum(dim=1, keepdim=True)).clamp_(min=0).sqrt_().neg_()


def evaluate(
    encoder: Encoder,
    train: datasets.Resident | datasets.Files,
    test: datasets.Resident | datasets.Files,
    augment: Augment,
    knn: KNN,
    device: torch.device,
    workers: int = 0,
    batch_size: int = Execution.eval_batch,
) -> dict[str, float]:
    """Top-1 accuracy in percent under its full name, {metric: percent}. Leaves the encoder in its mode."""
    with evaluated(encoder, knn) as model:
        bank, queries = (
            extract(model, each, augment, shorter_side(augment, each), device, workers, batch_size)
            for each in (train, test)
        )
    return score(knn, bank, queries.to(device), train, test)


@contextlib.contextmanager
def evaluated(encoder: Encoder, knn: KNN) -> Iterator[nn.Module]:
    """The network whose features k-NN compares, in evaluation mode; afterwards the encoder's mode is restored."""
    training = encoder.training
    encoder.eval()
    yield encoder if knn.features == "output" else encoder.backbone
    encoder.train(training)


def score(
    knn: KNN,
    bank: Tensor,
    queries: Tensor,
    train: datasets.Resident | datasets.Files,
    test: datasets.Resident | datasets.Files,
) -> dict[str, float]:
    """Top-1 accuracy of the features (M, D) of the test images by those of the training images (N, D), by its name."""
    predictions = predict(knn, bank, train.labels, queries, len(train.classes))
    return {knn_metric(knn, bank.shape[1]): accuracy(predictions, test.labels)}
