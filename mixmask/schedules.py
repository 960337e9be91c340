"""Learning rates as pure functions of the iteration: a resumed run needs no scheduler state. No torch here."""

from __future__ import annotations

import math

from mixmask.config import Schedule


def learning_rate(schedule: Schedule, base: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of iteration `step` (counted from 0) of a run of `epochs` epochs."""
    epoch = step // steps_per_epoch
    warmup = warmup_steps(schedule, steps_per_epoch)
    if step < warmup:
        first = schedule.first_lr
        return first + (base - first) * warmup_factor(schedule, step, warmup)
    if schedule.kind == "step":
        return base * step_factor(schedule, epoch, epochs)
    if schedule.kind == "exponential":
        return exponential(base, schedule.last_lr, epoch / epochs)
    last = schedule.last_lr
    if schedule.unit == "epoch":
        position, total = epoch + schedule.first_epoch - schedule.warmup_epochs, epochs - schedule.warmup_epochs
    else:
        position, total = step - warmup, steps_per_epoch * epochs - warmup
    return last + (base - last) * cosine(position, total)


def cosine(position: float, total: float) -> float:
    """Half a cosine from 1 at position 0 to 0 at `total`."""
    return 0.5 * (1 + math.cos(math.pi * position / total))


def exponential(first: float, last: float, done: float) -> float:
    """From `first` to `last` by equal ratios; `done` is the share of the run, 0 to 1."""
    return first ** (1 - done) * last**done


def step_factor(schedule: Schedule, epoch: int, epochs: int) -> float:
    """gamma to the number of milestones passed; negative milestones count from the last epoch.

    One that lies before epoch 0 of a short run never comes (as in PyTorch's MultiStepLR).
    """
    milestones = (from_start(m, epochs) for m in schedule.milestones)
    return schedule.gamma ** sum(0 <= m <= epoch for m in milestones)


def from_start(milestone: int, epochs: int) -> int:
    """A milestone that may count from the last epoch as an epoch; below 0: before the run."""
    return milestone if milestone >= 0 else epochs + milestone


def warmup_steps(schedule: Schedule, steps_per_epoch: int) -> int:
    """Iterations of warm-up."""
    return max(schedule.warmup_iterations, schedule.warmup_epochs * steps_per_epoch)


def warmup_factor(schedule: Schedule, step: int, warmup: int) -> float:
    """Linear: (step + 1) / warmup with `warmup_iterations` (htdt), from 0 by iteration with `warmup_epochs`."""
    return (step + 1) / warmup if schedule.warmup_iterations else step / warmup


def cautions(schedule: Schedule, steps_per_epoch: int, epochs: int) -> list[str]:
    """Notes on parts of the schedule that a run of `epochs` epochs is too short for; usually none."""
    steps, warmup = steps_per_epoch * epochs, warmup_steps(schedule, steps_per_epoch)
    notes = [f"the warm-up of {warmup} iterations fills all {steps} of the run"] if warmup >= steps else []
    if schedule.kind == "cosine" and schedule.first_epoch == epochs == 1:
        notes.append("the cosine counts its epochs from 1, so the only one trains at rate 0")
    if schedule.kind == "step":
        never = [m for m in schedule.milestones if not 0 <= from_start(m, epochs) < epochs]
        notes += [f"milestone {m} lies outside the {epochs} epochs and never comes" for m in never]
    return notes
