"""Masks on a grid of cells: which cells of a mixture show image i (Section 3.1 and 4.1, Table 1).

Block masks follow the algorithm of BEiT (Bao et al., "BEiT", Section 2.3; released in MixMask's `utils.py`): rectangles
of random area and aspect are placed until a target number of cells is covered. Value 1 shows image i (Eq. 1).
At the end: what MSCN keeps of each image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mixmask.config import MSCN, ConfigError, Mask

ATTEMPTS_PER_BLOCK = 10
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
AUTHORS_MIN_CELLS = 4  # BEiT's `min_num_patches`, left unchanged by the authors on every grid
MAX_REDRAWS = 100  # at most 4 block masks in 10 are drawn again (3x3, 8 cells): 100 in a row are never met


def sample_mask(mask: Mask, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """One pixel mask as the recipe describes it: float (1, 1, H, W) on the CPU, 1 where image i is shown.

    `none` shows it everywhere: what most masks of the released generator come to on a 2x2 grid (docs/fidelity.md).
    Raises ConfigError when the grid is finer than the image, and for a ratio that can only be 0 or only 1.
    """
    if mask.type == "none":
        return torch.ones(1, 1, height, width)
    check_grid("mask.grid", mask.grid, height, width)
    if mask.ratio in (0, 1, (0, 0), (1, 1)):
        shown = f"{mask.ratio:g}" if isinstance(mask.ratio, float) else list(mask.ratio)
        raise ConfigError(f"mask.ratio: {shown} mixes nothing; expected a share between 0 and 1")
    ratio = mask.ratio if isinstance(mask.ratio, float) else rng.uniform(*mask.ratio)
    if mask.type == "discrete":
        cells = discrete_mask(mask.grid, ratio, rng)
    else:
        cells = block_mask(mask.grid, ratio, rng, mask.block_impl)
    return to_pixels(cells, height, width)


def check_grid(key: str, grid: int, height: int, width: int) -> None:
    """Raises ConfigError when the grid is finer than the image."""
    if grid > min(height, width):
        raise ConfigError(f"{key}: {grid} cells do not fit into an image of {height}x{width} pixels")


def mixture_coefficient(mask: Tensor) -> Tensor:
    """Eq. 3: the share of pixels at which each mask shows image i. (G, 1, H, W) -> (G,), in float32."""
    return mask.mean(dim=(1, 2, 3))


def block_mask(grid: int, ratio: float, rng: np.random.Generator, impl: str = "repaired") -> np.ndarray:
    """A block mask of about `ratio * grid**2` cells, as bool (grid, grid).

    `literal` is the released generator: blocks of at least 4 cells, no second try, so that 94 % of the masks on a 2x2
    grid come out empty. `repaired` lets blocks start at one cell where fewer than 4 cells are wanted and draws again
    until the target is met; elsewhere it only draws an empty mask again. Raises RuntimeError after MAX_REDRAWS masks.
    """
    if impl == "literal":
        return place_blocks(grid, int(ratio * grid * grid), AUTHORS_MIN_CELLS, rng)
    target = min(max(int(ratio * grid * grid), 1), grid * grid - 1)
    small = target < AUTHORS_MIN_CELLS
    for _ in range(MAX_REDRAWS):
        cells = place_blocks(grid, target, 1 if small else AUTHORS_MIN_CELLS, rng)
        if cells.sum() == target or (cells.any() and not small):
            return cells
    raise RuntimeError(f"{MAX_REDRAWS} masks on a grid of {grid}: none has {target} cells")


def place_blocks(grid: int, target: int, min_cells: int, rng: np.random.Generator) -> np.ndarray:
    """BEiT's loop: add blocks until `target` cells are covered or ten attempts in a row fail. bool (grid, grid)."""
    cells = np.zeros((grid, grid), dtype=bool)
    done = 0
    while done < target:
        added = _add_block(cells, target - done, min_cells, rng)
        if added == 0:
            break
        done += added
    return cells


def _add_block(cells: np.ndarray, budget: int, min_cells: int, rng: np.random.Generator) -> int:
    """Cover a rectangle that holds between 1 and `budget` cells still empty; returns how many it added."""
    grid = len(cells)
    for _ in range(ATTEMPTS_PER_BLOCK):
        area = min_cells + (budget - min_cells) * rng.random()  # below min_cells the interval is simply reversed
        aspect = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * rng.random())
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
        block = cells[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= budget:
            block[:] = True
            return new
    return 0


def discrete_mask(grid: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Each cell shows image i with probability `ratio`; drawn again while all cells agree. bool (grid, grid)."""
    for _ in range(MAX_REDRAWS):
        cells = rng.random((grid, grid)) < ratio
        if cells.any() and not cells.all():
            return cells
    cells.flat[rng.integers(cells.size)] ^= True  # a ratio so extreme that chance alone does not get there
    return cells


def to_pixels(cells: np.ndarray, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Nearest-neighbour upsampling, as in the authors' code: bool (g, g) or (N, C, g, g) -> float (N, C, H, W)."""
    mask = torch.as_tensor(cells, dtype=torch.float32).to(device, non_blocking=True)
    return F.interpolate(mask[None, None] if mask.ndim == 2 else mask, size=(height, width), mode="nearest")


# ------------------------------------------------------------------------------- MSCN: what is kept of each image


def mscn_masks(settings: MSCN, shape: torch.Size, rng: np.random.Generator, device: torch.device | str) -> Tensor:
    """What MSCN keeps of each image of a batch (N, C, H, W): bool, of that shape, True where a pixel stays.

    With `focal_prob` a window; otherwise cells of a grid, with `spatial_prob` the same ones in every channel.
    Raises ConfigError when the grid is finer than the image.
    """
    n, channels, height, width = shape
    check_grid("mscn.grid", settings.grid, height, width)
    focal, spatial = rng.random(n) < settings.focal_prob, rng.random(n) < settings.spatial_prob
    cells = kept_cells(n, channels, settings.grid, settings.ratio, rng)
    cells[spatial] = cells[spatial, :1]
    windows = focal_windows(n, height, width, settings.focal_side, rng, device)
    focal = torch.from_numpy(focal).to(device, non_blocking=True)[:, None, None, None]
    return torch.where(focal, windows, to_pixels(cells, height, width, device).bool())


def kept_cells(n: int, channels: int, grid: int, ratio: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """All cells but int(r * grid**2) random ones, at least one, r from U(ratio) for each channel. bool (n, C, g, g)."""
    removed = (rng.uniform(*ratio, (n, channels, 1)) * grid * grid).astype(int).clip(1, grid * grid - 1)
    rank = rng.random((n, channels, grid * grid)).argsort(axis=2).argsort(axis=2)
    return (rank >= removed).reshape(n, channels, grid, grid)


def focal_windows(
    n: int, height: int, width: int, side: float, rng: np.random.Generator, device: torch.device | str
) -> Tensor:
    """Windows of `side` times the image's height and width, anywhere inside of it. bool (n, 1, H, W)."""
    inside = []
    for extent in (height, width):
        length = round(side * extent)
        start = torch.from_numpy(rng.integers(extent - length + 1, size=(n, 1))).to(device, non_blocking=True)
        pixel = torch.arange(extent, device=device)
        inside.append((start <= pixel) & (pixel < start + length))  # (n, extent)
    rows, columns = inside
    return rows[:, None, :, None] & columns[:, None, None, :]
