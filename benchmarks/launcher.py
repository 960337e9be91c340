"""The commands that read recipes and runs: time to start, and time with many finished runs. No torch here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mixmask import config as configs
from mixmask.runs import environment
from paper import presets
from paper.cells import Cell, select
from slurm import graph

ROOT = Path(__file__).resolve().parents[1]
LOGGED = 200  # epochs in the log of a generated pre-training
REPEATS = 3
BARS = {"launch": 2.0, "tables": 5.0}  # seconds, with 1,000 runs


def settings(runs: int, targets: Sequence[str] = ("all",)) -> tuple[list[str], list[graph.Job]]:
    """A `--set` under which the cells of `targets` together need at least `runs` runs, and these."""
    seeds = 0
    while True:
        seeds += 1
        words = [f"seed={json.dumps(list(range(seeds)))}"]
        jobs = graph.jobs(select(targets), presets.budget("paper", words), Path("runs"))
        if len(jobs) >= runs:
            return words, jobs
        seeds = max(seeds, seeds * runs // len(jobs) - 1)


def finished_runs(folder: Path, jobs: list[graph.Job], words: list[str]) -> None:
    """Write a finished run's record for each job: config, command, environment, log and result."""
    named = metrics(select(["all"]), presets.budget("paper", words))
    here, shared = json.dumps(environment(), indent=1), folder / "log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    shared.write_text(log())
    for number, job in enumerate(jobs):
        place = folder / job.stage / job.id
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text(yaml.dump(configs.to_dict(job.config), Dumper=yaml.CSafeDumper))
        (place / "command.txt").write_text(job.shell + "\n")
        (place / "environment.json").write_text(here)
        os.link(shared, place / "log.jsonl")  # a log of its own for each would fill a disk
        values = dict.fromkeys(named.get(job.id, ["loss"]), 50 + number % 200 / 10)
        result = {"run": job.id, "metrics": {"loss": 6.0, **values}, "timing": {"seconds": 1.0}}
        (place / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def metrics(cells: list[Cell], budget: presets.Budget) -> dict[str, set[str]]:
    """Run -> the names under which it reports numbers of `cells`."""
    names: dict[str, set[str]] = {}
    for cell in cells:
        for chain in presets.chains(cell, budget):
            names.setdefault(presets.directory("", chain[-1]).name, set()).add(presets.metric(cell, chain))
    return names


def log() -> str:
    """Lines as a pre-training writes them: ten steps and one summary an epoch."""
    numbers = {"loss": 6.25, "loss_clean": 3.5, "loss_mixmask": 1.5, "loss_mixmask_switch": 1.25, "lr": 0.06}
    timing = {"timing": {"seconds": 12.5, "images_per_second": 4000.1, "data_wait": 0.0123}}
    lines = []
    for epoch in range(1, LOGGED + 1):
        for step in range(10):
            lines.append({"kind": "step", "step": epoch * 100 + step * 10, "epoch": epoch, **numbers, **timing})
        lines.append({"kind": "epoch", "step": epoch * 100 + 99, "epoch": epoch, **numbers, **timing})
    return "".join(json.dumps(line) + "\n" for line in lines)


def command(*words: str) -> float:
    """Seconds of a command, the interpreter's start included: the best of REPEATS, after one that fills the caches."""
    taken = []
    with tempfile.TemporaryDirectory() as cache:  # byte code is kept, as usual, whatever this shell's settings are
        given = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        options = {"cwd": ROOT, "env": {**given, "PYTHONPYCACHEPREFIX": cache}, "stdout": subprocess.DEVNULL}
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, **options)
            taken.append(time.perf_counter() - start)
    return min(taken[1:])


def with_runs(runs: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds of the launcher's dry run of everything, and of the tables, over at least `runs` finished runs."""
    words, jobs = settings(runs)
    finished_runs(folder, jobs, words)
    given = ["--runs-dir", str(folder), "--set", *words]
    seconds = {
        "launch": command("slurm/launch.py", "all", "--dry-run", *given),
        "tables": command("paper/make_tables.py", *given, "--out", str(folder / "out")),
    }
    return {name: {"seconds": taken, "runs": len(jobs), "best_of": REPEATS} for name, taken in seconds.items()}


def start(script: str) -> dict[str, Any]:
    """Seconds of a script's --help."""
    return {"seconds": command(script, "--help"), "best_of": REPEATS}
