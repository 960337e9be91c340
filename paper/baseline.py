"""Of a table at a scale of its own: each number against the first row's, with the noise of that difference."""

from __future__ import annotations

import pandas as pd

NOISE = 2  # standard errors within which a difference counts as noise
LEGEND = (
    "A difference stands with its standard error, from the standard deviation pooled over the rows that have several "
    "seeds; a row with one seed is taken to vary as they do."
)


def against_first_row(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` (make_tables.collect) with `gain`, ours less the first row's in its column, and `gain_error`.

    gain_error is the standard error of that difference of two means, std * sqrt(1 / n + 1 / n of the first row), where
    std is pooled over the rows of the column that have several seeds: a row with one seed is taken to vary as they do.
    Both are empty in the first row and where a number is missing, gain_error where no row has several seeds.
    """
    columns = [_column(part) for _, part in frame.groupby("column", sort=False)]
    return pd.concat(columns).sort_index()


def _column(frame: pd.DataFrame) -> pd.DataFrame:
    first = frame.iloc[0]
    spread, others = pooled_std(frame), frame.index != frame.index[0]
    known = others & (frame["n"] > 0) & bool(first["n"])
    error = spread * (1 / frame["n"].where(known) + 1 / max(first["n"], 1)) ** 0.5
    return frame.assign(
        gain=(frame["ours_mean"].astype(float) - (first["ours_mean"] if first["n"] else float("nan"))).where(known),
        gain_error=error,
        baseline=first["row"],
    )


def pooled_std(frame: pd.DataFrame) -> float:
    """Standard deviation of one run, from all rows with several seeds; not a number without such a row."""
    several = frame[frame["n"] > 1]
    if several.empty:
        return float("nan")
    freedom, std = several["n"].astype(float) - 1, several["ours_std"].astype(float)
    return float(((std**2 * freedom).sum() / freedom.sum()) ** 0.5)


def words(cell: pd.Series) -> str:
    """`+1.2 ± 0.4 (outside 2 standard errors)`; nothing where there is no difference."""
    if pd.isna(cell.get("gain")):
        return ""
    if pd.isna(cell["gain_error"]):
        return f"{cell['gain']:+.1f} (noise unknown)"
    inside = "within" if abs(cell["gain"]) <= NOISE * cell["gain_error"] else "outside"
    return f"{cell['gain']:+.1f} ± {cell['gain_error']:.1f} ({inside} {NOISE} standard errors)"
