"""Learning rates against the formulas of the code that each recipe follows."""

import inspect
import math

import pytest
import torch

from mixmask import schedules
from mixmask.config import ConfigError, Schedule
from mixmask.schedules import cautions, learning_rate


def rates(schedule: Schedule, base: float, steps_per_epoch: int, epochs: int) -> list[float]:
    return [learning_rate(schedule, base, step, steps_per_epoch, epochs) for step in range(steps_per_epoch * epochs)]


@pytest.mark.parametrize("first_epoch", [0, 1])
def test_cosine_by_epoch(first_epoch: int):
    """0.5 lr (1 + cos(pi e / E)), e from 0 (MoCo, Table 9) or from 1 (Un-Mix's CIFAR script, Table 8)."""
    found = rates(Schedule("cosine", first_epoch=first_epoch), 0.06, 3, 10)
    for step, rate in enumerate(found):
        epoch = step // 3 + first_epoch
        assert rate == pytest.approx(0.06 * 0.5 * (1 + math.cos(math.pi * epoch / 10)), abs=1e-15)
    assert found[0] == (0.06 if first_epoch == 0 else pytest.approx(0.0585317, abs=1e-7))
    assert found[-1] == pytest.approx(0.0 if first_epoch else 0.0014683, abs=1e-7)


def test_cosine_by_iteration():
    for step, rate in enumerate(rates(Schedule("cosine", unit="iteration"), 0.1, 7, 4)):
        assert rate == pytest.approx(0.05 * (1 + math.cos(math.pi * step / 28)), abs=1e-15)


def test_table9_probe_divides_by_ten_at_epochs_60_and_80():
    found = rates(Schedule("step", milestones=(60, 80), gamma=0.1), 30.0, 2, 100)
    assert found == pytest.approx([30.0] * 120 + [3.0] * 40 + [0.3] * 40)


def test_negative_milestones_count_from_the_end():
    """SimCLR and BYOL: a fifth at 50 and at 25 epochs before the end."""
    found = rates(Schedule("step", milestones=(-50, -25), gamma=0.2), 1.0, 1, 200)
    assert found == pytest.approx([1.0] * 150 + [0.2] * 25 + [0.04] * 25)
    assert found == rates(Schedule("step", milestones=(-25, -50), gamma=0.2), 1.0, 1, 200)


def pytorch(scheduler: type, base: float, epochs: int, **settings: object) -> list[float]:
    """The rates of torch.optim.lr_scheduler, one an epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler, found = scheduler(optimizer, **settings), []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("epochs", [10, 24, 25, 26, 49, 50, 51, 100])
def test_milestone_before_the_start_of_a_short_run_never_comes(epochs: int):
    """SimCLR and BYOL with fewer epochs than 50: htdt's MultiStepLR over [E - 50, E - 25]."""
    schedule = Schedule("step", milestones=(-50, -25), gamma=0.2)
    multistep = torch.optim.lr_scheduler.MultiStepLR
    expected = pytorch(multistep, 3e-3, epochs, milestones=[epochs - 50, epochs - 25], gamma=0.2)
    assert rates(schedule, 3e-3, 1, epochs) == pytest.approx(expected)
    assert (rates(schedule, 3e-3, 1, epochs)[0] == 3e-3) == (epochs not in (25, 50))


def test_exponential_falls_by_one_ratio_each_epoch_towards_the_last_rate():
    """htdt's linear classifier: gamma = (1e-6 / 1e-2) ** (1 / 500), by epoch."""
    found = rates(Schedule("exponential", last_lr=1e-6), 1e-2, 3, 500)
    gamma = (1e-6 / 1e-2) ** (1 / 500)
    expected = pytorch(torch.optim.lr_scheduler.ExponentialLR, 1e-2, 500, gamma=gamma)
    assert found[::3] == found[1::3] == found[2::3] == pytest.approx(expected, rel=1e-9)
    assert found[0] == 1e-2 and found[-1] * gamma == pytest.approx(1e-6)


def test_exponential_to_zero_is_refused():
    with pytest.raises(ConfigError, match=r"schedule\.last_lr: .* above 0"):
        Schedule("exponential")


def test_run_too_short_for_its_schedule_says_so():
    schedule = Schedule("step", warmup_iterations=500, milestones=(-50, -25, 3, 40), gamma=0.2)
    assert cautions(schedule, 100, 1000) == []
    assert cautions(schedule, 10, 40) == [
        "the warm-up of 500 iterations fills all 400 of the run",
        "milestone -50 lies outside the 40 epochs and never comes",
        "milestone 40 lies outside the 40 epochs and never comes",
    ]
    assert cautions(Schedule("cosine", warmup_epochs=10), 5, 11) == []


def test_warmup_over_500_iterations_is_linear_from_a_500th():
    found = rates(Schedule("step", warmup_iterations=500, milestones=(-1,), gamma=0.2), 3e-3, 100, 8)
    assert found[:500] == pytest.approx([3e-3 * (i + 1) / 500 for i in range(500)])
    assert found[500:] == pytest.approx([3e-3] * 200 + [6e-4] * 100)


@pytest.mark.parametrize("unit", ["epoch", "iteration"])
def test_warmup_over_epochs_is_linear_from_zero_then_cosine_over_the_rest(unit: str):
    found = rates(Schedule("cosine", unit=unit, warmup_epochs=10), 0.06, 5, 30)
    assert found[:50] == pytest.approx([0.06 * i / 50 for i in range(50)])
    for step in range(50, 150):
        done = (step - 50) / 100 if unit == "iteration" else (step // 5 - 10) / 20
        assert found[step] == pytest.approx(0.03 * (1 + math.cos(math.pi * done)), abs=1e-15)
    assert found[50] == 0.06 and min(found[50:]) > 0


@pytest.mark.parametrize("unit", ["epoch", "iteration"])
def test_warm_up_begins_at_the_first_rate_and_the_cosine_ends_towards_the_last(unit: str):
    """SwAV: from 0.3 to 0.6, then down to 6e-4."""
    schedule = Schedule("cosine", unit=unit, warmup_epochs=2, first_lr=0.3, last_lr=6e-4)
    found = rates(schedule, 0.6, 5, 12)
    assert found[:10] == pytest.approx([0.3 + 0.3 * step / 10 for step in range(10)])
    for step in range(10, 60):
        done = (step - 10) / 50 if unit == "iteration" else (step // 5 - 2) / 10
        assert found[step] == pytest.approx(6e-4 + (0.6 - 6e-4) * 0.5 * (1 + math.cos(math.pi * done)))


def test_rate_is_a_pure_function_of_the_step():
    schedule = Schedule("cosine", unit="iteration", warmup_epochs=1)
    in_order = rates(schedule, 0.1, 4, 5)
    assert [learning_rate(schedule, 0.1, step, 4, 5) for step in reversed(range(20))] == in_order[::-1]
    assert "torch" not in inspect.getsource(schedules).replace("No torch here", "")
