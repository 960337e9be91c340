"""Figure 2: the filling-based masking strategy, and erasing or Gaussian noise (in the dashed box) for comparison."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixmask.config import Erase
from mixmask.methods import erase
from paper.figures.photographs import batch, masked_pair, photograph, pictures, recipe
from paper.figures.style import FIRST, GREY, INK, SECOND, SMALL, WIDTH, arrow, box, canvas, picture, write

RATIO, SEED = 0.4, 3  # not one half, so that the two coefficients differ
SIZE, STEP, LEFT = 1.05, 1.42, 0.17  # inches: a picture, from one picture to the next, the margin
TOP, BOTTOM = 2.1, 0.42  # lower edges of the two rows
BAR = 0.15  # height of a bar
COLUMNS = [LEFT + number * STEP for number in range(5)]


def draw() -> Figure:
    """Above: image times mask is erased, or noise. Below: the filling; the sum is the mixture; the switch image."""
    first, second = photograph("chelsea"), photograph("coffee")
    mask, mixed, switched, lam = masked_pair(first, second, recipe(ratio=RATIO), SEED)
    zero, noise = (erased(first, fill) for fill in ("zero", "noise"))
    filling = pictures(batch([second]) * torch.from_numpy(1 - mask))[0]
    above = {"image $I_i$": first, "mask $m$": mask, r"erased $m \odot I_i$": zero, "Gaussian noise": noise}
    below = {"partner $I_j$": second, "$1 - m$": 1 - mask, r"filling $(1 - m) \odot I_j$": filling}
    below |= {"mixture (Eq. 1)": mixed, "switch image (Eq. 2)": switched}

    figure, axes = canvas(WIDTH, 3.55)
    look = {"facecolor": "#f4f4f4", "edgecolor": GREY, "linestyle": "--", "zorder": 0}
    box(axes, 0.06, TOP - 0.27, COLUMNS[3] + SIZE + 0.05, 1.67, **look)
    write(axes, LEFT, TOP + SIZE + 0.18, "Erase / Gaussian noise masking strategy", ha="left", fontweight="bold")
    for y, panels in ((TOP, above), (BOTTOM, below)):
        for x, (caption, image) in zip(COLUMNS, panels.items(), strict=False):
            picture(axes, image, x, y, SIZE, caption)
    signs(axes)
    write(axes, COLUMNS[2] + SIZE / 2, (TOP - 0.27 + BOTTOM + SIZE) / 2, "$+$", fontsize=14)
    switch(axes)
    coefficients(axes, lam)
    return figure


def erased(image: np.ndarray, fill: str) -> np.ndarray:
    """What the erase baseline shows its encoder: the same mask, because the generator has the same seed."""
    (anchor,) = erase(batch([image]), recipe(ratio=RATIO), Erase(fill), [np.random.default_rng(SEED)])
    return pictures(anchor.images)[0]


def signs(axes: Axes) -> None:
    """Between the pictures of a row: image times mask equals; equals or; equals the mixture."""
    for y, row in ((TOP, (r"$\odot$", "$=$", "or")), (BOTTOM, (r"$\odot$", "$=$", "$=$"))):
        for x, sign in zip(COLUMNS[1:4], row, strict=True):
            write(axes, x - (STEP - SIZE) / 2, y + SIZE / 2, sign, fontsize=8 if sign == "or" else 13)


def switch(axes: Axes) -> None:
    """The two images of a pair change places under the same mask."""
    left, right, y = COLUMNS[3] + SIZE + 0.03, COLUMNS[4] - 0.03, BOTTOM + SIZE / 2
    arrow(axes, (left, y), (right, y), "<|-|>")
    write(axes, (left + right) / 2, y + 0.1, "switch", fontsize=SMALL)


def coefficients(axes: Axes, lam: float) -> None:
    """The shares of the two images in the mixture and in its switch image, as bars below them, and their key."""
    bars = [(lam, r"$\lambda$", r"$1 - \lambda$"), (1 - lam, r"$1 - \lambda$", r"$\lambda$")]
    for x, (share, first, second) in zip(COLUMNS[3:], bars, strict=True):
        bar(axes, x, 0.05, SIZE * share, FIRST, first)
        bar(axes, x + SIZE * share, 0.05, SIZE * (1 - share), SECOND, second)
    x, y = COLUMNS[4], TOP + SIZE - 0.1
    write(axes, x, y + 0.25, "Filling\ncoefficients", ha="left", fontweight="bold")
    for row, (colour, name) in enumerate(((FIRST, "share of $I_i$"), (SECOND, "share of $I_j$")), 1):
        bar(axes, x, y - 0.3 * row, 0.25, colour)
        write(axes, x + 0.33, y - 0.3 * row + BAR / 2, name, ha="left")
    write(axes, x, y - 0.8, f"$\\lambda$ = {lam:.2f} (Eq. 3)", ha="left")


def bar(axes: Axes, x: float, y: float, width: float, colour: str, text: str = "") -> None:
    axes.add_patch(Rectangle((x, y), width, BAR, facecolor=colour, edgecolor=INK, linewidth=0.6))
    write(axes, x + width / 2, y + BAR / 2, text, fontsize=SMALL, color="white" if colour == FIRST else INK)
