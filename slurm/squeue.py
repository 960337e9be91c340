"""What SLURM says about the jobs of a runs directory: which live, how others ended. No torch here.

A live job is recognised by its comment: its run's directory; of a job array, the file that lists the directories of its
tasks. What has ended, and is no longer known to the controller, is looked up in runs/slurm/jobs.jsonl and in sacct.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.config import UserError

AGAIN = 2.0  # seconds until a second look: between two of its states a job may be in none
ENDING = 30.0  # seconds to wait for jobs that are ending: some of them are about to be requeued
PATIENCE = 60  # seconds for an answer of SLURM's programs
NO_ANSWER = "SLURM is installed, but its controller does not answer"
# Why a job waits, where no end of waiting is in sight: what it asks for, or a hold.
NEVER = re.compile(
    r"Partition(Config|TimeLimit|NodeLimit)|BadConstraints|DependencyNeverSatisfied|Invalid(Account|QOS)"
    r"|(Account|QOS)NotAllowed|(Assoc|QOS)\w*PerJob|JobHeld|.*(requeued.held|held.state)"
)


@dataclass(frozen=True)
class Live:
    """A job that waits or runs."""

    job: str  # 12, or 12_3 in an array
    state: str  # SLURM's word: PENDING, RUNNING, ...
    reason: str  # why it waits, or where it runs

    @property
    def stuck(self) -> bool:
        """It waits for what does not come by itself."""
        return self.state == "PENDING" and bool(NEVER.match(self.reason))


def available() -> bool:
    """Whether SLURM is here: sbatch on PATH and a configuration. Raises UserError where it is and does not answer."""
    if not shutil.which("sbatch"):
        return False
    try:
        answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        raise UserError(NO_ANSWER) from None
    if " UP" in answer.stdout:  # of a controller and its deputy one is enough
        return True
    if "configuration source" in answer.stderr:
        return False
    said = (answer.stdout + answer.stderr).strip().splitlines()[:1]  # a banner may follow
    raise UserError(": ".join([NO_ANSWER, *said]))


def live_jobs() -> dict[str, Live]:
    """Run directory -> job, of this user's jobs that wait, run or are ending. Raises UserError."""
    return dict(all_jobs())


def all_jobs() -> list[tuple[str, Live]]:
    """`live_jobs`, where a run may have more than one. Raises UserError."""
    found = []
    answer = _ask("squeue", "--noheader", "--me", "--array", "--format=%i|%T|%R|%k")
    for line in answer.splitlines():
        job, state, reason, comment = (word.strip() for word in line.split("|", 3))
        directory, live = _directory(job, comment), Live(job, state, reason.strip("()"))
        if live.stuck:
            live = dataclasses.replace(live, reason=f"{live.reason}, which has no end by itself: cancel, mend, launch")
        if directory:
            found.append((directory, live))
    return found


def without_pickle(directories: set[str], runs_dir: Path) -> dict[str, str]:
    """Job -> run directory, of the jobs of these runs that submitit was kept from giving what they are to run.

    It writes that once sbatch has told the job's number: a launcher that is killed, or an sbatch that fails, after
    SLURM has accepted the job leaves one that can only fail. Only for one launcher at a time.
    """
    found = {live.job: directory for directory, live in all_jobs() if directory in directories}
    return {job: directory for job, directory in found.items() if not pickle_path(runs_dir, job).exists()}


def pickle_path(runs_dir: Path, job: str) -> Path:
    """What the job is to run, as submitit writes it."""
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
    remembered = _ask("squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i|%T").splitlines()
    states = _accounted(wanted) | dict(line.strip().split("|") for line in remembered)
    return {job: states[job] for job in wanted if states.get(job, "PENDING") not in ("PENDING", "RUNNING")}


def _accounted(wanted: list[str]) -> dict[str, str]:
    if not shutil.which("sacct"):
        return {}
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", "--jobs"]
    answer = subprocess.run([*words, ",".join(wanted)], capture_output=True, text=True)
    lines = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 1]
    states = {job.partition("[")[0]: state.split()[0] for job, state in lines if state}  # "CANCELLED by 0"
    never_began = {job: states.get(job.partition("_")[0] + "_") for job in wanted}  # 12_[3-5]: of an array, together
    return {job: state for job in wanted if (state := states.get(job) or never_began[job])}


def records(runs_dir: Path) -> dict[str, dict[str, Any]]:
    """Run directory -> the record of its last submission; a line that is none, such as one cut off, is passed over."""
    path = runs_dir / "slurm" / "jobs.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    found = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if _is_record(values):
                found[values["directory"]] = values
    return found


def _is_record(values: Any) -> bool:
    """Whether it names a run's directory and the number of a job, 12 or 12_3."""
    words = [values.get("directory"), values.get("job")] if isinstance(values, dict) else [None]
    return all(isinstance(word, str) for word in words) and re.fullmatch(r"\d+(_\d+)?", words[1]) is not None


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
    """End jobs. Raises UserError where SLURM refuses."""
    if numbers := list(jobs):
        _ask("scancel", *numbers)


def _ask(*words: str) -> str:
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise UserError(f"{NO_ANSWER}: {words[0]} has waited for {PATIENCE} s") from None
    if answer.returncode:
        raise UserError(f"{words[0]} failed: {' '.join(answer.stderr.split())}")
    return answer.stdout
