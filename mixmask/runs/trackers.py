"""TensorBoard and Weights & Biases, fed with each line of a run's log as it is written; log.jsonl stays the record.

A curve is called kind/field, as in `epoch/loss`, and its x counts the steps that are done: 0 is before training. The
run's id is the tracker's. A run that is resumed makes the steps after its last checkpoint again; no curve gets a point
twice, and a tracker that is new to a run is given all that the run has logged. No torch here.

A tracker that is not installed is refused before anything is made; one that fails later is left out, with one line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mixmask import config as configs
from mixmask.config import ConfigError

STEPS = "steps"  # W&B's x: its own steps count calls
PATIENCE = 60.0  # seconds for W&B's server, at the beginning and at the end


class Tracker(Protocol):
    """What shows curves."""

    known: bool  # it has this run from an earlier start

    def log(self, kind: str, x: int, values: Mapping[str, float]) -> None:
        """A point at `x` for each of the values, which are named kind/field."""

    def close(self) -> None:
        """Nothing more will come."""


class TensorBoard:
    """Event files in the run's directory: `tensorboard --logdir runs` shows the run under its id."""

    def __init__(self, run: Any, x: int, dropped: Sequence[Mapping[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter

        self.known = any(run.directory.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(
            run.directory, purge_step=x if self.known else None
        )  # readers drop what is replayed
        if not self.known or x == 0:
            text = "\n".join(
                f"    {key}: {value}" for key, value in configs.flatten(configs.to_dict(run.config)).items()
            )
            self.writer.add_text("config", text, 0)

    def log(self, kind: str, x: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, x)
        self.writer.flush()  # what a crash would take is in no checkpoint's past

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of the project $WANDB_PROJECT, or else mixmask; without a key, offline files in the run's directory."""

    def __init__(self, run: Any, x: int, dropped: Sequence[Mapping[str, Any]]):
        import wandb

        self.known = (run.directory / "wandb").exists()
        self.seen = (
            {line["kind"]: steps_done(line) for line in dropped} if self.known else {}
        )  # what it has of each kind
        key = wandb.setup().settings.api_key or any((Path.home() / name).exists() for name in (".netrc", "_netrc"))
        self.run = wandb.init(
            id=run.id,
            name=run.id,
            project=os.environ.get("WANDB_PROJECT", "mixmask"),
            dir=run.directory,
            config=configs.to_dict(run.config),
            resume="allow",
            mode=None if key or os.environ.get("WANDB_MODE") else "offline",  # in place of a question
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=PATIENCE, login_timeout=PATIENCE, finish_timeout=PATIENCE
            ),
        )
        self.run.define_metric("*", step_metric=STEPS)

    def log(self, kind: str, x: int, values: Mapping[str, float]) -> None:
        if x > self.seen.get(kind, -1):
            self.run.log({STEPS: x, **values})

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.trackers: {name} is not installed; pip install {name}")


class Trackers:
    """A run's trackers, started after its log was cut back: what follows is at `x` or later.

    kept, dropped: lines of the log.
    """

    def __init__(self, run: Any, x: int, kept: Sequence[Mapping[str, Any]], dropped: Sequence[Mapping[str, Any]]):
        self.open: dict[str, Tracker] = {}
        for name in dict.fromkeys(run.config.run.trackers):
            with self._failing(name):
                tracker = self.open[name] = KINDS[name](run, x, dropped)
                for line in () if tracker.known else kept:
                    tracker.log(line["kind"], steps_done(line), scalars(line))

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of the log, just written."""
        for name, tracker in list(self.open.items()):
            with self._failing(name):
                tracker.log(line["kind"], steps_done(line), scalars(line))

    def close(self) -> None:
        """Nothing more will come."""
        for name, tracker in list(self.open.items()):
            with self._failing(name):
                tracker.close()
        self.open.clear()

    @contextlib.contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """Whatever a tracker raises inside ends the tracker, and not the run."""
        try:
            yield
        except Exception as error:
            self.open.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: {name} is left out from now on, all is in log.jsonl ({reason})", flush=True)


def steps_done(line: Mapping[str, Any]) -> int:
    """Where a line stands: its step counts from 0, and is -1 before training."""
    return line["step"] + 1


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, by kind and dotted field."""
    flat = configs.flatten({key: value for key, value in line.items() if key not in ("kind", "step")})
    return {f"{line['kind']}/{key}": value for key, value in flat.items() if type(value) in (int, float)}
