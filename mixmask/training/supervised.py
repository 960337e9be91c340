"""What the probe and the fine-tuning share: a step on labelled inputs, and what is reported of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixmask.config import Finetune, Linear
from mixmask.runs import Run
from mixmask.training.loop import epoch_lines, seconds, test_results
from mixmask.training.optim import device_name
from mixmask.training.state import TrainState


def fit(state: TrainState, inputs: Tensor, labels: Tensor, rates: dict[str, float]) -> dict[str, Tensor]:
    """One step of the model on inputs (N, ...) and labels (N,), with a rate for each group; returns its loss."""
    set_rates(state.optimizer, rates)
    loss = F.cross_entropy(state.model(inputs), labels)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    state.step += 1
    return {"loss": loss.detach()}


def set_rates(optimizer: torch.optim.Optimizer, rates: dict[str, float]) -> None:
    """Give each of the optimiser's groups its rate, in their order."""
    for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
        group["lr"] = rate


def result_of(run: Run, config: Linear | Finetune, metric: str, device: torch.device, **origin: Any) -> dict[str, Any]:
    """Last and best test accuracy, named `metric`; `origin`: where the weights came from."""
    lines = epoch_lines(run)
    return {
        "checkpoint": config.checkpoint,
        **origin,
        "metrics": test_results(lines, metric),
        "epochs": config.epochs,
        "device": device_name(device),
        "timing": seconds(lines),
    }
