"""Workers that read ahead: an error arrives as one line, and no process outlives its loader or the program."""

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask.config import Augment
from mixmask.datasets import DataError, Files, loading, workers

ROOT = Path(__file__).parents[2]
VIEW = Augment(("crop",), 8, (0.2, 1.0))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Forty small images."""
    paths = [str(tmp_path / f"ä {i}.png") for i in range(40)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((12, 10, 3), i, np.uint8)).save(path)
    return Files(paths, torch.zeros(40, dtype=torch.long), ("a",), "x")


def read(files: Files, number: int):
    return loading.loader(files, torch.arange(40).reshape(10, 4), 0, 0, [VIEW], number)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("error", [ValueError("no\nsense"), RuntimeError("x"), MemoryError(), OSError(24, "many")])
def test_any_error_of_a_worker_is_one_line_that_names_the_file(files, monkeypatch, number, error):
    real = loading.read_image

    def broken(path, upright):
        if path.endswith("ä 9.png"):
            raise error
        return real(path, upright)

    monkeypatch.setattr(loading, "read_image", broken)
    with pytest.raises(DataError, match=rf"^image file .*ä 9.png: {type(error).__name__}: .*$") as caught:
        list(read(files, number))
    assert "\n" not in str(caught.value) and not multiprocessing.active_children()


def test_more_workers_than_cores_are_no_warning(files, monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert len(list(read(files, 2))) == 10 and not list(recwarn)


@pytest.mark.parametrize("number", [0, 2])
def test_batch_that_cannot_be_handed_over_is_one_line(files, monkeypatch, number):
    def full(items):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.utils.data, "default_collate", full)
    with pytest.raises(DataError, match=r"cannot hand over its batch: .*No space left.*; fewer: --set run.workers=2"):
        list(read(files, number))


def test_workers_end_with_their_loader(files):
    stream = read(files, 2)
    next(stream)
    other = read(files, 1)
    next(other)
    assert len(multiprocessing.active_children()) == 3
    stream.close()
    assert len(multiprocessing.active_children()) == 1
    assert len(list(other)) == 9 and not multiprocessing.active_children()


@pytest.mark.parametrize("reason", ["raise ValueError('of the training loop')", "raise SystemExit(3)"])
def test_program_ends_whatever_its_loop_raises(files, reason):
    """A traceback keeps the loader alive to the end of the program, and workers ignore SIGTERM."""
    code = f"""
import sys, torch
from mixmask.config import Augment
from mixmask.datasets import Files, loading
paths = {files.paths!r}
files = Files(paths, torch.zeros(40, dtype=torch.long), ("a",), "x")
for batch in loading.loader(files, torch.arange(40).reshape(10, 4), 0, 0, [Augment(("crop",), 8)], 2):
    {reason}
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, capture_output=True)
    assert done.returncode == (3 if "3" in reason else 1) and time.monotonic() - start < 100


def test_open_files_are_raised_to_what_workers_need_or_refused(files, monkeypatch):
    limits = [(50, 400)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.append(new))
    workers.allow_open_files(0, 3)
    assert limits == [(50, 400)]
    workers.allow_open_files(8, 3)
    assert limits[-1] == (64 + 8 * 16, 400)
    workers.allow_open_files(8, 3)
    assert len(limits) == 2
    with pytest.raises(DataError, match="too many open files for 30 workers; at most 21, or raise `ulimit -n`"):
        workers.allow_open_files(30, 3)
