"""What only a GPU can show. Skipped, and saying so, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixmask import config, datasets
from mixmask.training.state import TrainState
from pretrain import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parents[2]
METHODS = ("vanilla", "unmix", "mixmask", "both", "erase", "mscn")


def started(framework: str, **overrides) -> tuple[config.Pretrain, TrainState, datasets.Resident]:
    """A recipe of CIFAR-100 with fresh weights on the GPU, and as much noise as two batches need."""
    recipe = config.load(ROOT / f"pretrain/configs/cifar100_{framework}.yaml", overrides)
    device = torch.device("cuda")
    images = torch.randint(256, (2 * recipe.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    dataset = datasets.Resident(images, torch.zeros(len(images), dtype=torch.long, device=device), ("one",), "noise")
    return recipe, TrainState(*train.build(recipe, device), recipe.epochs, 2), dataset


def iterations(recipe: config.Pretrain, state: TrainState, dataset: datasets.Resident) -> list[float]:
    """The losses of one epoch."""
    batches = train.views(recipe, dataset, 0, 0, torch.device("cuda"))
    return [float(train.iterate(recipe, state, batch)[0]["loss"]) for batch in batches]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("framework", ["moco", "simclr", "byol", "simsiam"])
def test_an_iteration_never_waits_for_the_device(framework: str, method: str):
    recipe, state, dataset = started(framework, method=method, batch_size=64)
    iterations(recipe, state, dataset)  # the first one may wait: libraries load
    batches = train.views(recipe, dataset, 1, 0, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.iterate(recipe, state, next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("framework", ["moco", "simclr", "byol", "simsiam"])
def test_bf16_and_channels_last_keep_the_loss(framework: str):
    losses = {}
    for precision, last in (("fp32", False), ("fp32", True), ("bf16", True)):
        options = {"method": "mixmask", "batch_size": 64, "precision": precision, "run.channels_last": last}
        losses[precision, last] = iterations(*started_with_seed(framework, **options))
    assert losses["fp32", True] == pytest.approx(losses["fp32", False], rel=1e-3, abs=1e-3)
    assert losses["bf16", True] == pytest.approx(losses["fp32", False], rel=5e-2, abs=2e-2)


def started_with_seed(framework: str, **options) -> tuple[config.Pretrain, TrainState, datasets.Resident]:
    """`started`, with the same noise each time."""
    torch.manual_seed(0)
    return started(framework, **options)


def test_the_cifar_recipe_needs_less_than_8_gib():
    recipe, state, dataset = started("moco", method="mixmask", precision="bf16")
    torch.cuda.reset_peak_memory_stats()
    iterations(recipe, state, dataset)
    assert torch.cuda.max_memory_allocated() < 8 * 2**30


def test_what_is_compiled_keeps_the_loss():
    options = {"method": "mixmask", "batch_size": 64}
    eager, compiled = (iterations(*started_with_seed("moco", **options, **{"run.compile": c})) for c in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-3)
