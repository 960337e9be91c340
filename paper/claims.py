"""The paper's claims (paper/claims.yaml), and what its own printed numbers and our runs say of them. No torch here."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mixmask.config import ConfigError, build, nearest, read_yaml
from paper import verdicts
from paper.cells import ROOT, Cell, select, tables
from paper.collect import collect
from paper.launches import Launch, launch
from paper.markup import Footnotes, Sheet
from paper.presets import Budget
from paper.verdicts import Spread, Verdict, compare, holm

TITLE = "The paper's claims: what its own numbers say of them, and what our runs do"
FIRST_SEEDS = 3  # of a launch, where no spread is known yet: two would need a difference of 12.7 standard errors
SUPPORTED, CONTRADICTED, UNDECIDED, NOT_RUN = "supported", "contradicted", "undecided", "not run"
NO_NUMBER = "no number decides it"


@dataclass(frozen=True, eq=False)
class Comparison:
    """`one` is ahead of `other` or, where `level`, neither is."""

    one: Cell
    other: Cell
    level: bool = False

    @property
    def printed(self) -> str:
        """`Tiny-INet: BYOL: MixMask 50.8, Vanilla 51.4`; nothing where the paper prints no number."""
        if self.one.published is None or self.other.published is None:
            return ""
        values = (f"{cell.row.rpartition(': ')[2]} {cell.published}" for cell in (self.one, self.other))
        return f"{self.one.column}: {', '.join(values)}"

    @property
    def holds_as_printed(self) -> bool:
        """Of two printed numbers."""
        difference = self.one.published - self.other.published
        return abs(difference) < verdicts.RELEVANT if self.level else difference > 0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, and the comparisons that decide it."""

    id: str
    says: str
    where: tuple[str, ...]
    cells: tuple[str, ...]
    any: bool = False
    note: str = ""

    @functools.cached_property
    def comparisons(self) -> list[Comparison]:
        return [pair for text in self.cells for pair in _comparisons(text, self.id)]

    @property
    def as_printed(self) -> str:
        """What the paper's own numbers say."""
        printed = [pair for pair in self.comparisons if pair.printed]
        if not printed:
            return "prints no numbers" if self.comparisons else NO_NUMBER
        failing = [pair.printed for pair in printed if not pair.holds_as_printed]
        held = f"{len(printed) - len(failing)} of {len(printed)}"
        return f"contradicted: holds in {held}; not {'; '.join(failing)}" if failing else f"holds in {held}"


@functools.cache
def claims() -> tuple[Claim, ...]:
    """In the order of paper/claims.yaml. Raises ConfigError for an entry that is wrong."""
    entries = read_yaml(ROOT / "paper" / "claims.yaml")
    return tuple(build(Claim, {**entry, "id": name}, f"claim {name}") for name, entry in entries.items())


def _comparisons(text: str, claim: str) -> list[Comparison]:
    """`table5/*/mixmask > table5/*/vanilla` -> one comparison for each cell that fits the left side."""
    one, relation, other = text.partition(" ~ ") if " ~ " in text else text.partition(" > ")
    if not relation or one.count("*") != other.count("*"):
        raise ConfigError(
            f"claim {claim}: expected 'A > B' or 'A ~ B' with the same stars on both sides, found '{text}'"
        )
    pattern, known = re.compile(re.escape(one).replace(r"\*", "(.*)")), _cells()
    fitting = [match for match in map(pattern.fullmatch, known) if match]
    pairs = [(match.group(), _filled(other, match.groups())) for match in fitting]
    if not pairs:
        raise ConfigError(f"claim {claim}: no cell fits '{one}'{nearest(one, known)}")
    absent = [name for _, name in pairs if name not in known]
    if absent:
        raise ConfigError(f"claim {claim}: no cell '{absent[0]}'{nearest(absent[0], known)}")
    return [Comparison(known[a], known[b], "~" in relation) for a, b in pairs]


def _filled(pattern: str, parts: Iterable[str]) -> str:
    for part in parts:
        pattern = pattern.replace("*", part, 1)
    return pattern


@functools.cache
def _cells() -> dict[str, Cell]:
    return {cell.id: cell for cell in select(["all"])}


# --------------------------------------------------------------------------------------------------- by our runs


@dataclass(frozen=True)
class Outcome:
    """What our runs say of a claim, and what would decide it."""

    state: str
    tally: str = ""  # `2 ahead, 1 undecided of 7`: the others are not run
    detail: str = ""  # each comparison
    first: Launch | None = None  # the comparison that is cheapest to make
    whole: Launch | None = None  # all of them


Values = Mapping[str, Mapping[int, float]]  # by cell, then by seed


def values(budget: Budget, folders: Sequence[Path]) -> Values:
    """Of the cells that have runs of the paper's budget."""
    frames = [collect(table, [budget], folders) for table in tables().values() if not table.scale]
    rows = (row for frame in frames for _, row in frame.iterrows() if row["n"])
    return {row["cell"]: row["by_seed"] for row in rows if row["budget"].replicates}


