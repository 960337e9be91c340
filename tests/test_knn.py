"""Weighted k-NN (Wu et al. 2018, Section 3.4) against a loop over queries and neighbours."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixmask import knn
from mixmask.config import KNN, ConfigError


def naive(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int) -> list[int]:
    predictions = []
    for query in queries.tolist():
        similarities = [sum(a * b for a, b in zip(query, row, strict=True)) for row in bank.tolist()]
        nearest = sorted(range(len(bank)), key=lambda j: -similarities[j])[:k]
        votes = [0.0] * classes
        for j in nearest:
            votes[int(labels[j])] += math.exp(similarities[j] / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


def clusters(n: int, m: int, classes: int = 7, dim: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """A bank around one centre per class, and queries, of unit length; float64."""
    generator = torch.Generator().manual_seed(n)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator)
    noise = torch.randn(n + m, dim, generator=generator, dtype=torch.float64)
    bank = F.normalize(centres[labels] + 1.5 * noise[:n], dim=1)
    return bank, labels, F.normalize(noise[n:], dim=1)


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (5, 0.1), (20, 0.1), (60, 0.1), (20, 1.0), (20, 0.02)])
def test_weighted_knn(k: int, temperature: float):
    bank, labels, queries = clusters(60, 80)
    found = knn.predict(bank, labels, queries, k, temperature, classes=7)
    assert found.tolist() == naive(bank, labels, queries, k, temperature, 7)
    assert len(set(found.tolist())) > 3


def test_nearest_neighbour_outvotes_a_majority_that_is_far():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.0, 1.0]]), dim=1)
    query = torch.tensor([[1.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    assert knn.predict(bank, labels, query, 3, 0.1, 2).item() == 0
    assert knn.predict(bank, labels, query, 3, 10.0, 2).item() == 1


@pytest.mark.parametrize("chunk", [1, 7, 80, 1000])
def test_chunks_do_not_change_predictions(chunk: int):
    bank, labels, queries = clusters(60, 80)
    expected = knn.predict(bank, labels, queries, 20, 0.1, 7)
    assert torch.equal(knn.predict(bank, labels, queries, 20, 0.1, 7, chunk=chunk), expected)


def test_more_neighbours_than_images_is_an_error():
    bank, labels, queries = clusters(60, 5)
    with pytest.raises(ConfigError, match=r"knn\.k: 61 neighbours.*60 training images"):
        knn.predict(bank, labels, queries, 61, 0.1, 7)


def test_metric_names_the_whole_protocol():
    assert knn.metric_name(KNN(200, 0.1, "output", 10), 128) == "knn_k200_t0.1_out128"
    assert knn.metric_name(KNN(20, 0.07, "backbone", 0), 512) == "knn_k20_t0.07_backbone512"
