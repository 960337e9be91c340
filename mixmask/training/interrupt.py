"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) stop a run between two steps, after a checkpoint.

A second Ctrl-C stops it at once. Under nohup a closed terminal stops nothing.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType


class Interrupt:
    """Context manager: `requested` becomes true when the first signal arrives."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            numbers = [n for n in self.SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if sys.stderr.isatty():
            print("\nstopping at the next safe point; a second Ctrl-C stops at once", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
