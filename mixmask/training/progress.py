"""Progress for people: a bar on a terminal; elsewhere plain lines, one a minute with the time left."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY = 60.0  # seconds between the lines that stand for a bar
_muted = False


class Progress:
    """Counts the steps of a run, `total` in all, of which `start` are done; `label` stands before them.

    `told`: when the previous Progress printed its last line, since epochs may be shorter than EVERY.
    """

    def __init__(self, total: int, label: str, start: int = 0, told: float | None = None):
        self.total, self.label, self.start, self.done = total, label, start, start
        self.began = time.perf_counter()
        self.told = self.began if told is None else told
        self.bar = tqdm(
            total=total, initial=start, desc=label, unit="it", leave=False, dynamic_ncols=True, disable=not _terminal()
        )

    def step(self, **values: str) -> None:
        """One step more; `values` stand behind the bar until they are replaced."""
        self.done += 1
        self.bar.update(1)
        if values:
            self.bar.set_postfix(values, refresh=False)
        now = time.perf_counter()
        if self.bar.disable and now - self.told >= EVERY:
            self.told = now
            left = (now - self.began) / (self.done - self.start) * (self.total - self.done)
            say(f"{self.label}, step {self.done}/{self.total}, {duration(left)} left")

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


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
    """No bars and no lines from now on: only one of several processes prints."""
    global _muted
    _muted = True


def _terminal() -> bool:
    return sys.stderr.isatty() and not _muted
