"""What an iteration of each stage does, and in which order: rates, modes, draws, initial weights, crops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from eval import finetune as finetune_stage
from eval import knn as knn_stage
from eval import linear as linear_stage
from mixmask import config as configs
from mixmask import datasets, features, formats, registry
from mixmask.augment import test_view as view_of
from mixmask.backbones import ResNet
from mixmask.config import Finetune, Pretrain
from mixmask.datasets.views import train_batches
from mixmask.runs import read_log
from mixmask.training.state import TrainState
from pretrain import train as pretrain_stage
from pretrain.train import build, train
from tests.conftest import TINY, squares

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

FINETUNE = """
recipe: tiny_finetune
dataset: squares
labels: 60
epochs: 2
batch_size: 16
seed: 0
backbone_lr: 0.01
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0}
schedule: {kind: step, milestones: [1], gamma: 0.2}
augment: {order: [crop, flip], size: 12, crop_scale: [0.2, 1.0], flip_prob: 0.5}
test_resize: 0
run: {workers: 0, device: cpu}
"""


def tiny_finetune(*items: str) -> Finetune:
    return configs.resolve(yaml.safe_load(FINETUNE), configs.parse_overrides(items), Finetune)


@pytest.fixture(scope="module")
def pretrained(tiny: Callable[..., Pretrain], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pretrained")
    train(tiny("epochs=1", "knn.every=0", "augment.mean=[0.4, 0.5, 0.6]"), directory)
    return directory / "checkpoint.pt"


@pytest.fixture
def rates_in_use() -> Iterator[list[tuple[float, ...]]]:
    """The rates of the optimiser's groups, at each of its steps."""
    found: list[tuple[float, ...]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: found.append(tuple(group["lr"] for group in optimizer.param_groups))
    )
    yield found
    hook.remove()


# ------------------------------------------------------------------------------------------------- initial weights


def test_each_seed_starts_from_weights_of_its_own(tiny: Callable[..., Pretrain]):
    one, again, other = (dict(build(tiny(f"seed={seed}"), CPU)[0].named_parameters()) for seed in (0, 0, 1))
    drawn = [name for name, value in one.items() if value.ndim > 1]
    assert len(drawn) > 20 and all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_each_seed_has_a_classifier_and_a_baseline_of_its_own(pretrained: Path):
    for init in ("normal", "uniform"):
        one, again, other = (linear_stage.build_classifier(8, 4, seed, init).weight for seed in (0, 0, 1))
        assert torch.equal(one, again) and not torch.equal(one, other)
    source = formats.read(pretrained)
    one, again, other = (
        dict(finetune_stage.build_model(tiny_finetune("init=random", f"seed={seed}"), source, 4).named_parameters())
        for seed in (0, 0, 1)
    )
    drawn = [name for name, value in one.items() if value.ndim > 1]
    assert "head.weight" in drawn and all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


# ---------------------------------------------------------------------------------------------------- augmentation


def test_each_step_of_each_epoch_draws_its_own_augmentation(tiny: Callable[..., Pretrain]):
    """All images are one image, so that only the draws differ."""
    image = torch.arange(3 * 12 * 12, dtype=torch.uint8).reshape(1, 3, 12, 12)
    alike = datasets.Resident(image.expand(32, -1, -1, -1).clone(), torch.zeros(32, dtype=torch.long), ("a",), "alike")
    seen = [
        batch[0]
        for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0))
        for batch, _ in train_batches(alike, tiny().augment, 8, seed, epoch, 1, CPU)
    ]
    assert len(seen) == 16
    assert not any(torch.equal(seen[i], seen[j]) for i in range(16) for j in range(i))


# ---------------------------------------------------------------------------------------------------------- rates


def test_each_step_of_a_pretraining_has_the_rate_of_its_place(
    tiny: Callable[..., Pretrain], tmp_path: Path, rates_in_use: list
):
    train(tiny("method=vanilla", "knn.every=0", "run.log_every=1"), tmp_path)
    assert rates_in_use == [(0.06,)] * 6 + [(pytest.approx(0.03),)] * 6  # half a cosine over two epochs
    lines = read_log(tmp_path)
    assert [line["lr"] for line in lines if line["kind"] == "step"] == [rate for (rate,) in rates_in_use]
    assert [line["lr"] for line in lines if line["kind"] == "epoch"] == [0.06, pytest.approx(0.03)]


def test_each_step_of_a_linear_probe_has_the_rate_of_its_place(
    tiny_linear: Callable[..., configs.Linear], pretrained: Path, tmp_path: Path, rates_in_use: list
):
    linear_stage.probe(tiny_linear(), pretrained, tmp_path)
    assert rates_in_use == [(0.01,)] * 12 + [(pytest.approx(0.001),)] * 6  # a tenth from epoch 2 on


