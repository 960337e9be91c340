"""Draw the paper's figures with this repository's code, as PNG and PDF.

Example:
    python paper/make_figures.py figure1 --out paper/output
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixmask.config import ConfigError, Mask, main_guard, nearest

PHOTOGRAPHS = ("chelsea", "coffee")  # in scikit-image's wheel: a cat, a cup
SIDE = 224  # pixels, as on ImageNet
GRID = 8  # the caption of Figure 1


def figure1():
    """Figure 1: discrete and block masks of grid 8, and the mixtures they make, by the code that trains."""
    from matplotlib import pyplot as plt

    first, second = (photograph(name) for name in PHOTOGRAPHS)
    figure, axes = plt.subplots(2, 4, figsize=(7.2, 3.9), layout="constrained")
    rows = [("discrete", 3), ("block", 8)]  # mask type, seed: chosen for masks of about half the image
    for (kind, seed), row in zip(rows, axes, strict=True):
        mask, mixture, switch, lam = masked_pair(first, second, kind, seed)
        left = (first, "image $I_i$") if kind == "discrete" else (second, "partner $I_j$")
        panels = [
            left,
            (mask, f"{kind} mask, $\\lambda$ = {lam:.2f}"),
            (mixture, "mixture (Eq. 1)"),
            (switch, "switch image (Eq. 2)"),
        ]
        for axis, (picture, title) in zip(row, panels, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def photograph(name: str):
    """A bundled photograph, centre-cropped and shrunk: float (224, 224, 3) in [0, 1]."""
    import numpy as np
    import skimage.data
    from PIL import Image, ImageOps

    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    return np.asarray(ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC)) / 255


def masked_pair(first, second, kind: str, seed: int):
    """The pixel mask, both mixtures of a pair of photographs (H, W, 3), and lambda."""
    import numpy as np
    import torch

    from mixmask.masks import mixture_coefficient, sample_mask
    from mixmask.methods import mixture, partners

    recipe = Mask(type=kind, block_impl="repaired", grid=GRID, ratio=0.5)
    mask = sample_mask(recipe, SIDE, SIDE, np.random.default_rng(seed))  # (1, 1, H, W)
    batch = torch.from_numpy(np.stack([first, second])).permute(0, 3, 1, 2).float()  # (2, 3, H, W)
    anchor, _ = mixture("mixmask", batch, mask, partners(2, [None], "reverse"))
    mixed, switched = anchor.images.permute(0, 2, 3, 1).numpy()
    return mask[0, 0].numpy(), mixed, switched, mixture_coefficient(mask).item()


FIGURES: dict[str, Callable] = {"figure1": figure1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(FIGURES)}; none means all")
    parser.add_argument("--out", type=Path, default=Path("paper/output"), help="default: paper/output")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("agg")
    args.out.mkdir(parents=True, exist_ok=True)
    for target in args.targets or FIGURES:
        if target not in FIGURES:
            raise ConfigError(f"unknown figure '{target}'{nearest(target, FIGURES)}")
        figure = FIGURES[target]()
        for suffix in ("png", "pdf"):
            path = args.out / f"{target}.{suffix}"
            figure.savefig(path, dpi=160)
            print(path)


if __name__ == "__main__":
    main_guard(main)
