"""One thread for every test (bits and times stay put), and the smallest pre-training that has all its parts."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mixmask import config as configs
from mixmask import datasets, registry
from mixmask.config import resnets

torch.set_num_threads(1)

TINY = """
recipe: tiny
dataset: squares
framework: moco
method: mixmask
epochs: 2
batch_size: 16
seed: 0
mix_groups: 1
precision: fp32
backbone: {arch: resnet10, stem: tiny, width: 8, bn_groups: 2}
moco: {dim: 8, queue: 64, momentum: 0.9, temperature: 0.1, mlp: false, symmetric: true, shuffle_bn: true}
mask: {type: block, block_impl: repaired, grid: 2, ratio: 0.5, switch: true, permutation: reverse}
unmix: {prob: 0.5}
both: {permutation: random}
erase: {fill: zero}
optimizer: {name: sgd, lr: 0.06, momentum: 0.9, weight_decay: 0.0005}
schedule: {kind: cosine, unit: epoch}
augment:
  order: [crop, flip, jitter, grayscale]
  size: 12
  crop_scale: [0.2, 1.0]
  flip_prob: 0.5
  jitter: [0.4, 0.4, 0.4, 0.1]
  jitter_prob: 0.8
  grayscale_prob: 0.2
  mean: [0.5, 0.5, 0.5]
  std: [0.25, 0.25, 0.25]
knn: {k: 5, temperature: 0.1, features: output, every: 1}
run: {workers: 0, log_every: 2, device: cpu}
"""

LINEAR = """
recipe: tiny_linear
dataset: squares
epochs: 3
batch_size: 16
seed: 0
optimizer: {name: sgd, lr: 0.01, momentum: 0.9, weight_decay: 0}
schedule: {kind: step, milestones: [2], gamma: 0.1}
augment: {order: [crop, flip], size: 12, crop_scale: [0.2, 1.0], flip_prob: 0.5}
test_resize: 0
run: {workers: 0, device: cpu}
"""


def squares(split: str, expected: datasets.Expected) -> datasets.Resident:
    """Noise with a square whose place is the class: 4 classes, 12 x 12 pixels."""
    rng = np.random.Generator(np.random.PCG64(split == "test"))
    labels = torch.arange(expected.images(split)) % 4
    images = torch.from_numpy(rng.integers(0, 128, (len(labels), 3, 12, 12), dtype=np.uint8))
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 6 * (label // 2) :, 6 * (label % 2) :][:, :6, :6] += 100
    return datasets.Resident(images, labels, ("a", "b", "c", "d"), "squares")


@pytest.fixture(scope="session", autouse=True)
def _squares() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.DATASETS, "squares", registry.Dataset(4, 96, 40, 12, "squares", squares))
        patch.setitem(resnets.ARCHITECTURES, "resnet10", resnets.Architecture((1, 1, 1, 1), bottleneck=False))
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The tiny recipe as a file: 6 steps an epoch, 2 epochs, about a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def linear_recipe(tmp_path: Path) -> Path:
    """A linear probe of 3 epochs on the same images, as a file."""
    path = tmp_path / "tiny_linear.yaml"
    path.write_text(LINEAR)
    return path


@pytest.fixture(scope="session")
def tiny() -> Callable[..., configs.Pretrain]:
    """`tiny("method=vanilla", ...)`: the tiny recipe's config with overrides."""
    return lambda *items: configs.resolve(yaml.safe_load(TINY), configs.parse_overrides(items), configs.Pretrain)


@pytest.fixture(scope="session")
def tiny_linear() -> Callable[..., configs.Linear]:
    """`tiny_linear("epochs=1", ...)`: the linear probe's config with overrides."""
    return lambda *items: configs.resolve(yaml.safe_load(LINEAR), configs.parse_overrides(items), configs.Linear)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """`cli(main, "--config", ...)` as a shell would run it: (exit status, stdout, stderr)."""

    def run(main: Callable[[], None], *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        status = 0
        try:
            configs.main_guard(main)
        except SystemExit as exit:
            status = exit.code or 0
        return status, *capsys.readouterr()

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: a process in which a test has started threads can no longer be forked safely."""
    items.sort(key=lambda item: item.path.name != "test_distributed.py")
