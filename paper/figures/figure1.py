"""Figure 1: discrete and block masks on a grid of 8, and the mixtures they make, by the code that trains."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper.figures.photographs import masked_pair, photograph, recipe
from paper.figures.style import WIDTH, canvas, picture

SIDE, GAP, ROW = 1.6, 0.15, 1.93  # inches
SEEDS = {"discrete": 3, "block": 8}  # of masks of about half the image


def draw() -> Figure:
    """Panels (a) to (h) of the paper: the two images, then mask, mixture and switch image of either pattern."""
    images = photograph("chelsea"), photograph("coffee")
    captions = ["image $I_i$", "mixture (Eq. 1)", "switch image (Eq. 2)"], ["partner $I_j$"]
    figure, axes = canvas(WIDTH, 2 * ROW + 0.05)
    for row, (kind, seed) in enumerate(SEEDS.items()):
        mask, mixed, switched, lam = masked_pair(*images, recipe(kind), seed)
        names = [captions[row][0], f"{kind} mask, $\\lambda$ = {lam:.2f}", *captions[0][1:]]
        letters = ("acde", "bfgh")[row]
        for column, (image, name) in enumerate(zip((images[row], mask, mixed, switched), names, strict=True)):
            corner = 0.075 + column * (SIDE + GAP), 0.3 + (1 - row) * ROW
            picture(axes, image, *corner, SIDE, f"({letters[column]}) {name}")
    return figure
