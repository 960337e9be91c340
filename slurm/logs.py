"""What the logs of a job or a run say: why it has ended, how far it has come. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from paper import cost
from slurm import squeue
from slurm.graph import Job

TAIL = 65_536  # bytes at the end of a log that are read
SHOWN = 3  # lines of a log that are shown
SILENT = 120.0  # seconds without a line of log.jsonl, after which that is said
NOISE = re.compile(r"srun: (?!error|fatal)|slurmstepd: |submitit |interrupted: ")
STARTED = re.compile(r"submitit .*Starting with JobEnvironment")  # in each task's log, at each start of its job
CAUSES = {  # in the order in which they are believed, each with which of several lines says it
    re.compile(r"error: "): 0,  # ours
    re.compile(r"[\w.]*(Error|Exception)\b"): -1,  # a traceback's last line
    re.compile(r"srun: error: \S+: tasks? [^:]+: (?!Exited with exit code)"): 0,  # the first one killed
    re.compile(r"srun: (error|fatal): (?!\S+: tasks? )"): 0,  # no process was started
}
ECHO = re.compile(  # the end of one process in the words of those that it took with it
    r"error: another process of this run has ended|srun: error: \S+: tasks? [^:]+: (Exited with exit code|Terminated)"
    r"|(?!srun: |error: )(.*[\s:])?(Terminated|Killed)(\s|$)"
)
# What a process says of a node that is broken: its GPU, its disk. And where each task says that it runs.
FAULT = re.compile(
    r"(uncorrectable|double.bit) ECC|GPU (is lost|has fallen off)|fallen off the bus|no CUDA-capable device"
    r"|CUDA (driver )?(error|initialization).*(unknown error|system not yet initialized|hardware|launch failure|ECC)"
    r"|\bXid\b|NVML.*Unknown Error|\[Errno 5\]|Input/output error|Read-only file system|Remote I/O error",
    re.IGNORECASE,
)
PLACE = re.compile(r"task \d+ of job \S+ on node (\S+)")
SAID_OF = re.compile(r"srun: error: \S+: tasks? (\d+)")


# ------------------------------------------------------------------------------------------------ why it ended


def task_logs(runs_dir: Path, number: str) -> list[Path]:
    """What each task of a job has printed; the first's also has what SLURM says of the whole job."""
    logs = squeue.log_path(runs_dir, number).parent.glob(f"{number}_*_log.out")
    return sorted((log for log in logs if task_of(log).isdecimal()), key=lambda log: int(task_of(log)))


def task_of(log: Path) -> str:
    """The number of the task whose log this is."""
    return log.name.split("_")[-2]


def root_cause(logs: list[Path]) -> tuple[Path, list[str]]:
    """The log that says why the job ended, and its last lines up to there; without a cause, the first task's end."""
    lines = {log: said(log) for log in logs}
    for cause, which in CAUSES.items():
        for log, whole in lines.items():
            own = [line for line in whole if not ECHO.match(line)]
            ends = [end for end, line in enumerate(own, 1) if cause.match(line)]
            if ends:
                shown = own[: ends[which]][-SHOWN:]
                return _task_meant(shown[-1], lines) or (log, shown)
    return logs[0], lines[logs[0]][-SHOWN:]


def faulty_nodes(logs: list[Path]) -> dict[str, str]:
    """Node -> what was said there, for nodes whose fault ended a job: a lost GPU, an I/O error of a disk."""
    faulty = {}
    for log in logs:
        places = [place.group(1) for line in said(log) if (place := PLACE.match(line))]
        said_there = [line for line in said(log) if FAULT.search(line)]
        if places and said_there:
            faulty[places[-1]] = said_there[-1]
    return faulty


def _task_meant(line: str, lines: dict[Path, list[str]]) -> tuple[Path, list[str]] | None:
    """The log of the process of which srun says this line, with its last lines and this one."""
    task = SAID_OF.match(line)
    for log in lines:
        if task and task_of(log) == task.group(1):
            return log, [*[text for text in lines[log] if not text.startswith("srun: ")][1 - SHOWN :], line]
    return None


def said(path: Path) -> list[str]:
    """The lines of a log, since its job was last started, that say something."""
    lines = tail(path)
    starts = [number for number, line in enumerate(lines) if STARTED.match(line)]
    return [line.rstrip() for line in lines[starts[-1] if starts else 0 :] if line.strip() and not NOISE.match(line)]


def quote(log: Path, lines: list[str], task: str = "") -> str:
    """Where the log is, and these of its lines, for the end of a report."""
    text = "".join(f"\n             | {line[:200]}" for line in lines)
    return f"; log{task}: {log}{text}" if os.path.exists(log) else "; it left no log"


def tail(path: Path) -> list[str]:
    """The lines at the end of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


# ------------------------------------------------------------------------------------------- how far it has come


def progress(job: Job) -> str:
    """Epoch, loss, images/s and time left, as far as log.jsonl says."""
    lines = _log_lines(job.directory / "log.jsonl")
    if not lines:
        return ", no step logged yet"
    last, epochs = lines[-1], getattr(job.config, "epochs", 0)
    text = f", epoch {last['epoch']}/{epochs}" if epochs else f", epoch {last['epoch']}"
    text += f", loss {last['loss']:.3f}" if "loss" in last else ""
    rate = last["timing"].get("images_per_second")
    text += f", {rate:.0f} images/s" if rate else ""
    left = time_left(job.config, lines)
    return text + (f", {clock(left)} left" if left is not None else "")


def silence(job: Job) -> str:
    """How long the log has been silent, where that is long: its node may have gone."""
    with contextlib.suppress(OSError):
        seconds = time.time() - (job.directory / "log.jsonl").stat().st_mtime
        if seconds > SILENT:
            return f", last log line {clock(seconds)} ago"
    return ""


def time_left(config: Any, lines: list[dict[str, Any]]) -> float | None:
    """Seconds, from the last epoch's duration; in the first epoch from images/s. None where nothing says."""
    last, ends = lines[-1], [line for line in lines if line["kind"] == "epoch" and "seconds" in line["timing"]]
    within = last["timing"].get("seconds", 0.0) if last["kind"] == "step" else 0.0
    epochs = getattr(config, "epochs", 0)
    if ends and epochs:
        return max(0.0, (epochs - ends[-1]["epoch"]) * ends[-1]["timing"]["seconds"] - within)
    rate = last["timing"].get("images_per_second")
    if not rate or not epochs:
        return None
    images = cost.images_of(config).train
    return max(0.0, epochs * images / rate - within)


def clock(seconds: float) -> str:
    """A duration in its two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _log_lines(path: Path) -> list[dict[str, Any]]:
    """Those lines at the end of a log, which may be growing, that name an epoch."""
    lines = []
    for text in tail(path):
        with contextlib.suppress(ValueError):  # cut off by the start of what is read, or not yet whole
            lines.append(json.loads(text))
    return [{"timing": {}, **line} for line in lines if isinstance(line, dict) and line.get("epoch")]
