"""Real runs in a given time, in docs/replication.md's order, each group at the largest stated budget that fits.

The runs of a group are compared with each other, so they share a budget. What an epoch takes is measured here first, on
the same data. Runs are the training's own command: they resume, and one that is stopped has its checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import measure, steps
from mixmask import config as configs
from mixmask.config import Pretrain, UserError
from mixmask.datasets.settle import settle
from mixmask.runs import read_log, read_result, run_directory
from paper.cost import pretrain_pflop
from pretrain import train

ROOT = steps.ROOT
Overrides = Mapping[str, Any]

# Groups of docs/replication.md: (a) 1 to 3; then (a) 1 with two more seeds, without which nothing is decided.
GROUPS: tuple[tuple[Overrides, ...], ...] = (
    ({"method": "vanilla"}, {"method": "mixmask"}),
    ({"method": "unmix"}, {"method": "both"}),
    ({"method": "erase"},),
    *(({"method": "vanilla", "seed": seed}, {"method": "mixmask", "seed": seed}) for seed in (1, 2)),
)
BUDGETS: tuple[tuple[str, Overrides], ...] = (
    ("cifar100_moco", {"epochs": 200}),
    ("cifar100_moco", {"epochs": 100}),
    ("cifar100_reduced_moco", {}),
)
SPARE = 1.1  # of the seconds that a run is expected to take
PYTHON = 10.0  # seconds in which a run's interpreter is there and its data are read
STOPPING = 20.0  # seconds in which a run that is stopped writes its checkpoint
RECORD = ("config.yaml", "command.txt", "environment.json", "environments.jsonl", "log.jsonl", "result.json")


@dataclass(frozen=True)
class Planned:
    """A run: its recipe, what is laid over it, its config and where it lives."""

    recipe: str
    overrides: Overrides
    config: Pretrain
    directory: Path

    @property
    def finished(self) -> bool:
        return read_result(self.directory) is not None

    @property
    def epochs_done(self) -> int:
        """Of a run that can go on from a checkpoint."""
        if self.finished or not (self.directory / "checkpoint.pt").exists():
            return self.config.epochs if self.finished else 0
        return max((line["epoch"] for line in read_log(self.directory) if line["kind"] == "epoch"), default=0)

    @property
    def command(self) -> list[str]:
        words = [f"{key}={_word(value)}" for key, value in self.overrides.items()]
        recipe = f"pretrain/configs/{self.recipe}.yaml"
        where = ["--run-dir", str(self.directory.absolute())]
        return [sys.executable, "pretrain/train.py", "--config", recipe, *where, "--set", *words]

    def row(self, **more: Any) -> dict[str, Any]:
        """For the report: how far it has come, and its metrics."""
        result, last = read_result(self.directory), {}
        if (self.directory / "log.jsonl").exists():
            last = next((line for line in reversed(read_log(self.directory)) if line["kind"] == "epoch"), {})
        metrics = result["metrics"] if result else {k: v for k, v in last.items() if k == "loss" or k[:3] == "knn"}
        row = {"state": "finished" if result else "not finished", "epoch": last.get("epoch", 0)}
        return {**row, "epochs": self.config.epochs, "metrics": metrics, **more}


@dataclass
class Runs:
    """What is given: where the data and the runs are, the device, keys laid over every recipe."""

    device: torch.device
    data: Path
    runs_dir: Path
    settings: Overrides = field(default_factory=dict)
    budgets: Sequence[tuple[str, Overrides]] = BUDGETS
    peak: float = 0.0  # TFLOP/s of the device, which no run exceeds; 0: not known
    _costs: dict[tuple, dict[str, float]] = field(default_factory=dict)

    def plan(self, recipe: str, *overrides: Overrides) -> Planned:
        """The run of a recipe."""
        here = {"run.device": str(self.device), "run.data_root": str(self.data.absolute()), "run.download": False}
        laid = {key: value for each in (*overrides, here, self.settings) for key, value in each.items()}
        config = settle(configs.load(ROOT / "pretrain/configs" / f"{recipe}.yaml", laid))
        return Planned(recipe, laid, config, run_directory(self.runs_dir, config))

    def measured(self, run: Planned) -> dict[str, float]:
        """Seconds of the start, an epoch and a k-NN evaluation of such a run, and the GiB that it takes."""
        config = run.config
        key = (run.recipe, config.method)
        if key not in self._costs:
            sets = train.load_data(config, self.device)
            self._costs[key] = _measured(config, *sets, self.device)
        return self._costs[key]

    def seconds(self, group: Sequence[Planned]) -> float:
        """Seconds that a group still takes, one run after the other; side by side takes no longer."""
        total = 0.0
        for run in group:
            cost, left = self.measured(run), run.config.epochs - run.epochs_done
            every = run.config.knn.every or run.config.epochs
            total += (cost["start"] + left * cost["epoch"] + (2 + left // every) * cost["knn"]) * bool(left)
        return SPARE * total

    def least(self, group: Sequence[Planned]) -> float:
        """The least seconds that a group can take, at the device's peak: a hopeless one is not measured."""
        left = sum(pretrain_pflop(run.config) * (1 - run.epochs_done / run.config.epochs) for run in group)
        return 1e3 * left / self.peak if self.peak else 0.0

    def fitting(self, group: Sequence[Overrides], seconds: float) -> tuple[list[Planned], str]:
        """The group at the largest budget that fits into so many seconds, or nothing and the reason."""
        asked = []
        for recipe, budget in self.budgets:
            runs = [self.plan(recipe, budget, each) for each in group]
            if all(run.finished for run in runs):
                return runs, ""
            least = self.least(runs)
            taken = least if least > seconds else self.seconds(runs)
            at_least = " at least" if least > seconds else ""
            asked.append((taken, f"{recipe} of {runs[0].config.epochs} epochs would take{at_least} {taken:.0f} s"))
            if asked[-1][0] <= seconds:
                return runs, ""
        return [], f"{min(asked)[1]}, and {max(seconds, 0):.0f} s are left"

    def together(self, group: Sequence[Planned]) -> int:
        """How many runs go side by side: two where the GPU's memory holds both."""
        if self.device.type != "cuda" or len(group) < 2:
            return 1
        needed = sum(self.measured(run)["gib"] + 1 for run in group[:2])  # 1: of the CUDA context
        return 2 if needed < torch.cuda.mem_get_info(self.device)[0] / measure.GIB else 1


