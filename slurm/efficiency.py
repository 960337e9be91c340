"""What jobs asked for against what they used, as SLURM's accounting says, and what to ask for. No torch here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mixmask.config import UserError
from slurm import shell, squeue
from slurm.graph import Job

FIELDS = "JobID,State,ElapsedRaw,TimelimitRaw,AllocCPUS,TotalCPU,ReqMem,MaxRSS,AllocTRES,NNodes,NTasks"
SPARE = 1.25  # of what is proposed, over what was used
UNITS = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}  # GB


@dataclass(frozen=True)
class Used:
    """A job, over all its starts: hours, GB (largest process), CPU-hours, GPU-hours; asked and used. 0: not known."""

    state: str
    hours: float = 0.0
    limit: float = 0.0
    memory: float = 0.0
    memory_asked: float = 0.0  # per process
    cpus: int = 0
    cpu_hours: float = 0.0
    gpus: int = 0
    starts: int = 0

    @property
    def cpu_share(self) -> float:
        """The share of its CPU time that it has used."""
        return self.cpu_hours / (self.hours * self.cpus) if self.hours and self.cpus else 0.0

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours


def print_efficiency(jobs: list[Job], runs_dir: Path) -> None:
    """A line for each run that has had a job of SLURM, and what to ask for, stage by stage."""
    known = squeue.records(runs_dir)
    numbers = [(job, known[key]["job"]) for job in jobs if (key := str(job.directory.resolve())) in known]
    used = accounted(number for _, number in numbers)
    told = [(job, number, used[number]) for job, number in numbers if number in used]
    if not told:
        print("accounting knows no job of these runs")
        return
    print(f"{'job':<10} {'stage':<10} {'state':<12} {'hours':>14} {'memory GB':>14} {'CPU':>12} {'GPU-hours':>10}  run")
    for job, number, each in told:
        print(f"{number:<10} {job.stage:<10} {line(each)}  {job.id}")
    for stage in dict.fromkeys(job.stage for job, *_ in told):
        own = [(job, each) for job, _, each in told if job.stage == stage]
        if words := advice([each for _, each in own], own[0][0]):
            print(f"ask for, of {stage}: --set " + " ".join(f"{stage}.cluster.{word}" for word in words))


def line(used: Used) -> str:
    """Used of asked, in columns."""
    hours = f"{used.hours:.2f} of {used.limit:.2f}" if used.limit else f"{used.hours:.2f}"
    memory = f"{used.memory:.1f} of {used.memory_asked:.1f}" if used.memory else "-"
    share = f"{100 * used.cpu_share:.0f} % of {used.cpus}" if used.cpu_share else "-"
    gpu_hours = f"{used.gpu_hours:.2f}" if used.gpus else "-"
    return f"{used.state:<12} {hours:>14} {memory:>14} {share:>12} {gpu_hours:>10}"


def advice(used: list[Used], job: Job) -> list[str]:
    """Cluster settings that would have sufficed for these jobs of one stage, where they requested much more."""
    asked, words = job.resources, []
    finished = [each for each in used if each.state == "COMPLETED"]
    if finished and max(each.starts for each in finished) == 1:
        hours = math.ceil(60 * SPARE * max(each.hours for each in finished)) / 60
        hours = max(hours, (60 + 2 * asked.warning_seconds) / 3600)
        words += [f"hours={math.ceil(100 * hours) / 100:g}"] if hours < 0.8 * asked.hours else []
    memory = math.ceil(SPARE * max(each.memory for each in used))
    words += [f"memory_gb={memory}"] if 0 < memory < 0.8 * asked.memory_gb else []
    cpus = max(1, math.ceil(round(asked.cpus * max(each.cpu_share for each in used), 1)))
    words += [f"cpus={cpus}"] if any(each.cpu_share for each in used) and cpus < 0.8 * asked.cpus else []
    return words


def accounted(numbers: Iterable[str]) -> dict[str, Used]:
    """Job -> what sacct says of it. Raises UserError where it cannot be asked, or keeps nothing."""
    numbers = list(numbers)
    if not numbers:
        return {}
    words = ["sacct", "--noheader", "--parsable2", "--duplicates", f"--format={FIELDS}", "--jobs", ",".join(numbers)]
    try:
        answer = shell.ask(*words, patience=squeue.ACCOUNTING)
    except UserError as error:
        raise UserError(f"--efficiency asks SLURM's accounting: {error}") from None
    jobs: dict[str, Used] = {}
    for text in answer.splitlines():
        name, state, *values = text.split("|")
        number, _, step = name.partition(".")
        before = jobs.get(number, Used(state.split()[0]))
        jobs[number] = _with_step(before, values) if step else _with_start(before, state.split()[0], values)
    return jobs


def _with_start(used: Used, state: str, values: list[str]) -> Used:
    """With one more start of the job."""
    elapsed, limit, cpus, _, memory, _, resources, *_ = values
    gpus = re.search(r"gres/gpu=(\d+)", resources)
    return dataclasses.replace(
        used,
        state=state,
        hours=used.hours + int(elapsed or 0) / 3600,
        limit=int(limit) / 60 if limit.isdigit() else 0.0,
        cpus=int(cpus or 0),
        gpus=int(gpus.group(1)) if gpus else 0,
        memory_asked=_gigabytes(memory.rstrip("nc")),
        starts=used.starts + 1,
    )


def _with_step(used: Used, values: list[str]) -> Used:
    """With what the processes of a step have used: time of them all, memory of the largest one."""
    _, _, _, total, _, memory, *_ = values
    return dataclasses.replace(
        used, cpu_hours=used.cpu_hours + _hours(total), memory=max(used.memory, _gigabytes(memory))
    )


def _gigabytes(text: str) -> float:
    """Of `64G`, `4096M`, `123K` or bytes."""
    number = re.fullmatch(r"([\d.]+)([KMGT]?)", text)
    return float(number.group(1)) * UNITS.get(number.group(2), 2**-30) if number else 0.0


def _hours(text: str) -> float:
    """Of `[D-][HH:]MM:SS[.mmm]`."""
    days, _, clock = text.rpartition("-")
    seconds = 0.0
    for part in clock.split(":") if clock else []:
        seconds = 60 * seconds + float(part)
    return 24 * int(days or 0) + seconds / 3600
