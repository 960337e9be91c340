"""Learning rates as pure functions of the iteration: a resumed run needs no scheduler state. No torch here."""

from __future__ import annotations

import math
from bisect import bisect_right

from mixmask.config import Schedule


def learning_rate(schedule: Schedule, base: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of iteration `step` (counted from 0) of a run of `epochs` epochs."""
    epoch = step // steps_per_epoch
    warmup = max(schedule.warmup_iterations, schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return base * warmup_factor(schedule, step, warmup)
    if schedule.kind == "step":
        return base * step_factor(schedule, epoch, epochs)
    if schedule.unit == "epoch":
        return base * cosine(epoch + schedule.first_epoch - schedule.warmup_epochs, epochs - schedule.warmup_epochs)
    return base * cosine(step - warmup, steps_per_epoch * epochs - warmup)


def cosine(position: float, total: float) -> float:
    """Half a cosine from 1 at position 0 to 0 at `total`."""
    return 0.5 * (1 + math.cos(math.pi * position / total))


def step_factor(schedule: Schedule, epoch: int, epochs: int) -> float:
    """gamma to the number of milestones passed; negative milestones count from the last epoch."""
    milestones = sorted(m if m >= 0 else epochs + m for m in schedule.milestones)
    return schedule.gamma ** bisect_right(milestones, epoch)


def warmup_factor(schedule: Schedule, step: int, warmup: int) -> float:
    """Linear: (step + 1) / warmup with `warmup_iterations` (htdt), from 0 by iteration with `warmup_epochs`."""
    return (step + 1) / warmup if schedule.warmup_iterations else step / warmup
