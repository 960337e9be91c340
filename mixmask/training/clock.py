"""How fast a run is: images, floating-point operations, and the share of time that it waits for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


class Clock:
    """Images, floating-point operations, seconds, and seconds spent waiting for data since the epoch began."""

    def __init__(self) -> None:
        self.last_due = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.images, self.flops, self.wait = 0, 0, 0.0
        self.start = time.perf_counter()

    def waits(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time it takes to get each counted as waiting."""
        batches = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def timing(self) -> dict[str, float]:
        """Since the epoch began: seconds, images_per_second, tflops_per_second where counted, data_wait from 0 to 1."""
        seconds = time.perf_counter() - self.start
        work = {"tflops_per_second": round(self.flops / seconds / 1e12, 4)} if self.flops else {}
        return {
            "seconds": round(seconds, 3),
            "images_per_second": round(self.images / seconds, 1),
            **work,
            "data_wait": round(self.wait / seconds, 4),
        }

    def due(self, minutes: float) -> bool:
        """Whether so many minutes have passed since the epoch began or since this last returned true."""
        if time.perf_counter() - self.last_due <= 60 * minutes:
            return False
        self.last_due = time.perf_counter()
        return True


class Work:
    """Floating-point operations of one step in this process, counted while the first one runs.

    Matrix products and convolutions, forward and backward; a multiply-add counts two.
    """

    def __init__(self) -> None:
        self.flops = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what is inside, once."""
        if self.flops:
            yield
            return
        eager = torch.compiler.set_stance("force_eager")  # the counter sees no operation of a compiled graph
        with eager, FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()