def _measured(config: Pretrain, train_set: Any, test_set: Any, device: torch.device) -> dict[str, float]:
    """By a few steps and, on a GPU, one k-NN evaluation (on a CPU: as many forward passes as a third of a step's)."""
    measure.free(device)
    measure.forget_peak(device)
    begin = time.perf_counter()
    training = steps.Ours(config, device, data=train_set)
    training.step()
    measure.wait(device)
    start = time.perf_counter() - begin
    block = 5 if device.type == "cuda" else 1
    step = measure.seconds(lambda: [training.step() for _ in range(block)], device) / block
    knn = step * (len(train_set) + len(test_set)) / config.batch_size / 3
    if device.type == "cuda":
        model = training.state.model
        knn = measure.seconds(lambda: train.evaluate(model, train_set, test_set, config, device), device)
    epoch = step * (len(train_set) // config.batch_size)
    return {"start": start + PYTHON, "epoch": epoch, "knn": knn, "gib": measure.peak_memory(device)}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------------ carrying out


def carry_out(group: Sequence[Planned], together: int, until: float, tick: Callable[[], None]) -> dict[str, str]:
    """Run the group, `together` at a time, to time.monotonic() = `until`; by directory why one did not finish.

    `tick` is called every few seconds. Whatever happens, no run is left behind.
    """
    waiting, running, ends = [run for run in group if not run.finished], [], {}
    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < together:
                run = waiting.pop(0)
                running.append((run, *_started(run)))
            for run, process, output in [each for each in running if each[1].poll() is not None]:
                running.remove((run, process, output))
                ends[run.directory.name] = _end(process, output)
            tick()
            time.sleep(0.2)
    finally:
        for _, process, _ in running:
            process.terminate()
        last = time.monotonic() + STOPPING
        for run, process, output in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, last - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
            output.close()
            ends[run.directory.name] = "" if run.finished else "the time was over: the same command goes on"
    return ends | {run.directory.name: "the time was over before it began" for run in waiting}


def _started(run: Planned) -> tuple[subprocess.Popen, IO]:
    output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with the run
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    return subprocess.Popen(run.command, cwd=ROOT, env=environment, **streams), output


def _end(process: subprocess.Popen, output: IO) -> str:
    """Nothing for a run that succeeded, else its last line."""
    output.seek(0)
    lines = [line for line in output.read().splitlines() if line.strip()]
    output.close()
    return "" if process.returncode == 0 else (lines or [f"exit status {process.returncode}"])[-1]


# ----------------------------------------------------------------------------------------------------------- records


def pack(runs_dir: Path, archive: Path) -> None:
    """The records of all pre-trainings, without checkpoints, as one tar file, whole at every moment."""
    temporary = archive.with_name(f".{archive.name}")
    with tarfile.open(temporary, "w") as tar:
        for path in _records(runs_dir):
            tar.add(path, path.relative_to(runs_dir))
    os.replace(temporary, archive)


def _records(runs_dir: Path) -> Iterator[Path]:
    for directory in sorted(runs_dir.glob("pretrain/*")):
        yield from (directory / name for name in RECORD if (directory / name).exists())


def unpack(archive: Path, runs_dir: Path) -> None:
    """Records of an earlier call, where there are none of the same run. Raises UserError for a file that is no tar."""
    if not archive.exists():
        return
    try:
        with tarfile.open(archive) as tar:
            new = [member for member in tar if not (runs_dir / Path(member.name).parent).exists()]
            tar.extractall(runs_dir, new, filter="data")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{archive}: no records of runs ({error})") from None
