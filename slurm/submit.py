"""The SLURM executor: each job through submitit, dependent on those of its parents that are live. No torch here.

Truth is a run's own result file plus squeue: a finished run is skipped, a live one is reused as the dependency, any
other is submitted. So launching again is always safe. What a job runs: slurm/command.py; the traps: docs/slurm.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mixmask.config import ConfigError, UserError, fitting_processes
from mixmask.runs import is_busy, read_result, write_atomically
from paper.cells import ROOT
from slurm import squeue
from slurm.command import Command
from slurm.graph import Cluster, Job, make_folder, needed
from slurm.snapshot import take
from slurm.squeue import Live

TIMEOUTS = 10_000  # how often submitit requeues a job at its time limit: as often as it takes
REFUSED = set("%:\\\"'\n")  # of the runs directory's path: sbatch or PYTHONPATH would take it apart
# What sbatch says where it does not know whether its job was accepted.
UNCERTAIN = re.compile(
    "timed? ?out|unable to contact|connect failure|connection|communication|transmitted|killed|^$", re.IGNORECASE
)


def launch(jobs: list[Job], runs_dir: Path) -> None:
    """Submit what is needed and neither finished nor live. Raises UserError where SLURM refuses, or parents fail."""
    check(jobs, runs_dir)
    with _one_launcher(runs_dir):
        keys = {_key(job.directory) for job in jobs}
        clear(keys, runs_dir)
        placing = Placing(jobs, runs_dir, squeue.settled_jobs(keys))
        for job in jobs:
            placing.say(job, placing.leave(job))
        for group in _groups(placing.todo):
            placing.submit(group)
        lost = placing.lost() if placing.new else {}
    if lost:
        lines = "".join(f"\n  {directory}: {why}" for directory, why in lost.items())
        raise UserError(f"{len(lost)} runs cannot start; mend what failed and launch again{lines}")


def check(jobs: list[Job], runs_dir: Path) -> None:
    """Raises UserError for what sbatch would take, and no job would survive."""
    path = str(runs_dir.resolve())
    if wrong := ", ".join(map(repr, sorted(set(path) & REFUSED))):
        raise UserError(
            f"the runs directory {path!r} has {wrong} in its path, which sbatch or PYTHONPATH would take apart"
        )
    for asked in {job.resources for job in jobs}:
        if asked.warning_seconds >= (limit := 60 * _minutes(asked)):
            raise ConfigError(
                f"cluster.warning_seconds: {asked.warning_seconds} s before the time limit, which is {limit} s "
                f"(cluster.hours {asked.hours:g}); expected less"
            )


def clear(keys: set[str], runs_dir: Path) -> None:
    """Cancel the jobs of these runs that a launch before has left without what they are to run."""
    if not squeue.without_pickle(keys, runs_dir):
        return
    time.sleep(squeue.AGAIN)  # a launcher elsewhere, on a file system without locks, may be about to write it
    left = squeue.without_pickle(keys, runs_dir)
    squeue.cancel(left)
    for job, key in left.items():
        print(
            f"cancelled job {job} of {key}, which an interrupted launch has left without what it is to run", flush=True
        )


@dataclass
class Placing:
    """One launch: where each job is, by run directory."""

    jobs: list[Job]
    runs_dir: Path
    live: dict[str, Live]
    todo: list[Job] = field(default_factory=list)  # to be submitted, parents first
    new: dict[str, Job] = field(default_factory=dict)  # submitted by this launch
    elsewhere: set[str] = field(default_factory=set)  # a process that is no job works on it, or on its parent
    snapshot: Path | None = None

    def __post_init__(self) -> None:
        self.needed = needed(self.jobs)
        self.number = {job.directory: number for number, job in enumerate(self.jobs, 1)}

    def leave(self, job: Job) -> str:
        """Why `job` is not submitted, in words; where nothing, it is to do."""
        key, parents = _key(job.directory), [_key(parent) for parent in job.parents]
        if job.state == "finished":
            return "finished"
        if job.directory not in self.needed:
            return "not needed: all that needs it is finished"
        again = any(_key(other.directory) in parents for other in self.todo)
        if key in self.live and again:  # it waits for a job of its parent that has failed
            squeue.cancel([self.live.pop(key).job])
        elif key in self.live:
            live = self.live[key]
            return f"live, job {live.job}" + (f": {live.reason}" if live.stuck else "")
        elif is_busy(job.directory) or self.elsewhere & set(parents):
            self.elsewhere.add(key)
            busy = job.directory if is_busy(job.directory) else job.parents[0]
            return f"not submitted: a process outside SLURM works on {busy}; launch again when it has ended"
        self.todo.append(job)
        return ""

    def submit(self, group: list[Job]) -> None:
        """Submit one job, or several as an array."""
        self.snapshot = self.snapshot or take(ROOT, (self.runs_dir / "slurm" / "snapshots").resolve())
        waited = [self.live[key].job for key in map(_key, group[0].parents) if key in self.live]
        for job, number in zip(group, _submit(group, waited, self.runs_dir, self.snapshot), strict=True):
            key = _key(job.directory)
            self.live[key], self.new[key] = Live(number, "PENDING", ""), job
            when = datetime.now(UTC).isoformat(timespec="seconds")
            squeue.record(
                self.runs_dir, directory=key, job=number, after=waited, snapshot=self.snapshot.name, submitted=when
            )
            self.say(job, f"submitted, job {number}" + (f", after {', '.join(waited)}" if waited else ""))

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
        parents = ((key, _key(parent)) for key, job in self.new.items() for parent in job.parents)
        return {key: parent for key, parent in parents if parent not in live and read_result(parent) is None}

    def _reason(self, parent: str) -> str:
        job = self.live[parent].job if parent in self.live else "?"
        return f"cancelled: job {job} of {parent} ended without a result ({squeue.log_path(self.runs_dir, job)})"

    def say(self, job: Job, state: str) -> None:
        if state:
            number = f"[{self.number[job.directory]}/{len(self.jobs)}]"
            print(f"{number} {job.stage} {job.id} ({', '.join(job.cells)}): {state}", flush=True)


def _key(directory: Path) -> str:
    return str(directory.resolve())


# -------------------------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Layout:
    """The processes of a job: so many nodes, so many processes (and GPUs) on each."""

    nodes: int
    tasks: int


def layout(job: Job) -> Layout:
    """The largest number of processes that the run can be shared by and the settings allow, on the fewest nodes."""
    asked = job.resources
    each = max(1, asked.gpus)
    most = asked.nodes * asked.gpus or 1
    for processes in sorted(fitting_processes(job.config), reverse=True):
        for nodes in range(1, asked.nodes + 1):
            if processes <= most and processes % nodes == 0 and processes // nodes <= each:
                return Layout(nodes, processes // nodes)
    return Layout(1, 1)


def _groups(todo: list[Job]) -> Iterator[list[Job]]:
    """What is submitted together: arrays of equal jobs that wait for none, where their number at once is limited."""
    waiting = {job.directory for job in todo}
    free = [job for job in todo if job.resources.parallel and not waiting & set(job.parents)]
    alike: dict[Any, list[Job]] = {}
    for job in free:
        alike.setdefault((job.resources, layout(job)), []).append(job)
    yield from alike.values()
    together = {job.directory for job in free}
    yield from ([job] for job in todo if job.directory not in together)


def parameters(job: Job, waited: list[str], snapshot: Path) -> dict[str, Any]:
    """sbatch's parameters, as submitit calls them, of `job`, which starts once the jobs `waited` have succeeded."""
    asked, where = job.resources, layout(job)
    after = f"afterok:{':'.join(waited)}," if waited else ""
    values = {
        "job_name": f"{job.id}@{_short(_key(job.directory))}",
        "comment": _key(job.directory),
        "time": _minutes(asked),
        "nodes": where.nodes,
        "ntasks_per_node": where.tasks,
        "cpus_per_task": asked.cpus,
        "mem": f"{asked.memory_gb * where.tasks}GB",
        "gpus_per_node": where.tasks if asked.gpus else None,
        "partition": asked.partition,
        "account": asked.account,
        "constraint": asked.constraint,
        "signal_delay_s": asked.warning_seconds,
        "dependency": f"{after}singleton",
        "stderr_to_stdout": True,
        "additional_parameters": {"kill-on-invalid-dep": "yes", "requeue": True, "chdir": str(snapshot)},
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": [
            f'export PYTHONPATH={shlex.quote(str(snapshot))}:"$PYTHONPATH"',
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{asked.cpus}}} OMP_WAIT_POLICY=${{OMP_WAIT_POLICY:-PASSIVE}}",
        ],
    }
    return {key: value for key, value in values.items() if value not in (None, "")}


