"""A cell under a preset and the user's --set -> the stages to run, each as a validated config. No torch here.

The order in which values are laid over a recipe: the cell's overrides, the preset's, the user's. A cell's stages are a
chain, each reading what the one before has made: pretrain -> linear, pretrain -> finetune, pretrain -> convert ->
detection. A public checkpoint (paper/checkpoints.yaml) takes the pre-training's place where the user names its file.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmask import config as configs
from mixmask.config import ConfigError, build, flatten, nearest, read_yaml
from mixmask.metrics import pretraining_metric
from mixmask.runs import file_identity, run_id
from mixmask.stages import STAGES
from paper.cells import ROOT, Cell
from paper.checkpoints import public_checkpoints

CONVERT = {"recipe": "convert", "target": "detectron2"}  # the config of the stage without recipes

# Where a run's number cannot change: overriding these leaves a paper-budget run one.
NEUTRAL = ("run.", *(f"{stage}.run." for stage in STAGES), "cluster.", "checkpoints.", "knn.every")


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

    def shortened(self, target: str, recipe: str, epochs: int) -> int:
        """Pre-training epochs of `recipe` in place of the paper's `epochs`."""
        return next(rule for pattern, rule in self.epochs.items() if _fits(pattern, target, recipe))(epochs)

    def over(self, target: str, stage: str, recipe: str) -> dict[str, Any]:
        """What the preset lays over `recipe`: the values of every pattern that fits, the later over the earlier."""
        fitting = (v for pattern, v in self.values.items() if _fits(pattern, target, f"{stage}/{recipe}"))
        return {key: value for values in fitting for key, value in values.items()}


def _fits(pattern: str, target: str, name: str) -> bool:
    """Whether `name` fits the pattern, which may begin with the only tables and figures that it is for: `table6:`."""
    targets, colon, rest = pattern.rpartition(":")
    return fnmatch.fnmatchcase(name, rest) and (not colon or fnmatch.fnmatchcase(target, targets))


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
        seeds = chosen if isinstance(chosen, list) else [chosen]
        for seed in seeds:
            if type(seed) is not int:
                raise ConfigError(f"--set seed: expected a whole number, or a list of them, found {seed!r}")
        return seeds


@dataclass(frozen=True)
class Step:
    """One run that a cell needs: the resolved config, and how to say it on a command line."""

    stage: str
    recipe: str  # path, relative to the repository; empty: the stage has none
    overrides: Mapping[str, Any]  # where the config differs from the recipe
    config: configs.Config
    notes: tuple[str, ...] = ()
    source: str = ""  # the public checkpoint that it reads, where no run comes before it

    @functools.cached_property
    def id(self) -> str:
        """Of its run."""
        return run_id(self.config)


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
        if key == "checkpoints":
            known = ", ".join(f"checkpoints.{name}" for name in public_checkpoints())
            raise ConfigError(f"--set checkpoints: which one? {known}")
        if stage not in (*STAGES, "cluster", "checkpoints") or not rest:
            stage, rest = "pretrain", key
        if rest.startswith("cluster.") and stage in STAGES:  # what the jobs of one stage ask for
            stage, rest = "cluster", f"{stage}.{rest.removeprefix('cluster.')}"
        if stage != "pretrain" and rest in ("seed", "checkpoint"):
            raise ConfigError(
                f"--set {key}: an evaluation takes it from its pre-training; set the pre-training's seed "
                "(repeated evaluations, as VOC's five, count on from it)"
            )
        if stage == "checkpoints":
            value = _existing(rest, value)
        by_stage.setdefault(stage, {})[rest] = value
    return Budget(presets()[preset], by_stage)


def _existing(name: str, path: Any) -> str:
    """The file of the public checkpoint `name`. Raises ConfigError for an unknown name, and where there is no file."""
    if name not in public_checkpoints():
        raise ConfigError(f"--set checkpoints.{name}: unknown{nearest(name, public_checkpoints())}")
    if not isinstance(path, str) or not Path(path).is_file():
        reason = "a folder" if isinstance(path, str) and Path(path).is_dir() else "no such file"
        raise ConfigError(f"--set checkpoints.{name}: {reason}: {path or ''} ({public_checkpoints()[name].hint})")
    return str(Path(path).resolve())


