"""Cells -> distinct runs -> a graph of jobs, as data. No torch here.

A job is keyed by its run directory, which is named after the hash of everything that decides its numbers: two cells
that need the same run share one job.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask import config as configs
from mixmask import registry
from mixmask.config import UserError
from mixmask.runs import read_result
from mixmask.stages import STAGES
from paper.cells import Cell
from paper.cost import hours
from paper.presets import Budget, Step, chains, directory
from slurm.cluster import Cluster, cluster

IMAGES = ("dataset", "folder", "task", "data", "allow_partial_data")  # keys that say which images, with run.data_root


@dataclass(frozen=True)
class Job:
    """One run of one stage."""

    stage: str
    config: configs.Config
    directory: Path  # the key
    command: tuple[str, ...]  # what a person would type, `python` first
    parents: tuple[Path, ...]  # directories of the runs it needs
    resources: Cluster
    hours: float  # expected, on one GPU or, without GPUs, on two CPU cores; nan: unknown
    cells: tuple[str, ...]  # ids of the cells that use it
    notes: tuple[str, ...] = ()
    cpu_hours: float = 0.0  # expected on two CPU cores

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def expected(self) -> float:
        """Hours; of an unknown duration infinitely many."""
        return math.inf if math.isnan(self.hours) else self.hours

    @property
    def gpu_hours(self) -> float:
        return self.hours if self.resources.gpus else 0.0

    @property
    def shell(self) -> str:
        """The command as one line, ready to paste."""
        return shlex.join(self.command)

    @property
    def finished_in(self) -> Path | None:
        """The directory that holds its result: its own, or the one in results/ beside the runs where it is kept."""
        kept = self.directory.parents[1].parent / "results" / self.stage / self.id
        return next((place for place in (self.directory, kept) if read_result(place) is not None), None)

    @property
    def state(self) -> str:
        """finished (or kept in results/), unfinished (resumed by the same command) or new."""
        if self.finished_in:
            return "finished"
        return "unfinished" if (self.directory / "config.yaml").exists() else "new"


def jobs(cells: Iterable[Cell], budget: Budget, runs_dir: Path, profile: str = "", gpu: str = "") -> list[Job]:
    """The distinct runs of `cells`, parents before their children, with what they ask of a cluster of this profile.

    `gpu`: whose measured rates decide the hours (paper/cost.py).
    """
    resources = {stage: cluster(budget, stage, profile) for stage in STAGES}
    graph: dict[Path, Job] = {}
    for cell in cells:
        for chain in chains(cell, budget):
            parent = None
            for step in chain:
                where = directory(runs_dir, step)
                known = graph.get(where) or new_job(step, where, chain[0].config, parent, resources[step.stage], gpu)
                parent = graph[where] = used_by(known, cell)
    return list(graph.values())


def new_job(
    step: Step, where: Path, origin: configs.Config, parent: Job | None, resources: Cluster, gpu: str = ""
) -> Job:
    """The run that lives in `where`, used by no cell yet."""
    words = ("python", STAGES[step.stage].script, *_arguments(step, parent, where), "--run-dir", str(where))
    parents = (parent.directory,) if parent else ()
    expected = hours(step.config, origin, resources.gpus, gpu)
    on_cpu = hours(step.config, origin, 0)
    return Job(step.stage, step.config, where, words, parents, resources, expected, (), step.notes, on_cpu)


def _arguments(step: Step, parent: Job | None, where: Path) -> list[str]:
    """What the stage reads, its recipe, and what differs from it."""
    stage = STAGES[step.stage]
    source = str(parent.directory / STAGES[parent.stage].gives) if parent else step.source
    words = [stage.takes, source] if stage.takes else [source, str(where / stage.gives)]
    words = words if source else []
    words += ["--config", step.recipe] if step.recipe else []
    if step.overrides:
        words += ["--set", *(f"{key}={_yaml(value)}" for key, value in step.overrides.items())]
    return words


def used_by(job: Job, cell: Cell) -> Job:
    """The job, used by one cell more."""
    return job if cell.id in job.cells else dataclasses.replace(job, cells=(*job.cells, cell.id))


def _yaml(value: Any) -> str:
    """A value as YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def needed(jobs: Iterable[Job], states: Mapping[Path, str] | None = None) -> set[Path]:
    """Directories of the runs still to be made: the last one of each cell, and those that it needs.

    A pre-training whose directory was deleted is not made again for the sake of evaluations that are finished.
    `states`: each job's `state` by directory, where it has been looked up.
    """
    jobs = list(jobs)
    states = {job.directory: job.state for job in jobs} if states is None else states
    inner = {(parent, cell) for job in jobs for parent in job.parents for cell in job.cells}
    wanted: set[Path] = set()
    parents: set[Path] = set()  # of those
    for job in reversed(jobs):  # children before their parents
        last = any((job.directory, cell) not in inner for cell in job.cells)
        if states[job.directory] != "finished" and (last or job.directory in parents):
            wanted.add(job.directory)
            parents.update(job.parents)
    return wanted


