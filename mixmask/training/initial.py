"""The initial backbone weights of a pre-training (`run.init`), which are part of its identity."""

from __future__ import annotations

import dataclasses

from torch import nn

from mixmask import checkpoint, formats
from mixmask.config import ConfigError, Pretrain
from mixmask.training.progress import say


def load_initial(config: Pretrain, backbone: nn.Module) -> None:
    """Give the backbone the weights of `run.init`, where it is set. Raises UserError for others than the run's."""
    if not (config.run.init or config.init):
        return
    if not config.run.init:
        raise ConfigError("init: the run starts from weights that are not given; expected run.init=FILE")
    source = _read(config)
    if checkpoint.digest(source.weights)[:16] != config.init:
        raise ConfigError(f"run.init: {config.run.init} holds other weights than those that the run began with")
    checkpoint.load_weights(backbone, source.weights, config.run.init)


def settle_initial(config: Pretrain) -> Pretrain:
    """The config with the digest of the weights of `run.init`. Raises UserError where they cannot be read, or do not
    fit."""
    if not config.run.init:
        return config
    source = _read(config)
    say(f"note: the backbone begins with the weights of {source.identity}")
    return dataclasses.replace(config, init=checkpoint.digest(source.weights)[:16])


def _read(config: Pretrain) -> formats.Source:
    try:
        return formats.read_for(config.run.init, config.backbone)
    except checkpoint.CheckpointError as error:
        hint = "; an option of detection/convert.py, which writes what run.init takes" if " --" in str(error) else ""
        raise ConfigError(f"run.init: {error}{hint}") from None
