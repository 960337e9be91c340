"""What SLURM says about the jobs of a runs directory: which live, how others ended. No torch here.

A live job is recognised by its comment: its run's directory; of a job array, the file that lists the directories of its
tasks. What has ended, and is no longer known to the controller, is looked up in runs/slurm/jobs.jsonl and in sacct.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.config import UserError
from slurm import shell

AGAIN = 2.0  # seconds until a second look: between two of its states a job may be in none
ENDING = 30.0  # seconds to wait for jobs that are ending: some of them are about to be requeued
ACCOUNTING = 10.0  # seconds for an answer of sacct, without which `status` knows less
silent: set[str] = set()  # programs that have not answered this process in time, and are not asked again
FORMAT = "--format=%i|%T|%R|%k"
JOB = re.compile(r"\s*(\d[^|]*)\|([^|]+)\|([^|]*)\|(.*)")  # a line of it
MINE = f"--user={os.getuid()}"  # `squeue --me` is younger

# Reasons for waiting that do not end by themselves: a hold, or an impossible request.
HELD = re.compile(r"JobHeld|.*(requeued.held|held.state)", re.IGNORECASE)
NEVER = re.compile(
    r"Partition(Config|TimeLimit|NodeLimit)|BadConstraints|DependencyNeverSatisfied|Invalid(Account|QOS)"
    r"|(Account|QOS)NotAllowed|(Assoc|QOS)\w*PerJob|Reservation(Deleted|Invalid)|Job's \w+ not permitted"
)
# SLURM's word for what neither waits nor runs: ours, and what to do.
OTHERWISE = {
    "COMPLETING": ("ending", "look again in a minute"),
    "CONFIGURING": ("starting", "its nodes are being made ready"),
    "POWER_UP_NODE": ("starting", "its nodes are being made ready"),
    "STAGE_OUT": ("ending", "look again in a minute"),
    "REQUEUED": ("waiting", ""),
    "SUSPENDED": ("suspended", "it goes on when SLURM lets it; by hand: scontrol resume {job}"),
    "STOPPED": ("suspended", "it goes on when SLURM lets it; by hand: scancel --signal=CONT {job}"),
    "REQUEUE_HOLD": ("held", "scontrol release {job}"),
    "SPECIAL_EXIT": ("held", "scontrol release {job}"),
    "RESV_DEL_HOLD": ("held", "its reservation is gone: cancel, fix, launch again"),
}


@dataclass(frozen=True)
class Live:
    """A job that has not ended."""

    job: str  # 12, or 12_3 in an array
    state: str  # SLURM's word: PENDING, RUNNING, ...
    reason: str  # why it waits, or where it runs

    @property
    def word(self) -> str:
        """waiting, held, stuck, starting, running, suspended or ending."""
        return self._told[0]

    @property
    def about(self) -> str:
        """The job, why it waits or where it runs, and what there is to do."""
        where = {"running": " on ", "waiting": ": "}.get(self.word)
        what = f"{where}{self.reason}" if where else f": {self.reason or self.state}"
        remedy = self._told[1].format(job=self.job)
        return f"job {self.job}{what}" + (f"; {remedy}" if remedy else "")

    @property
    def _told(self) -> tuple[str, str]:
        if self.state != "PENDING":
            return OTHERWISE.get(self.state, ("running", ""))
        if HELD.match(self.reason):
            return "held", "it starts after: scontrol release {job}"
        if NEVER.match(self.reason):
            return "stuck", "it will not start by itself: cancel, fix, launch again"
        return "waiting", ""


def live_jobs() -> dict[str, Live]:
    """Run directory -> job, of this user's jobs that wait, run or are ending. Raises UserError."""
    return dict(all_jobs())


def all_jobs() -> list[tuple[str, Live]]:
    """`live_jobs`, where a run may have more than one. Raises UserError."""
    jobs = []
    lines = [line for line in shell.ask("squeue", "--noheader", MINE, "--array", FORMAT).splitlines() if line.strip()]
    if lines and not JOB.match(lines[0]):
        raise UserError(f"squeue: expected jobs, found {lines[0].strip()!r}")
    for found in filter(None, map(JOB.match, lines)):  # the comment of a user's own job may have several lines
        job, state, reason, comment = (word.strip() for word in found.groups())
        if directory := _directory(job, comment):
            jobs.append((directory, Live(job, state, reason.strip("()"))))
    return jobs


