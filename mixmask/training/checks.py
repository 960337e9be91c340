"""Refuses pre-training settings that conflict, or that do not fit the data, the network or the machine."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixmask import networks, registry
from mixmask.batchnorm import SplitBatchNorm2d
from mixmask.config import ConfigError, Pretrain
from mixmask.config.resnets import ARCHITECTURES
from mixmask.datasets.views import check_augment
from mixmask.frameworks.base import Framework
from mixmask.masks import check_grid, sample_mask
from mixmask.methods import extra_crops
from mixmask.randomness import numpy_generator
from mixmask.training import distributed


def check(config: Pretrain) -> None:
    """Raises ConfigError for settings that cannot work together, before anything is read or written."""
    method = registry.find(registry.METHODS, config.method, "method")
    for key, groups in (("backbone.bn_groups", config.backbone.bn_groups), ("mix_groups", config.mix_groups)):
        if config.batch_size % groups:
            raise ConfigError(f"{key}: {groups} groups do not divide a batch of {config.batch_size} images")
    if config.batch_size == config.backbone.bn_groups:
        raise ConfigError("backbone.bn_groups: BatchNorm needs at least two images in a group")
    for key, values in (("augment.mean", config.augment.mean), ("augment.std", config.augment.std)):
        if len(values) != 3:
            raise ConfigError(f"{key}: expected three numbers, one per channel, found {list(values)}")
    if not config.augment.size:
        raise ConfigError("augment.size: expected at least 1, found 0")
    if method.masks:
        sample_mask(config.mask, config.augment.size, config.augment.size, numpy_generator("check"))
    if method.mixes and config.batch_size == config.mix_groups:
        raise ConfigError("mix_groups: a mixture needs at least two images in a group")
    check_crops(config)


def check_crops(config: Pretrain) -> None:
    """Raises ConfigError for extra crops that the augmentation does not cut, or that are too small for their masks."""
    for augment in [config.augment, *extra_crops(config)] if registry.METHODS[config.method].crops else []:
        check_grid("mscn.grid", config.mscn.grid, augment.size, augment.size)
        if config.mscn.focal_prob and round(config.mscn.focal_side * augment.size) < 1:
            where = f"a window of {config.mscn.focal_side:g} of {augment.size} pixels"
            raise ConfigError(f"mscn.focal_side: {where} shows nothing; expected at least one pixel")
    if extra_crops(config) and "crop" not in config.augment.order:
        raise ConfigError("mscn.crops: augment.order has no crop, which would cut them; expected mscn.crops=0")


def check_data(config: Pretrain, framework: nn.Module, train_set: Any) -> None:
    """Raises ConfigError for settings that do not fit this training set."""
    images = len(train_set)
    framework.check_data(images)
    check_augment(train_set, config.augment)
    if config.batch_size > images:
        raise ConfigError(f"batch_size: {config.batch_size} exceeds the {images} training images")
    if config.knn.k > images:
        raise ConfigError(f"knn.k: {config.knn.k} neighbours, but there are only {images} training images")


def check_backbone(config: Pretrain, framework: nn.Module) -> None:
    """Raises ConfigError for a third-party backbone that does not take the views, or that processes cannot share."""
    backbone, groups = framework.encoder.backbone, config.backbone.bn_groups
    if config.backbone.arch in ARCHITECTURES:
        return
    networks.check_groups(backbone, groups, "backbone.bn_groups", config.backbone.arch)
    if distributed.size() > 1 and (norms := networks.whole_batch_norms(backbone)):
        raise ConfigError(f"{distributed.size()} processes cannot share a BatchNorm of the whole batch ({norms[0]})")
    for augment in (config.augment, *extra_crops(config), *framework.crops(config.augment)):
        networks.feature_width(backbone, augment.size)


def check_parts(config: Pretrain, framework: nn.Module) -> None:
    """Raises ConfigError for gradient accumulation that would not equal the whole step."""
    parts, rows = config.run.accumulate, config.batch_size // distributed.size()
    if parts == 1:
        return
    if type(framework).part is Framework.part:
        reason = f"the head or the loss of {config.framework} takes the whole batch at once"
        raise ConfigError(f"run.accumulate: {reason}; expected 1, found {parts}")
    if extra_crops(config):
        raise ConfigError(f"run.accumulate: {config.method}'s crops are other images; expected 1, found {parts}")
    if whole := networks.whole_batch_norms(framework.encoder):
        raise ConfigError(f"run.accumulate: {whole[0]}, takes the whole batch; expected 1, found {parts}")
    norms = any(isinstance(module, SplitBatchNorm2d) for module in framework.encoder.modules())
    groups = config.backbone.bn_groups // distributed.size() if norms else rows
    if not groups or groups % parts or rows % parts:
        of = "whole BatchNorm groups (backbone.bn_groups)" if norms else "equally many images"
        has = f"of which {'a process' if distributed.size() > 1 else 'the batch'} has {groups}"
        raise ConfigError(f"run.accumulate: {parts} parts cannot hold {of}, {has}; expected a divisor of it")
