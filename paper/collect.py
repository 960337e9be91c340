"""Runs -> one row a cell: the published value, ours, and the verdict on their difference. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mixmask.runs import ResultError, read_result
from paper import comparisons
from paper.cells import Cell, Table
from paper.checkpoints import public_checkpoints
from paper.presets import Budget, Step, chains, label, located, metric, missing_file, public_file, remark

NO_RUN = "no run yet"
UNREADABLE = "unreadable result"
NOT_IMPLEMENTED = "not implemented"
PUBLIC_ONLY = "public checkpoint, no run yet"


def collect(table: Table, budgets: Sequence[Budget], folders: Sequence[Path]) -> pd.DataFrame:
    """One row a cell: the published value, and ours from the first of `budgets` that has runs.

    ours_mean, ours_std (over runs, n - 1 in the denominator; empty for one), n, by_seed (each pre-training's value),
    preset, metric (of ours, where there is a run), epochs (of our pre-training), runs, remark (on our number); state,
    where there is no number of ours; and what paper/comparisons.py says of it.
    """
    frame = pd.DataFrame([{**_published(cell), **_ours(cell, budgets, folders)} for cell in table.cells])
    compared = comparisons.with_first_row if table.scale else comparisons.with_published
    return compared(table, frame, folders)


def _ours(cell: Cell, budgets: Sequence[Budget], folders: Sequence[Path]) -> dict[str, Any]:
    """A result that cannot be read leaves its own cell empty, with the reason, and no other."""
    try:
        ours = next((runs for runs in (_runs(cell, b, folders) for b in budgets) if len(runs)), None)
    except ResultError as error:
        return {**_nothing(), "state": UNREADABLE, "note": str(error)}
    if ours is not None:
        return _summary(cell, ours)
    waiting = PUBLIC_ONLY if cell.checkpoint else NOT_IMPLEMENTED
    return {**_nothing(), "state": waiting if missing_file(cell, budgets[0]) else NO_RUN}


def _runs(cell: Cell, budget: Budget, folders: Sequence[Path]) -> pd.DataFrame:
    """The finished runs of `cell`, one row each."""
    rows = []
    for chain in chains(cell, budget):
        where, name = located(folders, chain[-1]), metric(cell, chain)
        result = read_result(where)
        if result is not None:
            _check_source(cell, chain, folders, budget)
            run = {"run": where.name, "budget": budget, "labels": result.get("labels", ""), **_origin(chain)}
            rows.append({"value": _metric(result, name, where), "metric": name, **run})
    return pd.DataFrame(rows)


def _origin(chain: Sequence[Step]) -> dict[str, Any]:
    """Seed, data set and epochs of our pre-training; of somebody else's checkpoint the evaluation's own seed."""
    first, ours = chain[0].config, chain[0].stage == "pretrain"
    seed = first.seed if ours else chain[-1].config.seed
    return {"seed": seed, "dataset": getattr(first, "dataset", ""), "epochs": first.epochs if ours else None}


def _check_source(cell: Cell, chain: Sequence[Step], folders: Sequence[Path], budget: Budget) -> None:
    """Raises ResultError for a number that was measured from another method's public checkpoint than its row's."""
    if public_file(cell, budget) is None:
        return
    name, expected = cell.checkpoint, public_checkpoints()[cell.checkpoint].format
    for where in (located(folders, step) for step in chain):  # a conversion need not be kept: the last run says it too
        result = read_result(where) or {}
        measured = result.get("format", result.get("source", {}).get("format", expected))
        if measured != expected:
            reason = f"{chain[0].source} is of format {measured}, expected {expected} for {cell.row}"
            raise ResultError(f"{where / 'result.json'}: {reason}; give the right file as checkpoints.{name}")


def _metric(result: dict[str, Any], name: str, where: Path) -> float:
    try:
        return float(result["metrics"][name])
    except (KeyError, TypeError, ValueError):
        reason = f"no metric '{name}'; move the run away to run it again"
        raise ResultError(f"{where / 'result.json'}: {reason}") from None


def _published(cell: Cell) -> dict[str, Any]:
    keys = ("row", "column", "published", "origin", "source", "metric", "note")
    values = {"cell": cell.id, **{key: getattr(cell, key) for key in keys}, "state": ""}
    return values if cell.published is not None else {**values, "origin": ""}


def _nothing() -> dict[str, Any]:
    empty = {"ours_mean": None, "ours_std": None, "n": 0, "by_seed": {}, "budget": None, "dataset": "", "preset": ""}
    return {**empty, "epochs": None, "runs": "", "remark": ""}


def _summary(cell: Cell, runs: pd.DataFrame) -> dict[str, Any]:
    """by_seed: several trainings from one pre-training (VOC's five) are one value, for they share its noise."""
    budget = runs["budget"].iloc[0]
    return {
        "ours_mean": runs["value"].mean(),
        "ours_std": runs["value"].std(),
        "n": len(runs),
        "by_seed": runs.groupby("seed")["value"].mean().to_dict(),
        "budget": budget,
        "dataset": runs["dataset"].iloc[0],
        "preset": label(cell, budget),
        "remark": "; ".join(filter(None, [remark(cell, budget), *runs["labels"].unique()])),
        "metric": runs["metric"].iloc[0],
        "epochs": runs["epochs"].iloc[0],
        "runs": " ".join(runs["run"]),
    }
