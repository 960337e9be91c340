"""Frameworks: how an image is embedded, and what its embedding is scored against.

A framework is a module with an `encoder` (backbone and head) and

    targets(x1, x2, generator)             what the images are scored against, once per iteration
    embed(batches, targets)                what the gradient flows through: of each batch a tuple of (N, ...)
    score(embedding, targets, clean)       one loss per row, (N,)
    after_step(targets, step, steps)       after the optimiser's step: queue, target network
    fixed_lr_parameters()                        parameters whose learning rate no schedule changes
    metrics(targets)                       scalars worth a line in the log
    check_data(images)                     refuses settings that the data set cannot bear

Adding one is a file here and a line below.
"""

from __future__ import annotations

from torch import nn

from mixmask.backbones import build_backbone
from mixmask.config import ConfigError, Pretrain, build, nearest
from mixmask.frameworks.byol import BYOL
from mixmask.frameworks.moco import MoCo
from mixmask.frameworks.simclr import SimCLR
from mixmask.frameworks.simsiam import SimSiam

FRAMEWORKS: dict[str, type[nn.Module]] = {
    "moco": MoCo,
    "simclr": SimCLR,
    "byol": BYOL,
    "simsiam": SimSiam,
}


def build_framework(recipe: Pretrain) -> nn.Module:
    """The framework of a recipe, with fresh weights. Raises ConfigError for a name or a setting that is not known."""
    if recipe.framework not in FRAMEWORKS:
        raise ConfigError(f"framework: unknown '{recipe.framework}'{nearest(recipe.framework, FRAMEWORKS)}")
    framework = FRAMEWORKS[recipe.framework]
    settings = build(framework.Settings, recipe.settings, where=recipe.framework)
    return framework(build_backbone(recipe.backbone), settings)
