"""Masks: BEiT's algorithm, its statistics, Eq. 3, and the options of Table 1.

The statistics come from 10,000 masks of an independent implementation of the released generator; every bound is four
standard errors of the difference of two samples.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mixmask import masks
from mixmask.config import ConfigError, Mask
from mixmask.masks import block_mask, discrete_mask, mixture_coefficient, place_blocks, sample_mask, to_pixels
from tests import reference

MASKS = 2_500
PUBLISHED = 10_000  # masks behind the numbers below
LITERAL = {  # (grid, ratio): share of empty masks, share that meets the target, mean and deviation of the ratio, blocks
    (2, 0.25): (0.2694, 0.7306, 0.1827, 0.1109, 0.731),
    (2, 0.5): (0.9404, 0.0370, 0.0242, 0.1004, 0.097),
    (2, 0.75): (1.0, 0.0, 0.0, 0.0, 0.0),
    (4, 0.25): (0.0, 0.9516, 0.2470, 0.0134, 1.503),
    (4, 0.5): (0.0005, 0.9879, 0.4990, 0.0131, 2.603),
    (4, 0.75): (0.0077, 0.9668, 0.7426, 0.0663, 3.718),
    (8, 0.25): (0.0, 0.9519, 0.2492, 0.0034, 2.947),
    (8, 0.5): (0.0, 0.9569, 0.4993, 0.0034, 4.693),
    (8, 0.75): (0.0, 0.8930, 0.7477, 0.0080, 7.238),
    (16, 0.25): (0.0, 0.9282, 0.2497, 0.0010, 4.704),
    (16, 0.5): (0.0, 0.9117, 0.4996, 0.0015, 7.146),
    (16, 0.75): (0.0001, 0.7749, 0.7476, 0.0111, 11.349),
}
FROM_ONE_CELL = {  # the same with blocks from one cell
    (2, 0.5): (0.0139, 0.9854, 0.4929, 0.0589, 1.972),
    (2, 0.75): (0.1318, 0.8148, 0.6281, 0.2644, 2.512),
    (4, 0.25): (0.0, 1.0, 0.25, 0.0, 2.197),
    (4, 0.5): (0.0, 0.9993, 0.5, 0.0017, 3.551),
    (8, 0.5): (0.0, 0.9968, 0.4999, 0.0009, 5.718),
    (16, 0.5): (0.0, 0.9939, 0.5, 0.0006, 8.284),
}
BLOCKS_DEVIATION = 4.0  # no configuration's number of blocks varies more
COVERAGE = {  # grid: how often a corner, a middle of an edge, the centre shows image i, at ratio 0.5
    2: (0.024, 0.024, 0.024),
    4: (0.287, 0.474, 0.761),
    8: (0.151, 0.377, 0.809),
    16: (0.065, 0.255, 0.836),
}


@dataclass
class Statistics:
    empty: float
    exact: float
    mean: float
    deviation: float
    blocks: float
    first_block: float
    coverage: np.ndarray  # (g, g)

    @property
    def zones(self) -> tuple[float, float, float]:
        """Corner, middle of an edge, centre."""
        c, middle = self.coverage, slice(len(self.coverage) // 2 - 1, len(self.coverage) // 2 + 1)
        corner = c[np.ix_([0, -1], [0, -1])].mean()
        edge = np.mean([c[0, middle], c[-1, middle], c[middle, 0], c[middle, -1]])
        return float(corner), float(edge), float(c[middle, middle].mean())


def statistics(monkeypatch, draw, grid: int, ratio: float, count: int = MASKS) -> Statistics:
    """Of `count` masks that `draw(rng)` returns; the blocks are counted where they are added."""
    added, last, first = [], [], []
    add_block = masks._add_block

    def counting(cells, *args):
        if not cells.any():
            last.clear()  # a mask begins (again)
        new = add_block(cells, *args)
        last.extend([new] if new else [])
        return new

    monkeypatch.setattr(masks, "_add_block", counting)
    rng = np.random.default_rng(grid)
    total, cells = np.zeros((grid, grid)), []
    for _ in range(count):
        mask = draw(rng)
        total += mask
        cells.append(mask.sum())
        added.append(len(last))
        first.extend(last[:1])
    cells, target = np.array(cells), int(ratio * grid * grid)
    return Statistics(
        empty=float((cells == 0).mean()),
        exact=float((cells == target).mean()),
        mean=float(cells.mean() / grid**2),
        deviation=float(cells.std() / grid**2),
        blocks=float(np.mean(added)),
        first_block=float(np.mean(first) / grid**2) if first else 0.0,
        coverage=total / count,
    )


def bound(deviation: float, count: int) -> float:
    return 4 * deviation * math.sqrt(1 / count + 1 / PUBLISHED) + 5e-4  # the published numbers are rounded


def rate_bound(rate: float, count: int) -> float:
    return bound(math.sqrt(rate * (1 - rate)), count)


def hold(found: Statistics, expected: tuple[float, ...], count: int = MASKS) -> None:
    empty, exact, mean, deviation, blocks = expected
    assert found.empty == pytest.approx(empty, abs=rate_bound(empty, count))
    assert found.exact == pytest.approx(exact, abs=rate_bound(exact, count))
    assert found.mean == pytest.approx(mean, abs=bound(deviation, count))
    assert found.blocks == pytest.approx(blocks, abs=bound(BLOCKS_DEVIATION, count))


# ---------------------------------------------------------------------------------------- BEiT's algorithm


@pytest.mark.parametrize("min_cells", [1, 4, 16])
@pytest.mark.parametrize("grid", [2, 3, 4, 7, 8, 16])
def test_beit_algorithm_draw_for_draw(grid: int, min_cells: int):
    for seed in range(60):
        target = int((seed % 9 + 1) / 10 * grid * grid)
        expected = reference.place_blocks(grid, target, min_cells, np.random.default_rng(seed))
        found = place_blocks(grid, target, min_cells, np.random.default_rng(seed))
        assert (found == expected).all(), (grid, target, seed)
        assert found.sum() <= target


def test_beit_gives_up_after_ten_attempts():
    class TooLarge:
        calls = 0

        def random(self):
            self.calls += 1
            return 0.5  # a square of more than the full side

    rng = TooLarge()
    assert not place_blocks(2, 2, 4, rng).any()
    assert rng.calls == 2 * 10


@pytest.mark.parametrize("grid, ratio", LITERAL)
def test_literal_statistics(monkeypatch, grid: int, ratio: float):
    hold(
        statistics(monkeypatch, lambda rng: block_mask(grid, ratio, rng, "literal"), grid, ratio), LITERAL[grid, ratio]
    )


@pytest.mark.parametrize("grid, ratio", FROM_ONE_CELL)
def test_statistics_of_blocks_from_one_cell(monkeypatch, grid: int, ratio: float):
    target = int(ratio * grid * grid)
    found = statistics(monkeypatch, lambda rng: place_blocks(grid, target, 1, rng), grid, ratio)
    hold(found, FROM_ONE_CELL[grid, ratio])


@pytest.mark.parametrize("grid, ratio", [key for key in LITERAL if key[0] > 2])
def test_repaired_is_literal_where_four_cells_are_wanted_but_never_empty(monkeypatch, grid: int, ratio: float):
    found = statistics(monkeypatch, lambda rng: block_mask(grid, ratio, rng), grid, ratio)
    assert found.empty == 0
    empty, exact, mean, deviation, blocks = LITERAL[grid, ratio]
    kept = 1 - empty
    hold(found, (0, exact / kept, mean / kept, deviation, blocks / kept))


@pytest.mark.parametrize("grid", COVERAGE)
def test_coverage_of_corner_edge_and_centre(monkeypatch, grid: int):
    found = statistics(monkeypatch, lambda rng: block_mask(grid, 0.5, rng, "literal"), grid, 0.5)
    for zone, expected in zip(found.zones, COVERAGE[grid], strict=True):
        assert zone == pytest.approx(expected, abs=rate_bound(expected, MASKS))


def test_first_block_covers_a_quarter_of_an_8x8_grid(monkeypatch):
    found = statistics(monkeypatch, lambda rng: block_mask(8, 0.5, rng, "literal"), 8, 0.5)
    assert found.first_block == pytest.approx(0.251, abs=bound(0.13, MASKS))


# ------------------------------------------------------------------------------------------ the 2x2 grid


def test_literal_leaves_94_percent_of_2x2_masks_empty():
    rng = np.random.default_rng(0)
    empty = np.mean([not block_mask(2, 0.5, rng, "literal").any() for _ in range(10_000)])
    assert empty == pytest.approx(0.9404, abs=rate_bound(0.94, 10_000))


def test_repaired_2x2_is_uniform_over_the_six_masks_of_two_cells():
    rng = np.random.default_rng(0)
    counts = Counter(tuple(block_mask(2, 0.5, rng).ravel().tolist()) for _ in range(6_000))
    assert len(counts) == 6 and all(sum(cells) == 2 for cells in counts)
    chi_squared = sum((n - 1000) ** 2 / 1000 for n in counts.values())
    assert chi_squared < 20.5  # 99.9 % of a chi-squared variable with 5 degrees of freedom


@pytest.mark.parametrize("grid, ratio, cells", [(2, 0.25, 1), (2, 0.5, 2), (2, 0.75, 3), (3, 0.34, 3), (4, 0.19, 3)])
def test_repaired_always_meets_a_target_below_four_cells(grid: int, ratio: float, cells: int):
    rng = np.random.default_rng(0)
    assert {int(block_mask(grid, ratio, rng).sum()) for _ in range(500)} == {cells}


@pytest.mark.parametrize("grid, ratio", [(2, 0.5), (2, 0.75), (3, 0.9), (4, 0.95), (8, 0.99)])
def test_redraws_are_few_and_their_end_is_an_error(monkeypatch, grid: int, ratio: float):
    """Of 10 masks at most 4 are drawn again: 100 in a row are never seen, and no unmet mask is given back."""
    rng, draws = np.random.default_rng(0), []
    monkeypatch.setattr(masks, "place_blocks", lambda *arguments: (draws.append(1), place_blocks(*arguments))[1])
    for _ in range(500):
        assert block_mask(grid, ratio, rng).any()
    assert 500 / len(draws) > 0.6
    monkeypatch.setattr(masks, "place_blocks", lambda *arguments: np.zeros((grid, grid), dtype=bool))
    with pytest.raises(RuntimeError, match=f"100 masks on a grid of {grid}: none has"):
        block_mask(grid, ratio, rng)


# --------------------------------------------------------------------------------------- discrete masks


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid", [2, 4, 8])
def test_discrete_mask_is_bernoulli_given_that_the_cells_disagree(grid: int, ratio: float):
    n, rng = grid * grid, np.random.default_rng(grid)
    cells = np.array([discrete_mask(grid, ratio, rng).sum() for _ in range(MASKS)])
    pmf = np.array([math.comb(n, k) * ratio**k * (1 - ratio) ** (n - k) for k in range(n + 1)])
    pmf[[0, n]] = 0
    pmf /= pmf.sum()
    mean = (pmf * np.arange(n + 1)).sum()
    deviation = math.sqrt((pmf * (np.arange(n + 1) - mean) ** 2).sum())
    assert 0 < cells.min() and cells.max() < n
    assert cells.mean() == pytest.approx(mean, abs=4 * deviation / math.sqrt(MASKS))
    assert cells.std() == pytest.approx(deviation, rel=0.08)
    half = pmf[n // 2]
    assert (cells == n // 2).mean() == pytest.approx(half, abs=4 * math.sqrt(half / MASKS))


def test_discrete_2x2_shows_half_of_the_image_in_six_of_fourteen_masks():
    rng = np.random.default_rng(1)
    counts = Counter(tuple(discrete_mask(2, 0.5, rng).ravel().tolist()) for _ in range(7_000))
    assert len(counts) == 14
    assert sum(n for cells, n in counts.items() if sum(cells) == 2) / 7_000 == pytest.approx(6 / 14, abs=0.024)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_discrete_mask_of_an_extreme_ratio_still_mixes(ratio: float):
    cells = discrete_mask(4, ratio, np.random.default_rng(0))
    assert cells.any() and not cells.all()


# ------------------------------------------------------------------------------------ pixels and lambda


@pytest.mark.parametrize("grid, height, width", [(2, 32, 32), (4, 64, 64), (8, 224, 224), (3, 32, 32), (5, 7, 13)])
def test_nearest_upsampling_shows_pixel_p_of_cell_floor_pg_over_s(grid: int, height: int, width: int):
    cells = discrete_mask(grid, 0.5, np.random.default_rng(0))
    pixels = to_pixels(cells, height, width)
    expected = [[float(cells[y * grid // height, x * grid // width]) for x in range(width)] for y in range(height)]
    assert pixels.shape == (1, 1, height, width) and pixels.dtype == torch.float32
    assert pixels[0, 0].tolist() == expected


def test_grid_48_at_224_has_cells_of_four_or_five_pixels():
    cells = np.zeros((48, 48), dtype=bool)
    for i in range(48):
        cells[:] = False
        cells[i, :] = True
        rows = to_pixels(cells, 224, 224)[0, 0, :, 0].nonzero().ravel().tolist()
        assert rows == list(range(rows[0], rows[-1] + 1)) and len(rows) in (4, 5)
        assert abs(rows[0] - math.ceil(i * 224 / 48)) <= 1


@pytest.mark.parametrize(
    "kind, grid, side", [("block", 2, 32), ("block", 8, 224), ("block", 48, 224), ("discrete", 5, 32)]
)
def test_eq3_lambda_is_the_pixel_share_of_image_i(kind: str, grid: int, side: int):
    mask = sample_mask(Mask(kind, "repaired", grid, 0.5), side, side, np.random.default_rng(3))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mixture_coefficient(mask).tolist() == pytest.approx([reference.pixel_share(mask[0, 0])], abs=1e-7)


def test_eq3_lambda_counts_pixels_not_cells():
    cells = np.array([[True, False, False]] * 3)
    mask = to_pixels(cells, 32, 32)  # columns of 11, 11 and 10 pixels
    assert mixture_coefficient(mask).item() == pytest.approx(11 / 32)


@pytest.mark.parametrize("height, width", [(4, 4), (8, 4), (4, 8)])
def test_grid_finer_than_the_image_is_an_error(height: int, width: int):
    mask = Mask("block", "repaired", 5, 0.5)
    with pytest.raises(ConfigError, match=r"mask\.grid: 5 cells.*" + f"{height}x{width}"):
        sample_mask(mask, height, width, np.random.default_rng(0))


# ----------------------------------------------------------------------------- ratios of Table 1


@pytest.mark.parametrize("kind", ["block", "discrete"])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.25, 0.75)])
def test_table1_uniform_ratios_are_drawn_for_every_mask(kind: str, low: float, high: float):
    rng = np.random.default_rng(0)
    mask = Mask(kind, "repaired", 16, (low, high))
    lam = np.array([mixture_coefficient(sample_mask(mask, 16, 16, rng)).item() for _ in range(1_000)])
    deviation = (high - low) / math.sqrt(12)
    assert lam.mean() == pytest.approx((low + high) / 2, abs=4 * deviation / math.sqrt(1_000) + 0.01)
    assert lam.std() == pytest.approx(deviation, rel=0.1)
    quartiles = low + (high - low) * np.array([0.25, 0.5, 0.75])
    assert np.quantile(lam, [0.25, 0.5, 0.75]) == pytest.approx(quartiles, abs=0.06)


@pytest.mark.parametrize("kind", ["block", "discrete"])
def test_table1_uniform_ratio_never_shows_one_image_alone(kind: str):
    rng = np.random.default_rng(0)
    mask = Mask(kind, "repaired", 2, (0.0, 1.0))
    assert {mixture_coefficient(sample_mask(mask, 8, 8, rng)).item() for _ in range(500)} == {0.25, 0.5, 0.75}


def test_masks_repeat_from_their_generator():
    mask = Mask("block", "repaired", 8, (0.25, 0.75))
    first, again = (sample_mask(mask, 32, 32, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, sample_mask(mask, 32, 32, np.random.default_rng(8)))


@pytest.mark.slow
def test_10000_block_masks_on_grids_2_4_8_16(monkeypatch):
    print("\nimpl      grid  empty   exact   mean    std     blocks  1st block  corner  edge   centre")
    for impl in ("literal", "repaired"):
        for grid in COVERAGE:
            with monkeypatch.context() as patch:
                found = statistics(patch, lambda rng: block_mask(grid, 0.5, rng, impl), grid, 0.5, 10_000)  # noqa: B023
            print(
                f"{impl:9} {grid:<4}  {found.empty:.4f}  {found.exact:.4f}  {found.mean:.4f}  {found.deviation:.4f}  "
                f"{found.blocks:<6.3f}  {found.first_block:<9.3f}  " + "  ".join(f"{zone:.3f}" for zone in found.zones)
            )
            if (impl, grid) != ("repaired", 2):
                hold(found, LITERAL[grid, 0.5], 10_000)
            else:
                assert (found.empty, found.exact) == (0, 1)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_ratio_that_mixes_nothing_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"mask\.ratio"):
        sample_mask(Mask(type="block", block_impl="repaired", grid=2, ratio=ratio), 8, 8, np.random.default_rng(0))
