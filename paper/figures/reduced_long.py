"""Reduced scale, 30 epochs: training loss and k-NN accuracy by epoch, every method; not a figure of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from paper.figures import reduced
from paper.presets import Budget

METHODS = ("vanilla", "erase", "unmix", "mixmask", "both")  # the table's other rows are variants of MixMask


def draw(budgets: Sequence[Budget], folders: Sequence[Path]) -> Figure:
    """As the figure of six epochs."""
    return reduced.draw(budgets, folders, [f"reduced_long/knn/{method}" for method in METHODS])
