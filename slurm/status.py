"""What has become of each run, from finished to not started, and what to do about it. No torch here.

A result file says finished, squeue waiting or running, a held lock running without SLURM. Of what is neither, the
last job's accounting and the logs of its tasks say why; for runs on this machine the log alone. Whatever lies in the
runs directory is read with care: what is damaged costs its own run's line, not the table.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.config import UserError
from mixmask.runs import ResultError, is_busy, read_result
from paper.cells import Cell
from slurm import cost, logs, squeue
from slurm.graph import Job, needed
from slurm.squeue import Live

AGAIN = "launch again: it goes on from its last checkpoint"
ADVICE = {
    "FAILED": f"mend what the log says, if it does; {AGAIN}",
    "TIMEOUT": f"it did not save in time; {AGAIN}, or with a longer cluster.warning_seconds",
    "OUT_OF_MEMORY": f"{AGAIN}, with a larger cluster.memory_gb",
    "CANCELLED": AGAIN,
}
LOST = re.compile(r"no such (checkpoint|file)|(damaged)")


@dataclass(frozen=True)
class Report:
    """The state of a run in a word, and more of it in a line or more."""

    state: str
    text: str = ""
    ended: str = ""  # how its job ended, in SLURM's word


class Seen(Job):
    """A job whose result, where it cannot be read, counts as none."""

    @property
    def state(self) -> str:
        return "unfinished" if damage(self) else super().state


def damage(job: Job) -> str:
    """Why the result that is there cannot be read, and what to do; empty where it can, or there is none."""
    path = job.directory / "result.json"
    if os.path.exists(path) and not path.is_file():  # reading from a pipe would wait
        return f"{path} is no regular file; move it away to run again"
    try:
        _ = job.finished_in
    except ResultError as error:
        return str(error)
    except (RecursionError, OverflowError):  # JSON, but neither ours nor anybody's
        return f"{path} is no result; move it away to run again"
    return ""


def busy(directory: Path) -> bool:
    """`is_busy`; False where there is a lock that cannot be tried."""
    try:
        return (directory / "lock").is_file() and is_busy(directory)
    except (OSError, UserError):
        return False


def reports(jobs: list[Job], runs_dir: Path) -> dict[Path, Report]:
    """Run directory -> report. Takes two seconds more where a job seems to have failed: one look may be too early."""
    known, jobs = squeue.records(runs_dir), [Seen(**vars(job)) for job in jobs]
    found = _look(jobs, runs_dir, known)
    if any(report.state == "failed" and str(path.resolve()) in known for path, report in found.items()):
        time.sleep(squeue.AGAIN)
        found = _look(jobs, runs_dir, known)
    return found


def _look(jobs: list[Job], runs_dir: Path, known: dict[str, dict[str, Any]]) -> dict[Path, Report]:
    has_slurm = squeue.available()
    live = squeue.live_jobs() if has_slurm else {}
    last = {key: known[key]["job"] for job in jobs if (key := str(job.directory.resolve())) in known}
    ended = squeue.ended_as(last.values()) if has_slurm else {}
    wanted, found = needed(jobs), {}
    for job in jobs:
        key = str(job.directory.resolve())
        report = _alive(job, live.get(key))
        if report is None and job.directory not in wanted:
            report = Report("not needed", "all that needs it is finished")
        if report is None and key in last:
            report = _ended(job, last[key], ended.get(last[key], "ended"), runs_dir)
        report = report or _stopped(job)
        found[job.directory] = _blamed(report, job, found)
    return found


def _alive(job: Job, live: Live | None) -> Report | None:
    """Finished, waiting or running, or with a result that cannot be read; None for anything else."""
    if unreadable := damage(job):
        return Report("failed", f"unreadable result: {unreadable}")
    if place := job.finished_in:
        kept = f"; kept in {place}" if place != job.directory else ""
        return Report("finished", headline(read_result(place)["metrics"]) + kept)
    if live is None:
        return Report("running", f"without SLURM{progress(job)}") if busy(job.directory) else None
    if live.state == "PENDING":
        return Report("waiting", f"job {live.job}: {live.reason}")
    return Report("running", f"job {live.job} on {live.reason}{progress(job)}")


def _ended(job: Job, number: str, state: str, runs_dir: Path) -> Report:
    """A job that is over and has left no result."""
    printed = logs.task_logs(runs_dir, number)
    log, lines = logs.telling(printed) if printed else (squeue.log_path(runs_dir, number), [])
    advice = _lost_parent(job, lines) or ADVICE.get(state, AGAIN)
    task = f" of task {logs.task_of(log)}" if len(printed) > 1 else ""
    return Report("failed", f"job {number} {state}; {advice}{logs.quote(log, lines, task)}", ended=state)


def _stopped(job: Job) -> Report:
    """Nobody works on it, and no job has."""
    log = job.directory / "output.log"
    lines = logs.said(log)[-logs.SHOWN :]
    if lines and any(cause.match(lines[-1]) for cause in logs.CAUSES):
        return Report("failed", f"{_lost_parent(job, lines) or ADVICE['FAILED']}{logs.quote(log, lines)}")
    if job.state == "unfinished":
        return Report("stopped", f"{AGAIN}{progress(job)}")
    return Report("not started")


def _lost_parent(job: Job, lines: list[str]) -> str:
    """What to do where the job has missed what a finished parent has made: no launch makes that again by itself."""
    for parent in job.parents:
        found = [match for line in lines if parent.name in line and (match := LOST.search(line))]
        if found and (parent / "result.json").exists():
            too = " and the damaged file" if found[-1].group(2) else ""
            return f"what {parent} has made is lost: move its result.json{too} away and launch again, it is made anew"
    return ""


def _blamed(report: Report, job: Job, found: dict[Path, Report]) -> Report:
    """The report of a run that cannot start, with the parent that failed."""
    failed = [parent for parent in job.parents if parent in found and found[parent].state == "failed"]
    if failed and (report.ended == "CANCELLED" or report.state == "not started"):
        return Report("not started", f"it needs {failed[0]}, which failed")
    return report


# -------------------------------------------------------------------------------------------------- progress


def progress(job: Job) -> str:
    """Epoch, loss, images/s and time left, as far as log.jsonl says."""
    lines = _log_lines(job.directory / "log.jsonl")
    if not lines:
        return ", no step logged yet"
    last, epochs = lines[-1], getattr(job.config, "epochs", 0)
    text = f", epoch {last['epoch']}/{epochs}" if epochs else f", epoch {last['epoch']}"
    text += f", loss {last['loss']:.3f}" if "loss" in last else ""
    rate = last["timing"].get("images_per_second")
    text += f", {rate:.0f} images/s" if rate else ""
    left = time_left(job.config, lines)
    return text + (f", {_clock(left)} left" if left is not None and math.isfinite(left) else "")


def time_left(config: Any, lines: list[dict[str, Any]]) -> float | None:
    """Seconds, from the last epoch's duration; in the first epoch from images/s. None where nothing says."""
    last, ends = lines[-1], [line for line in lines if line["kind"] == "epoch" and "seconds" in line["timing"]]
    within = last["timing"].get("seconds", 0.0) if last["kind"] == "step" else 0.0
    epochs = getattr(config, "epochs", 0)
    if ends and epochs:
        return max(0.0, (epochs - ends[-1]["epoch"]) * ends[-1]["timing"]["seconds"] - within)
    rate = last["timing"].get("images_per_second")
    if not rate or not epochs:
        return None
    images = cost.IMAGES.get(config.dataset, cost.PHOTOS)[0]
    return max(0.0, epochs * images / rate - within)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _log_lines(path: Path) -> list[dict[str, Any]]:
    """Of the whole lines at the end of a log that may be growing: kind, epoch, loss if there is one, timing."""
    lines = []
    for text in logs.tail(path):
        with contextlib.suppress(ValueError, RecursionError):  # cut off by the start of what is read, or not yet whole
            lines.append(json.loads(text))
    return [_sound(line) for line in lines if isinstance(line, dict) and _is_epoch(line.get("epoch"))]


