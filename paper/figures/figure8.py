"""Figure 8: more of Figure 1, on other photographs: a row for each pair."""

from __future__ import annotations

from matplotlib.figure import Figure

from paper.figures.photographs import masked_pair, photograph, recipe
from paper.figures.style import WIDTH, canvas, picture

SIDE, STEP = 0.825, 0.87  # inches
PAIRS = [  # photographs, seed of the discrete mask, of the block mask
    ("astronaut", "stereo_motorcycle", 1, 2),
    ("rocket", "coffee", 5, 4),
    ("camera", "chelsea", 6, 5),
    ("coins", "retina", 7, 6),
]
CAPTIONS = ["image $I_i$", "partner $I_j$", "discrete", "mixture", "switch", "block", "mixture", "switch"]


def draw() -> Figure:
    """Columns (a) to (h) of the paper: two images, then mask, mixture and switch image of either pattern."""
    figure, axes = canvas(WIDTH, len(PAIRS) * STEP + 0.36)
    for row, (first, second, *seeds) in enumerate(PAIRS):
        images = [photograph(first), photograph(second)]
        panels = [*images]
        for kind, seed in zip(("discrete", "block"), seeds, strict=True):
            panels += masked_pair(*images, recipe(kind), seed)[:3]
        for column, panel in enumerate(panels):
            caption = f"({'abcdefgh'[column]})\n{CAPTIONS[column]}" if row == len(PAIRS) - 1 else ""
            corner = 0.04 + column * STEP, 0.36 + (len(PAIRS) - 1 - row) * STEP
            picture(axes, panel, *corner, SIDE, caption)
    return figure