def test_each_step_of_a_finetuning_has_the_two_rates_of_its_place(pretrained: Path, tmp_path: Path, rates_in_use: list):
    finetune_stage.finetune(tiny_finetune(), formats.read(pretrained), tmp_path)
    assert rates_in_use == [(0.01, 0.1)] * 3 + [(pytest.approx(0.002), pytest.approx(0.02))] * 3


# ---------------------------------------------------------------------------------------------------------- modes


@pytest.fixture
def modes_in_use(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, set[bool]]]:
    """Of each forward pass of a ResNet: whether gradients are taken, and the modes of all of its modules."""
    found: list[tuple[bool, set[bool]]] = []
    forward = ResNet.forward

    def noting(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta:  # a pass without images, that shows how wide the features are
            found.append((torch.is_grad_enabled(), {module.training for module in network.modules()}))
        return forward(network, x)

    monkeypatch.setattr(ResNet, "forward", noting)
    return found


def test_training_goes_on_in_training_mode_after_knn(tiny: Callable[..., Pretrain], tmp_path: Path, modes_in_use: list):
    """k-NN at epochs 0, 1 and 2: bank, test images, two views. MoCo's key encoder takes no gradient, and trains."""
    train(tiny("method=vanilla"), tmp_path)
    trained = [modes for gradient, modes in modes_in_use if gradient]
    assert trained == [{True}] * len(trained) and len(trained) >= 12
    without = [modes for gradient, modes in modes_in_use if not gradient]
    assert without.count({False}) == 12 and without.count({True}) == len(without) - 12 >= 12


def test_finetuning_goes_on_in_training_mode_after_its_test(pretrained: Path, tmp_path: Path, modes_in_use: list):
    finetune_stage.finetune(tiny_finetune(), formats.read(pretrained), tmp_path)
    assert modes_in_use == ([(True, {True})] * 3 + [(False, {False})]) * 2


def test_a_probe_s_encoder_stays_in_evaluation_mode(
    tiny_linear: Callable[..., configs.Linear], pretrained: Path, tmp_path: Path, modes_in_use: list
):
    linear_stage.probe(tiny_linear("epochs=1"), pretrained, tmp_path)
    assert modes_in_use == [(False, {False})] * 7  # the test images at once, six batches


# ---------------------------------------------------------------------------------------------------- BYOL's order


def test_byol_s_target_moves_after_the_optimiser_towards_the_weights_that_it_has_made():
    items = {"byol.momentum": 0.9, "byol.dim": 4, "byol.hidden": 8, "backbone.width": 2, "batch_size": 8}
    config = configs.load(ROOT / "pretrain/configs/cifar100_byol.yaml", {**items, "optimizer.lr": 0.1})
    config = configs.resolve(configs.to_dict(config), {"schedule.warmup_iterations": 0, "method": "vanilla"}, Pretrain)
    framework, optimizer = build(config, CPU)
    state = TrainState(framework, optimizer, 2, 2)
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.1 * (1 + math.cos(math.pi / 4)) / 2):  # a quarter of all steps, half of an epoch
        before = [parameter.clone() for parameter in framework.encoder.parameters()]
        target = [parameter.clone() for parameter in framework.target_encoder.parameters()]
        pretrain_stage.iterate(config, state, [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2)])
        online = [parameter.detach() for parameter in framework.encoder.parameters()]
        moved = [not torch.equal(a, b) for a, b in zip(before, online, strict=True)]
        assert sum(moved) > 20
        for old, new, now in zip(target, online, framework.target_encoder.parameters(), strict=True):
            torch.testing.assert_close(now, (1 - share) * old + share * new, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------- SwAV's step


@pytest.mark.parametrize(("step", "frozen"), [(2, True), (3, False)])
def test_swav_s_prototypes_are_frozen_by_the_step_of_the_run_also_when_it_is_resumed(step: int, frozen: bool):
    items = {"swav.frozen": 3, "swav.prototypes": 6, "swav.dim": 4, "swav.hidden": 8, "swav.crops": 0, "swav.queue": 0}
    config = configs.load(ROOT / "pretrain/configs/cifar100_swav.yaml")
    more = {"backbone.width": 2, "batch_size": 8, "mix_groups": 1, "backbone.bn_groups": 1, "method": "vanilla"}
    config = configs.resolve(configs.to_dict(config), {**items, **more}, Pretrain)
    framework, optimizer = build(config, CPU)
    state = TrainState(framework, optimizer, 2, 4)
    state.step = step  # as a checkpoint has it: the framework itself is new
    before = nn.functional.normalize(framework.prototypes.weight.detach(), dim=1)
    generator = torch.Generator().manual_seed(0)
    pretrain_stage.iterate(config, state, [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2)])
    assert torch.equal(framework.prototypes.weight, before) == frozen


