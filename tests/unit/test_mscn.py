"""MSCN, our reconstruction: its masks cell by cell, its terms row by row, its extra crops, and that it trains."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mixmask import config as configs
from mixmask import datasets
from mixmask.config import MSCN, Augment, ConfigError
from mixmask.datasets.views import train_batches
from mixmask.frameworks import FRAMEWORKS
from mixmask.masks import focal_windows, kept_cells, mscn_masks
from mixmask.methods import METHODS, extra_crops, mscn, mscn_view
from mixmask.objective import objective
from pretrain import train as script
from tests import reference
from tests.reference import info_nce, moved, unit, views
from tests.unit.test_frameworks import PAIRS, small

ROOT = Path(__file__).parents[2]
SETTINGS = MSCN(grid=4, noise=0.7)
CPU = torch.device("cpu")


def rngs(groups: int = 1, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, g]) for g in range(groups)]


# ---------------------------------------------------------------------------------------- masks, pixel by pixel


def naive_masks(s: MSCN, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """bool (N, C, H, W) with the draws in their order: focal?, spatial?, ratios, ranks of cells, window corners."""
    n, channels, height, width = shape
    focal, spatial = rng.random(n) < s.focal_prob, rng.random(n) < s.spatial_prob
    ratios, ranks = rng.uniform(*s.ratio, (n, channels)), rng.random((n, channels, s.grid**2))
    sides = round(s.focal_side * height), round(s.focal_side * width)
    tops, lefts = rng.integers(height - sides[0] + 1, size=n), rng.integers(width - sides[1] + 1, size=n)
    keep = np.zeros(shape, dtype=bool)
    for i, c, y, x in np.ndindex(*shape):
        if focal[i]:
            keep[i, c, y, x] = tops[i] <= y < tops[i] + sides[0] and lefts[i] <= x < lefts[i] + sides[1]
        else:
            from_channel = 0 if spatial[i] else c
            cell = y * s.grid // height * s.grid + x * s.grid // width
            count = max(int(ratios[i, from_channel] * s.grid**2), 1)
            keep[i, c, y, x] = cell not in np.argsort(ranks[i, from_channel])[:count]
    return keep


@pytest.mark.parametrize("height, width", [(8, 8), (9, 7)])
@pytest.mark.parametrize(("focal", "spatial"), [(0.2, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_masks_pixel_by_pixel(focal: float, spatial: float, height: int, width: int):
    settings = dataclasses.replace(SETTINGS, focal_prob=focal, spatial_prob=spatial, focal_side=0.6)
    for seed in range(3):
        shape = (6, 3, height, width)
        found = mscn_masks(settings, shape, np.random.default_rng(seed), "cpu")
        assert found.dtype == torch.bool and found.shape == shape
        assert (found.numpy() == naive_masks(settings, shape, np.random.default_rng(seed))).all()


def near(found: float, expected: float, deviation: float, count: int) -> bool:
    return abs(found - expected) < 4 * deviation / math.sqrt(count)


def test_focal_spatial_and_channel_wise_masks_come_with_their_probabilities():
    n = 4_000
    keep = mscn_masks(MSCN(), (n, 3, 14, 14), np.random.default_rng(0), "cpu")
    side = round(14 * 200 / 224)
    alike = (keep == keep[:, :1]).all(dim=(1, 2, 3))  # focal or spatial; three channels hardly ever agree by chance
    focal = alike & (keep[:, 0].sum(dim=(1, 2)) == side**2) & (keep[:, 0].any(1).sum(1) == side)
    spatial = alike & ~focal
    for found, expected in ((focal, 0.2), (spatial, 0.8 * 0.3), (~alike, 0.8 * 0.7)):
        assert near(found.double().mean().item(), expected, math.sqrt(expected * (1 - expected)), n)


@pytest.mark.parametrize("grid", [7, 8, 4])
def test_removed_shares_follow_u_005_025_for_each_channel_rounded_down_to_cells(grid: int):
    n = 4_000
    cells = kept_cells(n, 3, grid, (0.05, 0.25), np.random.default_rng(grid))
    removed = (~cells).sum(axis=(2, 3))  # (n, 3)
    edges = np.arange(1, grid**2 + 1)  # so many cells are removed for ratios in [edge, edge + 1) / g^2; one for fewer
    low, high = np.where(edges == 1, 0, edges) / grid**2, (edges + 1) / grid**2
    share = (np.clip(high, 0.05, 0.25) - np.clip(low, 0.05, 0.25)) / 0.2
    assert share.sum() == pytest.approx(1)
    for count, expected in zip(edges, share, strict=True):
        assert near((removed == count).mean(), expected, math.sqrt(expected * (1 - expected)) + 1e-9, 3 * n)
    assert abs(np.corrcoef(removed.T)[0, 1]) < 4 / math.sqrt(n)  # channels draw their own


def test_every_cell_is_removed_equally_often():
    gone = (~kept_cells(6_000, 1, 4, (0.05, 0.25), np.random.default_rng(0))).mean(axis=(0, 1))
    assert np.abs(gone - gone.mean()).max() < 4 * math.sqrt(gone.mean() / 6_000)


@pytest.mark.parametrize(("extent", "side"), [(224, 200), (96, 86), (64, 57), (32, 29)])
def test_focal_window_is_200_of_224_pixels_at_any_place_inside(extent: int, side: int):
    n = 2_000
    windows = focal_windows(n, extent, extent, 200 / 224, np.random.default_rng(0), "cpu")[:, 0]
    rows, columns = windows.any(2), windows.any(1)  # (n, extent)
    for line in (rows, columns):
        assert (line.sum(1) == side).all()
        starts = torch.bincount(line.int().argmax(1), minlength=extent - side + 1)
        expected = n / (extent - side + 1)
        assert len(starts) == extent - side + 1 and ((starts - expected).abs() < 4.5 * math.sqrt(expected)).all()
    assert torch.equal(windows, rows[:, :, None] & columns[:, None, :])


# ------------------------------------------------------------------------------------------------- masked views


def naive_view(x: Tensor, s: MSCN, rng: np.random.Generator) -> Tensor:
    """The kept pixels of x, and s times a normal number for each other one, drawn after the masks."""
    keep = naive_masks(s, x.shape, rng)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    numbers = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    view = x.clone()
    for place in np.ndindex(*x.shape):
        if not keep[place]:
            view[place] = s.noise * numbers[place]
    return view


def test_masked_view_keeps_pixels_and_fills_with_noise():
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    before = x.clone()
    found = mscn_view(x, SETTINGS, rngs())
    assert torch.equal(found, naive_view(x, SETTINGS, rngs()[0])) and torch.equal(x, before)


@pytest.mark.parametrize("deviation", [0.18, 1.0])
def test_noise_is_normal_and_independent_over_pixels_channels_and_images(deviation: float):
    settings = MSCN(grid=2, ratio=(0.75, 0.75), focal_prob=0, spatial_prob=1, noise=deviation)
    x = torch.full((200, 3, 16, 16), 9.0)
    found = mscn_view(x, settings, rngs())
    gone = found != 9
    assert gone.double().mean().item() == 0.75
    numbers = found[gone].double() / deviation
    count = len(numbers)
    assert near(numbers.mean().item(), 0, 1, count) and near(numbers.pow(2).mean().item(), 1, math.sqrt(2), count)
    assert near((numbers.abs() < 1).double().mean().item(), 0.6827, 0.47, count)
    red, green = found[:, 0][gone[:, 0]] / deviation, found[:, 1][gone[:, 1]] / deviation
    assert near((red * green).mean().item(), 0, 1, len(red))
    both = gone[0] & gone[1]
    assert near((found[0][both] * found[1][both]).mean().item() / deviation**2, 0, 1, int(both.sum()))


def test_views_repeat_from_their_generators_and_no_two_share_masks_or_noise():
    x = torch.zeros(4, 3, 8, 8)
    first, again = (METHODS["mscn"](reference.recipe(), x, rngs(), x, x) for _ in range(2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert len({tuple(anchor.images.ravel().tolist()) for anchor in first}) == 3


def test_a_mix_group_is_masked_as_if_it_were_the_batch():
    x, crop = torch.randn(9, 3, 8, 8), torch.randn(9, 3, 5, 5)
    whole = mscn(x, [crop], SETTINGS, rngs(3))
    for g in range(3):
        rows = slice(3 * g, 3 * g + 3)
        for a, b in zip(whole, mscn(x[rows], [crop[rows]], SETTINGS, [rngs(3)[g]]), strict=True):
            assert torch.equal(a.images[rows], b.images)


# ---------------------------------------------------------------------------------------------------- the terms


def test_three_terms_of_weight_one_and_no_clean_one():
    x, crops = torch.randn(4, 3, 8, 8), [torch.randn(4, 3, 5, 5) for _ in range(2)]
    anchors = mscn(x, crops, SETTINGS, rngs())
    assert [a.name for a in anchors] == ["mscn", "mscn_crop1", "mscn_crop2"]
    assert [a.images.shape[-1] for a in anchors] == [8, 5, 5]
    assert all(a.weight == 1 and a.order is None and not a.clean for a in anchors)
    clean, *rest = mscn(x, crops, dataclasses.replace(SETTINGS, keep_clean=True, mean=True), rngs())
    assert clean.clean and clean.images is x and clean.weight == 1
    assert [a.weight for a in rest] == [1 / 3] * 3
    assert [a.name for a in mscn(x, [], SETTINGS, rngs())] == ["mscn"]


def moco_terms(moco: nn.Module, encoder: nn.Module, anchor: Tensor, x1: Tensor, x2: Tensor) -> list[Tensor]:
    """Eq. 5 of each row: its query against the key of x2; symmetric: and against the key of x1."""
    keys = moved(moco.key_encoder, encoder, moco.settings.momentum)
    with torch.no_grad():
        k1, k2 = unit(keys(x1)), unit(keys(x2))
    q, t = unit(encoder(anchor)), moco.settings.temperature
    loss = [info_nce(q[i], k2[i], moco.queue, t) for i in range(len(q))]
    if moco.settings.symmetric:
        loss = [term + info_nce(q[i], k1[i], moco.queue, t) for i, term in enumerate(loss)]
    return loss


@pytest.mark.parametrize(("n", "seed", "options"), [(4, 0, {}), (5, 1, {"mean": True}), (6, 2, {"crops": 0})])
@pytest.mark.parametrize("name", [*FRAMEWORKS, "moco in one direction"])
def test_loss_and_gradients_equal_the_loops(name: str, n: int, seed: int, options: dict):
    framework = small("moco", seed, symmetric=False) if name.startswith("moco in") else small(name, seed)
    other = copy.deepcopy(framework)
    settings = dataclasses.replace(SETTINGS, **options)
    (x1, x2), crops = views(n, seed), [views(n, seed + 10 + e, side=5)[0] for e in range(settings.crops)]

    anchors = mscn(x1, crops, settings, rngs(seed=seed))
    loss, parts, targets = objective(framework, x1, x2, anchors, torch.Generator().manual_seed(seed))
    (rng,) = rngs(seed=seed)
    expected = torch.zeros((), dtype=torch.float64)
    for x in (x1, *crops):
        masked = naive_view(x, settings, rng)
        terms = moco_terms(other, other.encoder, masked, x1, x2) if "moco" in name else PAIRS[name](other, masked, x2)
        expected = expected + sum(terms) / n / (1 + len(crops) if settings.mean else 1)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert list(parts) == ["mscn", "mscn_crop1", "mscn_crop2"][: 1 + len(crops)]
    assert framework.metrics(targets) == {}
    loss.backward()
    expected.backward()
    for (key, mine), theirs in zip(framework.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=key)


# -------------------------------------------------------------------------------------------------- extra crops


def ramps(n: int, side: int) -> Tensor:
    """Channel 0 holds each pixel's column, channel 1 its row, channel 2 the image's number. uint8 (n, 3, S, S)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.stack([x, y, torch.full_like(x, i)]) for i in range(n)]).to(torch.uint8)


