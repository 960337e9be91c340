"""A cell under a preset and the user's --set -> the stages to run, each as a validated config. No torch here.

The order in which values are laid over a recipe: the cell's overrides, the preset's, the user's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask import config as configs
from mixmask.config import ConfigError, build, flatten, nearest, read_yaml
from mixmask.runs import run_id
from paper.cells import ROOT, Cell

# Where a run's number cannot change: overriding these leaves a paper-budget run one.
NEUTRAL = ("run.", "linear.run.", "cluster.", "knn.every")


@dataclass(frozen=True)
class Stage:
    """A stage: the script that runs it, the folder of its recipes, the class of its configs."""

    script: str
    recipes: str
    config: type


STAGES = {
    "pretrain": Stage("pretrain/train.py", "pretrain/configs", configs.Pretrain),
    "linear": Stage("eval/linear.py", "eval/configs", configs.Linear),
}


@dataclass(frozen=True)
class Epochs:
    """Pre-training epochs of the paper's budget -> the preset's."""

    divided_by: int = configs.within(1)
    at_least: int = configs.within(1)

    def __call__(self, epochs: int) -> int:
        return max(self.at_least, round(epochs / self.divided_by))


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Values laid over every recipe of a launch (paper/presets.yaml)."""

    name: str
    about: str
    epochs: Epochs
    seeds: int = configs.within(1)
    pretrain: Mapping[str, Any]
    frameworks: Mapping[str, Mapping[str, Any]]
    linear: Mapping[str, Any]
    cluster: Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """A preset and what the user set on top of it, by stage; `cluster` counts as one."""

    preset: Preset
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The preset's name and every --set that can change a number: printed beside each number."""
        changed = [
            f"{key}={value}"
            for key, value in _prefixed(self.settings)
            if not key.startswith(NEUTRAL) and key not in ("seed", "pretrain.seed")
        ]
        return ", ".join([self.preset.name, *changed])

    @property
    def replicates(self) -> bool:
        """Whether its numbers may be compared with the published ones."""
        return self.label == "paper"

    def seeds(self, cell: Cell) -> list[int]:
        """`--set seed=3` and `--set seed=[0,1,2]` choose; otherwise the cell's, within the preset's number."""
        chosen = self.settings.get("pretrain", {}).get("seed", list(range(min(cell.seeds, self.preset.seeds))))
        return chosen if isinstance(chosen, list) else [chosen]


@dataclass(frozen=True)
class Step:
    """One run that a cell needs: the resolved config, and how to say it on a command line."""

    stage: str
    recipe: str  # path, relative to the repository
    overrides: Mapping[str, Any]  # where the config differs from the recipe
    config: configs.Pretrain | configs.Linear
    notes: tuple[str, ...] = ()


@functools.cache
def presets() -> dict[str, Preset]:
    values = read_yaml(ROOT / "paper" / "presets.yaml")
    return {name: build(Preset, {"name": name, **section}, f"preset {name}") for name, section in values.items()}


def budget(preset: str, settings: Iterable[str] = ()) -> Budget:
    """`budget("smoke", ["epochs=3", "linear.epochs=5", "cluster.partition=gpu"])`. Raises ConfigError."""
    if preset not in presets():
        raise ConfigError(f"unknown preset '{preset}'{nearest(preset, presets())}")
    by_stage: dict[str, dict[str, Any]] = {}
    for key, value in configs.parse_overrides(settings).items():
        stage, _, rest = key.partition(".")
        if stage not in (*STAGES, "cluster") or not rest:
            stage, rest = "pretrain", key
        if stage != "pretrain" and rest in ("seed", "checkpoint"):
            raise ConfigError(f"--set {key}: an evaluation takes it from its pre-training; set the pre-training's seed")
        by_stage.setdefault(stage, {})[rest] = value
    return Budget(presets()[preset], by_stage)


def _prefixed(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    return [
        (key if stage == "pretrain" else f"{stage}.{key}", value)
        for stage, keys in settings.items()
        for key, value in keys.items()
    ]


def steps(cell: Cell, seed: int, budget: Budget) -> tuple[Step, ...]:
    """The pre-training of `cell`, and the evaluation that gives its metric. Raises ConfigError for a wrong key."""
    pretraining = _pretraining(cell, seed, budget)
    if not cell.evaluation:
        return (pretraining,)
    stage, _, name = cell.evaluation.partition("/")
    recipe = f"{STAGES[stage].recipes}/{name}.yaml"
    overrides = {**getattr(budget.preset, stage), **budget.settings.get(stage, {}), "seed": seed}
    evaluation = _step(stage, recipe, overrides)
    config = dataclasses.replace(evaluation.config, checkpoint=run_id(pretraining.config))
    return pretraining, dataclasses.replace(evaluation, config=config)


def _pretraining(cell: Cell, seed: int, budget: Budget) -> Step:
    recipe, preset = f"pretrain/configs/{cell.recipe}.yaml", budget.preset
    values = _recipe(recipe)
    of_framework = preset.frameworks.get(values["framework"], {})
    overrides = {
        **cell.overrides,
        "epochs": preset.epochs(cell.overrides.get("epochs", values["epochs"])),
        **preset.pretrain,
        **{f"{values['framework']}.{key}": value for key, value in of_framework.items()},
    }
    notes = _clamp_grid(values, overrides)
    return _step("pretrain", recipe, {**overrides, **budget.settings.get("pretrain", {}), "seed": seed}, notes)


def _clamp_grid(values: Mapping[str, Any], overrides: dict[str, Any]) -> tuple[str, ...]:
    """A small image has no room for the paper's finest grids: one cell a pixel, and a note."""
    flat = {**flatten(values), **overrides}
    grid, size = flat["mask.grid"], flat["augment.size"]
    if grid <= size:
        return ()
    overrides["mask.grid"] = size
    return (f"mask grid {grid} is finer than the {size}-pixel image: {size} is used",)


def _step(stage: str, recipe: str, overrides: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Step:
    values = _recipe(recipe)
    flat = flatten(values)
    differing = {key: value for key, value in overrides.items() if key not in flat or flat[key] != value}
    try:
        config = configs.resolve(values, differing, STAGES[stage].config)
    except ConfigError as error:
        raise ConfigError(f"{stage}: {error} (recipe {recipe})") from None
    return Step(stage, recipe, differing, config, notes)


@functools.cache
def _recipe(path: str) -> dict[str, Any]:
    return read_yaml(ROOT / path)


def directory(runs_dir: str | Path, step: Step) -> Path:
    """Where the run lives: equal configs share it."""
    return Path(runs_dir) / step.stage / run_id(step.config)