def check_products(jobs: Iterable[Job]) -> None:
    """Raises UserError where a run still to be made reads what a finished one has made, and that is no longer there.

    Repeating that run may take weeks, so the user decides; what takes seconds is repeated.
    """
    jobs = list(jobs)
    by_directory, wanted = {job.directory: job for job in jobs}, needed(jobs)
    for child in jobs:
        for parent in (by_directory[p] for p in child.parents if child.directory in wanted and p not in wanted):
            product = parent.directory / STAGES[parent.stage].gives
            if not product.exists() and STAGES[parent.stage].repeatable:
                print(f"{product} is gone: it is made again")
                (parent.directory / "result.json").unlink()
                return check_products(jobs)
            if not product.exists():
                result = parent.finished_in / "result.json"
                raise UserError(
                    f"{child.directory} needs {product}, which is gone, though its run is finished ({result}): "
                    f"restore it, or move {result} away and launch again to repeat the run"
                )


def check_data(jobs: Iterable[Job]) -> None:
    """Raises UserError where a run was made, or begun, with other images than those that are given now.

    A run's id here comes from its recipe alone, without the identity of images that are no published set: it is
    compared with what the run has noted. Images that cannot be seen from here are passed over, with a note.
    """
    known: dict[str, str] = {}  # each data set is listed once
    for job in jobs:
        own = getattr(job.config, "dataset", "") == "folder" or getattr(job.config, "allow_partial_data", False)
        if not own:
            continue
        stage, key = STAGES[job.stage], repr([getattr(job.config, k, "") for k in IMAGES] + [job.config.run.data_root])
        try:
            file = (job.finished_in or job.directory) / "config.yaml"
            if not file.exists():
                continue
            if key not in known:
                known[key] = registry.load(stage.identity)(job.config)
        except UserError as error:
            print(f"note: {job.id}: whether its images are those that it was made with is not known: {error}")
            continue
        there = configs.read_yaml(file).get(stage.data) or ""
        if there != known[key]:
            raise UserError(
                f"{file.parent} is of other images ({there or 'none noted'} there, {known[key] or 'the published'} now)"
                "; give another --runs-dir"
            )


def missing_package(job: Job) -> str:
    """The package that `job` needs and this environment lacks, and how to get it; else nothing."""
    package = STAGES[job.stage].package
    if not package or importlib.util.find_spec(package):
        return ""
    return f"{job.stage} needs {package}, which is not installed: make {package} (docs/{job.stage}.md)"


def check_packages(jobs: Iterable[Job]) -> None:
    """Raises UserError if a pending run cannot be made here, before the runs that it needs are made."""
    jobs = list(jobs)
    wanted = needed(jobs)
    for job in jobs:
        if job.directory in wanted and missing_package(job):
            raise UserError(missing_package(job))


def make_folder(folder: Path) -> None:
    """Create `folder`. Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from None
