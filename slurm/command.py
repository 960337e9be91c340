"""What a SLURM job runs: the printed command, and what SLURM's signals mean for it. No torch here.

SIGUSR2 (a time limit is near, or a preemption on clusters that announce it so) and SIGTERM (a preemption with a grace
time) let the run save; then the job is requeued, and goes on from there. A job that is being cancelled is not requeued.
Without a warning (SIGKILL, a dead node) SLURM requeues the job itself, and it goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from mixmask.runs import read_result
from paper.cells import ROOT

INTERRUPTED = 130  # exit status of a stage's script that saved after a signal
PATIENCE = 60  # seconds in which SLURM ends a job that it has requeued


class Command:
    """The command `words` of the run in `directory`; every task of the job calls it. Pickled by submitit."""

    def __init__(self, words: tuple[str, ...], directory: str, parents: tuple[str, ...], warning_seconds: int):
        self.words, self.directory, self.parents, self.warning_seconds = words, directory, parents, warning_seconds

    def __call__(self) -> None:
        """Run the script, unless the run is finished. Exits with a line where a parent's result is not there."""
        if read_result(self.directory) is not None:
            print(f"{self.directory} is finished; nothing to do")
            return
        for parent in self.parents:
            if read_result(parent) is None:
                sys.exit(f"error: {self.directory} needs {parent}, which has no result; launch again")
        os.chdir(ROOT)
        sys.argv = list(self.words[1:])
        sys.path.insert(0, str(Path(self.words[1]).resolve().parent))
        notice = Notice(self.warning_seconds)
        try:
            runpy.run_path(self.words[1], run_name="__main__")
        except SystemExit as exit:
            if exit.code == INTERRUPTED:
                requeue()
            raise
        finally:
            notice.over()

    def checkpoint(self) -> Any:
        """Called by submitit for a warning that comes before the command has begun: submit the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Notice:
    """SIGUSR2 for this process (not those that it forks): the script saves if it can, else the job is requeued at once.

    A script that can save has a handler for SIGTERM of its own. It has half of the time that is left.
    """

    def __init__(self, seconds: int):
        self.seconds, self.process = seconds, os.getpid()
        self.before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGUSR2, self.receive)
        signal.signal(signal.SIGALRM, self.too_late)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return
        print("warned by SLURM: saving, then requeued", flush=True)
        if signal.getsignal(signal.SIGTERM) == self.before:
            requeue()
        else:
            signal.setitimer(signal.ITIMER_REAL, max(1, self.seconds / 2))
            os.kill(self.process, signal.SIGTERM)

    def too_late(self, number: int, frame: FrameType | None) -> None:
        """What was saved before has to do."""
        print("no safe point was reached in time: going on later from the last checkpoint", flush=True)
        requeue()

    def over(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def requeue() -> None:
    """Ask SLURM to run this job again, and wait to be ended; returns where the job is being cancelled."""
    job = os.environ["SLURM_JOB_ID"]
    if int(os.environ.get("SLURM_PROCID", 0)) == 0:
        words = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
        state = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        if state != "RUNNING":
            print(f"job {job} is {state or 'ended'}: not requeued", flush=True)
            return
        print(f"requeueing job {job}", flush=True)
        subprocess.run(["scontrol", "requeue", job], check=True)
    time.sleep(PATIENCE)  # the other tasks, too: one that ended early would end the first before it has asked
