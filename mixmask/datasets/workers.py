"""Processes that read ahead: any error in one arrives as one line, and none outlives its loader or the program."""

from __future__ import annotations

import atexit
import contextlib
import errno
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mixmask.datasets.base import DataError, one_line

AHEAD = 4  # batches that a worker prepares ahead
_running: dict[multiprocessing.process.BaseProcess, int] = {}  # worker -> the process whose worker it is


class Read(Protocol):
    """What a worker does: reads image `index`; `name(index)` is the image's, for errors."""

    def __getitem__(self, index: int) -> Tensor | list[Tensor]: ...

    def name(self, index: int) -> str: ...


def in_workers(
    read: Read, batches: Iterable[Sequence[int]], workers: int, pin_memory: bool = False, tensors: int = 2
) -> Iterator[tuple[Any, Tensor]]:
    """For each batch of indices: what `read` returns, collated, and the indices int64 (N,).

    `workers` processes read ahead, 0 reads here. `tensors`: how many a batch has, including the indices. Raises
    DataError, of one line, for whatever goes wrong in a worker.
    """
    allow_open_files(workers, tensors)
    with _more_than_cores():
        data = torch.utils.data.DataLoader(
            _Reader(read),
            batch_sampler=[torch.as_tensor(batch).tolist() for batch in batches],
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_begin,
            pin_memory=pin_memory,
            prefetch_factor=AHEAD if workers else None,
            generator=torch.Generator(),  # of its own: the loader draws a number, which must not touch the run's state
        )
    before = set(multiprocessing.active_children())
    stream, mine = None, set()
    try:
        try:
            with _more_than_cores():
                stream = iter(data)
        finally:
            mine = set(multiprocessing.active_children()) - before
            _running.update(dict.fromkeys(mine, os.getpid()))
        for batch in stream:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except (OSError, RuntimeError) as error:
        if "Too many open files" in str(error) or "ancdata" in str(error):
            raise DataError(_too_many_files(workers)) from None
        raise
    finally:
        stream = None  # the loader stops its workers, if nobody else holds it
        _stop(mine)


@contextlib.contextmanager
def _more_than_cores() -> Iterator[None]:
    """No warning for more workers than cores: workers also wait for disks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


@dataclass(frozen=True)
class _Reader:
    """A reader for DataLoader: an error travels as a value, since an exception would arrive as a traceback."""

    read: Read

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], int] | DataError:
        try:
            return self.read[index], index
        except DataError as error:
            return error
        except Exception as error:
            return DataError(f"image file {self.read.name(index)}: {type(error).__name__}: {one_line(error)}")


def _collate(items: list) -> list | DataError:
    errors = [item for item in items if isinstance(item, DataError)]
    try:
        return errors[0] if errors else torch.utils.data.default_collate(items)
    except Exception as error:  # no space in /dev/shm, too many open files
        return DataError(f"a worker cannot hand over its batch: {one_line(error)}; fewer: --set run.workers=2")


def ignore_signals(worker: int) -> None:
    """Ctrl-C and SLURM signal every process of a job: a worker goes on until its training loop is done with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _begin(worker: int) -> None:
    """A batch that cannot be sent would be lost silently, and the loop would wait for it: the worker exits instead."""
    ignore_signals(worker)

    def end(error: Exception, batch: object) -> None:
        sys.stderr.write(f"a worker cannot hand over its batch: {one_line(error)}\n")
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


@atexit.register
def _stop(workers: set[multiprocessing.process.BaseProcess] | None = None) -> None:
    """Kill those (None: all) that still run. They ignore SIGTERM, so Python's exit would wait for them forever."""
    for worker in list(_running) if workers is None else workers:
        if _running.pop(worker, None) == os.getpid():  # not of the process that this one was forked from
            worker.kill()
            worker.join()


def allow_open_files(workers: int, tensors: int) -> None:
    """Raise this process's limit of open files to what the workers need: every tensor they hand over is one.

    Raises DataError, with the number of workers that fits, where the system does not allow it.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    each, spare = 4 + AHEAD * tensors, 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if workers == 0 or soft == resource.RLIM_INFINITY or soft >= workers * each + spare:
        return
    limit = workers * each + spare if hard == resource.RLIM_INFINITY else min(hard, workers * each + spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < workers * each + spare:
        raise DataError(_too_many_files(workers, max(0, (limit - spare) // each)))


def _too_many_files(workers: int, fitting: int | None = None) -> str:
    remedy = "fewer" if fitting is None else f"at most {fitting}"
    return f"run.workers: {os.strerror(errno.EMFILE).lower()} for {workers} workers; {remedy}, or raise `ulimit -n`"
