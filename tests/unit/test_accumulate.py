"""A step of parts is the step of the whole batch, in float64; what cannot be is refused."""

import dataclasses
import functools

import pytest
import torch

from mixmask.config import ConfigError
from mixmask.training.state import TrainState
from pretrain import train
from tests.unit.test_frameworks import SMALL

METHODS = ("vanilla", "unmix", "mixmask", "both", "erase")


def after(recipe, steps: int = 2):
    """Values and state after some steps."""
    torch.set_default_dtype(torch.float64)
    try:
        model, optimizer = train.build(recipe, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    state = TrainState(model, optimizer, recipe.epochs, 6)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        side = recipe.augment.size
        x1, x2 = torch.randn(2, 16, 3, side, side, generator=generator, dtype=torch.float64)
        values, _ = train.iterate(recipe, state, [x1, x2])
    return values, model.state_dict()


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        say = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-11, msg=say)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_parts_are_the_whole(tiny, method, symmetric):
    items = [f"method={method}", f"moco.symmetric={symmetric}".lower(), "backbone.width=4", "backbone.bn_groups=4"]
    items += ["mask.permutation=random", "mix_groups=2"]
    whole = after(tiny(*items))
    for parts in (2, 4):
        found = after(tiny(*items, f"run.accumulate={parts}"))
        assert_same(whole[0], found[0])
        assert_same(whole[1], found[1])


def test_without_batch_norm_any_parts_do(tiny):
    pytest.importorskip("timm")
    items = ["backbone.arch=timm/convnext_atto", "backbone.width=64", "backbone.stem=imagenet", "backbone.bn_groups=1"]
    items += ["augment.size=32", "run.channels_last=false"]
    whole, found = (after(tiny(*items, f"run.accumulate={parts}"), 1) for parts in (1, 8))
    assert_same(whole[0], found[0])


@pytest.mark.parametrize(
    "items, message",
    [
        (["framework=simsiam"], "the head or the loss of simsiam takes the whole batch at once; expected 1, found 2"),
        (["framework=vicreg"], "the head or the loss of vicreg takes the whole batch at once"),
        (
            ["backbone.bn_groups=1"],
            "2 parts cannot hold whole BatchNorm groups .*, of which the batch has 1;",
        ),
        (
            ["backbone.bn_groups=8", "run.accumulate=3"],
            "3 parts cannot hold .*, of which the batch has 8; expected a",
        ),
        (["method=mscn"], "mscn's crops are other images"),
    ],
)
def test_what_is_no_sum_of_parts_is_refused_by_name(tiny, items, message):
    recipe = tiny("run.accumulate=2", *[item for item in items if not item.startswith("framework")])
    for item in items:
        if item.startswith("framework"):
            name = item.partition("=")[2]
            recipe = dataclasses.replace(recipe, framework=name, settings=SMALL[name])
    with pytest.raises(ConfigError, match=f"run.accumulate: {message}"):
        train.build(recipe, torch.device("cpu"))
