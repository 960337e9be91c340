"""Compare runs: a table of any number, named by the keys in which they differ; of two, the epoch where they part.

examples:
  python paper/compare.py runs/pretrain/*                       a table, and their curves in one picture
  python paper/compare.py runs/pretrain/RUN results/pretrain/REFERENCE
  python paper/compare.py runs/pretrain/RUN results/pretrain/REFERENCE --tolerance 0.01 --out curves.png

Of two, versions, commit and machine are compared, too. Two values part when they differ by more than the tolerance
times the greater of the two. The curves are overlaid in a PNG. The exit status of two is 0 where they agree over all
the epochs that both have, else 1.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.config import UserError, flatten, main_guard, read_yaml
from mixmask.runs import read_environments, read_log
from paper import overview
from paper.overview import panels, save
from paper.report.curve import quantities, unit

Curve = Mapping[int, float]  # epoch -> value
LATER = (
    "timing",
    "gradient_norm",
    "feature_std",
    "effective_rank",
    "alignment",
    "uniformity",
)  # not compared bit by bit


@dataclass(frozen=True)
class Verdict:
    """What the curves of two runs say."""

    text: str
    same: bool
    parting: int | None = None  # the first epoch at which a curve parts
    curve: str = ""  # which one


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what differs and where, draw the curves; status 1 where two part."""
    options = _parse(arguments)
    runs = [Path(run) for run in dict.fromkeys(options.runs)]
    for directory in runs:
        if not (directory / "config.yaml").exists():
            raise UserError(f"{directory} is no run directory: it has no config.yaml")
    configs = [read_yaml(directory / "config.yaml") for directory in runs]
    if len({"checkpoint" in config for config in configs}) > 1:
        raise UserError("some runs are pre-trainings, others evaluations: expected runs of one stage")
    logs, out = [read_log(directory) for directory in runs], Path(options.out)
    names = overview.names(runs)
    print(overview.table(names, logs))
    if len(runs) != 2:
        overview.draw(names, logs, out)
        print(f"written: {out}")
        return
    print("\n".join([*settings(*configs), *machines(*runs)]))
    result = verdict(*logs, options.tolerance)
    print(result.text)
    draw(*map(quantities, logs), result, unit(logs[1]), out)
    print(f"written: {out}")
    if not result.same:
        raise SystemExit(1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python paper/compare.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run directories of one stage; of two the second is the reference"
    )
    parser.add_argument("--tolerance", type=float, default=0.05, metavar="X", help="relative (default: %(default)s)")
    parser.add_argument("--out", default="paper/output/compare.png", metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.tolerance < 0:
        parser.error(f"--tolerance: expected a number from 0 on, found {options.tolerance:g}")
    return options


# ------------------------------------------------------------------------------------------------------ settings


def settings(run: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """A line for each key that differs; what only says where and how a run is carried out (`run.*`) is left out."""
    ours, theirs = flatten(run), flatten(reference)
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if not key.startswith("run.")]
    differing = [key for key in keys if ours.get(key, "absent") != theirs.get(key, "absent")]
    if not differing:
        return ["config: the same"]
    lines = [f"  {key}: {ours.get(key, 'absent')} (reference: {theirs.get(key, 'absent')})" for key in differing]
    noise = "; what parts the curves is the noise between seeds" if differing == ["seed"] else ""
    return [f"config: {len(differing)} key{'s differ' if differing[1:] else ' differs'}{noise}", *lines]


def machines(run: Path, reference: Path) -> list[str]:
    """A line that names the versions, commit and machine in which the two differ; none where they agree.

    One more for each time that one of them was continued in another environment.
    """
    paths = [directory / "environment.json" for directory in (run, reference)]
    ours, theirs = (json.loads(p.read_text(encoding="utf-8")) if p.exists() else {} for p in paths)
    differing = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
    parts = [f"{key} {ours.get(key, 'absent')} (reference: {theirs.get(key, 'absent')})" for key in differing]
    lines = [f"environment: {', '.join(parts)}"] if parts else []
    for name, directory in ("run", run), ("reference", reference):
        later = read_environments(directory)[1:]
        lines += [f"{name} was continued after step {entry['step']}: {entry['changed']}" for entry in later]
    return lines


# -------------------------------------------------------------------------------------------------------- curves


def verdict(run: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], tolerance: float) -> Verdict:
    """Equal bit by bit, equal within the tolerance, or the epoch at which they part, over the epochs that both have.

    Raises UserError where the logs have no curve in common.
    """
    ours, theirs, by = quantities(run), quantities(reference), unit(reference)
    pairs = {
        (epoch, name): (ours[name][epoch], theirs[name][epoch])
        for name in ours
        for epoch in ours[name].keys() & theirs.get(name, {}).keys()
    }
    if not pairs:
        raise UserError("the two logs have no curve in common: expected two runs of one stage with a logged epoch each")
    first, last = min(epoch for epoch, _ in pairs), max(epoch for epoch, _ in pairs)
    ends = [max(max(curve) for curve in curves.values()) for curves in (ours, theirs)]
    span = f"over {by}s {first} to {last} (the run has come to {ends[0]}, the reference to {ends[1]})"
    if _numbers(run, last) == _numbers(reference, last):
        return Verdict(f"curves: equal bit by bit {span}", True)
    parts = sorted((place for place, pair in pairs.items() if distance(*pair) > tolerance), key=lambda place: place[0])
    if not parts:
        largest = max(distance(*pair) for pair in pairs.values())
        return Verdict(f"curves: equal within {largest:.2g} {span}; tolerance {tolerance:g}", True)
    (epoch, name), most = parts[0], max(distance(*pairs[place]) for place in parts)
    values = "{:.6g} against {:.6g}".format(*pairs[epoch, name])
    text = f"curves: part at {by} {epoch}: {name} is {values}, {distance(*pairs[epoch, name]):.2g} apart"
    return Verdict(f"{text}; tolerance {tolerance:g}, at most {most:.2g} {span}", False, epoch, name)


def distance(a: float, b: float) -> float:
    """|a - b| over the greater of |a| and |b|; 0 for equal values, infinite where one alone is not finite."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf


def _numbers(lines: Sequence[Mapping[str, Any]], last: int) -> list[dict[str, Any]]:
    """All that was logged up to the epoch (or iteration) `last`, but for timings and for what old logs lack."""
    upto = [line for line in lines if line.get("epoch", line["step"]) <= last]
    return [{key: value for key, value in line.items() if key not in LATER} for line in upto]


def draw(run: Mapping[str, Curve], reference: Mapping[str, Curve], result: Verdict, by: str, out: Path) -> None:
    """A panel for each curve that either has: the reference broad and pale, the run over it; a line where they part."""
    from paper.figures import style

    names = list(dict.fromkeys([*run, *reference]))
    figure, row = panels(names, by)
    for axes, name in zip(row, names, strict=True):
        for label, curves, look in (
            ("reference", reference, {"color": style.SECOND, "linewidth": 3.5}),
            ("run", run, {"color": style.FIRST, "linewidth": 1.2, "marker": ".", "markersize": 3}),
        ):
            points = sorted(curves.get(name, {}).items())
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, **look)
        if result.parting is not None:
            label = f"{result.curve} parts at {by} {result.parting}"
            axes.axvline(result.parting, color=style.ACCENT, linestyle=":", label=label)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(figure, out)


if __name__ == "__main__":
    main_guard(main)
