"""The SLURM executor: each job through submitit, dependent on those of its parents that are live. No torch here.

Truth is a run's own result file plus squeue: a finished run is skipped, a live one is reused as the dependency, any
other is submitted. So launching again is always safe. A job is recognised by its name (the run's id) and its comment
(the run's directory).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixmask.config import UserError
from mixmask.runs import read_result
from paper.cells import ROOT
from slurm.graph import Job, make_folder


class Command:
    """What a SLURM job runs: the printed command. Requeued, it runs again and goes on from the last checkpoint."""

    def __init__(self, words: tuple[str, ...], directory: str):
        self.words, self.directory = words, directory

    def __call__(self) -> None:
        if read_result(self.directory) is not None:
            return
        os.chdir(ROOT)
        sys.argv = list(self.words[1:])
        sys.path.insert(0, str(Path(self.words[1]).resolve().parent))
        runpy.run_path(self.words[1], run_name="__main__")

    def checkpoint(self) -> Any:
        """Called by submitit before a time limit or a preemption: submit the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def available() -> bool:
    """Whether SLURM is here: sbatch on PATH and a controller that answers."""
    if not shutil.which("sbatch"):
        return False
    try:
        answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and " UP" in answer.stdout


def launch(jobs: list[Job], runs_dir: Path) -> None:
    """Submit what is neither finished nor live. Raises UserError where SLURM refuses."""
    with _one_launcher(runs_dir):
        live = live_jobs()
        for number, job in enumerate(jobs, 1):
            state = _place(job, live, runs_dir)
            print(f"[{number}/{len(jobs)}] {job.stage} {job.id} ({', '.join(job.cells)}): {state}", flush=True)


def _place(job: Job, live: dict[str, str], runs_dir: Path) -> str:
    """Skip, reuse or submit; returns the state in words."""
    key = str(job.directory.resolve())
    if job.state == "finished":
        return "finished"
    if key in live:
        return f"live, job {live[key]}"
    waited = [live[str(parent.resolve())] for parent in job.parents if str(parent.resolve()) in live]
    live[key] = _submit(job, waited, runs_dir)
    return f"submitted, job {live[key]}"


def live_jobs() -> dict[str, str]:
    """Run directory -> SLURM job ID, for this user's jobs that wait or run."""
    command = ["squeue", "--noheader", "--me", "--states=PENDING,RUNNING,SUSPENDED,CONFIGURING", "--format=%i|%k"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"squeue failed: {answer.stderr.strip()}")
    lines = [line.partition("|") for line in answer.stdout.splitlines()]
    return {comment.strip(): job for job, _, comment in lines}


def _submit(job: Job, waited: list[str], runs_dir: Path) -> str:
    import submitit

    executor = submitit.AutoExecutor(runs_dir / "slurm" / "%j", cluster="slurm", slurm_max_num_timeout=10_000)
    executor.update_parameters(**_parameters(job, waited))
    try:
        return executor.submit(Command(job.command, str(job.directory.resolve()))).job_id
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refused {job.id}: {' '.join(str(error).split())}") from None


def _parameters(job: Job, waited: list[str]) -> dict[str, Any]:
    """submitit's parameters of `job`, which starts once the jobs `waited` have succeeded."""
    asked = job.resources
    after = f"afterok:{':'.join(waited)}," if waited else ""
    parameters = {
        "name": job.id,
        "timeout_min": round(60 * asked.hours),
        "cpus_per_task": asked.cpus,
        "mem_gb": asked.memory_gb,
        "gpus_per_node": asked.gpus or None,
        "slurm_partition": asked.partition,
        "slurm_account": asked.account,
        "slurm_constraint": asked.constraint,
        "slurm_comment": str(job.directory.resolve()),
        "slurm_signal_delay_s": asked.warning_seconds,
        "slurm_dependency": f"{after}singleton",
        "slurm_additional_parameters": {"kill-on-invalid-dep": "yes", "chdir": str(ROOT)},
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
        "slurm_setup": [
            f'export PYTHONPATH="{ROOT}:$PYTHONPATH"',
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{asked.cpus}}} OMP_WAIT_POLICY=${{OMP_WAIT_POLICY:-PASSIVE}}",
        ],
    }
    return {key: value for key, value in parameters.items() if value not in (None, "")}


@contextlib.contextmanager
def _one_launcher(runs_dir: Path) -> Iterator[None]:
    """Two launchers on one runs directory take turns, so that both see what the other has submitted."""
    make_folder(runs_dir)
    with open(runs_dir / ".launch.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