def _prefixed(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    return [
        (key if stage == "pretrain" else f"{stage}.{key}", value)
        for stage, keys in settings.items()
        for key, value in keys.items()
    ]


def chains(cell: Cell, budget: Budget) -> list[tuple[Step, ...]]:
    """The chains of runs that measure `cell`, one a value: of each pre-training seed, each repeat of the last stage."""
    repeats = min(cell.repeats, budget.preset.seeds)
    wanted = ((seed, seed * repeats + repeat) for seed in budget.seeds(cell) for repeat in range(repeats))
    return [chain for seed, last in wanted if (chain := steps(cell, seed, budget, last))]


def steps(cell: Cell, seed: int, budget: Budget, last_seed: int | None = None) -> tuple[Step, ...]:
    """One chain: the pre-training of `cell`, and what leads from it to the metric. Raises ConfigError for a wrong key.

    last_seed: of the evaluation, where it is not the pre-training's. Nothing where there is neither a recipe nor a
    public checkpoint at hand.
    """
    source = public_file(cell, budget)
    if source is None and not cell.recipe:
        return ()
    pretraining = _pretraining(cell, seed, budget) if source is None else None
    whose = pretraining.id if pretraining else file_identity(source)
    last_seed = seed if last_seed is None else last_seed
    chain = [
        _evaluation(cell, stage, name, last_seed if name else seed, whose, budget) for stage, name in _evaluations(cell)
    ]
    if pretraining:
        return pretraining, *chain
    return dataclasses.replace(chain[0], source=str(source)), *chain[1:]


def public_file(cell: Cell, budget: Budget) -> Path | None:
    """The public checkpoint that takes the place of the pre-training of `cell`, where the user has named its file."""
    path = budget.settings.get("checkpoints", {}).get(cell.checkpoint)
    return None if path is None else Path(path)


def missing_file(cell: Cell, budget: Budget) -> str:
    """What keeps `cell` from being measured: it has no recipe, and its public checkpoint has not been named."""
    if cell.recipe or public_file(cell, budget):
        return ""
    if not cell.checkpoint:
        return "this method is not implemented here, its published value is all there is"
    return f"no pre-training of ours; --set checkpoints.{cell.checkpoint}=PATH measures the public checkpoint: " + (
        public_checkpoints()[cell.checkpoint].hint
    )


def offer(cell: Cell, budget: Budget) -> str:
    """The public checkpoint of which `cell` could be measured in place of our pre-training, where there is one."""
    if not cell.recipe or not cell.checkpoint or public_file(cell, budget):
        return ""
    hint = public_checkpoints()[cell.checkpoint].hint
    return f"--set checkpoints.{cell.checkpoint}=PATH measures the public checkpoint in place of ours: {hint}"


def label(cell: Cell, budget: Budget) -> str:
    """What stands beside our number: the budget's label, with the cell's own scale in place of the published one."""
    at_its_scale = cell.scale and budget.preset.name == "paper"
    return cell.scale + budget.label.removeprefix("paper") if at_its_scale else budget.label


def remark(cell: Cell, budget: Budget) -> str:
    """What a reader of our number must know that is not true of the cell under every budget."""
    return public_checkpoints()[cell.checkpoint].note if public_file(cell, budget) else ""


def _evaluations(cell: Cell) -> list[tuple[str, str]]:
    """(stage, recipe) of all that comes after the pre-training; a stage in between has no recipe."""
    stage, _, name = cell.evaluation.partition("/")
    evaluations: list[tuple[str, str]] = []
    while stage and stage != "pretrain":
        if stage not in STAGES:
            raise ConfigError(f"{cell.id}: evaluation: unknown stage '{stage}'{nearest(stage, STAGES)}")
        evaluations.insert(0, (stage, "" if evaluations else name))
        stage = STAGES[stage].after
    return evaluations


def _evaluation(cell: Cell, stage: str, name: str, seed: int, whose: str, budget: Budget) -> Step:
    if not name:
        return Step(stage, "", {}, build(STAGES[stage].config, {**CONVERT, "seed": seed, "checkpoint": whose}))
    overrides = {**budget.preset.over(cell.target, stage, name), **budget.settings.get(stage, {}), "seed": seed}
    step = _step(stage, name, overrides)
    return dataclasses.replace(step, config=dataclasses.replace(step.config, checkpoint=whose))


def metric(cell: Cell, chain: tuple[Step, ...]) -> str:
    """The full name under which the last of `chain` reports the number of `cell`.

    The cell names the paper budget's; a k-NN accuracy is named after its protocol, which a preset may change.
    """
    last = chain[-1].config
    return f"{pretraining_metric(last)}_last" if isinstance(last, configs.Pretrain) else cell.metric


def _pretraining(cell: Cell, seed: int, budget: Budget) -> Step:
    preset, flat = budget.preset, _flat("pretrain", cell.recipe)
    epochs = preset.shortened(cell.target, cell.recipe, cell.overrides.get("epochs", flat["epochs"]))
    overrides = {**cell.overrides, "epochs": epochs, **preset.over(cell.target, "pretrain", cell.recipe)}
    notes = _clamp_grid(flat, overrides)
    return _step("pretrain", cell.recipe, {**overrides, **budget.settings.get("pretrain", {}), "seed": seed}, notes)


def _clamp_grid(values: Mapping[str, Any], overrides: dict[str, Any]) -> tuple[str, ...]:
    """A small image has no room for the paper's finest grids: one cell a pixel, and a note."""
    flat = {**values, **overrides}
    grid, size = flat["mask.grid"], flat["augment.size"]
    if grid <= size:
        return ()
    overrides["mask.grid"] = size
    return (f"mask grid {grid} is finer than the {size}-pixel image: {size} is used",)


def _step(stage: str, name: str, overrides: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Step:
    flat = _flat(stage, name)
    differing = {key: value for key, value in overrides.items() if key not in flat or flat[key] != value}
    return Step(stage, _path(stage, name), differing, _config(stage, name, differing), notes)


def _config(stage: str, name: str, differing: Mapping[str, Any]) -> configs.Config:
    """The recipe with what differs. Configs that differ in nothing but a valid seed are validated together."""
    seed = differing.get("seed")
    if type(seed) is int and seed >= 0:
        others = {key: value for key, value in differing.items() if key != "seed"}
        return dataclasses.replace(_config(stage, name, others), seed=seed)
    key = (stage, name, repr(differing))
    if key not in _CONFIGS:
        try:
            _CONFIGS[key] = configs.resolve(_recipe(stage, name), differing, STAGES[stage].config)
        except ConfigError as error:
            raise ConfigError(f"{stage}: {error} (recipe {_path(stage, name)})") from None
    return _CONFIGS[key]


_CONFIGS: dict[tuple[str, str, str], configs.Config] = {}  # what `_config` has validated


def _path(stage: str, name: str) -> str:
    return f"{STAGES[stage].recipes}/{name}.yaml"


@functools.cache
def _recipe(stage: str, name: str) -> dict[str, Any]:
    return read_yaml(ROOT / _path(stage, name))


@functools.cache
def _flat(stage: str, name: str) -> dict[str, Any]:
    return flatten(_recipe(stage, name))


def directory(runs_dir: str | Path, step: Step) -> Path:
    """Where the run lives: equal configs share it."""
    return Path(runs_dir) / step.stage / step.id


def located(folders: Sequence[Path], step: Step) -> Path:
    """The run in the first of `folders` that has its result, else where it has begun, else in the first of all."""
    places = [directory(folder, step) for folder in folders]
    return max(places, key=lambda place: ((place / "result.json").exists(), place.exists()))
