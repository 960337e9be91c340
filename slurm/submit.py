"""The SLURM executor: each job through submitit, dependent on those of its parents that are live. No torch here.

Truth is a run's own result file plus squeue: a finished run is skipped, a live one is reused as the dependency, any
other is submitted. So launching again is always safe. What is asked for: slurm/sbatch.py; what a job runs:
slurm/command.py; the traps: docs/slurm.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mixmask.config import UserError
from mixmask.runs import is_busy, read_result, write_atomically
from paper.cells import ROOT
from slurm import logs, sbatch, shell, squeue
from slurm.graph import Job, make_folder, needed
from slurm.sbatch import key_of
from slurm.snapshot import take
from slurm.squeue import Live

TIMEOUTS = 10_000  # how often submitit requeues a job at its time limit: as often as it takes
# What sbatch says where it does not know whether its job was accepted.
UNCERTAIN = re.compile(
    "timed? ?out|unable to contact|connect failure|connection|communication|transmitted|killed|^$", re.IGNORECASE
)
# ... where it takes no more jobs, of this user now or of anybody, or no array of so many.
FULL = re.compile("submit limit|job limit|MaxJobCount|job array|temporarily una", re.IGNORECASE)
LIMIT = re.compile(r"\b(?:Assoc|QOS)\w+")  # sbatch's own word for the limit, which the sentence after it leaves open
# What to do where it refuses a job in words that do not say so.
REMEDIES = {
    "dependency problem": "one that it waits for has ended meanwhile: launch again",
    "invalid number of nodes": "a job takes all nodes of cluster.nodelist, and has fewer: cluster.exclude names others",
}


class Full(UserError):
    """SLURM takes no more jobs, or no array of so many."""


def launch(jobs: list[Job], runs_dir: Path) -> None:
    """Submit what is needed and neither finished nor live. Raises UserError where SLURM refuses, or parents fail."""
    sbatch.check(jobs, runs_dir)
    with _one_launcher(runs_dir):
        keys = {key_of(job.directory) for job in jobs}
        clear(keys, runs_dir)
        placing = Placing(jobs, runs_dir, squeue.settled_jobs(keys), squeue.records(runs_dir))
        for job in jobs:
            placing.say(job, placing.skip_reason(job))
        sbatch.check_nodes(placing.todo)
        for group in groups(placing.todo):
            placing.submit(group, placing.earlier_array(group[0]))
        lost = placing.lost() if placing.new else {}
        placing.say_left()
    if lost:
        lines = "".join(f"\n  {directory}: {why}" for directory, why in lost.items())
        raise UserError(f"{len(lost)} runs cannot start; fix what failed and launch again{lines}")


def clear(keys: set[str], runs_dir: Path) -> None:
    """Cancel the jobs of these runs that an interrupted launch left without a command."""
    if not squeue.without_pickle(keys, runs_dir):
        return
    time.sleep(squeue.AGAIN)  # a launcher elsewhere, on a file system without locks, may be about to write it
    left = squeue.without_pickle(keys, runs_dir)
    squeue.cancel(left)
    for job, key in left.items():
        print(f"cancelled job {job} of {key}, which an interrupted launch left without a command", flush=True)


@dataclass
class Placing:
    """One launch: where each job is, by run directory."""

    jobs: list[Job]
    runs_dir: Path
    live: dict[str, Live]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the last submissions
    todo: list[Job] = field(default_factory=list)  # to be submitted, parents first
    new: dict[str, Job] = field(default_factory=dict)  # submitted by this launch
    elsewhere: set[str] = field(default_factory=set)  # a process that is no job works on it, or on its parent
    left: dict[str, Job] = field(default_factory=dict)  # for the next launch: SLURM takes no more now
    full: str = ""  # what SLURM has said of that
    snapshot: Path | None = None

    def __post_init__(self) -> None:
        self.needed = needed(self.jobs)
        self.number = {job.directory: number for number, job in enumerate(self.jobs, 1)}

    def skip_reason(self, job: Job) -> str:
        """Why `job` is not submitted, in words; empty if it is to be submitted."""
        key, parents = key_of(job.directory), [key_of(parent) for parent in job.parents]
        if job.state == "finished":
            return "finished"
        if job.directory not in self.needed:
            return "not needed: all that needs it is finished"
        again = any(key_of(other.directory) in parents for other in self.todo)
        if key in self.live and again:  # it waits for a job of its parent that has failed
            squeue.cancel([self.live.pop(key).job])
        elif key in self.live:
            live, log = self.live[key], squeue.log_path(self.runs_dir, self.live[key].job)
            return f"{live.word}, {live.about}" + (f"; log: {log}" if live.word == "running" else "")
        elif is_busy(job.directory) or self.elsewhere & set(parents):
            self.elsewhere.add(key)
            busy = job.directory if is_busy(job.directory) else job.parents[0]
            return f"not submitted: a process outside SLURM works on {busy}; launch again when it has ended"
        self.todo.append(job)
        return ""

    def submit(self, group: list[Job], before: str = "") -> str:
        """Submit one job, or several as an array, which is halved if SLURM refuses its size; returns its number.

        before: the array after whose end it starts.
        """
        self.snapshot = self.snapshot or take(ROOT, (self.runs_dir / "slurm" / "snapshots").resolve())
        if self.full or any(key_of(parent) in self.left for parent in group[0].parents):
            self.left |= {key_of(job.directory): job for job in group}
            return before
        waited = [self.live[key].job for key in map(key_of, group[0].parents) if key in self.live]
        excluded = tuple(dict.fromkeys(node for job in group for node in self.faulty_nodes(job)))
        others = {"before": before, "excluded": excluded}
        if len(group) == 1:
            asked = sbatch.options(group[0], waited, self.snapshot, **others)
        else:
            asked = sbatch.array_options(group, self.snapshot, self._manifest(group), **others)
        try:
            numbers = _submit(group, asked, self.runs_dir, self.snapshot)
        except Full as error:
            if len(group) > 1:
                half = len(group) // 2
                return self.submit(group[half:], self.submit(group[:half], before))
            if not (self.new or self.live):  # it is not the number of jobs that is too large
                raise
            self.full = str(error)
            return self.submit(group, before)
        for job, number in zip(group, numbers, strict=True):
            self._submitted(job, number, waited, excluded)
        return numbers[0].partition("_")[0]

    def earlier_array(self, like: Job) -> str:
        """The last live job of an earlier launch that counts for `parallel`; empty where there is none."""
        if not like.resources.parallel:
            return ""
        alike = {key_of(job.directory): job for job in self.jobs if _kind(job) == _kind(like)}
        live = [(self.live[key].job, alike[key]) for key in alike.keys() & self.live.keys() - self.new.keys()]
        return str(max((int(n.partition("_")[0]) for n, job in live if "_" in n or not job.parents), default=""))

    def _manifest(self, group: list[Job]) -> Path:
        """The file that lists the runs of an array's tasks, by which they are recognised."""
        directories = [key_of(job.directory) for job in group]
        manifest = self.runs_dir.resolve() / "slurm" / "arrays" / f"{sbatch.short_hash(json.dumps(directories))}.json"
        make_folder(manifest.parent)
        write_atomically(manifest, json.dumps(directories, indent=1) + "\n")
        return manifest

    def _submitted(self, job: Job, number: str, waited: list[str], excluded: tuple[str, ...]) -> None:
        key, when = key_of(job.directory), datetime.now(UTC).isoformat(timespec="seconds")
        self.live[key], self.new[key] = Live(number, "PENDING", ""), job
        values = {"directory": key, "job": number, "after": waited, "snapshot": self.snapshot.name, "submitted": when}
        squeue.record(self.runs_dir, **values, **({"exclude": excluded} if excluded else {}))
        text = f"submitted, job {number}" + (f", after {', '.join(waited)}" if waited else "")
        text += f", not on {', '.join(excluded)}, where the node made it fail" if excluded else ""
        self.say(job, f"{text}; log: {squeue.log_path(self.runs_dir, number)}")

    def faulty_nodes(self, job: Job) -> list[str]:
        """Nodes that made this run fail, now or in an earlier job."""
        last = self.records.get(key_of(job.directory), {})
        logs_of_last = logs.task_logs(self.runs_dir, last["job"]) if last else []
        return list(dict.fromkeys([*last.get("exclude", []), *logs.faulty_nodes(logs_of_last)]))

    def say_left(self) -> None:
        """What did not fit now."""
        if self.left:
            print(f"{len(self.left)} runs are left for the next launch: SLURM takes no more jobs now ({self.full})")

    def lost(self) -> dict[Path, str]:
        """Submitted jobs whose parents ended without a result meanwhile: cancelled, with the reason.

        `afterok` of a job that the controller has forgotten counts as satisfied, so what was true before the
        submission has to be true after it.
        """
        if not (orphans := self._orphans()):
            return {}
        time.sleep(squeue.AGAIN)  # a job that is being requeued, a result on its way through a network file system
        orphans = {key: parent for key, parent in self._orphans().items() if key in orphans}
        live = squeue.live_jobs()
        squeue.cancel(live[key].job for key in orphans if key in live)
        return {self.new[key].directory: self._reason(parent) for key, parent in orphans.items()}

    def _orphans(self) -> dict[str, str]:
        """Submitted job -> its parent that is neither live nor finished."""
        live = squeue.live_jobs()
        parents = ((key, key_of(parent)) for key, job in self.new.items() for parent in job.parents)
        return {key: parent for key, parent in parents if parent not in live and read_result(parent) is None}

    def _reason(self, parent: str) -> str:
        job = self.live[parent].job if parent in self.live else "?"
        return f"cancelled: job {job} of {parent} ended without a result ({squeue.log_path(self.runs_dir, job)})"

    def say(self, job: Job, state: str) -> None:
        if state:
            number = f"[{self.number[job.directory]}/{len(self.jobs)}]"
            print(f"{number} {job.stage} {job.id} ({', '.join(job.cells)}): {state}", flush=True)


