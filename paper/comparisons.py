"""The verdicts of a table: each number of ours against the published one or, at a scale of its own, the first row's.

Columns that are added to the rows of paper/collect.py, empty where nothing is compared: against (what with),
difference, low, high, p, sees and word (paper/verdicts.py), verdict (in words), to_decide (what would settle an
undecided cell, and what it costs). No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from paper import verdicts
from paper.cells import Cell, Table
from paper.launches import launch
from paper.presets import Budget
from paper.verdicts import Spread, Verdict

NUMBERS = ("difference", "low", "high", "p", "sees")
NOT_COMPARABLE = "not comparable"
PUBLISHED = "published"


def with_published(table: Table, frame: pd.DataFrame, folders: Sequence[Path]) -> pd.DataFrame:
    """Against the published values, where the budget is the paper's."""
    spreads = _spreads(table, frame)
    pairs = zip(table.cells, frame.iterrows(), strict=True)
    return _joined(frame, [_published(cell, row, spreads, folders) for cell, (_, row) in pairs])


def with_first_row(table: Table, frame: pd.DataFrame, folders: Sequence[Path]) -> pd.DataFrame:
    """Against the first row of the same column, where both have runs of one budget."""
    first: dict[str, tuple[Cell, pd.Series]] = {}
    rows = []
    for cell, (_, row) in zip(table.cells, frame.iterrows(), strict=True):
        base, other = first.setdefault(cell.column, (cell, row))
        compared = base is not cell and row["n"] and row["preset"] == other["preset"]
        rows.append(_rows(cell, row, base, other, folders) if compared else _blank())
    return _joined(frame, rows)


def _rows(cell: Cell, row: pd.Series, base: Cell, other: pd.Series, folders: Sequence[Path]) -> dict[str, Any]:
    ours, others = row["by_seed"], other["by_seed"]
    verdict = verdicts.compare(ours, others)
    more = ""
    if verdict.word == "undecided":
        spread = Spread.of([ours[s] - others[s] for s in ours]) if ours.keys() == others.keys() else None
        seeds = verdicts.seeds_to_see(spread, paired=True) if spread else None
        seeds = seeds or max(len(ours), len(others), 2) + (spread is not None or len(ours) == len(others))
        more = _advice(seeds, [base, cell], spread, row["budget"], folders)
    return {**_described(verdict, base.row), "to_decide": more}


def _joined(frame: pd.DataFrame, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    made = pd.DataFrame(rows, index=frame.index)
    return frame.join(made.astype(dict.fromkeys(NUMBERS, float)))


def _published(cell: Cell, row: pd.Series, spreads: dict, folders: Sequence[Path]) -> dict[str, Any]:
    if not row["n"] or cell.published is None:
        return _blank()
    if not row["budget"].replicates:
        return _blank(NOT_COMPARABLE)
    values, spread = [*row["by_seed"].values()], spreads.get((row["dataset"], row["metric"]))
    verdict = verdicts.fits(values, cell.published, cell.published_runs, spread)
    more = ""
    if verdict.word == "undecided":
        more = _to_decide(cell, len(values), spread or Spread.of(values), row["budget"], folders)
    return {**_described(verdict, PUBLISHED), "to_decide": more}


def _spreads(table: Table, frame: pd.DataFrame) -> dict[tuple[str, str], Spread]:
    """By data set and metric, pooled over the distinct runs, where the table says so; a run in three rows is one."""
    samples: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _, row in frame.iterrows():
        if table.spread == "pooled" and row["n"] and row["budget"].replicates:
            samples.setdefault((row["dataset"], row["metric"]), {})[row["runs"]] = [*row["by_seed"].values()]
    return {alike: spread for alike, runs in samples.items() if (spread := Spread.of(*runs.values()))}


def _to_decide(cell: Cell, n: int, spread: Spread | None, budget: Budget, folders: Sequence[Path]) -> str:
    """How many seeds would settle an undecided cell, and what they cost."""
    if spread is None or not spread.std:
        return _advice(max(n, 2) + 1, [cell], None, budget, folders)
    seeds = verdicts.seeds_to_see(spread, cell.published_runs)
    if seeds is not None:
        return _advice(seeds, [cell], spread, budget, folders)
    whose = "one run" if cell.published_runs == 1 else f"a mean of {cell.published_runs}"
    return (
        f"no number of seeds would decide: the published value is {whose}, and where one run varies by "
        f"{spread.std:.1f} its own noise hides a difference of {verdicts.RELEVANT:.1f}"
    )


def _advice(seeds: int, cells: Sequence[Cell], spread: Spread | None, budget: Budget, folders: Sequence[Path]) -> str:
    """`spread`: None if only these seeds can tell it."""
    would = "decide" if spread and spread.std else "show the noise"
    more = launch(cells, seeds, budget, folders)
    what = f"{more.cost} more" if more.hours else "they are there, beyond those of this table"
    return f"{seeds} seeds would {would}: {what}"


def _described(verdict: Verdict, against: str) -> dict[str, Any]:
    numbers = {key: getattr(verdict, key) for key in (*NUMBERS, "word")}
    return {"against": against, **numbers, "verdict": str(verdict), "to_decide": ""}


def _blank(verdict: str = "") -> dict[str, Any]:
    empty = dict.fromkeys(NUMBERS)
    return {"against": "", **empty, "word": "", "verdict": verdict, "to_decide": ""}


# ------------------------------------------------------------------------------------------------------ in words


def words(cell: pd.Series) -> str:
    """`+1.2 (differs, +0.4 to +2.0)`; nothing where there is no difference."""
    return f"{cell['difference']:+.1f} ({cell['verdict']})" if pd.notna(cell["difference"]) else ""


def legend(table: Table, frame: pd.DataFrame) -> list[str]:
    """Below a table: how its verdicts are reached, and how many of them chance alone would make."""
    if not frame["difference"].notna().any():
        return []
    if table.scale:
        how = (
            "A difference is from the first row, with its 95 % interval: paired by seed where both have the same "
            "seeds, by Welch's test where they do not. "
        )
    else:
        spread = "pooled over the cells of one data set and metric" if table.spread == "pooled" else "of its own seeds"
        how = (
            "A difference is from the published value, with the 95 % t interval for one more result of the same kind; "
            f"spread: {spread}. "
        )
    compared = frame[frame["difference"].notna()]
    several = any(cell["n"] > len(cell["by_seed"]) for _, cell in compared.iterrows())
    repeats = "Several trainings from one pre-training count as one seed. " if several else ""
    decide = f" To decide is to see a difference of {verdicts.RELEVANT:.1f} in {verdicts.POWER:.0%} of all cases."
    text = f"{how}{repeats}One seed shows no noise: undecided."
    return [text + (decide if any(compared["to_decide"]) else ""), *filter(None, [by_chance(frame)])]


def by_chance(frame: pd.DataFrame) -> str:
    """How many of a table's verdicts would differ by chance alone, and which survive when all are asked at once."""
    asked = frame[frame["p"].notna()]
    if asked.empty:
        return ""
    differ = int((~asked["word"].isin(("agrees", "level", "undecided"))).sum())
    survive = asked[verdicts.holm([*asked["p"]])]
    names = f" ({', '.join(survive['cell'])})" if len(survive) else ""
    outcome = f"{differ} differ{'s' if differ == 1 else ''}, {len(survive)} also by Holm's correction{names}"
    return (
        f"{len(asked)} comparisons rest on two seeds or more; of as many perfect replications "
        f"{(1 - verdicts.CONFIDENCE) * len(asked):.1f} would differ by chance. {outcome if differ else 'None differs'}."
    )
