"""Write the paper's tables with our numbers beside the published ones: Markdown, LaTeX and CSV.

examples:
  python paper/make_tables.py                      Tables 1 to 10 and reduced ones, of runs/ and results/
  python paper/make_tables.py table4 --runs-dir /scratch/runs --out tables
  python paper/make_tables.py table4 --preset paper --set epochs=100      the runs launched with the same --set

Each cell shows the runs of the paper's budget where there are some, else those of the smoke preset, marked as such:
a smoke number is never compared with a published one. Where there is no run, the table says so. Tables 8, 9 and 10 are
hyper-parameters: ours are read from the recipes. `reduced` and what begins with it hold no published numbers: our small
CPU runs, each against the table's first row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mixmask.config import ConfigError, UserError, main_guard
from mixmask.runs import ResultError, read_result, write_atomically
from mixmask.training.progress import printable
from paper import baseline, settings
from paper.cells import Cell, Heading, Table, select, tables
from paper.checkpoints import public_checkpoints
from paper.markup import Footnotes, Sheet, latex, markdown
from paper.presets import (
    Budget,
    Step,
    budget,
    chains,
    label,
    located,
    metric,
    missing_file,
    presets,
    public_file,
    remark,
)

NONE = "–"  # nothing is published
NO_RUN = "no run yet"
UNREADABLE = "unreadable result"
NOT_IMPLEMENTED = "not implemented"
PUBLIC_ONLY = "public checkpoint, no run yet"
NOT_COMPARABLE = "not comparable"
GAIN = ("baseline", "gain", "gain_error")  # columns that only tables at a scale of their own have
NOISE = 2  # standard deviations of ours within which a difference counts as noise


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write the three files of each table, print the Markdown.

    Raises UserError, when all is written, where a result could not be read: its cell says so.
    """
    options = _parse(arguments)
    chosen = [options.preset] if options.preset else list(presets())
    budgets = [budget(name, options.set) for name in chosen]
    unreadable: dict[str, None] = {}  # each reason once
    for name in _names(options.targets):
        if name in settings.names():
            frame = settings.collect(name)
            sheet, csv = settings.sheet(name, frame), settings.csv(frame)
        else:
            frame = collect(tables()[name], budgets, [Path(folder) for folder in options.runs_dir])
            sheet, csv = numbers(tables()[name], frame), numbers_csv(frame)
            unreadable |= dict.fromkeys(frame.loc[frame["state"] == UNREADABLE, "note"])
        print(printable(markdown(sheet)))
        for path in write(sheet, csv, Path(options.out)):
            print(f"written: {path}")
        print()
    if unreadable:
        raise UserError("; ".join(unreadable))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python paper/make_tables.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="table4, or one of its cells; none: all")
    folders = {"nargs": "+", "default": ["runs", "results"], "metavar": "DIR"}
    parser.add_argument("--runs-dir", **folders, help="where the runs are, the first first (default: runs results)")
    parser.add_argument("--out", default="paper/output", metavar="DIR", help="default: paper/output")
    parser.add_argument("--preset", help=f"only the runs of this preset: {', '.join(presets())}")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as given to slurm/launch.py"
    )
    return parser.parse_args(arguments)


def _names(targets: Sequence[str]) -> list[str]:
    """The tables that `targets` name, in the paper's order. Raises ConfigError for anything else."""
    found = {cell.target for cell in select(targets)} | set(targets) & set(settings.names())
    everything = not targets or "all" in targets
    figures = [name for name in [*found, *targets] if name.startswith("figure")]
    if figures and not everything:
        raise ConfigError(f"{figures[0]} is no table: python paper/make_figures.py {figures[0].partition('/')[0]}")
    own = [name for name, table in tables().items() if table.scale]
    every = [*(name for name in tables() if name.startswith("table")), *settings.names(), *own]
    return [name for name in every if everything or name in found]


# ------------------------------------------------------------------------------------------------------- reading


def collect(table: Table, budgets: Sequence[Budget], folders: Sequence[Path]) -> pd.DataFrame:
    """One row a cell: the published value, and ours from the first of `budgets` that has runs.

    ours_mean, ours_std (over seeds, n - 1 in the denominator; empty for one seed), n, preset, difference (empty
    where the preset is not the paper's) and verdict, metric (of ours, where there is a run), epochs (of our
    pre-training), runs, remark (on our number); state, where there is no number of ours. Where the table has a scale of
    its own, gain, gain_error and baseline, too (paper/baseline.py).
    """
    frame = pd.DataFrame([{**_published(cell), **_ours(cell, budgets, folders)} for cell in table.cells])
    return baseline.against_first_row(frame) if table.scale else frame


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
    """The finished runs of `cell`, one row a seed."""
    rows = []
    for chain in chains(cell, budget):
        where, name = located(folders, chain[-1]), metric(cell, chain)
        result = read_result(where)
        if result is not None:
            _check_source(cell, chain, folders, budget)
            epochs = chain[0].config.epochs if chain[0].stage == "pretrain" else None
            run = {"run": where.name, "epochs": epochs, "budget": budget, "labels": result.get("labels", "")}
            rows.append({"value": _metric(result, name, where), "metric": name, **run})
    return pd.DataFrame(rows)


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
    empty = {"ours_mean": None, "ours_std": None, "n": 0, "preset": "", "difference": None}
    return {**empty, "verdict": "", "epochs": None, "runs": "", "remark": ""}