def without_pickle(directories: set[str], runs_dir: Path) -> dict[str, str]:
    """Job -> run directory, of the jobs of these runs whose command submitit was kept from writing.

    It writes that once sbatch has returned the job's number: a launcher that is killed, or an sbatch that fails, after
    SLURM has accepted the job leaves one that can only fail. Only for one launcher at a time.
    """
    jobs = {live.job: directory for directory, live in all_jobs() if directory in directories}
    return {job: directory for job, directory in jobs.items() if not pickle_path(runs_dir, job).exists()}


def pickle_path(runs_dir: Path, job: str) -> Path:
    """The file of the job's command, as submitit writes it."""
    return runs_dir / "slurm" / job / f"{job}_submitted.pkl"


def settled_jobs(directories: set[str]) -> dict[str, Live]:
    """`live_jobs` once none of these is about to end (or after half a minute: a node may be slow to say so)."""
    end = time.monotonic() + ENDING
    while True:
        live = live_jobs()
        if time.monotonic() > end or all(live[d].state != "COMPLETING" for d in live.keys() & directories):
            return live
        time.sleep(0.5)


def _directory(job: str, comment: str) -> str:
    """The run directory of a job with this comment; empty for a job of another kind."""
    if not comment.endswith(".json"):
        return comment
    task = job.partition("_")[2]
    directories = _tasks(comment)
    return directories[int(task)] if task.isdigit() and int(task) < len(directories) else ""


@functools.cache
def _tasks(path: str) -> list[str]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # an array of somebody else, or of a runs directory that is gone
        return []


def ended_as(jobs: Iterable[str]) -> dict[str, str]:
    """Job -> how it ended (FAILED, TIMEOUT, ...): as the controller remembers it, or accounting, which may lag."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    remembered = shell.ask("squeue", "--noheader", MINE, "--array", "--states=all", "--format=%i|%T").splitlines()
    states = dict(line.strip().split("|") for line in remembered if line.count("|") == 1)
    states = _accounted([job for job in wanted if job not in states]) | states
    ends = {job: states.get(job) or states.get(array_of(job), "PENDING") for job in wanted}
    return {job: state for job, state in ends.items() if state not in ("PENDING", "RUNNING")}


def array_of(job: str) -> str:
    """12 of 12_3: under this number stand, together, the tasks that never began."""
    return job.partition("_")[0]


def _accounted(wanted: list[str]) -> dict[str, str]:
    """As `sacct` says, of all tasks of their arrays; nothing, and a note, where it does not answer in time."""
    if not wanted or not shutil.which("sacct") or "sacct" in silent:
        return {}
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", "--jobs"]
    try:
        answer = shell.run(*words, ",".join(dict.fromkeys(map(array_of, wanted))), patience=ACCOUNTING).stdout
    except UserError:
        silent.add("sacct")
        print(f"note: sacct has not answered within {ACCOUNTING:g} s; how jobs of the past ended is not known")
        return {}
    lines = [line.split("|") for line in answer.splitlines() if line.count("|") == 1]
    return {job.partition("_[")[0]: state.split()[0] for job, state in lines if state}  # 12_[3-5]; "CANCELLED by 0"


def records(runs_dir: Path) -> dict[str, dict[str, Any]]:
    """Run directory -> the record of its last submission; a line that a crash cut short is passed over."""
    path = runs_dir / "slurm" / "jobs.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    last = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            last[values["directory"]] = values
    return last


def record(runs_dir: Path, **values: Any) -> None:
    """Note a submission; for people and for `status`: no launch depends on it."""
    path = runs_dir / "slurm" / "jobs.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def log_path(runs_dir: Path, job: str) -> Path:
    """What the job's first task has printed."""
    return runs_dir / "slurm" / job / f"{job}_0_log.out"


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs and check that they end. Raises UserError if SLURM refuses, or if one of them goes on."""
    if not (numbers := set(jobs)):
        return
    shell.ask("scancel", *sorted(numbers))
    end = time.monotonic() + ENDING
    while left := {live.job for _, live in all_jobs() if live.job in numbers and live.state != "COMPLETING"}:
        if time.monotonic() > end:
            raise UserError(f"scancel has not ended {', '.join(sorted(left))}: ask squeue, or cancel again")
        time.sleep(0.5)
