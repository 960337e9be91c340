"""The backbone of one of our own pre-training checkpoints: the recipe says what every key must be."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixmask import checkpoint
from mixmask.formats.architectures import check_shapes, own
from mixmask.formats.source import FormatError, Source, some
from mixmask.formats.state_dicts import flat
from mixmask.frameworks import build_framework

SIGNS = {  # keys of a config -> the stage it is of, for checkpoints that do not record their `stage`
    "framework": "pretrain",
    "detectron2": "detection",
    "backbone_lr": "finetune",
    "test_resize": "linear",
}


def ours(state: dict[str, Any], path: Path) -> Source:
    """A pre-training checkpoint: the recipe says what every key must be."""
    if state["format"] != checkpoint.FORMAT:
        raise FormatError(f"{path} is of format {state['format']!r}; this version reads {checkpoint.FORMAT}")
    stage = state.get("stage") or next((stage for key, stage in SIGNS.items() if key in state["config"]), "pretrain")
    if stage != "pretrain":
        raise FormatError(f"{path} is not a pre-training checkpoint: it is a checkpoint of a {stage} run")
    recipe, identity = checkpoint.pretraining(state, path)
    prefix, model = "encoder.backbone.", flat(state["model"], path)
    with torch.device("meta"):
        expected = build_framework(recipe).state_dict().keys()
    for what, keys in (("lacks", expected - model.keys()), ("has unlisted", model.keys() - expected)):
        if keys:
            raise FormatError(f"{path} is not whole: it {what} {some(keys)} for a run of {recipe.framework}")
    weights = {k.removeprefix(prefix): own(v) for k, v in model.items() if k.startswith(prefix)}
    dropped = Counter(re.match(r"(encoder\.)?[^.]+", k)[0] for k in model if not k.startswith(prefix))
    backbone = replace(recipe.backbone, bn_groups=1)
    check_shapes(weights, backbone, path)
    return Source(
        "mixmask", weights, backbone, dict(dropped), recipe.augment.mean, recipe.augment.std, identity, "", recipe
    )
