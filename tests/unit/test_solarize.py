"""Solarization, as Pillow's, and probabilities that differ between the two views (Barlow Twins, VICReg)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageOps

from mixmask import augment as aug
from mixmask import config, datasets
from mixmask.config import ConfigError
from mixmask.datasets.views import train_batches
from tests.reference import ROOT

RECIPE = ROOT / "pretrain/configs/cifar100_barlow_twins.yaml"
CPU = torch.device("cpu")


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_solarize_is_pillows_and_leaves_the_others():
    x = images(6)
    x[0, 0, 0, :4] = torch.tensor([127, 128, 0, 255], dtype=torch.uint8)
    chosen = torch.tensor([True, False] * 3)
    found = aug.solarize(x.float(), chosen)
    for image, result, is_chosen in zip(x, found, chosen, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = ImageOps.solarize(pillow) if is_chosen else pillow
        assert result.permute(1, 2, 0).byte().numpy().tobytes() == expected.tobytes()


def test_an_order_without_it_draws_what_it_drew_before():
    without = replace(config.load(RECIPE).augment, order=("crop", "jitter", "grayscale", "flip")).of_view(1)
    last = replace(without, order=(*without.order, "solarize"), solarize_prob=0.5)
    parameters = [aug.sample(a, 9, 8, 8, torch.Generator().manual_seed(3), CPU) for a in (without, last)]
    assert not parameters[0].solarize.any() and 0 < parameters[1].solarize.sum() < 9
    assert all(torch.equal(getattr(parameters[0], name), getattr(parameters[1], name)) for name in ("top", "sigma"))


def test_only_the_second_view_of_barlow_twins_is_solarized():
    augment = replace(config.load(RECIPE).augment, order=("solarize",), size=12, solarize_prob=(0.0, 1.0))
    augment = replace(augment, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    dataset = datasets.load("squares", "", "train")
    ((x1, x2), indices), *_ = train_batches(dataset, augment, 8, 0, 0, 2, CPU)
    plain = dataset.images[indices].float()
    torch.testing.assert_close(255 * x1, plain)
    torch.testing.assert_close(255 * x2, torch.where(plain >= 128, 255 - plain, plain))


def test_a_pair_of_probabilities_is_checked_and_one_number_is_both_views():
    augment = config.load(RECIPE).augment
    assert (augment.of_view(0).solarize_prob, augment.of_view(1).solarize_prob) == (0.0, 0.2)
    same = config.load(ROOT / "pretrain/configs/cifar100_vicreg.yaml").augment
    assert same.of_view(0) is same.of_view(1) is same
    with pytest.raises(ConfigError, match=r"augment.solarize_prob: expected between 0 and 1, found 2"):
        config.load(RECIPE, {"augment.solarize_prob": [0.5, 2]})
    with pytest.raises(ConfigError, match=r"augment.blur_prob: expected 2 values, found 3"):
        config.load(RECIPE, {"augment.blur_prob": [0.1, 0.2, 0.3]})
