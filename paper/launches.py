"""What more runs would settle: the command that launches them, and its GPU hours (paper/cost.py). No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paper.cells import Cell
from paper.cost import hours
from paper.presets import Budget, Step, chains, located


@dataclass(frozen=True)
class Launch:
    """The runs of some cells with the seeds 0 ... seeds - 1, and the hours of those that are not finished."""

    targets: tuple[str, ...]
    seeds: int
    hours: float  # on one A100; of a small net (`cpu`) on two CPU cores
    cpu: bool = False
    checkpoints: tuple[str, ...] = ()  # public ones that it needs

    @property
    def command(self) -> str:
        seeds = ",".join(map(str, range(self.seeds)))
        files = "".join(f" checkpoints.{name}=PATH" for name in self.checkpoints)
        return f"python slurm/launch.py {' '.join(self.targets)} --set seed=[{seeds}]{files}"

    @property
    def cost(self) -> str:
        """`26 GPU hours`, `8 minutes of two CPU cores`."""
        if self.cpu and self.hours < 1:
            return f"{60 * self.hours:.0f} minutes of two CPU cores"
        return f"{self.hours:,.{0 if self.hours >= 10 else 1}f} {'hours of two CPU cores' if self.cpu else 'GPU hours'}"


def launch(cells: Sequence[Cell], seeds: int, budget: Budget, folders: Sequence[Path]) -> Launch:
    """Of `cells`; each distinct run that has no result in `folders` counts once."""
    settings = {**budget.settings, "pretrain": {**budget.settings.get("pretrain", {}), "seed": [*range(seeds)]}}
    budget, cpu = dataclasses.replace(budget, settings=settings), any(cell.scale for cell in cells)
    runs: dict[Path, float] = {}
    for cell in cells:
        for chain in chains(cell, budget):
            for step in chain:
                where = located(folders, step)
                if where not in runs and not (where / "result.json").exists():
                    runs[where] = _hours(step, chain[0], cpu)
    needed = tuple(dict.fromkeys(cell.checkpoint for cell in cells if cell.checkpoint and not cell.recipe))
    return Launch(tuple(cell.id for cell in cells), seeds, sum(runs.values()), cpu, needed)


def _hours(step: Step, origin: Step, cpu: bool) -> float:
    """A conversion takes no GPU."""
    return 0.0 if step.stage == "convert" else hours(step.config, origin.config, gpus=0 if cpu else 1)
