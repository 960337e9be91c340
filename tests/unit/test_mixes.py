"""The library's interface: settings with defaults, generators of any kind, the same anchors as the functions'."""

import numpy as np
import pytest
import torch

import mixmask
from mixmask import config
from mixmask.config import ConfigError

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def same(one, other):
    return len(one) == len(other) and all(
        a.images.equal(b.images) and torch.equal(torch.as_tensor(a.weight), torch.as_tensor(b.weight))
        for a, b in zip(one, other, strict=True)
    )


def test_the_defaults_are_block_repaired_reverse():
    mask = mixmask.Mask("block", "repaired", grid=4, ratio=0.5, switch=True, permutation="reverse")
    ours = mixmask.MixMask(grid=4)(X, np.random.default_rng(3))
    assert same(ours, mixmask.mixmask(X, mask, [np.random.default_rng(3)]))
    assert mixmask.MixMask(4) == mixmask.MixMask(grid=4, type="block", block_impl="repaired", permutation="reverse")
    theirs = mixmask.unmix(X, mixmask.UnMix(0.5), [np.random.default_rng(3)])
    assert same(mixmask.UnMix()(X, np.random.default_rng(3)), theirs)
    erased = mixmask.Erase(4)(X, np.random.default_rng(3))
    assert same(erased, mixmask.erase(X, mask, mixmask.Erase(4), [np.random.default_rng(3)]))
    assert same(ours, [ours[0], ours[1]]) and ours[0].images is ours[1].images


def test_every_setting_reaches_the_function():
    of = np.random.default_rng
    for seed in range(3):  # Mixup has one coefficient everywhere, CutMix a box: no seed can hide which it was
        for prob in (0.0, 1.0):
            assert same(mixmask.UnMix(prob)(X, of(seed)), mixmask.unmix(X, config.UnMix(prob), [of(seed)]))
    settings = {"ratio": 0.25, "type": "discrete"}
    mask = config.Mask(block_impl="repaired", grid=4, switch=True, permutation="reverse", **settings)
    erased = mixmask.erase(X, mask, config.Erase("noise"), [of(0)])
    assert same(mixmask.Erase(4, fill="noise", **settings)(X, of(0)), erased)
    settings = {"ratio": (0.2, 0.5), "switch": False, "permutation": "random", "per_image": True}
    for kind, implementation in (("discrete", "repaired"), ("block", "literal")):
        mask = config.Mask(kind, implementation, grid=8, **settings)
        ours = mixmask.MixMask(8, type=kind, block_impl=implementation, **settings)
        assert same(ours(X, of(1)), mixmask.mixmask(X, mask, [of(1)]))


@pytest.mark.parametrize("make", [lambda: mixmask.MixMask(4), mixmask.UnMix, lambda: mixmask.Erase(4, fill="noise")])
def test_generators_of_any_kind(make):
    mix, torchs = make(), torch.Generator
    assert same(mix(X, torchs().manual_seed(5)), mix(X, torchs().manual_seed(5)))
    assert not same(mix(X, torchs().manual_seed(5)), mix(X, torchs().manual_seed(6)))
    one = torchs().manual_seed(5)
    assert not same(mix(X, one), mix(X, one))  # it moves on
    torch.manual_seed(1)
    first = mix(X)
    torch.manual_seed(1)
    assert same(first, mix(X)) and not same(first, mix(X))
    two = mix(X, [np.random.default_rng(1), torchs().manual_seed(2)])
    halves = [mix(half, g)[0].images for half, g in
              zip(X.chunk(2), (np.random.default_rng(1), torchs().manual_seed(2)), strict=True)]  # fmt: skip
    assert two[0].images.equal(torch.cat(halves))


def test_rows_are_those_of_the_image_that_an_anchor_is_about():
    mixed, switch = mixmask.MixMask(4)(X, np.random.default_rng(0))
    numbers = torch.arange(8)
    assert mixed.rows(numbers) is numbers and switch.rows(numbers).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(mixed.weight + switch.weight.flip(0), torch.ones(8))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mixmask.MixMask(grid=4)(X, 3), "generator: expected torch's or NumPy's.*found a builtins.int"),
        (lambda: mixmask.MixMask(grid=4)(X, np.random.RandomState(0)), "found a numpy.random.*RandomState"),
        (lambda: mixmask.MixMask(grid=4)(X, []), "cannot be split into 0 equal mix groups"),
        (lambda: mixmask.MixMask(grid=4)(X, [np.random.default_rng()] * 3), "8 images cannot be split into 3"),
        (
            lambda: mixmask.MixMask(grid=4)((X * 9).byte()),
            r"expected normalised .*found torch.uint8 \(8, 3, 16",
        ),
        (lambda: mixmask.UnMix()(X[0]), r"x1: expected normalised images \(N, C, H, W\)"),
        (lambda: mixmask.Erase(grid=4)("x"), "found a str"),
        (lambda: mixmask.MixMask(grid=32)(X), "32 cells do not fit into an image of 16x16"),
        (lambda: mixmask.MixMask(grid=1), "MixMask.grid: expected at least 2"),
        (lambda: mixmask.MixMask(grid=4, ratio=1.5), "MixMask.ratio: expected between 0 and 1"),
        (lambda: mixmask.Erase(grid=4, ratio=-1), "Erase.ratio: expected between 0 and 1"),
        (lambda: mixmask.Erase(grid=4, fill="ones"), "Erase.fill: expected one of zero, noise"),
        (lambda: mixmask.UnMix(2), "UnMix.prob: expected between 0 and 1"),
    ],
)
def test_what_cannot_be_mixed_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_all_frameworks_and_the_objective_are_exported():
    names = ("MoCo", "SimCLR", "BYOL", "SimSiam", "BarlowTwins", "SwAV", "VICReg")
    assert [getattr(mixmask, name) for name in names] == list(mixmask.FRAMEWORKS.values())
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    framework = mixmask.SimSiam(net, mixmask.SimSiam.Settings(dim=4, hidden=5, predictor_hidden=3))
    loss, parts, _ = mixmask.objective(framework, X, X + 0.1, mixmask.vanilla(X) + mixmask.MixMask(4)(X))
    loss.backward()
    assert set(parts) == {"clean", "mixmask", "mixmask_switch"} and net[0].weight.grad.abs().sum() > 0