def recipe_of(augment: Augment, crops: int) -> configs.Pretrain:
    base = reference.recipe(method="mscn", mscn__crops=crops, mscn__crop_size=24)
    return dataclasses.replace(base, augment=augment)


AUGMENT = Augment(("crop", "flip"), 40, (0.5, 1.0), flip_prob=0.5, mean=(0.0,) * 3, std=(1 / 255,) * 3)


def batches(dataset, crops: int, skip: int = 0, workers: int = 0, seed: int = 0) -> list[list[Tensor]]:
    augments = extra_crops(recipe_of(AUGMENT, crops))
    stream = train_batches(dataset, AUGMENT, 8, seed, 1, 2, CPU, workers, skip=skip, crops=augments)
    return [images for images, _ in stream]


@pytest.fixture(params=["in memory", "files"])
def dataset(request, tmp_path: Path) -> datasets.Resident | datasets.Files:
    images, labels = ramps(32, 96), torch.zeros(32, dtype=torch.long)
    if request.param == "in memory":
        return datasets.Resident(images, labels, ("a",), "ramps")
    paths = [str(tmp_path / f"{i}.png") for i in range(32)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return datasets.Files(paths, labels, ("a",), "ramps")


def test_extra_crops_show_5_to_20_percent_of_the_same_image(dataset):
    for x1, x2, *crops in batches(dataset, 2):
        assert [tuple(c.shape) for c in (x1, x2, *crops)] == [(8, 3, 40, 40)] * 2 + [(8, 3, 24, 24)] * 2
        assert all(torch.allclose(view[:, 2].mean((1, 2)), x2[:, 2].mean((1, 2)), atol=1e-3) for view in crops)
        for view, (low, high) in ((x1, (0.5, 1.0)), (crops[0], (0.05, 0.2)), (crops[1], (0.05, 0.2))):
            spans = (view.amax((2, 3)) - view.amin((2, 3)))[:, :2] + 1  # columns and rows of the box
            area = spans.prod(1) / 96**2
            assert (area > 0.85 * low).all() and (area < 1.1 * high).all()
        assert not torch.equal(*crops)


def test_the_two_views_do_not_depend_on_the_number_of_crops(dataset):
    for with_crops, without in zip(batches(dataset, 2), batches(dataset, 0), strict=True):
        assert len(without) == 2 and all(torch.equal(a, b) for a, b in zip(with_crops, without, strict=False))


def test_crops_do_not_depend_on_workers_or_on_where_a_run_resumes(dataset):
    whole = batches(dataset, 2)
    for skip, workers in ((0, 2), (2, 0), (3, 2)):
        for expected, found in zip(whole[skip:], batches(dataset, 2, skip, workers), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(whole[0][2], batches(dataset, 2, seed=1)[0][2])


def test_only_mscn_asks_for_extra_crops():
    for method in METHODS:
        found = extra_crops(reference.recipe(method=method))
        assert len(found) == (2 if method == "mscn" else 0)
    views_of, found = reference.recipe().augment, extra_crops(reference.recipe(method="mscn"))
    assert found[0] == dataclasses.replace(views_of, size=16, crop_scale=(0.05, 0.2))


# ------------------------------------------------------------------------------------------- recipes and training


@pytest.mark.parametrize("path", sorted((ROOT / "pretrain/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_hold_the_reconstruction_and_differ_in_grid_and_crop_alone(path: Path):
    recipe = configs.load(path)
    grid, crop = {224: (7, 96), 64: (8, 32), 32: (4, 16)}[recipe.augment.size]
    assert dataclasses.replace(recipe.mscn, focal_side=200 / 224) == MSCN(grid=grid, crop_size=crop)
    for extent in (recipe.augment.size, crop):
        assert round(recipe.mscn.focal_side * extent) == round(200 / 224 * extent)


SMALL_HEADS = {
    "moco": {"queue": 64},
    "barlow_twins": {"dim": 16, "hidden": 16},
    "vicreg": {"dim": 16, "hidden": 16},
}


def small_run(framework: str, *items: str) -> configs.Pretrain:
    values = {
        "method": "mscn",
        "dataset": "squares",
        "epochs": 2,
        "batch_size": 16,
        "mix_groups": 2,
        "backbone.arch": "resnet10",
        "backbone.stem": "tiny",
        "backbone.width": 4,
        "backbone.bn_groups": 2,
        "augment.size": 12,
        "mscn.crop_size": 8,
        "knn.k": 5,
        "knn.every": 0,
        "run.device": "cpu",
        "run.log_every": 1,
        **{f"{framework}.{key}": value for key, value in SMALL_HEADS.get(framework, {}).items()},
        **configs.parse_overrides(items),
    }
    return configs.load(ROOT / f"pretrain/configs/cifar100_{framework}.yaml", values)


def lines(directory: Path) -> list[dict]:
    read = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in read]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_training_stopped_and_resumed_equals_the_undisturbed_one(framework: str, tmp_path: Path, monkeypatch):
    config = small_run(framework)
    result = script.train(config, tmp_path / "whole")
    assert result["steps"] == 12 and math.isfinite(result["metrics"]["loss"])
    step = lines(tmp_path / "whole")[0]
    terms = {"loss_mscn", "loss_mscn_crop1", "loss_mscn_crop2"}
    assert {key for key in step if key.startswith("loss_")} == terms
    assert step["loss"] == pytest.approx(sum(step[key] for key in terms), rel=1e-5)

    inner, calls = script.objective, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "objective", stopping)
        script.train(config, tmp_path / "parts")
    script.train(config, tmp_path / "parts")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("items", "named"),
    [
        (["mscn.grid=9"], r"mscn\.grid: 9 cells do not fit into an image of 8x8"),
        (["mscn.grid=13", "mscn.crops=0"], r"mscn\.grid: 13 cells do not fit into an image of 12x12"),
        (["augment.order=[flip]"], r"mscn\.crops: augment\.order has no crop"),
        (["mscn.noise=-1"], r"mscn\.noise"),
        (["mscn.focal_prob=2"], r"mscn\.focal_prob"),
        (["mscn.crop=2"], r"mscn\.crop'; did you mean 'mscn\.crops'"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_written(items: list[str], named: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=named):
        script.train(small_run("moco", *items), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_extra_crops_are_augmented_as_the_first_view():
    recipe = configs.load(
        reference.ROOT / "pretrain/configs/cifar100_barlow_twins.yaml",
        {"method": "mscn", "augment.blur_prob": [1.0, 0.1], "augment.solarize_prob": [0.0, 0.2]},
    )
    assert recipe.mscn.crops and {(c.blur_prob, c.solarize_prob) for c in extra_crops(recipe)} == {(1.0, 0.0)}