def _summary(cell: Cell, runs: pd.DataFrame) -> dict[str, Any]:
    mean, std, budget = runs["value"].mean(), runs["value"].std(), runs["budget"].iloc[0]
    difference = mean - cell.published if budget.replicates and cell.published is not None else None
    return {
        "ours_mean": mean,
        "ours_std": std,
        "n": len(runs),
        "preset": label(cell, budget),
        "difference": difference,
        "verdict": verdict(difference, std) if cell.published is not None else "",
        "remark": "; ".join(filter(None, [remark(cell, budget), *runs["labels"].unique()])),
        "metric": runs["metric"].iloc[0],
        "epochs": runs["epochs"].iloc[0],
        "runs": " ".join(runs["run"]),
    }


def verdict(difference: float | None, std: float) -> str:
    """The difference from the published value against the noise; `std` is not a number for one run."""
    if difference is None:
        return NOT_COMPARABLE
    if pd.isna(std):
        return "one run, noise unknown"
    return f"{'within' if abs(difference) <= NOISE * std else 'outside'} {NOISE} std"


# ------------------------------------------------------------------------------------------------------- writing


def write(sheet: Sheet, csv: str, out: Path) -> list[Path]:
    """table4.md, table4.tex, table4.csv in `out`. Raises UserError where it cannot be written."""
    texts = {"md": markdown(sheet), "tex": latex(sheet), "csv": csv}
    paths = [out / f"{sheet.name}.{kind}" for kind in texts]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, texts.values(), strict=True):
            write_atomically(path, text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    return paths


def numbers_csv(frame: pd.DataFrame) -> str:
    """One line a cell; percentages with one decimal as in the paper, the standard deviation with two."""
    order = ["cell", "row", "column", "published", "ours_mean", "ours_std", "n", "preset", "difference", "verdict"]
    order += ["metric", "epochs", "origin", "source", "note", "remark", "runs"]
    digits = {
        "published": "{:.1f}",
        "ours_mean": "{:.1f}",
        "ours_std": "{:.2f}",
        "difference": "{:+.1f}",
        "epochs": "{:.0f}",
    }
    if "gain" in frame:
        order, digits = [*order, *GAIN], {**digits, "gain": "{:+.1f}", "gain_error": "{:.2f}"}
    shown = frame.assign(**{k: [f.format(v) if pd.notna(v) else "" for v in frame[k]] for k, f in digits.items()})
    return shown[order].to_csv(index=False, lineterminator="\n")


def numbers(table: Table, frame: pd.DataFrame) -> Sheet:
    """The paper's rows and columns; each row is three lines: published, ours, difference."""
    notes, body, group = Footnotes(), [], ""
    cells = {(cell["row"], cell["column"]): cell for _, cell in frame.iterrows()}
    for row in table.rows:
        if row.group != group:
            group = row.group
            body.append(group)
        of_row = [cells.get((row.label, column.label)) for column in table.columns]
        body += _gains(row, of_row, notes) if table.scale else _lines(row, of_row, notes)
    columns = [("", ""), ("", ""), *((column.group, column.name) for column in table.columns)]
    return Sheet(table.name, table.title, columns, body, notes, _legend(table, frame))


def _lines(row: Heading, cells: list[pd.Series | None], notes: Footnotes) -> list[list[str]]:
    """Up to three lines of the table: the last only where some cell of the row has a run."""
    name = row.name + notes.marks(cell["note"] for cell in cells if cell is not None)
    published, ours, differences = zip(*(_triple(cell, notes) for cell in cells), strict=True)
    lines = [[name, "published", *published], ["", "ours", *ours], ["", "difference", *differences]]
    return lines if any(differences) else lines[:2]


def _triple(cell: pd.Series | None, notes: Footnotes) -> tuple[str, str, str]:
    """Published, ours, difference; a dash where the paper prints none."""
    if cell is None:
        return NONE, "", ""
    origin = "" if cell["origin"] in ("own", "") else f"published value {cell['origin']}: {cell['source']}"
    published = f"{cell['published']:.1f}" + notes.marks([origin]) if pd.notna(cell["published"]) else NONE
    if not cell["n"]:
        return published, cell["state"], ""
    ours = _own(cell) + notes.marks([cell["remark"]])
    compared = f"{cell['difference']:+.1f} ({cell['verdict']})" if pd.notna(cell["difference"]) else cell["verdict"]
    return published, ours, compared


def _own(cell: pd.Series) -> str:
    spread = f" ± {cell['ours_std']:.1f}" if cell["n"] > 1 else ""
    return f"{cell['ours_mean']:.1f}{spread} ({cell['preset']}, n = {cell['n']})"


def _gains(row: Heading, cells: list[pd.Series | None], notes: Footnotes) -> list[list[str]]:
    """Of a table at a scale of its own: nothing is published, the difference is from the first row."""
    made = [cell for cell in cells if cell is not None]
    name = row.name + notes.marks(cell["note"] for cell in made)
    ours = [NONE if cell is None else _own(cell) if cell["n"] else cell["state"] for cell in cells]
    gains = ["" if cell is None else baseline.words(cell) for cell in cells]
    lines = [[name, "ours", *ours]]
    return [*lines, ["", f"from {made[0]['baseline']}", *gains]] if any(gains) else lines


def _legend(table: Table, frame: pd.DataFrame) -> list[str]:
    """What the metrics are, and what each preset that occurs means."""
    used = [name for name in presets() if any(frame["preset"].str.split(",").str[0] == name)]
    metrics = ", ".join(dict.fromkeys(frame["metric"]))
    compared = frame["difference"].notna().any()
    return [
        f"Ours: mean ± standard deviation (std) over n seeds of {metrics}.",
        *([f"A difference within {NOISE} std of ours is within the noise; one run has no std."] if compared else []),
        *([f"{table.scale.capitalize()}: {table.about}. {baseline.LEGEND}"] if table.scale else []),
        *(f"Preset {n}: {presets()[n].about}." for n in used),
    ]


if __name__ == "__main__":
    main_guard(main)
