"""mixmask/training/loop.py on a model of one number: what is saved when, what is logged once, what a return owes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mixmask import checkpoint
from mixmask.config import Linear
from mixmask.runs import Run, read_log
from mixmask.training import loop as module
from mixmask.training.loop import Loop, epoch_lines, last_and_best, seconds
from mixmask.training.state import TrainState

EPOCHS, STEPS = 3, 4


class Crash(Exception):
    """What ends a run without a word."""


@pytest.fixture
def config(tiny_linear: Callable[..., Linear]) -> Callable[..., Linear]:
    return lambda *items: tiny_linear("run.log_every=2", "run.checkpoint_minutes=1000", *items)


def go(
    directory: Path,
    config: Linear,
    step: Callable[[int], None] = lambda step: None,
    measure: Callable[[int], None] = lambda epoch: None,
) -> list[int]:
    """A run of 3 epochs of 4 steps; step s has the loss s and adds s to the weight. Returns the steps it has taken.

    step, measure: called after each step is logged, and where an epoch is measured; they may end the run.
    """
    model, taken = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(model.weight)
    with Run(directory, config) as run:
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=1.0), EPOCHS, STEPS)
        loop = Loop(run, config, state, lambda s: {"lr": 1 / (s + 1)}, lambda e: torch.zeros(STEPS, 1), step_lines=True)
        loop.resume()
        with loop.running():
            for epoch in loop.epochs():
                for number in loop.batches(range(epoch * STEPS + loop.skip, (epoch + 1) * STEPS)):
                    taken.append(number)
                    model.weight.data += number
                    state.step += 1
                    loop.log({"loss": torch.tensor(float(number))})
                    step(number)
                    loop.save_if_due()
                loop.end_epoch(lambda: measure(loop.epoch + 1) or {"test_top1": float(model.weight)})
        lines = epoch_lines(run)
        loop.finish({"metrics": last_and_best(lines, "test_top1", "top1")})
    return taken


def log(directory: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_log(directory)]


EXPECTED = [
    *({"kind": "step", "step": s, "epoch": 1, "loss": float(s), "lr": 1 / (s + 1)} for s in (0, 2)),
    {"kind": "epoch", "step": 3, "epoch": 1, "loss": 1.5, "test_top1": 6.0, "lr": 1 / 4},
    *({"kind": "step", "step": s, "epoch": 2, "loss": float(s), "lr": 1 / (s + 1)} for s in (4, 6)),
    {"kind": "epoch", "step": 7, "epoch": 2, "loss": 5.5, "test_top1": 28.0, "lr": 1 / 8},
    *({"kind": "step", "step": s, "epoch": 3, "loss": float(s), "lr": 1 / (s + 1)} for s in (8, 10)),
    {"kind": "epoch", "step": 11, "epoch": 3, "loss": 9.5, "test_top1": 66.0, "lr": 1 / 12},
]


def test_an_undisturbed_run_logs_each_second_step_and_each_epoch(config: Callable[..., Linear], tmp_path: Path):
    assert go(tmp_path, config()) == list(range(12)) and log(tmp_path) == EXPECTED


def test_a_measurement_that_fails_finds_the_epoch_saved_and_is_all_that_is_made_again(
    config: Callable[..., Linear], tmp_path: Path
):
    def fails(at: int) -> Callable[[int], None]:
        def measure(epoch: int) -> None:
            if epoch == at:
                raise Crash

        return measure

    for epoch in (2, 3):
        with pytest.raises(Crash):
            go(tmp_path, config(), measure=fails(epoch))
        assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == epoch * STEPS
    measured: list[int] = []
    assert go(tmp_path, config(), measure=measured.append) == [] and measured == [3]
    assert log(tmp_path) == EXPECTED


@pytest.mark.parametrize("items", [(), ("run.checkpoint_every=2",), ("run.checkpoint_minutes=0",)])
@pytest.mark.parametrize("at", range(12))
def test_a_run_that_crashes_after_any_step_goes_on_to_the_same_log(
    config: Callable[..., Linear], tmp_path: Path, at: int, items: tuple[str, ...]
):
    def crashes(step: int) -> None:
        if step == at:
            raise Crash

    with pytest.raises(Crash):
        go(tmp_path, config(*items), step=crashes)
    taken = go(tmp_path, config(*items))
    saved = {"": at // STEPS * STEPS, "every": at // (2 * STEPS) * 2 * STEPS, "minutes": at}
    assert taken[0] == saved["every" if "every" in str(items) else "minutes" if items else ""]
    assert log(tmp_path) == EXPECTED
    assert checkpoint.load(tmp_path / "checkpoint.pt")["model"]["weight"].item() == sum(range(12))


@pytest.mark.parametrize(
    ("items", "steps"),
    [((), [4, 8, 12]), (("run.checkpoint_every=2",), [8, 12]), (("run.checkpoint_minutes=0",), list(range(1, 13)))],
)
def test_it_saves_as_often_as_it_is_told_and_after_the_last_epoch(
    config: Callable[..., Linear], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items, steps
):
    saved: list[int] = []
    monkeypatch.setattr(module.checkpoint, "save", lambda path, state: saved.append(state["step"]))
    go(tmp_path, config(*items))
    assert saved == steps


def test_last_best_and_before_training():
    lines = [{"epoch": e, "a": v, "timing": {"seconds": s}} for e, v, s in ((0, 9.0, 1), (1, 5.0, 2.25), (2, 7.0, 4))]
    lines += [{"epoch": 3, "a": 6.0}]
    assert last_and_best(lines, "a", "x") == {"x_last": 6.0, "x_best": 7.0, "x_init": 9.0}
    assert last_and_best(lines[1:], "a", "x") == {"x_last": 6.0, "x_best": 7.0}
    assert seconds(lines) == {"seconds": 7.2}


def test_what_else_has_a_state_goes_on_where_it_was(tmp_path):
    def made() -> TrainState:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
        return TrainState(model, optimizer, EPOCHS, STEPS, parts={"scheduler": scheduler})

    before, after = made(), made()
    for _ in range(3):
        before.optimizer.step()
        before.parts["scheduler"].step()
    after.load_state_dict(before.state_dict(), tmp_path)
    assert after.parts["scheduler"].last_epoch == 3
    for state in (before, after):
        state.parts["scheduler"].step()
        assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
