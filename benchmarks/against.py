"""Steps of this code and of another commit, in turn, so that other load on the machine slows both alike."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import median
from mixmask.config import UserError

ROOT = Path(__file__).resolve().parents[1]

# One step for each line that comes: seconds of wall time, and of CPU time of all its threads. Only the oldest names.
WORKER = """
import json, sys, time
import torch
from benchmarks import steps
framework, method, overrides = sys.argv[1:]
device = torch.device("cpu")
training = steps.Ours(steps.recipe("cifar100", framework, method, device, json.loads(overrides)), device)
training.step()
print(training.config.batch_size, training.config.precision, flush=True)
for _ in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    training.step()
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The commit's files in a folder of their own. Raises UserError for an unknown commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "tree.tar"
        command = ["git", "archive", "--output", str(archive), commit]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"--before {commit}: {done.stderr.strip().splitlines()[-1]}")
        tree = Path(folder) / "tree"
        tree.mkdir()
        subprocess.run(["tar", "-xf", str(archive), "-C", str(tree)], check=True)
        yield tree


def numbers(commit: str, framework: str, method: str, overrides: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Seconds of a step on the CPU, before (at `commit`) and now: medians, and the ratios of pairs of steps.

    Either comes first in turn; the first step of each does not count.
    """
    words = [sys.executable, "-c", WORKER, framework, method, json.dumps(dict(overrides))]
    with checked_out(commit) as before, contextlib.ExitStack() as stack:
        workers = {key: stack.enter_context(_worker(words, tree)) for key, tree in (("before", before), ("now", ROOT))}
        (batch, precision), *_ = [_answer(worker).split() for worker in workers.values()]
        taken = []
        for number in range(pairs):
            turn = sorted(workers, reverse=number % 2 == 1)
            taken.append({key: _step(workers[key]) for key in turn})
    row: dict[str, Any] = {"before": commit, "batch": int(batch), "precision": precision, "steps": pairs}
    for i, kind in enumerate(("wall", "cpu")):
        old, new = ([pair[key][i] for pair in taken] for key in ("before", "now"))
        ratios = [after / first for first, after in zip(old, new, strict=True)]
        row |= {f"{kind}_before": median(old), f"{kind}_now": median(new), f"{kind}_ratio": median(ratios)}
        row |= {f"{kind}_interval": interval(ratios), f"{kind}_ratios": [round(ratio, 4) for ratio in ratios]}
    return row


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median, at 95 % (of five values or fewer all that there are): two of the ordered values, whatever their
    distribution."""
    n, left_out, tail = len(values), 0, 2 / 2 ** len(values)
    while tail + 2 * math.comb(n, left_out + 1) / 2**n <= 0.05:
        left_out += 1
        tail += 2 * math.comb(n, left_out) / 2**n
    ordered = sorted(values)
    return ordered[left_out], ordered[n - 1 - left_out]


@contextlib.contextmanager
def _worker(words: list[str], tree: Path) -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tree, env=environment, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def _step(worker: subprocess.Popen) -> tuple[float, float]:
    worker.stdin.write("\n")
    worker.stdin.flush()
    wall, cpu = map(float, _answer(worker).split())
    return wall, cpu


def _answer(worker: subprocess.Popen) -> str:
    line = worker.stdout.readline()
    if not line:
        raise UserError("--before: a step failed; its error stands above")
    return line
