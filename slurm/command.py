"""What a SLURM job runs: the printed command, and what SLURM's signals mean for it. No torch here.

SIGUSR2 (a time limit is near, or a preemption on clusters that announce it so) and SIGTERM (a preemption with a grace
time) let the run save; then the job is requeued, and goes on from there. A job that is being cancelled is not requeued.
Without a warning (SIGKILL, a dead node) SLURM requeues the job itself, and it goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mixmask.config.cli import INTERRUPTED
from mixmask.runs import read_result
from paper.cells import ROOT

PATIENCE = 60  # seconds in which SLURM ends a job whose first process has ended


@dataclass(frozen=True)
class Command:
    """The command `words` of the run in `directory`; every task of the job calls it. Pickled by submitit."""

    words: tuple[str, ...]
    directory: str
    parents: tuple[str, ...]
    logs: str  # the folder with one folder for each job
    warning_seconds: int

    def __call__(self) -> None:
        """Run the script, unless the run is finished. Exits with a line where a parent's result is not there."""
        print(f"task {_rank()} of job {job_id()} on node {os.environ.get('SLURMD_NODENAME', '?')}", flush=True)
        if read_result(self.directory) is not None:
            print(f"{self.directory} is finished; nothing to do")
            return
        for parent in self.parents:
            if read_result(parent) is None:
                sys.exit(f"error: {self.directory} needs {parent}, which has no result; launch again")
        if _rank() == 0:
            self.point_to_log()
        os.chdir(ROOT)
        sys.argv = list(self.words[1:])
        sys.path.insert(0, str(Path(self.words[1]).resolve().parent))
        notice = Notice(self.warning_seconds, Path(self.logs))
        try:
            runpy.run_path(self.words[1], run_name="__main__")
        except SystemExit as exit:
            if exit.code == INTERRUPTED:
                ask_for_requeue(Path(self.logs))
            raise
        finally:
            notice.over()

    def point_to_log(self) -> None:
        """job.log in the run's directory: a link to what the job prints."""
        link, log = Path(self.directory) / "job.log", Path(self.logs) / job_id() / f"{job_id()}_0_log.out"
        with contextlib.suppress(OSError):  # it is a convenience
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(log, link.parent))

    def checkpoint(self) -> Any:
        """Called by submitit for a warning that comes before the command has begun: submit the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Notice:
    """SIGUSR2 for this process (not those that it forks): the script saves if it can, else the job is requeued at once.

    A script that can save has a handler for SIGTERM of its own. It has half of the time that is left.
    """

    def __init__(self, seconds: int, logs: Path):
        self.seconds, self.logs, self.process = seconds, logs, os.getpid()
        self.before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGUSR2, self.receive)
        signal.signal(signal.SIGALRM, self.too_late)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return
        print("warned by SLURM: saving, then requeued", flush=True)
        if signal.getsignal(signal.SIGTERM) == self.before:
            self.requeue_now()
        else:
            signal.setitimer(signal.ITIMER_REAL, max(1, self.seconds / 2))
            os.kill(self.process, signal.SIGTERM)

    def too_late(self, number: int, frame: FrameType | None) -> None:
        """Requeue with the last checkpoint."""
        print("no safe point was reached in time: will resume from the last checkpoint", flush=True)
        self.requeue_now()

    def requeue_now(self) -> None:
        ask_for_requeue(self.logs)
        os._exit(INTERRUPTED)

    def over(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def ask_for_requeue(logs: Path) -> None:
    """Leave word for the end of the batch script (slurm/batch_end.sh), which is reached when the first process ends."""
    if _rank() == 0:
        (logs / job_id() / "requeue").touch()
    else:
        time.sleep(PATIENCE)  # ending before the first process would end it, perhaps before it has saved


def job_id() -> str:
    """12, or 12_3 in an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "?")


def _rank() -> int:
    return int(os.environ.get("SLURM_PROCID", 0))
