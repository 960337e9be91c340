"""Figure 3: Masked Siamese ConvNets and MixMask: what is embedded by which encoder, and the weight of each loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixmask import config as configs
from mixmask.augment import augment_view
from mixmask.methods import METHODS, Anchor, extra_crops
from paper.cells import ROOT
from paper.figures.photographs import photograph, pictures
from paper.figures.style import ACCENT, GREY, INK, SMALL, WIDTH, arrow, box, canvas, picture, write

SIZE, HALF = 0.74, 3.62  # inches: a picture, from the left framework to the right one
QUERIES, KEY = (2.87, 2.05, 1.23), 0.2  # lower edges of the pictures
PICTURE, ENCODER, OUTPUT, LOSS = 0.66, 1.62, 2.26, 2.94  # x: left edges of pictures, encoders, q and the box of k
BOX, NODE = 0.36, 0.28  # widths
CENTRE = 1.7  # of the titles
LOSSES = {
    "Masked Siamese ConvNets (our reconstruction)": r"$L = L(\tilde{q}_1, k) + L(\tilde{q}_2, k) + L(\tilde{q}_3, k)$",
    "MixMask": r"$L = L_{Orig} + \lambda \cdot L_\uparrow + (1 - \lambda) \cdot L_\downarrow$  (Eq. 4, 6)",
}
VIEWS, MSCN_MASKS, MIXMASK_MASK = (1, 18, 12, 18), 1, 8  # seeds


def draw() -> Figure:
    """Left erasing, three terms of weight 1; right filling, whose terms weigh what they show of the image."""
    mscn, mixmask, key = terms()
    figure, axes = canvas(WIDTH, 4.22)
    axes.plot([HALF - 0.12] * 2, [0.12, 4.1], color=GREY, linewidth=0.6, linestyle=":")
    for left, (title, formula) in zip((0, HALF), LOSSES.items(), strict=True):
        write(axes, left + CENTRE, 4.06, title, fontweight="bold")
        write(axes, left + CENTRE, 3.83, formula)
        encoders(axes, left, key)
    names = ["masked\nview", "masked\ncrop", "masked\ncrop"]
    queries(axes, 0, mscn, names, [r"$\tilde{q}_1$", r"$\tilde{q}_2$", r"$\tilde{q}_3$"], ["1", "1", "1"])
    names = ["view", "mixture", "switch\nimage"]
    weights = ["1", r"$\lambda$", r"$1 - \lambda$"]
    queries(axes, HALF, mixmask, names, ["$q$", r"$q_\uparrow$", r"$q_\downarrow$"], weights)
    low = QUERIES[2] - 0.06
    look = {"facecolor": "#fdf1e7", "edgecolor": ACCENT, "linestyle": "--", "linewidth": 0.7, "zorder": 0}
    write(axes, HALF + 0.1, low + 0.14, "MixMask\nbranch", fontsize=SMALL, ha="left", color=ACCENT)
    box(axes, HALF + 0.05, low, LOSS - 0.09, QUERIES[1] + SIZE + 0.06 - low, **look)
    return figure


def terms() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """What each term embeds of image i, for MSCN and for MixMask, and the view behind the key: by the training code."""
    recipe = configs.load(ROOT / "pretrain/configs/imagenet_moco.yaml")
    of_mscn = configs.load(ROOT / "pretrain/configs/imagenet_moco.yaml", {"method": "mscn"})
    pair = np.stack([photograph("stereo_motorcycle"), photograph("chelsea")])
    raw = torch.from_numpy(pair * 255).permute(0, 3, 1, 2).round().to(torch.uint8)  # (2, 3, H, W)
    augments = [recipe.augment, recipe.augment, *extra_crops(of_mscn)]
    views = [augment_view(a, raw, torch.Generator().manual_seed(s)) for a, s in zip(augments, VIEWS, strict=True)]
    x1, x2, *crops = views
    mscn = METHODS["mscn"](of_mscn, x1, [np.random.default_rng(MSCN_MASKS)], *crops)
    mixmask = METHODS["mixmask"](recipe, x1, [np.random.default_rng(MIXMASK_MASK)])
    return [shown(anchor) for anchor in mscn], [shown(anchor) for anchor in mixmask], pictures(x2)[0]


def shown(anchor: Anchor) -> np.ndarray:
    """The picture that is scored with the key of image 0."""
    return pictures(anchor.images)[0 if anchor.order is None else anchor.order[0]]


def encoders(axes: Axes, left: float, key: np.ndarray) -> None:
    """Both encoders, and the way of the key: the view x2, f_k, k, which every query is compared with."""
    top, bottom = QUERIES[0] + SIZE, QUERIES[2]
    x, y = left + ENCODER, KEY + SIZE / 2
    box(axes, x, bottom, BOX, top - bottom, "$f_q$", facecolor="#dce6f1")
    box(axes, x, KEY, BOX, SIZE, "$f_k$", facecolor="#ececec")
    arrow(axes, (x + BOX / 2, bottom), (x + BOX / 2, KEY + SIZE), linestyle="--")
    write(axes, x + BOX / 2 + 0.06, (bottom + KEY + SIZE) / 2, "EMA", fontsize=SMALL, ha="left")
    picture(axes, key, left + PICTURE, KEY, SIZE)
    write(axes, left + PICTURE - 0.07, y, "other\nview", ha="right")
    arrow(axes, (left + PICTURE + SIZE, y), (x, y))
    end = left + LOSS + BOX / 2
    axes.plot([x + BOX, end], [y, y], color=INK, linewidth=0.9)
    arrow(axes, (end, y), (end, bottom))
    write(axes, (x + BOX + end) / 2, y - 0.09, "no gradient", fontsize=SMALL)
    box(axes, left + LOSS, bottom, BOX, top - bottom, "$k$", facecolor="#ececec")


def queries(axes: Axes, left: float, images: Sequence, names: Sequence, outputs: Sequence, weights: Sequence) -> None:
    """A row for each term: the picture, the encoder, its output, and the loss against k with its weight."""
    for lower, image, name, output, weight in zip(QUERIES, images, names, outputs, weights, strict=True):
        y, x = lower + SIZE / 2, left + OUTPUT
        picture(axes, image, left + PICTURE, lower, SIZE)
        write(axes, left + PICTURE - 0.07, y, name, ha="right")
        arrow(axes, (left + PICTURE + SIZE, y), (left + ENCODER, y))
        arrow(axes, (left + ENCODER + BOX, y), (x, y))
        box(axes, x, y - NODE / 2, NODE, NODE, output)
        arrow(axes, (x + NODE, y), (left + LOSS, y), "<|-|>", color=ACCENT, linewidth=1.3)
        write(axes, (x + NODE + left + LOSS) / 2, y + 0.11, weight, fontweight="bold")
