"""The objective (Eq. 4 to 6, Algorithm 1) against loops over rows and queue entries, loss and gradients, in float64."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mixmask.frameworks.base import Framework
from mixmask.frameworks.moco import MoCo, Settings
from mixmask.loss import objective
from mixmask.masks import sample_mask
from mixmask.methods import METHODS, Anchor, unmix_map
from mixmask.randomness import numpy_generator
from tests import reference
from tests.reference import Mixture, SmallNet, views

SIDE = 8


def build(settings: Settings, seed: int = 0, channels: int = 3) -> MoCo:
    """A small MoCo whose key encoder has already moved away from the encoder."""
    torch.manual_seed(seed)
    moco = MoCo(SmallNet(channels), settings).double().train()
    with torch.no_grad():
        for parameter in moco.key_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return moco


def generators(groups: int, seed: int) -> list[np.random.Generator]:
    return [numpy_generator(seed, "mix", group) for group in range(groups)]


def mixtures(recipe, x1: Tensor, groups: int, seed: int) -> list[Mixture]:
    """What Eq. 1 and Algorithm 1 mix, from the same draws: the box or lambda of Un-Mix, the mask, the permutation."""
    size, found = len(x1) // groups, []

    def mixture(maps: list[Tensor], local: list[list[int]]) -> Mixture:
        partner = [p + g * size for g, part in enumerate(local) for p in part]
        rows = [maps[i * len(maps) // len(x1)] for i in range(len(x1))]  # one map for each group, or for each image
        return Mixture(reference.mix(x1, rows, partner), [reference.pixel_share(m) for m in rows], partner)

    rngs, reverse = generators(groups, seed), [list(range(size))[::-1]] * groups
    if recipe.method in ("unmix", "both"):
        found.append(mixture([unmix_map(recipe.unmix.prob, SIDE, SIDE, rng)[0, 0] for rng in rngs], reverse))
    if recipe.method in ("mixmask", "both", "erase"):
        each = size if recipe.mask.per_image else 1
        masks = [sample_mask(recipe.mask, SIDE, SIDE, rng)[0, 0] for rng in rngs for _ in range(each)]
    if recipe.method in ("mixmask", "both"):
        different = (recipe.both if recipe.method == "both" else recipe.mask).permutation == "random"
        found.append(mixture(masks, [rng.permutation(size).tolist() for rng in rngs] if different else reverse))
    if recipe.method == "erase":
        erased = torch.stack([x1[i] * masks[i * len(masks) // len(x1)] for i in range(len(x1))])
        found.append(Mixture(erased, [1.0] * len(x1), None))
    return found


def compare(recipe, settings: Settings, n: int, seed: int, groups: int = 1) -> None:
    moco = build(settings, seed)
    x1, x2 = views(n, seed, side=SIDE)
    encoder = copy.deepcopy(moco.encoder)
    expected, _ = reference.moco_loss(moco, encoder, x1, x2, mixtures(recipe, x1, groups, seed), moco.queue.clone())
    expected.backward()

    anchors = METHODS[recipe.method](recipe, x1, generators(groups, seed))
    loss, parts, _ = objective(moco, x1, x2, anchors, torch.Generator().manual_seed(seed))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sum(part.item() for part in parts.values()) == pytest.approx(loss.item(), rel=1e-12)
    for (name, found), wanted in zip(moco.encoder.named_parameters(), encoder.parameters(), strict=True):
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-5, atol=1e-7), name
    assert all(parameter.grad is None for parameter in moco.key_encoder.parameters())


@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "mscn"])  # see test_mscn.py
def test_eq4_to_eq6_loss_and_gradients(method: str, symmetric: bool, mlp: bool):
    settings = Settings(dim=5, queue=11, momentum=0.9, temperature=0.2, mlp=mlp, symmetric=symmetric)
    for seed, n in ((0, 5), (1, 8)):
        compare(reference.recipe(method=method, mask__grid=4, mask__ratio=0.25), settings, n, seed)


@pytest.mark.parametrize("prob", [0.0, 1.0], ids=["cutmix", "mixup"])
def test_algorithm1_with_each_mixture_of_unmix(prob: float):
    settings = Settings(dim=4, queue=7, momentum=0.99, temperature=0.1, symmetric=True)
    compare(reference.recipe(method="both", mask__grid=2, unmix__prob=prob), settings, 6, 3)


@pytest.mark.parametrize("method", ["unmix", "mixmask", "both", "erase"])
def test_eq6_with_mix_groups(method: str):
    settings = Settings(dim=4, queue=7, momentum=0.99, temperature=0.1)
    recipe = reference.recipe(method=method, mask__type="discrete", mask__grid=4, mask__ratio=[0.0, 1.0])
    compare(recipe, settings, 9, 5, groups=3)


@pytest.mark.parametrize("overrides", [{"mask__permutation": "random"}, {"mask__type": "discrete"}])
def test_eq6_options_of_the_mask(overrides: dict):
    settings = Settings(dim=4, queue=7, momentum=0.99, temperature=0.1, symmetric=True)
    compare(reference.recipe(method="mixmask", mask__grid=4, **overrides), settings, 7, 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("permutation", ["reverse", "random"])
@pytest.mark.parametrize("method", ["mixmask", "both", "erase"])
def test_eq6_with_a_mask_and_a_lambda_for_each_image(method: str, permutation: str, groups: int):
    settings = Settings(dim=4, queue=7, momentum=0.99, temperature=0.1, symmetric=True)
    options = {"mask__permutation": permutation, "both__permutation": permutation, "mask__ratio": [0.1, 0.9]}
    recipe = reference.recipe(method=method, mask__grid=4, mask__per_image=True, **options)
    compare(recipe, settings, 6, 2, groups)


def test_table2_same_uses_the_reverse_order_in_both_branches():
    settings = Settings(dim=4, queue=7, momentum=0.99, temperature=0.1)
    compare(reference.recipe(method="both", mask__grid=4, both__permutation="reverse"), settings, 7, 2)


# ---------------------------------------------------------------------------------------- forward passes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method, passes", [("vanilla", 1), ("erase", 2), ("unmix", 2), ("mixmask", 2), ("both", 3)])
def test_reverse_order_costs_no_forward_pass(method: str, passes: int, symmetric: bool):
    moco = build(Settings(dim=4, queue=7, momentum=0.99, temperature=0.1, symmetric=symmetric))
    batches: dict[str, list[int]] = {"encoder": [], "key_encoder": []}
    for name, sizes in batches.items():
        head = getattr(moco, name).head
        head.register_forward_hook(lambda module, inputs, output, sizes=sizes: sizes.append(len(output)))
    x1, x2 = views(6, 0)
    anchors = METHODS[method](reference.recipe(mask__grid=4), x1, generators(1, 0))
    objective(moco, x1, x2, anchors)
    assert batches["encoder"] == [6] * (passes + symmetric)  # the symmetric loss also has x2 as a query
    assert batches["key_encoder"] == [6] * (1 + symmetric)


# --------------------------------------------------------------------------- the sum, for any framework


class Squares(Framework):
    """A framework with nothing to it: row i scores (embedding_i - target_i)^2, and clean rows a constant more."""

    def targets(self, x1: Tensor, x2: Tensor, generator: torch.Generator | None) -> Tensor:
        return x2

    def embed(self, batches: Sequence[Tensor], targets: Tensor) -> list[tuple[Tensor]]:
        return [(2 * images,) for images in batches]

    def score(self, embedding: tuple[Tensor], targets: Tensor, clean: bool) -> Tensor:
        return (embedding[0] - targets) ** 2 + (100 if clean else 0)


def test_objective_is_the_weighted_sum_over_anchors():
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 5.0])
    anchors = [
        Anchor("clean", x, clean=True),
        Anchor("scalar", x, weight=0.5),
        Anchor("rows", x, weight=torch.tensor([1.0, 0.0, 2.0]), order=torch.tensor([2, 0, 1])),
    ]
    loss, parts, targets = objective(Squares(), x, y, anchors)
    assert parts["clean"].item() == pytest.approx(100 + (4 + 9 + 1) / 3)
    assert parts["scalar"].item() == pytest.approx(0.5 * (4 + 9 + 1) / 3)
    assert parts["rows"].item() == pytest.approx((1 * 36 + 0 * 1 + 2 * 1) / 3)  # embeddings 6, 2, 4
    assert loss.item() == pytest.approx(sum(part.item() for part in parts.values()))
    assert targets is y
