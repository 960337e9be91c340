"""k-NN against a loop over queries and neighbours: weighted (Wu et al. 2018, Section 3.4), and Euclidean majority."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixmask import knn
from mixmask.backbones import Encoder
from mixmask.config import KNN, Augment, ConfigError
from mixmask.datasets import Resident
from mixmask.features import shorter_side
from mixmask.metrics import knn_metric


def weighted(k: int = 20, temperature: float = 0.1, **options: str) -> KNN:
    return KNN(k, temperature, **{"features": "backbone", "every": 0, **options})


def majority(k: int = 5, **options: str) -> KNN:
    return KNN(k, **{"features": "backbone", "every": 0, "distance": "euclidean", "vote": "majority", **options})


def similarity(knn: KNN, query: list[float], entry: list[float]) -> float:
    if knn.distance == "euclidean":
        return -math.dist(query, entry)
    return sum(a * b for a, b in zip(query, entry, strict=True)) / math.hypot(*query) / math.hypot(*entry)


def naive(knn: KNN, bank: Tensor, labels: Tensor, queries: Tensor, classes: int) -> list[int]:
    predictions = []
    for query in queries.tolist():
        similarities = [similarity(knn, query, row) for row in bank.tolist()]
        votes = [0.0] * classes
        for j in sorted(range(len(bank)), key=lambda j: -similarities[j])[: knn.k]:
            votes[int(labels[j])] += math.exp(similarities[j] / knn.temperature) if knn.vote == "weighted" else 1
        predictions.append(votes.index(max(votes)))  # the first of equals
    return predictions


def clusters(n: int, m: int, classes: int = 7, dim: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """A bank around one centre per class, its labels, and queries; float64."""
    generator = torch.Generator().manual_seed(n)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator)
    noise = torch.randn(n + m, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + 1.5 * noise[:n], labels, noise[n:]


PROTOCOLS = [weighted(k, t) for k, t in [(1, 0.1), (5, 0.1), (20, 0.1), (60, 0.1), (20, 1.0), (20, 0.02)]]
PROTOCOLS += [majority(), majority(1), majority(20), majority(distance="cosine"), weighted(distance="euclidean")]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: knn_metric(p, 6))
def test_knn(protocol: KNN):
    bank, labels, queries = clusters(60, 80)
    found = knn.predict(protocol, bank, labels, queries, classes=7)
    assert found.tolist() == naive(protocol, bank, labels, queries, 7)
    assert len(set(found.tolist())) > 3


def test_protocols_differ():
    bank, labels, queries = clusters(60, 80)
    both = (majority(), majority(distance="cosine"), weighted(5), weighted(5, distance="euclidean"))
    assert len({tuple(knn.predict(p, bank, labels, queries, 7).tolist()) for p in both}) == 4


def test_nearest_neighbour_outvotes_a_majority_that_is_far():
    bank = torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.0, 1.0]])
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1])
    assert knn.predict(weighted(3, 0.1), bank, labels, query, 2).item() == 0
    assert knn.predict(weighted(3, 10.0), bank, labels, query, 2).item() == 1
    assert knn.predict(majority(3), bank, labels, query, 2).item() == 1


def test_length_of_a_feature_counts_for_euclidean_distance_alone():
    bank, labels = torch.tensor([[10.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn.predict(majority(1), bank, labels, query, 2).item() == 1
    assert knn.predict(weighted(1), bank, labels, query, 2).item() == 0


def test_equal_votes_go_to_the_lowest_class():
    """As scipy's mode, and torch's argmax over sorted classes in htdt/self-supervised."""
    bank = torch.tensor([[1.0], [1.1], [1.2], [1.3], [9.0]])
    labels = torch.tensor([5, 2, 5, 2, 0])
    assert knn.predict(majority(4), bank, labels, torch.tensor([[0.9]]), 6).item() == 2


def test_near_neighbours_far_from_the_origin_keep_their_order():
    """Products in float32 would lose the differences between large features."""
    bank, labels, queries = clusters(60, 80)
    bank, queries = (1e3 + bank).float(), (1e3 + queries).float()
    found = knn.predict(majority(), bank, labels, queries, 7)
    assert found.tolist() == naive(majority(), bank, labels, queries, 7)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_weights_neither_vanish_nor_overflow(scale: float):
    bank, labels, queries = clusters(60, 80)
    features = (scale * bank, labels, scale * queries)
    expected = naive(weighted(20, 0.1 * scale, distance="euclidean"), *features, 7)
    assert knn.predict(weighted(20, 0.1 * scale, distance="euclidean"), *features, 7).tolist() == expected


@pytest.mark.parametrize("protocol", [weighted(), majority()], ids=lambda p: p.vote)
@pytest.mark.parametrize("chunk", [1, 7, 80, 1000])
def test_chunks_do_not_change_predictions(protocol: KNN, chunk: int):
    bank, labels, queries = clusters(60, 80)
    expected = knn.predict(protocol, bank, labels, queries, 7)
    assert torch.equal(knn.predict(protocol, bank, labels, queries, 7, chunk=chunk), expected)


def test_more_neighbours_than_images_is_an_error():
    bank, labels, queries = clusters(60, 5)
    with pytest.raises(ConfigError, match=r"knn\.k: 61 neighbours.*60 training images"):
        knn.predict(weighted(61), bank, labels, queries, 7)


@pytest.mark.parametrize(
    ("temperature", "vote", "words"),
    [(0.0, "weighted", "above 0 for a weighted vote, found 0"), (0.1, "majority", "none for a majority vote")],
)
def test_temperature_belongs_to_the_weighted_vote(temperature: float, vote: str, words: str):
    with pytest.raises(ConfigError, match=rf"knn\.temperature: expected .*{words}"):
        KNN(5, temperature, features="output", every=0, vote=vote)


def test_metric_names_the_whole_protocol():
    assert knn_metric(weighted(200, features="output"), 128) == "knn_k200_t0.1_out128"
    assert knn_metric(weighted(20, 0.07), 512) == "knn_k20_t0.07_backbone512"
    assert knn_metric(weighted(20, distance="euclidean"), 512) == "knn_k20_t0.1_euclidean_backbone512"
    assert knn_metric(majority(), 512) == "knn_k5_euclidean_backbone512"
    assert knn_metric(majority(distance="cosine"), 512) == "knn_k5_cosine_backbone512"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_blocks_of_the_bank_give_what_the_whole_gives(protocol, monkeypatch):
    """And no tensor is as large as a copy of the bank, or as all similarities."""
    torch.manual_seed(0)
    bank, queries, labels = torch.randn(1000, 8), torch.randn(37, 8), torch.randint(5, (1000,))
    whole = knn.predict(protocol, bank, labels, queries, 5)
    monkeypatch.setattr(knn, "BLOCK", 8 * 64)
    with Largest() as seen:
        assert torch.equal(knn.predict(protocol, bank, labels, queries, 5, chunk=10), whole)
    assert seen.numbers <= 10 * 128


PLAIN = Augment(order=(), size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_accuracy_is_that_of_the_test_images_and_their_labels():
    """Four grey levels are four classes; the test images come in another order, and one label in four is wrong."""

    def grey(levels: list[int], labels: list[int]) -> Resident:
        images = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
        return Resident(images, torch.tensor(labels), ("a", "b", "c", "d"), "grey")

    encoder = Encoder(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48, affine=False)), nn.Identity()).train()
    train, test = grey([0, 80, 160, 240] * 3, [0, 1, 2, 3] * 3), grey([241, 161, 81, 1], [3, 2, 1, 3])
    protocol = majority(3, features="backbone")
    assert knn.evaluate(encoder, train, test, PLAIN, protocol, torch.device("cpu")) == {
        "knn_k3_euclidean_backbone48": 75.0
    }
    assert encoder.training and encoder.backbone[1].num_batches_tracked == 0


def test_small_images_are_resized_by_their_shorter_side():
    for shape, side in (((4, 4), 0), ((4, 6), 0), ((6, 4), 0), ((3, 4), 4), ((4, 3), 4), ((6, 6), 4)):
        assert shorter_side(PLAIN, Resident(torch.zeros(1, 3, *shape), torch.zeros(1), ("a",), "x")) == side


class Largest(TorchDispatchMode):
    """How many numbers the largest new tensor inside has."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.numbers = max(self.numbers, result.numel())
        return result
