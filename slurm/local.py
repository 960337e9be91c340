"""The local executor: jobs in topological order, one at a time, on this machine. No torch here.

One start-up of torch serves all: a fork server imports it once, and each job is a fork that runs the printed command's
script with the printed command's arguments. A job's output is shown as it comes and kept in DIR/output.log.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import multiprocessing.process
import os
import pty
import runpy
import signal
import sys
import termios
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path

from mixmask.config import UserError
from mixmask.runs import is_busy, read_result
from paper.cells import ROOT
from slurm import squeue
from slurm.graph import Job, make_folder, needed
from slurm.squeue import Live
from slurm.status import headline

PRELOADED = ("torch", "torchvision")  # imported once, for all jobs
INTERRUPTED = 130  # exit status of a job that saved and ended because it was told to
LOOK = 1.0  # seconds: a signal that comes just before a wait begins does not end it, and is seen after it
STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def launch(jobs: list[Job]) -> None:
    """Run what is needed and not finished. Raises UserError, naming what failed and where its log is.

    Ctrl-C lets the running job save, and exits with status 130; so does a job that was told to stop by itself.
    """
    wanted = needed(jobs)
    todo = [job for job in jobs if job.directory in wanted]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished already")
    if not todo:
        return
    queued = _queued()
    _prepare(todo[0].resources.cpus)
    try:
        failed = _run_in_order(todo, queued)
    except KeyboardInterrupt:
        done = sum(job.state == "finished" for job in jobs)
        print(f"stopped: {done} of {len(jobs)} runs are finished and kept; the same command continues", file=sys.stderr)
        sys.exit(130)
    if failed:
        lines = "".join(f"\n  {directory}: {failure}" for directory, failure in failed.items())
        raise UserError(f"{len(failed)} of {len(todo)} runs did not finish; the same command tries again{lines}")


def _queued() -> dict[str, Live]:
    """Run directory -> job, of SLURM's, where there is one; a line where it does not answer."""
    try:
        return squeue.live_jobs() if squeue.available() else {}
    except UserError as error:
        print(f"note: {error}; a run that it has a job for is not left to it", flush=True)
        return {}


def _run_in_order(todo: list[Job], queued: dict[str, Live]) -> dict[Path, str]:
    """Run each job whose parents have not failed. Returns what went wrong, by run directory."""
    failed: dict[Path, str] = {}
    for number, job in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {job.stage} {job.id} ({', '.join(job.cells)})", flush=True)
        missing = [parent for parent in job.parents if parent in failed]
        failure = f"skipped: it needs {missing[0]}" if missing else _busy(job, queued) or _run(job)
        if failure:
            failed[job.directory] = failure
            print(f"[{number}/{len(todo)}] {failure}", flush=True)
    return failed


def _busy(job: Job, queued: dict[str, Live]) -> str:
    """Whether somebody else, such as another launch or SLURM, works on it: in words, or nothing."""
    if live := queued.get(str(job.directory.resolve())):
        return f"left to SLURM: job {live.job} is {live.state}"
    return "left to the other process that is working on it" if is_busy(job.directory) else ""


def _prepare(cpus: int) -> None:
    """The fork server and its threads, where the user has not chosen; being told to end is treated as Ctrl-C is."""
    os.environ.setdefault("OMP_NUM_THREADS", str(min(cpus, os.cpu_count() or 1)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make small nets many times slower
    for number in STOPPING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    resource_tracker.ensure_running()  # unblocks signals at its start, so it comes first
    with _signals_blocked():  # jobs inherit it: a signal that comes before a job is ready for it is not lost
        forkserver.ensure_running()


def _run(job: Job) -> str:
    """Run one job, showing its output. Returns what went wrong, or nothing."""
    start = time.monotonic()
    log = job.directory / "output.log"
    _touch(log)
    reader, writer = _channel()
    output = Connection(writer, readable=False)
    process = multiprocessing.get_context("forkserver").Process(target=_script, args=(output, job.command[1:]))
    try:
        with _signals_blocked(), output:  # Ctrl-C reaches this process alone, and is passed on once
            process.start()
        _forward(reader, process, log)
    except KeyboardInterrupt:
        _interrupt(reader, process, log)
        raise
    finally:
        os.close(reader)
    process.join()
    result = read_result(job.directory)
    if process.exitcode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.exitcode or result is None:
        return _busy(job, {}) or f"failed (exit status {process.exitcode}); its output is in {log}"
    print(f"    {time.monotonic() - start:.0f} s, {headline(result['metrics'])}", flush=True)
    return ""


def _touch(log: Path) -> None:
    """A file to append to. Raises UserError where it cannot be written."""
    make_folder(log.parent)
    try:
        log.open("ab").close()
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}") from None


def _interrupt(reader: int, process: multiprocessing.process.BaseProcess, log: Path) -> None:
    """Ask the job to save and end, and wait for it; a second Ctrl-C does not wait."""
    if process.pid is None:  # it had not begun
        return
    os.kill(process.pid, signal.SIGINT)
    try:
        _forward(reader, process, log)
        process.join()
    except KeyboardInterrupt:
        process.kill()
        process.join()


def _script(output: Connection, words: tuple[str, ...]) -> None:
    """In the forked process: become `python SCRIPT ARGUMENTS`. A signal that came before it began ends it quietly."""
    try:
        _become(output, words)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _become(output: Connection, words: tuple[str, ...]) -> None:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - as long as the process
    os.chdir(ROOT)
    script = words[0]
    sys.argv, sys.path[0] = list(words), str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def _channel() -> tuple[int, int]:
    """Descriptors to read and to write: a terminal of this one's size where there is one, so that bars move."""
    if not sys.stdout.isatty():
        return os.pipe()
    reader, writer = pty.openpty()
    attributes = termios.tcgetattr(writer)
    attributes[1] &= ~termios.OPOST  # this process's own terminal turns \n into \r\n
    termios.tcsetattr(writer, termios.TCSANOW, attributes)
    termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stdout.fileno()))
    return reader, writer


def _forward(reader: int, process: multiprocessing.process.BaseProcess, log: Path) -> None:
    """Show the job's output and append it to `log`, until the job ends; of a progress bar it gets the last state."""
    pending = b""
    with open(log, "ab") as file:
        for piece in _pieces(reader, process):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            *lines, pending = (pending + piece).split(b"\n")
            file.writelines(line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n" for line in lines)
            file.flush()
        file.write(pending)


def _pieces(reader: int, process: multiprocessing.process.BaseProcess) -> Iterator[bytes]:
    """What the job writes, as it comes; ends when the job has ended and all is read."""
    while True:
        ready = wait([reader, process.sentinel], timeout=LOOK)
        if not ready:
            continue
        if reader not in ready and not wait([reader], timeout=0):
            return
        try:
            piece = os.read(reader, 65536)
        except OSError as error:  # a pseudo-terminal's way of saying that the other side has closed
            if error.errno != errno.EIO:
                raise
            piece = b""
        if not piece:
            return
        yield piece


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
