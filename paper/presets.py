"""A cell under a preset and the user's --set -> the stages to run, each as a validated config. No torch here.

The order in which values are laid over a recipe: the cell's overrides, the preset's, the user's.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask import config as configs
from mixmask.config import ConfigError, build, flatten, nearest, read_yaml
from mixmask.metrics import pretraining_metric
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
    epochs: Mapping[str, Epochs]  # by recipe
    seeds: int = configs.within(1)
    values: Mapping[str, Mapping[str, Any]]  # by stage/recipe
    cluster: Mapping[str, Any]

    def shortened(self, recipe: str, epochs: int) -> int:
        """Pre-training epochs of `recipe` in place of the paper's `epochs`."""
        return next(rule for pattern, rule in self.epochs.items() if fnmatch.fnmatchcase(recipe, pattern))(epochs)

    def over(self, stage: str, recipe: str) -> dict[str, Any]:
        """What the preset lays over `recipe`: the values of every pattern that fits, the later over the earlier."""
        fitting = (v for pattern, v in self.values.items() if fnmatch.fnmatchcase(f"{stage}/{recipe}", pattern))
        return {key: value for values in fitting for key, value in values.items()}


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
        if chosen == []:
            raise ConfigError("--set seed=[]: expected at least one seed")
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
    return {name: _preset(name, values) for name, values in read_yaml(ROOT / "paper" / "presets.yaml").items()}


def _preset(name: str, values: Mapping[str, Any]) -> Preset:
    where = f"preset {name}"
    epochs = {pattern: build(Epochs, rule, f"{where}: epochs: {pattern}") for pattern, rule in values["epochs"].items()}
    return build(Preset, {**values, "name": name, "epochs": epochs}, where)


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
    """The pre-training of `cell`, and the evaluation that gives its metric. Raises ConfigError for a wrong key.

    Nothing for a method that is not implemented; the pre-training alone where the evaluation's stage is not built.
    """
    if not cell.recipe:
        return ()
    pretraining = _pretraining(cell, seed, budget)
    if not cell.evaluation or not_built(cell):
        return (pretraining,)
    stage, _, name = cell.evaluation.partition("/")
    overrides = {**budget.preset.over(stage, name), **budget.settings.get(stage, {}), "seed": seed}
    evaluation = _step(stage, name, overrides)
    config = dataclasses.replace(evaluation.config, checkpoint=run_id(pretraining.config))
    return pretraining, dataclasses.replace(evaluation, config=config)


def not_built(cell: Cell) -> str:
    """The stage that would give the metric of `cell`, where there is no such stage yet; else nothing."""
    stage = cell.evaluation.partition("/")[0]
    return "" if stage in ("", *STAGES) else stage


def metric(cell: Cell, chain: tuple[Step, ...]) -> str:
    """The full name under which the last of `chain` reports the number of `cell`.

    The cell names the paper budget's; a k-NN accuracy is named after its protocol, which a preset may change.
    """
    last = chain[-1].config
    return f"{pretraining_metric(last)}_last" if isinstance(last, configs.Pretrain) else cell.metric


def _pretraining(cell: Cell, seed: int, budget: Budget) -> Step:
    values, preset = _recipe("pretrain", cell.recipe), budget.preset
    epochs = preset.shortened(cell.recipe, cell.overrides.get("epochs", values["epochs"]))
    overrides = {**cell.overrides, "epochs": epochs, **preset.over("pretrain", cell.recipe)}
    notes = _clamp_grid(values, overrides)
    return _step("pretrain", cell.recipe, {**overrides, **budget.settings.get("pretrain", {}), "seed": seed}, notes)


def _clamp_grid(values: Mapping[str, Any], overrides: dict[str, Any]) -> tuple[str, ...]:
    """A small image has no room for the paper's finest grids: one cell a pixel, and a note."""
    flat = {**flatten(values), **overrides}
    grid, size = flat["mask.grid"], flat["augment.size"]
    if grid <= size:
        return ()
    overrides["mask.grid"] = size
    return (f"mask grid {grid} is finer than the {size}-pixel image: {size} is used",)


def _step(stage: str, name: str, overrides: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Step:
    values, path = _recipe(stage, name), _path(stage, name)
    flat = flatten(values)
    differing = {key: value for key, value in overrides.items() if key not in flat or flat[key] != value}
    try:
        config = configs.resolve(values, differing, STAGES[stage].config)
    except ConfigError as error:
        raise ConfigError(f"{stage}: {error} (recipe {path})") from None
    return Step(stage, path, differing, config, notes)


def _path(stage: str, name: str) -> str:
    return f"{STAGES[stage].recipes}/{name}.yaml"


@functools.cache
def _recipe(stage: str, name: str) -> dict[str, Any]:
    return read_yaml(ROOT / _path(stage, name))


def directory(runs_dir: str | Path, step: Step) -> Path:
    """Where the run lives: equal configs share it."""
    return Path(runs_dir) / step.stage / run_id(step.config)
