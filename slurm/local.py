"""The local executor: jobs side by side on this machine, as many as its cores and memory allow, and one on each GPU.

Each job is the printed command in a process of its own, started once its parents are finished. What it prints goes to
DIR/output.log, and is shown as it comes, behind the job's number. No torch here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mixmask.config import UserError
from mixmask.config.cli import INTERRUPTED
from mixmask.runs import is_busy, read_result
from paper.cells import ROOT
from slurm import gpus, shell, squeue
from slurm.graph import Job, make_folder, needed
from slurm.squeue import Live
from slurm.status import headline

LOOK = 0.1  # seconds between two looks at what runs
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(jobs: list[Job]) -> None:
    """Run what is needed and not finished. Raises UserError, naming what failed and where its log is.

    Ctrl-C lets the running jobs save, and exits with status 130; so does a job that was told to stop by itself.
    """
    wanted = needed(jobs)
    todo = [job for job in jobs if job.directory in wanted]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished already", flush=True)
    if not todo:
        return
    with _stop_signals() as told:
        batch = Batch(todo, _queued(), told)
        stopped = batch.run()
    if stopped:
        done = sum(job.state == "finished" for job in jobs)
        print(f"stopped: {done} of {len(jobs)} runs are finished and kept; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if batch.failed:
        lines = "".join(f"\n  {directory}: {failure}" for directory, failure in batch.failed.items())
        raise UserError(f"{len(batch.failed)} of {len(todo)} runs did not finish; the same command tries again{lines}")


def _queued() -> dict[str, Live]:
    """Run directory -> SLURM job, if SLURM is installed; prints a note if it does not answer."""
    try:
        return squeue.live_jobs() if shell.available() else {}
    except UserError as error:
        print(f"note: {error}; runs that have a SLURM job are not left to it", flush=True)
        return {}


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals that have asked for an end, as they come; those that are ignored (nohup) stay so."""
    told: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, lambda number, _: told.append(number))
    try:
        yield told
    finally:
        for number in STOPPING:
            signal.signal(number, before[number])


@dataclass
class Running:
    """A job and its process."""

    job: Job
    number: str  # [3/12]
    process: subprocess.Popen
    output: BinaryIO  # its log, as far as it has been shown
    gpus: list[str]  # its own
    start: float = field(default_factory=time.monotonic)

    def show(self) -> None:
        """What it has printed since the last time, in whole lines."""
        for line in iter(self.output.readline, b""):
            if not line.endswith(b"\n") and self.process.poll() is None:
                self.output.seek(-len(line), os.SEEK_CUR)
                break
            sys.stdout.buffer.write(f"{self.number} ".encode() + line.rstrip(b"\n") + b"\n")
        sys.stdout.buffer.flush()


