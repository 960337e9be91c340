"""What a config leaves to the data: which images they are, and for your own images the numbers that must fit them.

Both are part of a run's identity, and settled from the names of the files before the run is opened. A published data
set that is verified decides all of this itself, and is not looked at here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mixmask import registry
from mixmask.config import ConfigError, Finetune, KNNEval, Linear, Pretrain
from mixmask.datasets import Listing, list_split, subset
from mixmask.training.progress import say

STEPS = 4  # in an epoch, at least: what does not fill a batch is left out of it

Stage = Pretrain | KNNEval | Linear | Finetune


def settle(config: Stage) -> Stage:
    """The config with the identity of its images and, for `folder`, numbers that fit them; prints each change.

    Raises DataError for images that cannot be listed, and ConfigError where nothing fits.
    """
    listings = _listings(config)
    if config.data != (data := _identity(config, *listings)):
        config = dataclasses.replace(config, data=data)
    if config.dataset != "folder":
        return config
    train, test = listings
    if not isinstance(config, Pretrain):
        check_labels(train, test, config.run.data_root)
    config, changes = fit(config, train)
    for change in changes:
        say(f"note: {change}")
    return config


def identity(config: Stage) -> str:
    """The identity of the config's images, as in `data` of a settled one: "" if published. Raises DataError."""
    return _identity(config, *_listings(config))


def _listings(config: Stage) -> tuple[Listing, ...]:
    """Of both splits, where they can be other images than the published ones; else nothing."""
    spec = registry.DATASETS.get(config.dataset)  # of an unknown one `load` says what is known
    if spec is None or not spec.files or not (config.dataset == "folder" or config.allow_partial_data):
        return ()
    return tuple(list_split(config, split) for split in ("train", "test"))


def _identity(config: Stage, *listings: Listing) -> str:
    if not (config.dataset == "folder" or any(listing.note for listing in listings)):
        return ""
    train, test = listings
    return f"train: {train.identity()}; test: {test.identity()}"


def check_labels(train: Listing, test: Listing, root: str) -> None:
    """Raises ConfigError for unlabelled images, and if none are left for testing."""
    if not train.classes:
        raise ConfigError(f"dataset: the images in {root} have no labels; expected folders, one a class")
    if not len(test):
        raise ConfigError(f"folder.held_out: no image of {root} is left for testing; expected a larger share")


def fit(config: Stage, train: Listing) -> tuple[Stage, list[str]]:
    """`config` with batch, queue and k that fit so many images; what was changed. Raises ConfigError for too few."""
    images, fitted = len(train), {}
    if isinstance(config, Finetune):
        images = len(subset(train.labels, config.labels / 100, config.subset_seed))
    if not isinstance(config, KNNEval):
        fitted["batch_size"] = fitting_batch(config, images)
    if isinstance(config, Pretrain) and "queue" in config.settings:
        batch = fitted["batch_size"]
        longest = images // batch * batch
        fitted["settings"] = {**config.settings, "queue": min(config.settings["queue"] // batch * batch, longest)}
    if isinstance(config, Pretrain | KNNEval):
        k = min(config.knn.k, max(1, images // max(1, len(train.classes))))  # no more than a class has
        fitted["knn"] = dataclasses.replace(config.knn, k=k)
    new = dataclasses.replace(config, **fitted)
    before, after = (_shown(c) for c in (config, new))
    changed = [key for key in before if before[key] != after[key]]
    return new, [f"{key}: {before[key]} becomes {after[key]}, which fits {images:,} training images" for key in changed]


def fitting_batch(config: Pretrain | Linear | Finetune, images: int) -> int:
    """The config's batch, or the largest that its groups and STEPS allow. Raises ConfigError where there is none."""
    groups = {
        Pretrain: lambda: math.lcm(config.backbone.bn_groups, config.mix_groups),
        Finetune: lambda: config.bn_groups,
        Linear: lambda: 1,
    }[type(config)]()
    if config.batch_size * STEPS <= images:
        return config.batch_size
    least, parts = 2 * groups, images // STEPS // groups
    if parts < 2:
        raise ConfigError(f"dataset: {images:,} images are too few; expected at least {least * STEPS}")
    return min(config.batch_size, groups * 2 ** int(math.log2(parts)))


def _shown(config: Stage) -> dict[str, Any]:
    """The numbers that are fitted, by their keys."""
    shown = {"batch_size": getattr(config, "batch_size", None)}
    if isinstance(config, Pretrain):
        shown[f"{config.framework}.queue"] = config.settings.get("queue")
    if isinstance(config, Pretrain | KNNEval):
        shown["knn.k"] = config.knn.k
    return shown


def of_evaluations(run: Mapping[str, Any]) -> dict[str, Any]:
    """A pre-training's `run` without the keys that only a pre-training takes."""
    return {key: value for key, value in run.items() if key not in ("init", "accumulate", "keep_every")}


def inherit(recipe: Mapping[str, Any], pretraining: Mapping[str, Any]) -> dict[str, Any]:
    """A probe's recipe; the images, their place and size come from the pre-training's unless the probe sets them."""
    values = {"dataset": pretraining["dataset"], **recipe}
    if values["dataset"] == pretraining["dataset"]:
        values = {key: pretraining[key] for key in ("allow_partial_data", "folder") if key in pretraining} | values
    run, augment, where = recipe.get("run"), recipe.get("augment"), of_evaluations(pretraining["run"])
    values["run"] = {**where, **run} if isinstance(run, Mapping) else run or where
    if isinstance(augment, Mapping):
        values["augment"] = {**augment, "size": augment.get("size") or pretraining["augment"]["size"]}
    return values
