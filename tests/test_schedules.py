"""Learning rates against the formulas of the code that each recipe follows."""

import inspect
import math

import pytest

from mixmask import schedules
from mixmask.config import Schedule
from mixmask.schedules import learning_rate


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


def test_rate_is_a_pure_function_of_the_step():
    schedule = Schedule("cosine", unit="iteration", warmup_epochs=1)
    in_order = rates(schedule, 0.1, 4, 5)
    assert [learning_rate(schedule, 0.1, step, 4, 5) for step in reversed(range(20))] == in_order[::-1]
    assert "torch" not in inspect.getsource(schedules).replace("No torch here", "")
