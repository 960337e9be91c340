"""SLURM's programs, asked in an environment that holds nothing of the caller's. No torch here.

A shell inside an allocation, an array job or torchrun brings variables along: some change what sbatch asks for or what
squeue shows, others would reach the jobs. Tested with SLURM 22.05; the oldest that knows each option is 19.05.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping

from mixmask.config import UserError

PATIENCE = 60  # seconds for an answer of SLURM's programs
NO_ANSWER = "SLURM is installed, but its controller does not answer"
KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}  # where the cluster is, and who asks
DROPPED = re.compile(
    r"(_?SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SACCT|SACCTMGR|SCANCEL|SCONTROL|SINFO|SUBMITIT|PMI|PMIX|PMI2|OMPI|MPI"
    r"|TORCHELASTIC|TORCHRUN)_.*"  # options, and what an allocation or a launcher tells its processes
    r"|(GROUP_|LOCAL_|NODE_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"  # where the processes of a run meet
    r"|(CUDA|HIP|ROCR|NVIDIA)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"  # the GPUs of that allocation
)


def clean(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` without what an allocation, an array job or torchrun has added, or a user's defaults for SLURM."""
    kept = {name: value for name, value in environ.items() if name in KEPT or not DROPPED.fullmatch(name)}
    if "SLURM_JOB_ID" in environ:  # a folder of that job alone, as some clusters make
        kept.pop("TMPDIR", None)
    return kept


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """`clean` for this process: submitit starts sbatch in it, and sbatch hands it to the job."""
    before = dict(os.environ)
    kept = clean()
    try:
        os.environ.clear()
        os.environ.update(kept)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(*words: str, patience: float | None = None) -> subprocess.CompletedProcess[str]:
    """One of SLURM's programs and its answer, whatever it is. Raises UserError where none comes."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=patience or PATIENCE, env=clean())
    except subprocess.TimeoutExpired:
        waited = f"{words[0]} has waited for {patience or PATIENCE:g} s"
        raise UserError(waited if words[0] == "sacct" else f"{NO_ANSWER}: {waited}") from None  # accounting is another
    except OSError as error:
        raise UserError(f"cannot run {words[0]}: {error.strerror}") from None


def ask(*words: str, patience: float | None = None) -> str:
    """What the program prints. Raises UserError where it fails."""
    answer = run(*words, patience=patience)
    if answer.returncode:
        raise UserError(f"{words[0]} failed: {' '.join(answer.stderr.split())}")
    return answer.stdout


def available() -> bool:
    """Whether SLURM is here: sbatch on PATH and a configuration. Raises UserError where it is and does not answer."""
    if not shutil.which("sbatch"):
        return False
    answer = run("scontrol", "ping")
    if " UP" in answer.stdout:  # of a controller and its deputy one is enough
        return True
    if "configuration source" in answer.stderr:
        return False
    said = (answer.stdout + answer.stderr).strip().splitlines()[:1]  # a banner may follow
    raise UserError(": ".join([NO_ANSWER, *said]))