def _is_epoch(value: Any) -> bool:
    return type(value) is int and 0 < value < 1e9


def _sound(line: dict[str, Any]) -> dict[str, Any]:
    """What `progress` shows of a line: numbers where they are some."""
    timing = line.get("timing")
    timing = _numbers(timing) if isinstance(timing, dict) else {}
    return {"kind": line.get("kind"), "epoch": line["epoch"], "timing": timing, **_numbers({"loss": line.get("loss")})}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Those values that are finite numbers."""
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    return {key: float(value) for key, value in numbers.items() if abs(value) < 1e300}


def headline(metrics: dict[str, float]) -> str:
    """The metric a reader looks for: the last epoch's, else the loss."""
    last = [name for name in metrics if name.endswith("_last")]
    shown = ", ".join(f"{name} {metrics[name]:.1f} %" for name in last)
    return shown or ", ".join(f"{name} {metrics[name]:.3f}" for name in ("loss", "box_AP") if name in metrics)


# --------------------------------------------------------------------------------------------------- printing


def print_status(cells: list[Cell], jobs: list[Job], runs_dir: Path) -> None:
    """Per cell, each of its runs; then how many of each state."""
    found = reports(jobs, runs_dir)
    for cell in cells:
        print(cell.id)
        for job in jobs:
            if cell.id in job.cells:
                report = found[job.directory]
                text = f": {report.text}" if report.text else ""
                print(printable(f"  {report.state:<12}{job.directory}{text}"))
    states = ", ".join(f"{number} {state}" for state, number in Counter(r.state for r in found.values()).items())
    whole = [c for c in cells if all(found[j.directory].state in ("finished", "not needed") for j in _of(c, jobs))]
    print(f"\n{len(jobs)} runs: {states}; {len(whole)} of {len(cells)} cells are complete")