def outcome(claim: Claim, ours: Values, budget: Budget, folders: Sequence[Path]) -> Outcome:
    """Supported where every comparison holds (one, for `any`), contradicted if one is reversed beyond doubt.

    Beyond doubt: by Holm's correction over the comparisons of the claim that have a p-value.
    """
    if not claim.comparisons:
        return Outcome(NO_NUMBER)
    made = {
        pair: compare(ours[pair.one.id], ours[pair.other.id])
        for pair in claim.comparisons
        if pair.one.id in ours and pair.other.id in ours
    }
    held = [pair for pair, verdict in made.items() if verdict.word == ("level" if pair.level else "ahead")]
    certain = _certain(made)
    turned = [pair for pair in certain if made[pair].word == "behind" or (pair.level and made[pair].word == "ahead")]
    if claim.any:  # one of many: by chance alone one would be found
        held = [pair for pair in held if pair in certain]
    wanted = 1 if claim.any else len(claim.comparisons)
    detail = "; ".join(f"{pair.one.column}: {verdict.difference:+.1f} ({verdict})" for pair, verdict in made.items())
    words = Counter(verdict.word for verdict in made.values())
    counted = [f"{words[word]} {word}" for word in ("ahead", "level", "behind", "undecided") if words[word]]
    tally = f"{', '.join(counted)} of {len(claim.comparisons)}" if made else ""
    if len(held) >= wanted:
        return Outcome(SUPPORTED, tally, detail)
    if len(turned) > (len(claim.comparisons) - 1 if claim.any else 0):
        return Outcome(CONTRADICTED, tally, detail)
    open_ones = [pair for pair in claim.comparisons if pair not in held]
    seeds = {
        pair: _seeds(ours[pair.one.id], ours[pair.other.id]) if pair in made else FIRST_SEEDS for pair in open_ones
    }
    seeds = {pair: n for pair, n in seeds.items() if n}
    launches = [_launch({pair: n}, budget, folders) for pair, n in seeds.items()]
    first = min(launches, key=lambda each: each.hours, default=None)
    whole = _launch(seeds, budget, folders) if seeds else None
    return Outcome(UNDECIDED if made else NOT_RUN, tally, detail, first, whole)


def _certain(made: Mapping[Comparison, Verdict]) -> list[Comparison]:
    """Those that differ by Holm's correction."""
    tested = {pair: verdict for pair, verdict in made.items() if verdict.p == verdict.p}
    kept = holm([verdict.p for verdict in tested.values()])
    return [pair for pair, sure in zip(tested, kept, strict=True) if sure]


def _launch(seeds: Mapping[Comparison, int], budget: Budget, folders: Sequence[Path]) -> Launch:
    """With as many seeds as the noisiest of these comparisons needs."""
    cells = {cell.id: cell for pair in seeds for cell in (pair.one, pair.other)}
    return launch(list(cells.values()), max(seeds.values()), budget, folders)


def _seeds(one: Mapping[int, float], other: Mapping[int, float]) -> int | None:
    """Seeds that would show a point, or the difference found if smaller; None if no reasonable number would."""
    n, spread = max(len(one), len(other)), Spread.of([one[seed] - other[seed] for seed in one.keys() & other.keys()])
    if spread is None or not spread.std:
        return max(n + 1, FIRST_SEEDS)
    difference = abs(compare(one, other).difference)
    needed = verdicts.seeds_to_see(spread, size=min(verdicts.RELEVANT, max(difference, 0.1)), paired=True)
    return needed and max(needed, n + 1)


# ------------------------------------------------------------------------------------------------------ in words


def collected(budget: Budget, folders: Sequence[Path]) -> pd.DataFrame:
    """One row a claim; of the launches that would decide it, the cheapest comparison's and all of them."""
    ours, rows = values(budget, folders), []
    for claim in claims():
        result = outcome(claim, ours, budget, folders)
        launches = {
            f"{name}_{key}": "" if each is None else getattr(each, key)
            for name, each in (("first", result.first), ("whole", result.whole))
            for key in ("command", "cost")
        }
        about = {"id": claim.id, "claim": claim.says, "where": ", ".join(claim.where), "cells": "; ".join(claim.cells)}
        said = {
            "printed": claim.as_printed,
            "ours": result.state,
            "tally": result.tally,
            "detail": result.detail,
            "note": claim.note,
        }
        rows.append({**about, **said, **launches})
    return pd.DataFrame(rows)


def sheet(frame: pd.DataFrame) -> Sheet:
    """A line a claim: what it says and where, the paper's own numbers, our runs, the cheapest launch."""
    notes = Footnotes()
    body = [
        [
            f"{row['claim']} ({row['where']})" + notes.marks([row["note"]]),
            row["printed"],
            row["ours"] + (f" ({row['tally']})" if row["tally"] else ""),
            _cheapest(row),
        ]
        for _, row in frame.iterrows()
    ]
    heads = [
        ("", "claim"),
        ("", "the paper's own numbers"),
        ("", "our runs"),
        ("", "cheapest launch"),
    ]
    return Sheet("claims", TITLE, heads, body, notes, _legend(frame), widths=(0.27, 0.27, 0.16, 0.24))


def _cheapest(row: pd.Series) -> str:
    if not row["first_command"]:
        return ""
    text = f"{row['first_command']}: {row['first_cost']}"
    return text if row["first_command"] == row["whole_command"] else f"{text}; all comparisons {row['whole_cost']}"


def _legend(frame: pd.DataFrame) -> list[str]:
    counts = frame["ours"].value_counts()
    states = (SUPPORTED, CONTRADICTED, UNDECIDED, NOT_RUN, NO_NUMBER)
    contradicted = int(frame["printed"].str.startswith(CONTRADICTED).sum())
    return [
        f"{len(frame)} claims; the paper's own tables contradict {contradicted}. By our runs: "
        + ", ".join(f"{counts.get(state, 0)} {state}" for state in states)
        + ".",
        "Supported: every comparison has its 95 % interval on the claimed side. Contradicted: one has it on the other "
        "side, also by Holm's correction over the claim's comparisons. A launch makes the cheapest comparison that is "
        f"open; where no noise is known yet, with {FIRST_SEEDS} seeds. Hours are estimates (paper/cost.py).",
    ]


def csv(frame: pd.DataFrame) -> str:
    """One line a claim, with both launches."""
    return frame.to_csv(index=False, lineterminator="\n")
