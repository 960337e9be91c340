"""What the tests on a real SLURM share: a stage of a few seconds without torch, and what became of its jobs."""

import json
import os
import subprocess
import time

# A stage of N steps of 0.1 s: saves each, saves and ends when told to, goes on where it was.
STAGE = """
import json, os, signal, sys, time
from pathlib import Path
home, steps = Path(sys.argv[1]), int(sys.argv[2])
home.mkdir(parents=True, exist_ok=True)
note = lambda name, text: open(home / name, "a").write(f"{text}\\n")
note("starts", f"{os.getpid()} {os.environ['SLURM_JOB_ID']} {time.time()}")
if (home / "fail").exists():
    sys.exit("error: made to fail")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
state, log = home / "state.json", home / "log"
step, value = json.loads(state.read_text()) if state.exists() else (0, 0)
log.write_text("".join(log.read_text().splitlines(keepends=True)[:step]) if step else "")
while step < steps:
    time.sleep(0.1)
    step, value = step + 1, (31 * value + step) % 10007
    note("log", step)
    Path(f"{state}.new").write_text(json.dumps([step, value]))
    os.replace(f"{state}.new", state)
    if told:
        sys.exit(130)
note("ends", time.time())
(home / "result.json").write_text(json.dumps({"metrics": {"loss": value}}))
"""


def undisturbed(steps):
    value = 0
    for step in range(steps):
        value = (31 * value + step) % 10007
    return value


def wait(seconds, condition, what):
    """Seconds are those of a machine of one's own; one that others load waits as many times longer."""
    seconds *= max(1, os.getloadavg()[0] / os.cpu_count())
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} within {seconds:.0f} s:\n{shell('squeue')}"
        time.sleep(0.1)


def wait_finished(seconds, jobs):
    wait(seconds, lambda: all(job.state == "finished" for job in jobs), "all finished")


def shell(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def key(job):
    return str(job.directory.resolve())


def value(job):
    return json.loads((job.directory / "result.json").read_text())["metrics"]["loss"]


def lines(job, name):
    path = job.directory / name
    return path.read_text().splitlines() if path.exists() else []


def numbers(job):
    """SLURM jobs that this run has had."""
    path = job.directory.parents[1] / "slurm" / "jobs.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["job"] for record in records if record["directory"] == key(job)]


def started(job):
    wait(40, lambda: len(lines(job, "log")) >= 2, f"{job.id} takes steps")
