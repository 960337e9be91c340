"""Progress for people: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_muted = False


class Progress:
    """Counts iterations of an epoch. On a terminal a bar; elsewhere nothing but the lines given to `say`."""

    def __init__(self, total: int, label: str, start: int = 0):
        self.bar = tqdm(
            total=total, initial=start, desc=label, unit="it", leave=False, dynamic_ncols=True, disable=not _terminal()
        )

    def step(self, **values: str) -> None:
        """One iteration more; `values` stand behind the bar until they are replaced."""
        self.bar.update(1)
        if values:
            self.bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


def say(text: str) -> None:
    """One line, above a bar where there is one."""
    if _muted:
        return
    if _terminal():
        tqdm.write(printable(text))
    else:
        print(printable(text), flush=True)


def printable(text: str) -> str:
    """`text`, with a question mark for what standard output cannot encode (± where the locale is ASCII only)."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def mute() -> None:
    """No bars and no lines from now on: of several processes one speaks."""
    global _muted
    _muted = True


def _terminal() -> bool:
    return sys.stderr.isatty() and not _muted


class Stopwatch:
    """Seconds since the start or the last `lap()`."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the start or the last call."""
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds
