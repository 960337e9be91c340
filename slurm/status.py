"""What has become of each run, from finished to not started, and what to do about it. No torch here.

A result file says finished, squeue waiting or running, a held lock running without SLURM. Of what is neither, the
last job's accounting and the logs of its tasks say why; for runs on this machine the log alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.runs import ResultError, is_busy, read_result
from paper.cells import Cell
from slurm import logs, shell, squeue
from slurm.graph import Job, needed
from slurm.squeue import Live

ADVICE = {
    "FAILED": "fix what the log says; {again}",
    "TIMEOUT": "it did not save in time; {again}, or with a longer cluster.warning_seconds",
    "DEADLINE": "{again}, with a later cluster.extra.deadline",
    "OUT_OF_MEMORY": "{again}, with a larger cluster.memory_gb",
}
LOST = re.compile(r"no such (checkpoint|file)|(damaged)")


@dataclass(frozen=True)
class Report:
    """The state of a run in a word, and more of it in a line or more."""

    state: str
    text: str = ""


class TolerantJob(Job):
    """A job whose result, where it cannot be read, counts as none."""

    @property
    def state(self) -> str:
        return "unfinished" if unreadable(self) else super().state


def unreadable(job: Job) -> str:
    """Why the result that is there cannot be read, and what to do; empty where it can, or there is none."""
    try:
        _ = job.finished_in
    except ResultError as error:
        return str(error)
    return ""


def busy(directory: Path) -> bool:
    """`is_busy`; False where there is a lock that cannot be tried."""
    try:
        return is_busy(directory)
    except OSError:
        return False


def states(jobs: Iterable[Job]) -> list[str]:
    """What each run is, as its directory alone says: a result that cannot be read counts as none."""
    return [TolerantJob(**vars(job)).state for job in jobs]


def reports(jobs: list[Job], runs_dir: Path) -> dict[Path, Report]:
    """Run directory -> report. Takes two seconds more where a job seems to have failed: one look may be too early."""
    known, jobs = squeue.records(runs_dir), [TolerantJob(**vars(job)) for job in jobs]
    seen = _look(jobs, runs_dir, known)
    if any(report.state == "failed" and str(path.resolve()) in known for path, report in seen.items()):
        time.sleep(squeue.AGAIN)
        seen = _look(jobs, runs_dir, known)
    return seen


def _look(jobs: list[Job], runs_dir: Path, known: dict[str, dict[str, Any]]) -> dict[Path, Report]:
    has_slurm = shell.available()
    live = squeue.live_jobs() if has_slurm else {}
    last = {key: known[key]["job"] for job in jobs if (key := str(job.directory.resolve())) in known}
    ended = squeue.ended_as(last.values()) if has_slurm else {}
    wanted, seen = needed(jobs), {}
    for job in jobs:
        key = str(job.directory.resolve())
        report = _alive(job, live.get(key), runs_dir)
        if report is None and job.directory not in wanted:
            report = Report("not needed", "all that needs it is finished")
        if report is None and key in last:
            report = _ended(job, last[key], ended.get(last[key], "ended"), runs_dir)
        seen[job.directory] = _blamed(report or _stopped(job), job, seen)
    return seen


def _alive(job: Job, live: Live | None, runs_dir: Path) -> Report | None:
    """Finished, waiting or running, or with a result that cannot be read; None for anything else."""
    if problem := unreadable(job):
        return Report("failed", f"unreadable result: {problem}")
    if place := job.finished_in:
        kept = f"; kept in {place}" if place != job.directory else ""
        return Report("finished", headline(read_result(place)["metrics"]) + kept)
    if live is None:
        if not busy(job.directory):
            return None
        return Report("running", f"without SLURM{logs.progress(job)}{logs.silence(job)}")
    if live.word != "running":
        return Report(live.word, live.about)
    log = squeue.log_path(runs_dir, live.job)
    return Report("running", f"{live.about}{logs.progress(job)}{logs.silence(job)}; log: {log}")


def _ended(job: Job, number: str, state: str, runs_dir: Path) -> Report:
    """A job that is over and has left no result."""
    if state == "CANCELLED":
        return Report("cancelled", f"job {number}; {again(job)}{logs.progress(job)}")
    printed = logs.task_logs(runs_dir, number)
    log, lines = logs.root_cause(printed) if printed else (squeue.log_path(runs_dir, number), [])
    advice = _lost_parent(job, lines) or ADVICE.get(state, "{again}").format(again=again(job))
    task = f" of task {logs.task_of(log)}" if len(printed) > 1 else ""
    faulty = [f"; node {node} is at fault: the next launch leaves it out" for node in logs.faulty_nodes(printed)]
    return Report("failed", f"job {number} {state}; {advice}{''.join(faulty)}{logs.quote(log, lines, task)}")


def _stopped(job: Job) -> Report:
    """Nobody works on it, and no job has."""
    log = job.directory / "output.log"
    lines = logs.said(log)[-logs.SHOWN :]
    if lines and any(cause.match(lines[-1]) for cause in logs.CAUSES):
        advice = _lost_parent(job, lines) or ADVICE["FAILED"].format(again=again(job))
        return Report("failed", f"{advice}{logs.quote(log, lines)}")
    if job.state == "unfinished":
        return Report("stopped", f"{again(job)}{logs.progress(job)}")
    return Report("not started")


def again(job: Job) -> str:
    """What a launch makes of a run that is not finished."""
    saved = any(job.directory.glob("checkpoint*")) or any(job.directory.glob("model_*.pth"))
    return "launch again: it goes on from its last checkpoint" if saved else "launch again: it has saved nothing yet"


def _lost_parent(job: Job, lines: list[str]) -> str:
    """What to do if the product of a finished parent is missing, which no launch makes again by itself."""
    for parent in job.parents:
        missed = [match for line in lines if parent.name in line and (match := LOST.search(line))]
        if missed and (parent / "result.json").exists():
            too = " and the damaged file" if missed[-1].group(2) else ""
            return f"what {parent} has made is lost: move its result.json{too} away and launch again to repeat it"
    return ""


def _blamed(report: Report, job: Job, seen: dict[Path, Report]) -> Report:
    """The report of a run that cannot start, with the parent that has failed or was cancelled."""
    words = {"failed": "failed", "cancelled": "was cancelled"}
    for parent in job.parents:
        word = words.get(seen[parent].state) if parent in seen else None
        if word and report.state in ("cancelled", "not started"):
            return Report("not started", f"it needs {parent}, which {word}")
    return report


def headline(metrics: dict[str, float]) -> str:
    """The metric a reader looks for: the last epoch's, else the loss."""
    last = [name for name in metrics if name.endswith("_last")]
    shown = ", ".join(f"{name} {metrics[name]:.1f} %" for name in last)
    return shown or ", ".join(f"{name} {metrics[name]:.3f}" for name in ("loss", "box_AP") if name in metrics)