class Batch:
    """The jobs of one launch: those that wait, those that run, and what went wrong, by run directory."""

    def __init__(self, todo: list[Job], queued: dict[str, Live], told: list[int]):
        self.queued, self.told = queued, told
        self.number = {job.directory: f"[{number}/{len(todo)}]" for number, job in enumerate(todo, 1)}
        self.waiting = sorted(todo, key=lambda job: -job.expected)  # the longest first: none is left for the end
        self.running: list[Running] = []
        self.failed: dict[Path, str] = {}
        self.gpus = gpus.visible() if any(map(gpus.wants, todo)) else []
        if self.gpus:
            print(f"one job on each visible GPU: {', '.join(self.gpus)}", flush=True)

    def run(self) -> bool:
        """Run them all; returns whether it was told to stop."""
        try:
            while (self.waiting or self.running) and not self.told:
                self._start_what_can()
                time.sleep(LOOK)
                for one in list(self.running):
                    one.show()
                    if one.process.poll() is not None:
                        self._ended(one)
            return bool(self.told)
        finally:
            self._stop()

    def _start_what_can(self) -> None:
        unfinished = {job.directory for job in self.waiting} | {one.job.directory for one in self.running}
        for job in list(self.waiting):
            if not unfinished & set(job.parents) and fits(job, [one.job for one in self.running], len(self.gpus)):
                self.waiting.remove(job)
                failed = [parent for parent in job.parents if parent in self.failed]
                failure = f"skipped: it needs {failed[0]}" if failed else _busy(job, self.queued)
                if failure:
                    self._fail(job, failure)
                else:
                    self._start(job)

    def _start(self, job: Job) -> None:
        busy = {gpu for one in self.running for gpu in one.gpus}
        own = [gpu for gpu in self.gpus if gpu not in busy][: gpus.taken(job, len(self.gpus))]
        where = f" on GPU {', '.join(own)}" if own else ""
        print(f"{self.number[job.directory]} {job.stage} {job.id} ({', '.join(job.cells)}){where}", flush=True)
        log = job.directory / "output.log"
        make_folder(log.parent)
        try:
            with open(log, "ab") as file:
                shown = file.tell()
                process = subprocess.Popen(
                    [sys.executable, *job.command[1:]],
                    cwd=ROOT,
                    env=_environment(job, own, len(self.gpus)),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
                )
                output = open(log, "rb")  # noqa: SIM115 - closed when the job has ended
                output.seek(shown)
        except OSError as error:
            raise UserError(f"cannot write {log}: {error.strerror}") from None
        self.running.append(Running(job, self.number[job.directory], process, output, own))

    def _ended(self, one: Running) -> None:
        one.show()
        one.output.close()
        self.running.remove(one)
        status, result = one.process.returncode, read_result(one.job.directory)
        if status == INTERRUPTED:  # told to stop, as by `launch.py cancel`
            self.told.append(signal.SIGINT)
        elif status or result is None:
            log = one.job.directory / "output.log"
            self._fail(one.job, _busy(one.job, {}) or f"failed (exit status {status}); its output is in {log}")
        else:
            seconds = time.monotonic() - one.start
            print(f"{one.number} done in {seconds:.0f} s, {headline(result['metrics'])}", flush=True)

    def _fail(self, job: Job, failure: str) -> None:
        self.failed[job.directory] = failure
        print(f"{self.number[job.directory]} {failure}", flush=True)

    def _stop(self) -> None:
        """Ask the running jobs to save and stop, and wait for them; a second signal ends the wait."""
        for one in self.running:
            one.process.send_signal(signal.SIGINT)
        asked = len(self.told)
        while any(one.process.poll() is None for one in self.running):
            if len(self.told) > asked:
                for one in self.running:
                    one.process.kill()
            time.sleep(LOOK)


def fits(job: Job, running: list[Job], visible: int = 0) -> bool:
    """Whether this machine can run it beside these: by memory, and one job per GPU or as many as the cores allow.

    Where no GPU is `visible`, a job that asks for one runs alone.
    """
    if not running:
        return True
    together = [job, *running]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if sum(each.resources.memory_gb for each in together) > memory:
        return False
    if not visible and any(map(gpus.wants, together)):
        return False
    if taken := gpus.taken(job, visible):
        return taken + sum(gpus.taken(each, visible) for each in running) <= visible
    return sum(each.resources.cpus for each in together if not gpus.wants(each)) <= _cores()


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(job: Job, own: list[str], visible: int) -> dict[str, str]:
    """As many threads as it has cores (beside other GPUs' jobs an equal share), where the user has not chosen."""
    cores = min(job.resources.cpus, max(1, _cores() // max(1, visible)))
    chosen = {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
    return {**chosen, **seen, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _busy(job: Job, queued: dict[str, Live]) -> str:
    """Whether somebody else, such as another launch or SLURM, works on it: in words, or nothing."""
    if live := queued.get(str(job.directory.resolve())):
        return f"left to SLURM: job {live.job} is {live.state}"
    return "left to the other process that is working on it" if is_busy(job.directory) else ""
