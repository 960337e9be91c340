"""run.trackers with the real packages: TensorBoard and W&B hold the log, once, whatever has happened to the run."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixmask.config import ConfigError, Linear
from mixmask.runs import Run, read_log, run_id, trackers
from tests.stages.test_loop import Crash, go

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")

Points = list[tuple[str, int, float]]  # curve, x, value
TRACKERS = ("tensorboard", "wandb")


@pytest.fixture
def config(tiny_linear: Callable[..., Linear], monkeypatch) -> Callable[..., Linear]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    items = ("run.log_every=2", "run.checkpoint_minutes=1000", "run.trackers=[tensorboard, wandb]")
    return lambda *more: tiny_linear(*items, *more)


def logged(directory: Path) -> Points:
    """Of the record: all but timings, which a run that is resumed makes anew."""
    points = [(key, line["step"] + 1, v) for line in read_log(directory) for key, v in trackers.scalars(line).items()]
    return sorted(point for point in points if "timing" not in point[0])


def tensorboard(directory: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    found = [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    return sorted(point for point in found if "timing" not in point[0])


def wandb(directory: Path) -> Points:
    points = []
    for record in wandb_records(directory):
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            points += [(k, row["steps"], v) for k, v in row.items() if k != "steps" and not k.startswith("_")]
    return sorted(point for point in points if "timing" not in point[0])


def wandb_records(directory: Path) -> Iterator:
    """What all starts have written, in LevelDB's log format: blocks of 32 KiB of (crc, length, type, data)."""
    from wandb import teardown
    from wandb.proto.wandb_internal_pb2 import Record

    teardown()  # as the end of a process does: waits until all is written
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32_768 - place % 32_768 < 7:
                place += 32_768 - place % 32_768
                continue
            crc, length, kind = struct.unpack("<IHB", data[place : place + 7])
            parts += data[place + 7 : place + 7 + length]
            assert crc == zlib.crc32(data[place + 6 : place + 7 + length])
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(parts)
                yield record
                parts = b""


def approx(points: Points) -> Points:
    """TensorBoard's values are float32."""
    return [(name, x, pytest.approx(value, rel=1e-6)) for name, x, value in points]


def crash_at(number: int) -> Callable[[int], None]:
    def at(step: int) -> None:
        if step == number:
            raise Crash

    return at


def test_they_hold_the_log_under_the_runs_id_with_its_config(config, tmp_path):
    go(tmp_path, config())
    points = logged(tmp_path)
    assert ("epoch/test_top1", 12, pytest.approx(66.0)) in points and ("step/loss", 3, 2.0) in points
    assert tensorboard(tmp_path) == approx(points)
    assert wandb(tmp_path) == points
    runs = [record.run for record in wandb_records(tmp_path) if record.HasField("run")]
    assert runs[0].run_id == run_id(config()) and runs[0].project == "mixmask"
    assert {item.key: json.loads(item.value_json) for item in runs[0].config.update}["batch_size"] == 16
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert b"optimizer.lr: 0.01" in path.read_bytes()


@pytest.mark.parametrize("step", [1, 3, 6, 10])  # before any checkpoint, at an epoch's end, within an epoch
def test_steps_that_a_resumed_run_makes_again_are_not_doubled(config, tmp_path, step):
    with pytest.raises(Crash):
        go(tmp_path, config(), step=crash_at(step))
    assert tensorboard(tmp_path)  # nothing waits for the end
    with pytest.raises(Crash):
        go(tmp_path, config(), step=crash_at(min(step + 2, 11)))
    go(tmp_path, config())
    points = logged(tmp_path)
    assert len(points) == len({point[:2] for point in points}) == 6 * 3 + 3 * 4
    assert tensorboard(tmp_path) == approx(points)
    assert wandb(tmp_path) == points


def test_an_epochs_line_that_a_run_owed_comes_once(config, tmp_path):
    def measure(epoch: int) -> None:
        if epoch == 2 and not (tmp_path / "met").exists():
            (tmp_path / "met").touch()
            raise Crash

    with pytest.raises(Crash):
        go(tmp_path, config(), measure=measure)
    go(tmp_path, config(), measure=measure)
    assert tensorboard(tmp_path) == approx(logged(tmp_path))
    assert wandb(tmp_path) == logged(tmp_path)


def test_a_tracker_that_comes_later_is_given_what_was_logged(config, tmp_path):
    with pytest.raises(Crash):
        go(tmp_path, config("run.trackers=[]"), step=crash_at(6))
    go(tmp_path, config())
    assert tensorboard(tmp_path) == approx(logged(tmp_path))
    assert wandb(tmp_path) == logged(tmp_path)


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_fails_is_left_out_with_one_line_and_the_run_goes_on(config, tmp_path, monkeypatch, capsys, name):
    go(tmp_path / "whole", config("run.trackers=[]"))
    calls = []

    def log(*_: object) -> None:
        calls.append(1)
        raise OSError("the disk\nis full")

    monkeypatch.setattr(trackers.KINDS[name], "log", log)
    capsys.readouterr()
    go(tmp_path / "run", config())
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [f"warning: {name} is left out from now on, all is in log.jsonl (OSError: the disk is full)"]
    assert len(calls) == 1 and logged(tmp_path / "run") == logged(tmp_path / "whole")
    others = {"tensorboard": wandb, "wandb": tensorboard}
    assert others[name](tmp_path / "run") == approx(logged(tmp_path / "run"))


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_cannot_begin_is_left_out_too(config, tmp_path, monkeypatch, capsys, name):
    def begin(*_: object) -> None:
        raise ImportError("it is broken")

    monkeypatch.setitem(trackers.KINDS, name, begin)
    go(tmp_path, config())
    assert f"warning: {name} is left out from now on" in capsys.readouterr().out


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_not_installed_is_refused_before_anything_is_made(config, tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=f"run.trackers: {name} is not installed; pip install {name}"):
        Run(tmp_path / "run", config(f"run.trackers=[{name}]"))
    assert not (tmp_path / "run").exists()


def test_without_a_key_nothing_is_asked_and_wandb_writes_offline(config, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    go(tmp_path / "run", config("run.trackers=[wandb]"))
    assert wandb(tmp_path / "run") == logged(tmp_path / "run")