def _kind(job: Job) -> tuple[Any, Any]:
    """What the jobs of an array have in common."""
    return job.resources, sbatch.layout(job)


def groups(todo: list[Job]) -> Iterator[list[Job]]:
    """What is submitted together: arrays of equal jobs that wait for none, where their number at once is limited."""
    waiting = {job.directory for job in todo}
    free = [job for job in todo if job.resources.parallel and not waiting & set(job.parents)]
    alike: dict[Any, list[Job]] = {}
    for job in free:
        alike.setdefault(_kind(job), []).append(job)
    yield from alike.values()
    together = {job.directory for job in free}
    yield from ([job] for job in todo if job.directory not in together)


def _submit(group: list[Job], asked: dict[str, Any], runs_dir: Path, snapshot: Path) -> list[str]:
    """Hand the jobs to submitit; returns their numbers. Raises Full where SLURM takes no more of them now."""
    import submitit

    folder = runs_dir.resolve() / "slurm"
    resources = group[0].resources
    try:
        with shell.clean_environment(), contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the error
            executor = submitit.SlurmExecutor(folder / "%j", max_num_timeout=TIMEOUTS, python=resources.python or None)
            values = sbatch.parameters(group[0], asked, snapshot, folder)
            executor.update_parameters(**values, array_parallelism=max(1, resources.parallel))
            submitted = executor.submit_array([sbatch.command(job, runs_dir) for job in group])
    except submitit.core.utils.FailedJobError as error:
        text = " ".join(str(error).split())
        if FULL.search(text) and all("Submit" in limit for limit in LIMIT.findall(text)):
            raise Full(f"SLURM refused {group[0].id}: {text}") from None
        raise UserError(_failure(group, text, runs_dir)) from None
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    return [job.job_id for job in submitted]


