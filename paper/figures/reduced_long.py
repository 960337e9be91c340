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

METHOD_ROWS = {"vanilla": "Vanilla", "erase": "Erase", "unmix": "Un-Mix", "mixmask": "MixMask", "both": "MixMask*"}
AGAIN = replace(METHODS["vanilla"], color="#0b7fab", linestyle="-")
LOOKS = {  # by the table's row
    **{row: METHODS[name] for name, row in METHOD_ROWS.items()},
    "MixMask, the released generator": replace(
        METHODS["mixmask"], title="the released generator", color="#5b2a86", marker="^"
    ),
    "Vanilla, x1 scored again: both keys": replace(AGAIN, title="x1 again, both keys", marker="X"),
    "Vanilla, x1 scored again: x2's key": replace(AGAIN, title="x1 again, x2's key", marker="d", color="#8c8c8c"),
}
PANELS = {
    "methods": [*METHOD_ROWS.values()],
    "is it the masks?": [row for row in LOOKS if row not in ("Erase", "Un-Mix", "MixMask*")],
}


def draw(budgets: Sequence[Budget], folders: Sequence[Path]) -> Figure:
    """On the left the methods, on the right MixMask with both generators, and x1 scored again."""
    logs = read(["reduced_long/knn/*"], budgets, folders)
    curves = {row: logs.lines[logs.lines["row"] == row] for row in LOOKS}
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.0), layout="constrained", sharey=True)
    for axes, (title, rows) in zip(panels, PANELS.items(), strict=True):
        for row in rows:
            plot(axes, by_epoch(curves[row], "knn"), LOOKS[row])
        axes.set(title=title, xlabel="epoch")
    panels[0].set(ylabel="k-NN accuracy (%)")
    finish(figure, logs, [LOOKS[row].title for row, lines in curves.items() if lines.empty], columns=4)
    return figure
