"""Everything that the next training step depends on, and its way to disk and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmask import checkpoint
from mixmask.numerics import exact_device, wide


@dataclass
class TrainState:
    """A model in training. What is random follows from the seed and the step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epochs: int
    steps_per_epoch: int
    step: int = 0  # steps done
    sums: dict[str, Tensor] = field(default_factory=dict)  # of this epoch's values
    losses: list[Tensor] = field(default_factory=list)  # of this epoch's steps, or of those since the run was resumed
    data: dict[str, int] = field(default_factory=dict)  # how many images and classes
    parts: dict[str, Any] = field(default_factory=dict)  # by name: what else has a state_dict, such as a scheduler

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def model_norm(self) -> Tensor:
        """The norm of all weights and buffers, a scalar: finite as long as each of them is."""
        return nn.utils.get_total_norm([v for v in self.model.state_dict().values() if v.is_floating_point()])

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a step's scalars to the epoch's sums, in float64, and keep its loss; nothing waits for the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + wide(value)
        self.losses.append(values["loss"])

    def means(self) -> dict[str, Tensor]:
        """Of the epoch's values, once all of its steps are done."""
        return {name: total / self.steps_per_epoch for name, total in self.sums.items()}

    def start_epoch(self) -> None:
        """Forget the values of the epoch before."""
        self.sums.clear()
        self.losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain types."""
        return {
            "step": self.step,
            "steps": self.steps,
            "data": self.data,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_states(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any], path: Path) -> None:
        """Go on from what `state_dict` gave, now or in the first edition. Raises CheckpointError naming `path`."""
        saved = _modern(saved, self.steps_per_epoch)
        missing = [name for name in ("model", "optimizer", "step", *self.parts) if name not in saved]
        if missing:
            raise checkpoint.CheckpointError(f"{path} is not a checkpoint of this stage: no '{missing[0]}' in it")
        here = {"steps": self.steps, **self.data}
        for name, there in {"steps": saved.get("steps"), **saved.get("data", {})}.items():
            if there is not None and there != here.get(name, there):
                raise checkpoint.CheckpointError(
                    f"{path} is of a run of {there:,} {name}, and there are {here[name]:,} now: its data have changed; "
                    "put them back, or give another --run-dir"
                )
        checkpoint.load_weights(self.model, saved["model"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        if "random" in saved:
            checkpoint.restore_random_states(saved["random"])
        device = exact_device(next(self.model.parameters()).device)
        self.sums = {name: total.to(device) for name, total in saved.get("sums", {}).items()}
        self.step = saved["step"]


def _modern(saved: Mapping[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    """A probe's checkpoint of the first edition counts epochs; one of a fine-tuning holds the epoch's losses."""
    state = dict(saved)
    if "epoch" in state:
        state["step"] = state.pop("epoch") * steps_per_epoch
    if "losses" in state:
        losses = state.pop("losses").double()
        state["sums"] = {"loss": losses.sum()} if len(losses) else {}
    return state
