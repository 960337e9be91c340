"""Frameworks by name. What one is: base.py. Adding one is a file here and a line in mixmask/registry.py."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mixmask import registry
from mixmask.backbones import build_backbone
from mixmask.config import Pretrain, build
from mixmask.frameworks.base import Framework

FRAMEWORKS: dict[str, type[Framework]] = {name: registry.load(spec.code) for name, spec in registry.FRAMEWORKS.items()}


def build_framework(recipe: Pretrain, begin: Callable[[nn.Module], None] = lambda _: None) -> Framework:
    """The framework of a recipe, with fresh weights; `begin` may give its backbone others, before copies of it are
    made. Raises ConfigError for a name or a setting that is not known."""
    framework = registry.find(FRAMEWORKS, recipe.framework, "framework")
    settings = build(framework.Settings, recipe.settings, where=recipe.framework)
    backbone = build_backbone(recipe.backbone)
    begin(backbone)
    return framework(backbone, settings)