# --------------------------------------------------------------------------------------------------- printing


def print_status(cells: list[Cell], jobs: list[Job], runs_dir: Path) -> None:
    """Per cell, each of its runs; then how many of each state."""
    seen = reports(jobs, runs_dir)
    for cell in cells:
        print(cell.id)
        for job in _of(cell, jobs):
            report = seen[job.directory]
            text = f": {report.text}" if report.text else ""
            print(printable(f"  {report.state:<12}{job.directory}{text}"))
        if not _of(cell, jobs):
            print("  no run       of ours leads to it" + (": a public checkpoint does" if cell.checkpoint else ""))
    print(f"\n{_summary(cells, jobs, seen, runs_dir)}")


def print_brief(cells: list[Cell], jobs: list[Job], runs_dir: Path) -> None:
    """Per table and figure, how many of its cells are complete and how many of its runs are in each state."""
    seen = reports(jobs, runs_dir)
    targets = list(dict.fromkeys(cell.target for cell in cells))
    for target in targets:
        own = [cell for cell in cells if cell.target == target]
        ids = {cell.id for cell in own}
        states = _counts(seen[job.directory] for job in jobs if ids & set(job.cells))
        whole = f"{len(_complete(own, jobs, seen))} of {len(own)} cells complete"
        print(f"{target:<{max(map(len, targets))}}  {whole}; runs: {states or 'none'}")
    print(f"\n{_summary(cells, jobs, seen, runs_dir)}\neach run: python slurm/launch.py status TARGET")


def _summary(cells: list[Cell], jobs: list[Job], seen: dict[Path, Report], runs_dir: Path) -> str:
    without = sum(not _of(cell, jobs) for cell in cells)
    text = f"{len(jobs)} runs in {runs_dir}: {_counts(seen.values())}; " if jobs else ""
    text += f"{len(_complete(cells, jobs, seen))} of {len(cells) - without} cells are complete"
    return text + (f"; {without} more have no run of ours" if without else "")


def _counts(reports: Iterable[Report]) -> str:
    return ", ".join(f"{number} {state}" for state, number in Counter(r.state for r in reports).items())


def _complete(cells: list[Cell], jobs: list[Job], seen: dict[Path, Report]) -> list[Cell]:
    """Those whose runs, of which there are some, are all finished."""
    done = {path for path, report in seen.items() if report.state in ("finished", "not needed")}
    return [cell for cell in cells if (own := _of(cell, jobs)) and all(job.directory in done for job in own)]


def printable(text: str) -> str:
    """Lines without terminal control characters: a log may hold anything."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text.expandtabs(1))


def _of(cell: Cell, jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if cell.id in job.cells]


# ----------------------------------------------------------------------------------------------------- cancel


def cancel(jobs: list[Job]) -> None:
    """End the jobs of these runs, and ask the processes that work on them without SLURM to save and end."""
    live = squeue.live_jobs() if shell.available() else {}
    numbers = {job.directory: live[key].job for job in jobs if (key := str(job.directory.resolve())) in live}
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
