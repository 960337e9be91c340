"""Reduced scale, 30 epochs: k-NN accuracy by epoch of every method, and of x1 scored again without a mask.

Not a figure of the paper (docs/order.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mixmask.registry import METHODS
from paper.figures.curves import by_epoch, finish, plot, read
from paper.figures.style import WIDTH
from paper.presets import Budget

AGAIN = replace(METHODS["vanilla"], color="#0b7fab", linestyle="-")
LOOKS = {  # by the table's row
    **{name: METHODS[name] for name in ("vanilla", "erase", "unmix", "mixmask", "both")},
    "literal": replace(METHODS["mixmask"], title="the released generator", color="#5b2a86", marker="^"),
    "again_own": replace(AGAIN, title="x1 again, both keys", marker="X"),
    "again": replace(AGAIN, title="x1 again, x2's key", marker="d", color="#8c8c8c"),
}
PANELS = {
    "methods": ("vanilla", "erase", "unmix", "mixmask", "both"),
    "is it the masks?": ("vanilla", "mixmask", "literal", "again_own", "again"),
}


def draw(budgets: Sequence[Budget], folders: Sequence[Path]) -> Figure:
    """On the left the methods, on the right MixMask with both generators, and x1 scored again."""
    cells = {row: f"reduced_long/knn/{row}" for row in LOOKS}
    logs = {row: read([cell], budgets, folders).lines for row, cell in cells.items()}
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.0), layout="constrained", sharey=True)
    for axes, (title, rows) in zip(panels, PANELS.items(), strict=True):
        for row in rows:
            plot(axes, by_epoch(logs[row], "knn"), LOOKS[row])
        axes.set(title=title, xlabel="epoch")
    panels[0].set(ylabel="k-NN accuracy (%)")
    absent = [LOOKS[row].title for row, lines in logs.items() if lines.empty]
    finish(figure, read([*cells.values()], budgets, folders), absent, columns=4)
    return figure