# ------------------------------------------------------------------------------------------- the test images' crop


def wide(split: str, expected: datasets.Expected) -> datasets.Resident:
    """The squares in 24 x 24 pixels, with a frame of other content that a centre crop of 12 would not show."""
    small = squares(split, expected)
    images = small.images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return datasets.Resident(images, small.labels, small.classes, "wide")


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All that the networks are shown in evaluations, on images of 24 pixels."""
    monkeypatch.setitem(registry.DATASETS, "wide", registry.Dataset(4, 96, 40, 24, "wide", wide))
    shown: list[torch.Tensor] = []
    batches = features.test_batches

    def noting(*arguments) -> Iterator[torch.Tensor]:
        for images in batches(*arguments):
            shown.append(images.clone())
            yield images

    monkeypatch.setattr(features, "test_batches", noting)
    return shown


def views_of(split: str, resize: int, mean: tuple[float, ...] = (0.4, 0.5, 0.6)) -> torch.Tensor:
    images = wide(split, registry.DATASETS["wide"]).images
    return view_of(images, 12, resize, mean, (0.25, 0.25, 0.25))


@pytest.mark.parametrize(("test_resize", "resize"), [(14, 14), (-1, 12), (0, None)])
def test_a_probe_sees_test_images_resized_as_its_recipe_says(
    tiny_linear: Callable[..., configs.Linear], pretrained: Path, tmp_path: Path, evaluated: list, test_resize, resize
):
    items = ("dataset=wide", "epochs=1", f"test_resize={test_resize}")
    linear_stage.probe(tiny_linear(*items), pretrained, tmp_path / "augmented")
    linear_stage.probe(tiny_linear(*items, "features=cached", "augment.order=[]"), pretrained, tmp_path / "cached")
    test, test_again, train_set = evaluated
    assert torch.equal(test, views_of("test", resize)) and torch.equal(test, test_again)
    assert torch.equal(train_set, views_of("train", resize))


@pytest.mark.parametrize(("test_resize", "resize"), [(14, 14), (-1, 12), (0, None)])
def test_a_finetuning_is_tested_on_images_resized_as_its_recipe_says(
    pretrained: Path, tmp_path: Path, evaluated: list, test_resize, resize
):
    items = ("dataset=wide", "epochs=1", f"test_resize={test_resize}")
    finetune_stage.finetune(tiny_finetune(*items), formats.read(pretrained), tmp_path)
    assert len(evaluated) == 1 and torch.equal(evaluated[0], views_of("test", resize))


def test_knn_during_training_and_after_it_sees_whole_images_at_the_crop_s_size(
    tiny: Callable[..., Pretrain], tmp_path: Path, evaluated: list, cli: Callable
):
    train(tiny("dataset=wide", "epochs=1", "knn.every=0"), tmp_path / "run")
    words = ["--checkpoint", tmp_path / "run/checkpoint.pt", "--run-dir", tmp_path / "knn"]
    assert cli(knn_stage.main, *words)[0] == 0
    mean = tuple(yaml.safe_load(TINY)["augment"]["mean"])
    expected = [views_of(split, 12, mean) for split in ("train", "test")] * 2
    assert len(evaluated) == 4 and all(map(torch.equal, evaluated, expected))


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (112, 128)])
def test_image_files_are_resized_to_256_for_a_crop_of_224(tiny_linear: Callable[..., configs.Linear], size, resize):
    files = datasets.Files(("a.jpg",), torch.zeros(1, dtype=torch.long), ("a",), "files")
    config = tiny_linear(f"augment.size={size}")
    assert features.shorter_side(config.augment, files) == resize
    found = [
        features.resize_of(configs.resolve(configs.to_dict(config), {"test_resize": n}, configs.Linear), files)
        for n in (-1, 0, 240)
    ]
    assert found == [resize, 0, 240]


@pytest.mark.parametrize("path", sorted((ROOT / "eval/configs").glob("imagenet_*.yaml")), ids=lambda path: path.stem)
def test_the_imagenet_recipes_test_on_224_of_256_pixels(path: Path):
    values = configs.read_yaml(path)
    assert (values["augment"]["size"], values["test_resize"]) == (224, 256)


def test_knn_is_due_after_every_so_many_epochs_and_the_last(tiny):
    def due(every: int) -> list[bool]:
        return [pretrain_stage.knn_is_due(tiny("epochs=5", f"knn.every={every}"), epoch) for epoch in range(5)]

    assert due(2) == [False, True, False, True, True] and due(0) == [False] * 4 + [True] and all(due(1))
