"""Training steps: the project's own, framework by framework and mixture by mixture, and the plain reference's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure, plain
from mixmask import config as configs
from mixmask.config import Pretrain
from mixmask.datasets import Resident
from mixmask.datasets.views import without_crop
from mixmask.paths import as_on_a_gpu
from mixmask.registry import DATASETS
from mixmask.training.clock import Clock
from mixmask.training.state import TrainState
from pretrain import train

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("moco", "simclr", "byol", "simsiam")
MIXTURES = tuple(plain.MIXTURES)
CIFAR = DATASETS["cifar100"]
IMAGES = {"cifar100": (CIFAR.train, CIFAR.side), "imagenet": (2048, 224)}  # number of synthetic images, and their side


@dataclass(frozen=True)
class Plan:
    """How much is measured: `repeats` blocks of `block` steps, after `warm` steps."""

    repeats: int
    block: int
    warm: int


def recipe(dataset: str, framework: str, method: str, device: torch.device, overrides: dict[str, Any]) -> Pretrain:
    """The published recipe as it is run on this device: on a GPU in bf16, on a CPU a batch of 64 in fp32."""
    here = {"cpu": {"batch_size": 64}, "cuda": {"precision": "bf16"}}[device.type]
    chosen = {**here, "run.device": str(device), "method": method, **overrides}
    config = configs.load(ROOT / "pretrain" / "configs" / f"{dataset}_{framework}.yaml", chosen)
    if dataset != "imagenet":
        return config
    # ImageNet's workers hand over crops: what is left of the augmentation happens on the device.
    return dataclasses.replace(config, augment=without_crop(config.augment))


@functools.cache
def images(dataset: str, side: int = 0, number: int = 0) -> Resident:
    """Random pixels in place of a data set: uint8 (N, 3, S, S)."""
    usual_number, usual_side = IMAGES[dataset]
    side, number = side or usual_side, number or usual_number
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (number, 3, side, side), dtype=np.uint8)
    return Resident(torch.from_numpy(pixels), torch.arange(number) % 100, tuple(map(str, range(100))), "synthetic")


# ----------------------------------------------------------------------------------------------------------- ours


@dataclass
class Ours:
    """A pre-training, ready for its next step."""

    config: Pretrain
    device: torch.device
    clock: Clock = field(default_factory=Clock)
    number: int = 0  # of images; 0: as many as the data set has
    data: Resident | None = None  # what is trained on; none: random pixels

    def __post_init__(self) -> None:
        if self.data is None:
            self.data = images(self.config.dataset, number=self.number).to(self.device)
        steps_per_epoch = len(self.data) // self.config.batch_size
        self.state = TrainState(*train.build(self.config, self.device), self.config.epochs, steps_per_epoch)
        self.batches = self.clock.waits(self.views())

    def views(self) -> Iterator[list[Tensor]]:
        """The training's own batches, epoch after epoch."""
        for epoch in itertools.count():
            yield from train.views(self.config, self.data, epoch, 0, self.device)

    def step(self) -> None:
        """One iteration of the training."""
        train.iterate(self.config, self.state, next(self.batches))


# ---------------------------------------------------------------------------------------------------------- plain


@dataclass
class Plain:
    """The plain reference on the same recipe, ready for its next step."""

    config: Pretrain
    device: torch.device
    workers: int
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.model = plain.MoCo(self.config).to(self.device).train()
        o = self.config.optimizer
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay
        )
        pixels = images(self.config.dataset).images.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
        self.rng = np.random.Generator(np.random.PCG64(0))
        if self.config.dataset == "imagenet":  # synthetic input here, too: what a fast loader would hand over
            self.batches = self.clock.waits(self.synthetic())
            return
        pairs = plain.Pairs(pixels, plain.transform(self.config.augment))
        self.batches = self.clock.waits(plain.batches(pairs, self.config.batch_size, self.workers))

    def synthetic(self) -> Iterator[list[Tensor]]:
        """The same two views again and again, float32 (N, 3, S, S), in the host's memory."""
        shape = (self.config.batch_size, 3, self.config.augment.size, self.config.augment.size)
        views = [torch.randn(shape) for _ in range(2)]
        yield from itertools.repeat([v.pin_memory() for v in views] if self.device.type == "cuda" else views)

    def step(self) -> None:
        """One iteration."""
        x1, x2 = (x.to(self.device, non_blocking=True) for x in next(self.batches))
        plain.step(self.model, self.optimizer, x1, x2, self.config, self.rng)


# -------------------------------------------------------------------------------------------------------- numbers


def launches(config: Pretrain, device: torch.device, compiled: bool = False) -> int:
    """Operations of one iteration and its augmentation that are neither views nor allocations, as on a GPU.

    With `compiled`: calls of compiled graphs, and what is outside of them. Their number follows from the recipe's
    layers, groups, framework and method, not from width or batch: both are small here, so that any CPU counts at once.
    """
    groups = math.lcm(config.backbone.bn_groups, config.mix_groups)
    backbone = dataclasses.replace(config.backbone, width=4)
    execution = dataclasses.replace(config.run, compile=compiled)
    config = dataclasses.replace(config, backbone=backbone, batch_size=4 * groups, run=execution)
    counter = measure.Launches()
    with as_on_a_gpu(counter.backend):
        training = Ours(config, device, number=16 * groups)
        training.step()  # compiles, and makes what is made once
        with counter:
            training.step()
    return counter.total


def numbers(build: Callable[[], Ours | Plain], device: torch.device, plan: Plan, peak: float) -> dict[str, Any]:
    """images_per_second, ms_per_step, tflop_per_second, ... of one kind of step. `peak` in TFLOP/s."""
    measure.forget_peak(device)
    training = build()
    clock = training.clock
    flop = measure.counted_flop(training.step)  # the first step warms up, too
    for _ in range(plan.warm - 1):
        training.step()
    measure.wait(device)
    waited, start = clock.wait, time.perf_counter()
    blocks = measure.repeated(lambda: [training.step() for _ in range(plan.block)], device, plan.repeats, warm=0)
    share = (clock.wait - waited) / (time.perf_counter() - start)
    step = measure.median(blocks) / plan.block
    return {
        "batch": training.config.batch_size,
        "precision": training.config.precision,
        "images_per_second": training.config.batch_size / step,
        "ms_per_step": 1000 * step,
        "gflop_per_step": flop / 1e9,
        "tflop_per_second": flop / step / 1e12,
        "share_of_peak": flop / step / 1e12 / peak,
        "data_wait": share,
        "peak_memory_gib": measure.peak_memory(device),
        "steps": plan.repeats * plan.block,
        "ms_of_each": [round(1000 * block / plan.block, 2) for block in blocks],
    }
