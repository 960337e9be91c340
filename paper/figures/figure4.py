"""Figure 4: which images are mixed where Un-Mix and MixMask are used together: the same pairs twice, or others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixmask.config import UnMix
from mixmask.methods import Anchor, mixmask, unmix
from paper.figures.photographs import batch, photograph, pictures, recipe
from paper.figures.style import ACCENT, FIRST, GREY, SMALL, WIDTH, arrow, canvas, picture, write

NAMES = ("chelsea", "coffee", "astronaut", "stereo_motorcycle")
UNMIX_SEED = 6  # a global mixture of about equal parts
MASK_SEEDS = {"reverse": 8, "random": 34}  # the latter permutes so that no pair of the reverse permutation comes back
SIZE, STEP, LEFT, HALF = 0.64, 0.72, 0.6, 3.5  # inches: a picture, from one to the next, left margin, (a) to (b)
BATCH, UNMIX_ROW, MIXMASK_ROW = 1.98, 3.3, 0.66  # lower edges of the rows


def draw() -> Figure:
    """The batch in the middle, its Un-Mix mixtures above and its MixMask mixtures below; lines lead from partners."""
    photographs = [photograph(name) for name in NAMES]
    x = batch(photographs)  # (4, 3, H, W)
    figure, axes = canvas(WIDTH, 4.36)
    axes.plot([HALF - 0.04] * 2, [0.1, 4.26], color=GREY, linewidth=0.6, linestyle=":")
    panels = (("reverse", "$P_1$", "(a) the same permutation"), ("random", "$P_2$", "(b) different permutations"))
    for left, (permutation, name, title) in zip((0, HALF), panels, strict=True):
        write(axes, left + LEFT + 2 * STEP - (STEP - SIZE) / 2, 0.12, title, fontweight="bold")
        write(axes, left + LEFT - 0.08, BATCH + SIZE / 2, "batch", ha="right")
        for x_left, image in zip(places(left), photographs, strict=True):
            picture(axes, image, x_left, BATCH, SIZE)
        above = unmix(x, UnMix(prob=1.0), [np.random.default_rng(UNMIX_SEED)])
        below = mixmask(x, recipe(), [np.random.default_rng(MASK_SEEDS[permutation])], permutation)
        mixtures(axes, left, UNMIX_ROW, above, "Un-Mix", "Un")
        mixtures(axes, left, MIXMASK_ROW, below, "MixMask", "M")
        pairs(axes, left, above, "$P_1$\nreverse", up=True, new=False)
        pairs(axes, left, below, f"{name}\n{permutation}", up=False, new=permutation == "random")
        for number, x_left in enumerate(places(left), 1):
            tag(axes, x_left, BATCH, f"$I_{number}$")
    return figure


def places(left: float) -> list[float]:
    """Left edges of the four pictures of a row."""
    return [left + LEFT + number * STEP for number in range(len(NAMES))]


def partner(anchors: Sequence[Anchor]) -> list[int]:
    """Whose content fills mixture i: the switch term reads the mixtures in the inverse order (Eq. 2)."""
    return anchors[1].order.argsort().tolist()


def mixtures(axes: Axes, left: float, y: float, anchors: Sequence[Anchor], method: str, symbol: str) -> None:
    """A row of mixed images, each with its name and the pair that it mixes."""
    write(axes, left + LEFT - 0.08, y + SIZE / 2, method, ha="right")
    images, caption = pictures(anchors[0].images), y + SIZE + 0.13 if y > BATCH else y - 0.13
    for i, (x, j) in enumerate(zip(places(left), partner(anchors), strict=True)):
        picture(axes, images[i], x, y, SIZE)
        write(axes, x + SIZE / 2, caption, f"$I_{i + 1}$ + $I_{j + 1}$", fontsize=SMALL + 0.5)
        tag(axes, x, y, f"${symbol}_{i + 1}$")


def pairs(axes: Axes, left: float, anchors: Sequence[Anchor], name: str, up: bool, new: bool) -> None:
    """From each image to its own mixture (thin), and to the mixture that it fills."""
    start, end = (BATCH + SIZE, UNMIX_ROW) if up else (BATCH, MIXMASK_ROW + SIZE)
    centres = [x + SIZE / 2 for x in places(left)]
    write(axes, left + LEFT - 0.08, (start + end) / 2, name, ha="right", color=ACCENT if new else FIRST)
    for i, j in enumerate(partner(anchors)):
        arrow(axes, (centres[i], start), (centres[i], end), "-", color=GREY, linewidth=0.6)
        look = {"color": ACCENT} if new else {"color": FIRST, "linestyle": (0, (4, 1.5))}
        arrow(axes, (centres[j], start), (centres[i], end), linewidth=1.1, **look)


def tag(axes: Axes, x: float, y: float, text: str) -> None:
    """A name on the picture's lower left corner."""
    look = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
    write(axes, x + 0.04, y + 0.05, text, ha="left", va="bottom", fontsize=SMALL + 0.5, bbox=look)
