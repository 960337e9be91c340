"""A run's directory: what was asked, where it ran, what it logged, what came out. No torch here.

runs/<stage>/<name>-<hash8>-s<seed>/
    config.yaml        the resolved config (a recipe file: it can be run again)
    command.txt        the command that repeats the run
    environment.json   versions, machine, commit: those it began with
    environments.jsonl those it was re-opened with, where they are others: {"step", "time", "changed", ...} a line
    log.jsonl          one JSON object a line: {"kind": "step" | "epoch", ...}; timings only under "timing"
    checkpoint.pt      the last checkpoint; checkpoint.previous.pt: the one before, until the run is finished
    checkpoint.sha256  their SHA-256, a line each
    result.json        written last, atomically: a run that has one is finished
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from mixmask import config as configs
from mixmask.config import ConfigError, UserError
from mixmask.runs.files import discard, write_atomically
from mixmask.runs.provenance import CODE, CONTINUATION, ORDER, environment, short
from mixmask.runs.records import read_environments, read_log, read_result
from mixmask.runs.trackers import Trackers, check_trackers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_TRIES = 5  # a quarter of a second: `is_busy` holds the lock for a moment


def run_id(config: Any) -> str:
    """`<name>-<hash8>-s<seed>`: equal configs share it, whatever asked for them.

    Raises ConfigError for a recipe whose name is not one word.
    """
    if not re.fullmatch(r"\w[\w.]*", config.recipe):
        raise ConfigError(f"recipe: expected letters, digits, '_' and '.', found {config.recipe!r}")
    parts = [config.recipe]
    if isinstance(config, configs.Pretrain):
        parts += [config.method, f"e{config.epochs}"]
    elif config.checkpoint:
        parts += [re.sub(r"(-[0-9a-f]{8}-s\d+)?(@\w+)?$", "", config.checkpoint)]  # whose encoder
    return "-".join([*parts, configs.hash8(config), f"s{config.seed}"])


def run_directory(runs_dir: str | Path, config: Any) -> Path:
    """Where the run of this config lives."""
    return Path(runs_dir) / config.stage / run_id(config)


def what_is_left(checkpoint: Path) -> str:
    """For the last line of a run that stops: whether there is a checkpoint (or a previous one) to resume from."""
    there = checkpoint.exists() or previous_checkpoint(checkpoint).exists()
    return "the last checkpoint is intact" if there else "no checkpoint was written yet"


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def take_lock(file: IO, exclusive: bool) -> None:
    """Lock an open file, at once. Raises BlockingIOError where another process holds it, OSError if there are no locks.

    Windows has no such locks: nothing is locked there.
    """
    if fcntl is not None:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def is_busy(directory: str | Path) -> bool:
    """Whether a process is working on the run: its lock is tried, and given back at once."""
    try:
        with open(Path(directory) / "lock") as lock:
            take_lock(lock, exclusive=False)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Run:
    """An open run directory, held by one process at a time. Use as a context manager."""

    _trackers: Trackers | None = None  # from `rewind` on

    def __init__(self, directory: str | Path, config: Any):
        """Create or re-open; nothing but a lock is written before `describe`.

        Raises UserError where the directory cannot be written, holds another config, or another process works in it,
        and ConfigError for a tracker that is not installed.
        """
        self.directory = Path(directory)
        self.config = config
        check_trackers(config.run.trackers)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / "lock", "a+")  # noqa: SIM115 - held until close()
        except OSError as error:
            raise UserError(f"cannot write the run directory {self.directory}: {error.strerror}") from None
        self._log = None
        self._take_lock()
        try:
            self._check_config()
        except UserError:
            self.close()
            raise

    def _take_lock(self) -> None:
        for _ in range(LOCK_TRIES):
            try:
                take_lock(self._lock, exclusive=True)
                return
            except BlockingIOError:
                time.sleep(0.05)
            except OSError as error:  # a file system without locks
                self._lock.close()
                raise UserError(
                    f"cannot lock {self.directory} ({error.strerror}); give a --run-dir elsewhere"
                ) from None
        self._lock.close()
        raise UserError(f"another process is working on {self.directory}; wait for it, or stop it first")

    def _check_config(self) -> None:
        path = self.directory / "config.yaml"
        if not path.exists():
            return
        try:
            recorded = _deciding(configs.load(path, cls=type(self.config)))
        except ConfigError as error:
            raise UserError(f"{path} is not a config of this stage: {error}") from None
        wanted = _deciding(self.config)
        differing = sorted(k for k in recorded.keys() | wanted.keys() if recorded.get(k) != wanted.get(k))
        if differing:
            key = differing[0]
            raise UserError(
                f"{self.directory} holds a run of another config ({key}: "
                f"{recorded.get(key)} there, {wanted.get(key)} now"
                + (f"; {len(differing) - 1} more keys differ" if differing[1:] else "")
                + "); give another --run-dir"
            )

    def describe(self, command: list[str] | None = None) -> None:
        """Record the config and the environment, once config and data are known to be valid.

        A re-opened run only records changes of code or environment.
        """
        here = environment()
        if (self.directory / "config.yaml").exists():
            self._reopened(here)
            return
        write_atomically(self.directory / "command.txt", shlex.join(["python", *(command or sys.argv)]) + "\n")
        write_atomically(self.directory / "environment.json", json.dumps(here, indent=1) + "\n")
        text = yaml.safe_dump(configs.to_dict(self.config), sort_keys=False)
        write_atomically(self.directory / "config.yaml", text)

    def _reopened(self, here: Mapping[str, Any]) -> None:
        """Append `here` to environments.jsonl, and say so, where it differs from what the run was last opened with.

        `step`: the last one logged until then; those after the checkpoint before it are repeated.
        """
        known = read_environments(self.directory)
        before = {key: value for key, value in (known or [{}])[-1].items() if key not in CONTINUATION}
        changed = ", ".join(
            f"{key} {short(before.get(key))} -> {short(here.get(key))}"
            for key in dict.fromkeys([*CODE, *here, *before])
            if before.get(key) != here.get(key)
        )
        if not changed:
            return
        step = max((line["step"] for line in read_log(self.directory)), default=-1)
        entry = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changed": changed, **here}
        lines = [json.dumps(line) + "\n" for line in [*known[1:], entry]]
        write_atomically(self.directory / "environments.jsonl", "".join(lines))
        other = "by other code" if any(before.get(key) != here.get(key) for key in CODE) else "in another environment"
        order = any(key in before and before[key] != here.get(key) for key in ORDER)
        bits = "; sums are made in another order: equal to an undisturbed run up to rounding alone" if order else ""
        print(f"note: continued {other}: {changed}{bits}", flush=True)

    @property
    def id(self) -> str:
        """The config's id, whatever the directory is called: two runs never share it."""
        return run_id(self.config)

    @property
    def checkpoint(self) -> Path:
        """Where the last checkpoint is, or will be."""
        return self.directory / "checkpoint.pt"

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote; None while the run is not finished. Raises ResultError as `read_result` does."""
        return read_result(self.directory)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint says of the run that wrote it."""
        return {"run": self.id, "stage": self.config.stage, "config": configs.to_dict(self.config)}

    def rewind(self, step: int, epoch: int | None = None) -> None:
        """Drop log lines of `step` and after, and those of whole epochs after `epoch`: they will be repeated.

        The trackers start here, and are told what was dropped.
        """
        ended = math.inf if epoch is None else epoch
        kept, dropped = [], []
        for line in read_log(self.directory):
            again = line["step"] >= step or (line.get("kind") == "epoch" and line["epoch"] > ended)
            (dropped if again else kept).append(line)
        write_atomically(self.directory / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self._trackers = Trackers(self, step + 1, kept, dropped)

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Append one JSON line; everything measured in seconds belongs under `timing`.

        Raises UserError where the log cannot be written, as on a full disk.
        """
        try:
            if self._log is None:
                self._log = open(self.directory / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - held until close()
            self._log.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._log.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.directory / 'log.jsonl'}: {error.strerror}") from None
        if self._trackers is not None:
            self._trackers.log({"kind": kind, "step": step, **values})

    def sync(self) -> None:
        """Force the log to disk: called before a checkpoint, so that the log never ends before its checkpoint.

        Raises UserError where that fails.
        """
        try:
            if self._log is not None:
                os.fsync(self._log.fileno())
        except OSError as error:  # network file systems say only now that the disk is full
            raise UserError(f"cannot write {self.directory / 'log.jsonl'}: {error.strerror}") from None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json: from now on the run is finished, and its last checkpoint is enough."""
        self.sync()
        content = {"run": self.id, "stage": self.config.stage, **result}
        write_atomically(self.directory / "result.json", json.dumps(content, indent=1) + "\n")
        discard(previous_checkpoint(self.checkpoint))

    def close(self) -> None:
        """Give the lock back; a directory with nothing but a lock in it is removed."""
        if self._trackers is not None:
            self._trackers.close()
        with contextlib.suppress(OSError):  # a disk that was full already is still full
            if self._log is not None:
                self._log.close()
            if [path.name for path in self.directory.iterdir()] == ["lock"]:  # refused before anything was written
                shutil.rmtree(self.directory)
        self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _deciding(config: Any) -> dict[str, Any]:
    """Dotted keys, as a recipe has them, of all that decides the run's numbers."""
    flat = configs.flatten({**configs.identity(config), "seed": config.seed})
    section = getattr(config, "framework", "settings")
    return {key.replace("settings.", f"{section}.", 1): value for key, value in flat.items()}
