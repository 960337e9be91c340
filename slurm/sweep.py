"""Runs of a recipe of the user's own: every combination of the values that --set lists, and an evaluation of each.

A list in --set is several values, one run each, unless the key takes that very list as its value: `seed=[0,1]` and
`optimizer.lr=[0.03,0.06]` are two values, `augment.order=[crop,flip]`, `schedule.milestones=[60,80]` and
`mask.ratio=[0.2,0.5]` one; `augment.order=[[crop,flip],[crop]]` is two again. Several lists make every combination.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmask import config as configs
from mixmask.config import Config, ConfigError, Finetune, Linear, Pretrain
from mixmask.runs import run_id
from mixmask.stages import STAGES
from paper.cells import ROOT, Cell
from paper.presets import Budget, Preset, Step, budget, directory
from slurm import graph
from slurm.cluster import cluster
from slurm.graph import Job

OWN = Preset(name="own", about="a recipe of yours", epochs={}, seeds=1, values={}, cluster={})


def own_budget(settings: list[str]) -> Budget:
    """What --set says, by stage; a folder of data as seen from here. Raises ConfigError."""
    by_stage = budget("paper", settings).settings
    for values in by_stage.values():
        if isinstance(values.get("run.data_root"), str):
            values["run.data_root"] = str(Path(values["run.data_root"]).expanduser().resolve())
    return Budget(OWN, by_stage)


def plan(
    recipes: Sequence[Path], chosen: Budget, runs_dir: Path, profile: str, gpu: str = ""
) -> tuple[list[Cell], list[Job]]:
    """A cell for each combination, named after its overrides, and the jobs that make it.

    recipes: of the pre-training, and of the evaluation where there is to be one. Raises ConfigError for a value that
    the recipe cannot take, and as `settle` does for images of the user's own.
    """
    cells, jobs, (recipe, *then) = [], {}, recipes
    resources = {stage: cluster(chosen, stage, profile) for stage in STAGES}
    for name, chain in chains(recipe, then[0] if then else None, chosen.settings):
        cell = Cell(id=name, row=name, column="", recipe=str(recipe), seeds=1, metric="")
        parent = None
        for step in chain:
            where = directory(runs_dir, step)
            job = jobs.get(where) or graph.new_job(step, where, chain[0].config, parent, resources[step.stage], gpu)
            parent = jobs[where] = graph.used_by(job, cell)
        cells.append(cell)
    return cells, list(jobs.values())


def chains(
    recipe: Path, then: Path | None, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """For each distinct combination its name, RECIPE/KEY=VALUE,..., and its runs."""
    values = configs.read_yaml(recipe)
    path, given = in_repository(recipe), settings.get("pretrain", {})
    stem, notes, seen = str(values.get("recipe", recipe.stem)), set(), set()
    for overrides in combinations(values, given, recipe):
        config = settled(configs.resolve(values, overrides, Pretrain), notes)
        step = Step("pretrain", path, overrides, config)
        if step.id not in seen:
            seen.add(step.id)
            own = ",".join(f"{key}={shown(value)}" for key, value in overrides.items() if not key.startswith("run."))
            yield f"{stem}/{own}".rstrip("/"), (step, evaluation(then, config, settings, notes)) if then else (step,)
    for note in sorted(notes):
        print(note)


def combinations(values: Mapping[str, Any], given: Mapping[str, Any], where: Path) -> Iterator[dict[str, Any]]:
    """Every combination of the values that are given for keys of the recipe `values`, which is at `where`."""
    lists = {key: several(values, key, value, where) for key, value in given.items()}
    for chosen in itertools.product(*lists.values()):
        yield dict(zip(lists, chosen, strict=True))


def several(values: Mapping[str, Any], key: str, value: Any, where: Path) -> list[Any]:
    """The values of a key: its list's, or the one that it takes as it stands. Raises ConfigError for none."""
    if not isinstance(value, list):
        return [value]
    try:
        configs.resolve(values, {key: value}, Pretrain)
        return [value]
    except ConfigError as error:
        if not value:
            raise ConfigError(f"--set {key}=[]: expected at least one value") from None
        if str(error).startswith("unknown key"):
            raise ConfigError(f"{error} (in {where})") from None
    return value


def evaluation(then: Path, pretraining: Pretrain, settings: Mapping[str, Mapping[str, Any]], notes: set[str]) -> Step:
    """The probe or fine-tuning of a pre-training, with its seed. Raises ConfigError for a recipe of something else."""
    from mixmask.datasets.settle import inherit

    values = configs.read_yaml(then)
    if "optimizer" not in values or "framework" in values:
        raise ConfigError(f"--then {then}: expected a recipe of a linear probe or of a fine-tuning, as in eval/configs")
    cls = Finetune if "labels" in values else Linear
    overrides = {**settings.get(cls.stage, {}), "seed": pretraining.seed}
    config = configs.resolve(inherit(values, configs.to_dict(pretraining)), overrides, cls)
    config = settled(dataclasses.replace(config, checkpoint=run_id(pretraining)), notes)
    return Step(cls.stage, in_repository(then), overrides, config)


def settled(config: Config, notes: set[str]) -> Config:
    """`config` as its run will have it: with the identity of images of the user's own, and numbers that fit them."""
    given = isinstance(config, Finetune) or (isinstance(config, Pretrain) and config.run.init)
    if config.dataset != "folder" and not config.allow_partial_data and not given:
        return config  # without torch
    from mixmask import labels
    from mixmask.datasets.settle import settle
    from mixmask.training.initial import settle_initial

    with contextlib.redirect_stdout(io.StringIO()) as said:
        if isinstance(config, Finetune):
            config = labels.settle(config)[0]
        config = settle(config)
        if isinstance(config, Pretrain):
            config = settle_initial(config)
    notes |= {line.replace("note: ", f"note: {config.stage}: ", 1) for line in said.getvalue().splitlines()}
    return config


def in_repository(path: Path) -> str:
    """As jobs name a recipe: by its place in the repository, of which they have a copy; one elsewhere as it is."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def shown(value: Any) -> str:
    """A value in a name: without spaces."""
    return str(value).replace(" ", "").replace("'", "")
