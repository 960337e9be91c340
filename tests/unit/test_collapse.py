"""The measures of collapse against plain float64 formulas, and when they warn."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask import collapse
from mixmask.config import Augment
from mixmask.datasets import Resident

NORMAL = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def features(n: int, dim: int, seed: int = 0) -> Tensor:
    """float32 (n, dim), of unequal lengths and directions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 2, dim)
    return torch.randn(n, dim, generator=generator) * scale + 0.5


@pytest.mark.parametrize(("n", "dim"), [(40, 7), (9, 24)])
def test_measures_are_the_papers_formulas(n, dim):
    bank = features(n, dim)
    rows = [[value / math.hypot(*row) for value in row] for row in bank.double().tolist()]
    means = [sum(row[j] for row in rows) / n for j in range(dim)]
    std = sum(math.sqrt(sum((row[j] - means[j]) ** 2 for row in rows) / n) for j in range(dim)) / dim

    singular = torch.linalg.svdvals(bank.double()).tolist()
    shares = [value / sum(singular) + 1e-7 for value in singular]
    rank = math.exp(-sum(p * math.log(p) for p in shares))

    pairs = [math.dist(a, b) for a, b in itertools.combinations(rows, 2)]
    uniform = math.log(sum(math.exp(-2 * d**2) for d in pairs) / len(pairs))

    found = collapse.measures(bank)
    assert found == pytest.approx({"feature_std": std, "effective_rank": rank, "uniformity": uniform}, rel=1e-9)


def squares(n: int) -> Resident:
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Resident(images, torch.zeros(n, dtype=torch.int64), ("a",), "squares")


def test_alignment_is_the_mean_distance_of_two_views_and_drawn_alike_each_time():
    augment = Augment(("crop", "flip"), 8, crop_scale=(0.2, 1.0), flip_prob=0.5, **NORMAL)
    seen: list[Tensor] = []

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1)[:, :5]

    args = (Network(), squares(20), augment, 3, torch.device("cpu"))
    found = collapse.alignment(*args)
    one, other = (F.normalize(images.flatten(1)[:, :5].double(), dim=1) for images in seen)
    assert one.shape == (20, 5) and not torch.equal(*seen)
    assert found == pytest.approx(sum(math.dist(*pair) ** 2 for pair in zip(one, other, strict=True)) / 20, rel=1e-12)
    assert collapse.alignment(*args) == found


def test_alignment_of_identical_views_is_zero():
    augment = Augment((), 8, **NORMAL)
    assert collapse.alignment(nn.Flatten(), squares(6), augment, 0, torch.device("cpu")) == 0


def test_a_sample_is_spread_evenly():
    assert collapse.evenly(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert collapse.evenly(10, 4).tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize("dim", [8, 128, 2048])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_warning_of_collapse_and_of_nothing_else(dim, scale):
    generator = torch.Generator().manual_seed(dim)
    noise = torch.randn(300, dim, generator=generator)
    mean = torch.randn(dim, generator=generator)
    spread, rectified, near = noise, noise.relu(), mean + 0.05 * noise  # the mean cosine of the last is 0.9975
    line = noise[:1] * torch.linspace(-1, 1, 300)[:, None]  # two opposite directions
    for healthy in (spread, rectified, mean + 0.5 * noise):
        assert collapse.warning(collapse.measures(scale * healthy), dim) == ""
    for collapsed in (near, line, mean.expand(300, dim), torch.zeros(300, dim)):
        values = collapse.measures(scale * collapsed)
        found = collapse.warning(values, dim)
        assert found.startswith("warning: the features look collapsed: ") and "\n" not in found
        # each is named where it is out of bounds, and only there
        assert ("feature_std is" in found) == (values["feature_std"] * dim**0.5 < 0.1)
        assert (f"of {dim}, expected at least 2" in found) == (values["effective_rank"] < 2)


def test_features_that_are_not_finite_have_no_measures_but_a_warning():
    bank = features(10, 4)
    bank[3, 1] = float("inf")
    assert collapse.measures(bank) == {} and "not finite" in collapse.warning({}, 4)