def printable(text: str) -> str:
    """Lines without what a terminal would obey: a log may hold anything."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text.expandtabs(1))


def _of(cell: Cell, jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if cell.id in job.cells]


# ----------------------------------------------------------------------------------------------------- cancel


def cancel(jobs: list[Job], runs_dir: Path) -> None:
    """End the jobs of these runs, and ask the processes that work on them without SLURM to save and end."""
    live = squeue.live_jobs() if squeue.available() else {}
    numbers = {job.directory: live[key].job for job in jobs if (key := str(job.directory.resolve())) in live}
    if numbers:
        squeue.cancel(numbers.values())
    for directory, number in numbers.items():
        print(f"cancelled job {number}: {directory}")
    here = [job.directory for job in jobs if job.directory not in numbers and busy(job.directory)]
    for directory in here:
        processes = list(holders(directory))
        for process in processes:
            os.kill(process, signal.SIGINT)
        which = f"asked process {processes[0]} to save and stop" if processes else "running on another machine"
        print(f"{which}: {directory}")
    print(f"{len(numbers)} jobs cancelled, {len(here)} runs without SLURM; all up to each last checkpoint is kept")


def holders(directory: Path) -> Iterator[int]:
    """This user's process, on this machine, that works on the run; not those that it has forked."""
    path = str((directory / "lock").resolve())
    holding = {int(entry.name) for entry in _processes() if path in _open_files(entry)}
    for process in sorted(holding):
        with contextlib.suppress(OSError):
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            if parent not in holding:
                yield process


def _processes() -> Iterable[Path]:
    proc = Path("/proc")
    return [entry for entry in proc.iterdir() if entry.name.isdigit()] if proc.exists() else []


def _open_files(process: Path) -> set[str]:
    try:
        return {os.readlink(file) for file in (process / "fd").iterdir()}
    except OSError:
        return set()
