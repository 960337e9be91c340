"""The look that all figures share: sizes, fonts, and a colour, a dash and a marker for each method.

The colours differ in lightness too, so that they stay apart in greyscale and for the colour-blind.
"""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from numpy import ndarray

WIDTH = 7.0  # inches: both columns of a page
INK, GREY, PALE = "#1a1a1a", "#707070", "#d9d9d9"
ACCENT = "#d55e00"
FIRST, SECOND = "#173f6b", "#f0b27a"  # the shares of image i and of its partner: dark, light
FONT = 8.0  # points at print size; nothing is smaller than SMALL
SMALL = 6.5

LOOK = {
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "axes.linewidth": 0.6,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": PALE,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.6,
    "legend.fontsize": FONT,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.labelsize": SMALL + 0.5,
    "ytick.labelsize": SMALL + 0.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "pdf.fonttype": 42,  # letters stay letters
    "savefig.dpi": 170,
}


def use() -> None:
    """Apply the look; no window is ever opened."""
    matplotlib.use("agg")
    plt.rcdefaults()
    plt.rcParams.update(LOOK)


# ------------------------------------------------------------------------------- drawing by inches, for diagrams


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty page of that many inches; x to the right, y upwards, in inches."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    axes.autoscale(False)
    return figure, axes


def picture(axes: Axes, image: ndarray, x: float, y: float, side: float, caption: str = "", **text: Any) -> None:
    """A square picture (H, W) or (H, W, 3) in [0, 1] with its lower left corner at (x, y), a caption below."""
    axes.imshow(image, extent=(x, x + side, y, y + side), cmap="gray", vmin=0, vmax=1, aspect="auto", zorder=2)
    axes.add_patch(plt.Rectangle((x, y), side, side, fill=False, edgecolor=INK, linewidth=0.6, zorder=3))
    if caption:
        axes.text(x + side / 2, y - 0.05, caption, ha="center", va="top", **text)
    axes.set(xlim=(0, axes.figure.get_figwidth()), ylim=(0, axes.figure.get_figheight()))


def write(axes: Axes, x: float, y: float, text: str, **how: Any) -> None:
    """Text centred at (x, y) unless told otherwise."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "zorder": 5, **how})


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], heads: str = "-|>", **how: Any) -> None:
    """An arrow between two points."""
    look = {"color": INK, "linewidth": 0.9, "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0, "zorder": 4}
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=heads, **{**look, **how}))


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str = "", **how: Any) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    look = {"facecolor": "white", "edgecolor": INK, "linewidth": 0.9, "zorder": 3}
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **{**look, **how}))
    write(axes, x + width / 2, y + height / 2, text)