def _failure(group: list[Job], text: str, runs_dir: Path) -> str:
    """The error for a failed sbatch: SLURM may have accepted the job nevertheless, which is then cancelled."""
    if not UNCERTAIN.search(text):
        remedies = [remedy for words, remedy in REMEDIES.items() if words in text]
        return "; ".join([f"SLURM refused {group[0].id}: {text}", *remedies])
    time.sleep(squeue.AGAIN)
    said = f"sbatch has failed for {group[0].id}, which SLURM may have accepted ({text})"
    try:
        left = squeue.without_pickle({key_of(job.directory) for job in group}, runs_dir)
        squeue.cancel(left)
    except UserError as error:
        return f"{said}; {error}; launch again: what it has left is then cancelled"
    found = f"cancelled what it has left, {', '.join(sorted(left))}" if left else "it is not in the queue"
    return f"{said}; {found}; launch again"


@contextlib.contextmanager
def _one_launcher(runs_dir: Path) -> Iterator[None]:
    """Two launchers on one runs directory take turns, so that both see what the other has submitted."""
    make_folder(runs_dir)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(open(runs_dir / ".launch.lock", "w"))
            _lock(lock, runs_dir)
        except OSError as error:
            raise UserError(f"cannot write or lock {runs_dir}/.launch.lock: {error.strerror}") from None
        yield


def _lock(lock: IO[str], runs_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another launch is submitting to {runs_dir}; waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
