"""Recipes: YAML -> validated, frozen dataclasses; dotted overrides; a hash. Nothing here imports torch.

errors.py <- fields.py <- schema.py, values.py <- evaluations.py, recipe.py, cli.py
"""

from mixmask.config.cli import main_guard, run_options
from mixmask.config.errors import (
    ConfigError,
    UserError,
)
from mixmask.config.evaluations import GIVEN, Config, Convert, Detection, Finetune, KNNEval, Linear
from mixmask.config.fields import (
    build,
    check_fields,
    convert,
    flatten,
    nearest,
    within,
)
from mixmask.config.recipe import (
    apply_overrides,
    hash8,
    identity,
    load,
    resolve,
    to_dict,
)
from mixmask.config.schema import (
    KNN,
    MSCN,
    Augment,
    Backbone,
    Both,
    Erase,
    Execution,
    Mask,
    Optimizer,
    Permutation,
    Pretrain,
    Schedule,
    UnMix,
)
from mixmask.config.values import parse_overrides, read_yaml, recipe_file

__all__ = [
    "GIVEN",
    "KNN",
    "MSCN",
    "Augment",
    "Backbone",
    "Both",
    "Config",
    "ConfigError",
    "Convert",
    "Detection",
    "Erase",
    "Execution",
    "Finetune",
    "KNNEval",
    "Linear",
    "Mask",
    "Optimizer",
    "Permutation",
    "Pretrain",
    "Schedule",
    "UnMix",
    "UserError",
    "apply_overrides",
    "build",
    "check_fields",
    "convert",
    "flatten",
    "hash8",
    "identity",
    "load",
    "main_guard",
    "nearest",
    "parse_overrides",
    "read_yaml",
    "recipe_file",
    "resolve",
    "run_options",
    "to_dict",
    "within",
]
