"""Why a job or a run has ended, in the words of its logs. No torch here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from slurm import squeue

TAIL = 65_536  # bytes at the end of a log that are read
SHOWN = 3  # lines of a log that are shown
NOISE = re.compile(r"srun: (?!error)|slurmstepd: |submitit |interrupted: ")
STARTED = re.compile(r"submitit .*Starting with JobEnvironment")  # in each task's log, at each start of its job
CAUSES = {re.compile(r"error: "): 0, re.compile(r"[\w.]*(Error|Exception)\b"): -1}  # our first line, a traceback's last
ECHO = re.compile(  # the end of one process in the words of those that it took with it
    r"error: another process of this run has ended|srun: error: .*(Exited with exit code|Terminated|Killed)"
    r"|(?!error: )(.*[\s:])?(Terminated|Killed)(\s|$)"
)


def task_logs(runs_dir: Path, number: str) -> list[Path]:
    """What each task of a job has printed; the first's also has what SLURM says of the whole job."""
    logs = squeue.log_path(runs_dir, number).parent.glob(f"{number}_*_log.out")
    return sorted((log for log in logs if task_of(log).isdecimal()), key=lambda log: int(task_of(log)))


def task_of(log: Path) -> str:
    """The number of the task whose log this is."""
    return log.name.split("_")[-2]


def telling(logs: list[Path]) -> tuple[Path, list[str]]:
    """The log that says why the job ended, and its last lines up to there; without a cause, the first task's end."""
    lines = {log: said(log) for log in logs}
    for cause, which in CAUSES.items():
        for log, whole in lines.items():
            own = [line for line in whole if not ECHO.match(line)]
            ends = [end for end, line in enumerate(own, 1) if cause.match(line)]
            if ends:
                return log, own[: ends[which]][-SHOWN:]
    return logs[0], lines[logs[0]][-SHOWN:]


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
    """The lines at the end of a regular file; none of anything else: a pipe would keep its reader waiting."""
    try:
        if not path.is_file():
            return []
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