def _minutes(asked: Cluster) -> int:
    """The time limit, which SLURM has in whole minutes."""
    return max(1, round(60 * asked.hours))


def array_parameters(group: list[Job], snapshot: Path, manifest: Path) -> dict[str, Any]:
    """Of an array: its comment names the file that lists its runs. Its tasks share a name, so `singleton` is left out:
    it would run one at a time."""
    values = parameters(group[0], [], snapshot)
    del values["dependency"]
    name = f"{group[0].stage}-{len(group)}-runs@{_short(str(manifest))}"
    return {
        **values,
        "job_name": name,
        "comment": str(manifest),
        "array_parallelism": group[0].resources.parallel,
        "map_count": len(group),
    }


def command(job: Job) -> Command:
    """What the job runs, with a data directory that does not depend on where it runs."""
    words = job.command
    root = job.config.run.data_root
    if "--config" in words and not Path(root).is_absolute():  # a stage without recipes reads no data
        words += ("--set", f"run.data_root={ROOT / root}")
    parents = tuple(map(_key, job.parents))
    return Command(words, _key(job.directory), parents, job.resources.warning_seconds)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _submit(group: list[Job], waited: list[str], runs_dir: Path, snapshot: Path) -> list[str]:
    """Hand the jobs to submitit; returns their numbers."""
    import submitit

    folder = runs_dir.resolve() / "slurm"
    executor = submitit.SlurmExecutor(folder / "%j", max_num_timeout=TIMEOUTS)
    if len(group) == 1:
        executor.update_parameters(**parameters(group[0], waited, snapshot))
    else:
        directories = [_key(job.directory) for job in group]
        manifest = folder / "arrays" / f"{_short(json.dumps(directories))}.json"
        make_folder(manifest.parent)
        write_atomically(manifest, json.dumps(directories, indent=1) + "\n")
        values = array_parameters(group, snapshot, manifest)
        del values["map_count"]  # submitit sets it
        executor.update_parameters(**values)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the error, too
            return [submitted.job_id for submitted in executor.submit_array([command(job) for job in group])]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(_failure(group, " ".join(str(error).split()), runs_dir)) from None
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def _failure(group: list[Job], text: str, runs_dir: Path) -> str:
    """What to make of an sbatch that has failed: SLURM may have accepted the job nevertheless, which is cancelled."""
    if not UNCERTAIN.search(text):
        return f"SLURM refused {group[0].id}: {text}"
    time.sleep(squeue.AGAIN)
    said = f"sbatch has failed for {group[0].id}, which SLURM may have accepted ({text})"
    try:
        left = squeue.without_pickle({_key(job.directory) for job in group}, runs_dir)
        squeue.cancel(left)
    except UserError as error:
        return f"{said}; {error}; launch again: what it has left is then cancelled"
    found = f"cancelled what it has left, {', '.join(sorted(left))}" if left else "it is not in the queue"
    return f"{said}; {found}; launch again"


def batch_text(job: Job, runs_dir: Path) -> str:
    """The batch script of `job` as `sbatch` gets it; the parents' job numbers and the copy of the code are to come."""
    from submitit.slurm.slurm import _make_sbatch_string

    check([job], runs_dir)
    folder = runs_dir.resolve() / "slurm"
    waited = [f"<job of {parent.name}>" for parent in job.parents if read_result(parent) is None]
    values = parameters(job, waited, folder / "snapshots" / "<copy of the code>")
    run = shlex.join(["python", "-u", "-m", "submitit.core._submit", f"{folder}/%j"])
    return _make_sbatch_string(run, folder / "%j", **values)


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
