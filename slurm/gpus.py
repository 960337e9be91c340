"""This machine's GPUs, and how many a job takes here. No torch here."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Mapping

from slurm.graph import Job


def visible(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that processes started from here may use, as CUDA_VISIBLE_DEVICES calls them (numbers or UUIDs).

    Those of that variable, as CUDA reads it: up to the first name that is empty or -1. Else all that nvidia-smi lists.
    """
    if (named := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = map(str.strip, named.split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):  # none, or none that answers
        return []
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def taken(job: Job, gpus: int) -> int:
    """How many of so many GPUs the job takes: one, since it is one process here; all where run.device names one by its
    number; none where it needs none."""
    if not wants(job):
        return 0
    return gpus if ":" in job.config.run.device else min(1, gpus)


def wants(job: Job) -> bool:
    """Whether it asks for a GPU, and run.device does not say otherwise."""
    return job.resources.gpus > 0 and job.config.run.device != "cpu"
