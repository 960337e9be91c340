"""Other people's public checkpoints, which can take a pre-training's place: paper/checkpoints.yaml. No torch here."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mixmask.config import build, read_yaml
from paper.cells import ROOT


@dataclass(frozen=True)
class PublicCheckpoint:
    """Where a checkpoint comes from, and what a number measured from it needs said beside it."""

    file: str
    page: str
    format: str
    note: str

    @property
    def hint(self) -> str:
        return f"expected {self.file}, from {self.page}"


@functools.cache
def public_checkpoints() -> dict[str, PublicCheckpoint]:
    """By the name that `--set checkpoints.NAME=PATH` gives a file."""
    values = read_yaml(ROOT / "paper" / "checkpoints.yaml")
    return {name: build(PublicCheckpoint, entry, f"checkpoint {name}") for name, entry in values.items()}
