"""A number that is not finite stops a run: what happened, in which step, with which images, and the state, on disk."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mixmask import checkpoint
from mixmask.config import UserError
from mixmask.runs import Run, what_is_left, write_atomically
from mixmask.training import distributed
from mixmask.training.state import TrainState


class NonFiniteError(UserError):
    """The value called `name` is `number` in step `step`."""

    def __init__(self, name: str, number: float, step: int):
        super().__init__(f"{name} is {number} at step {step}")
        self.name, self.number, self.step = name, number, step


def finite(values: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """The values as numbers. Raises NonFiniteError when one is not finite."""
    numbers = {name: float(value) for name, value in values.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise NonFiniteError(name, number, step)
    return numbers


@contextlib.contextmanager
def dump_on_nonfinite(run: Run, state: TrainState, about: Callable[[int], Mapping[str, Any]]) -> Iterator[None]:
    """A NonFiniteError inside becomes nonfinite.json, nonfinite.pt and a UserError that says where they are.

    `about(step)`: what the report says of a step beside its number, such as the images of its batch. Losses are only
    checked now and then, so the first non-finite one is searched for here; the saved state is from when it was
    noticed.
    """
    try:
        yield
    except NonFiniteError as error:
        finite_losses = [math.isfinite(loss) for loss in state.losses]
        step = error.step if all(finite_losses) else state.step - len(finite_losses) + finite_losses.index(False)
        where = "the first process says why"
        with distributed.main_process_first():
            if distributed.rank() == 0:
                report = {"run": run.id, "step": step, **about(step), **nonfinite_report(state), "noticed": str(error)}
                where = save_dump(run, report, {**run.about, **state.state_dict()})
        what = f"{error.name} is {error.number} at step {step}"
        raise UserError(f"{run.id}: {what}; stopped, {where}, {what_is_left(run.checkpoint)}") from None


def nonfinite_report(state: TrainState) -> dict[str, Any]:
    """The epoch's sums and the gradient's norm, as text: JSON has no NaN."""
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    return {
        "sums": {name: str(float(total)) for name, total in state.sums.items()},
        "gradient_norm": str(float(nn.utils.get_total_norm(gradients))),
    }


def save_dump(run: Run, report: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Save why a run stopped as nonfinite.json, and its state as nonfinite.pt; says where they are, or why not."""
    path = run.directory / "nonfinite.json"
    try:
        write_atomically(path, json.dumps(report) + "\n")
        checkpoint.save(path.with_suffix(".pt"), state)
    except UserError as error:
        return str(error)
    return f"batch and state are in {path} and {path.with_suffix('.pt').name}"
