"""Write the paper's tables with our numbers beside the published ones: Markdown, LaTeX and CSV.

examples:
  python paper/make_tables.py                      Tables 1 to 10 and reduced ones, of runs/ and results/
  python paper/make_tables.py table4 --runs-dir /scratch/runs --out tables
  python paper/make_tables.py table4 --preset paper --set epochs=100      the runs launched with the same --set
  python paper/make_tables.py claims               the paper's claims: what its own numbers and our runs say of them

Each cell shows the runs of the paper's budget where there are some, else those of the smoke preset, marked as such:
a smoke number is never compared with a published one. Where there is no run, the table says so. Tables 8, 9 and 10 are
hyper-parameters: ours are read from the recipes. `reduced` and what begins with it hold no published numbers: our small
CPU runs, each against the table's first row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mixmask.config import ConfigError, UserError, main_guard
from mixmask.runs import write_atomically
from mixmask.training.progress import printable
from paper import claims, comparisons, settings
from paper.cells import Heading, Table, select, tables
from paper.collect import UNREADABLE, collect
from paper.markup import Footnotes, Sheet, latex, markdown
from paper.options import own, reading_parser
from paper.presets import budget, presets

CLAIMS = "claims"
NONE = "–"  # nothing is published


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write the three files of each table, print the Markdown.

    Raises UserError, when all is written, where a result could not be read: its cell says so.
    """
    options = _parse(arguments)
    chosen = [options.preset] if options.preset else list(presets())
    budgets = [budget(name, options.set) for name in chosen]
    unreadable: dict[str, None] = {}  # each reason once
    for name in _names(options.targets):
        if name == CLAIMS:
            frame = claims.collected(budgets[0], [Path(folder) for folder in options.runs_dir])
            sheet, csv = claims.sheet(frame), claims.csv(frame)
        elif name in settings.names():
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
    parser = reading_parser("make_tables", __doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="table4, or one of its cells; none: all")
    parser.add_argument("--out", default=own("paper/output"), metavar="DIR", help="default: %(default)s")
    return parser.parse_args(arguments)


def _names(targets: Sequence[str]) -> list[str]:
    """The tables that `targets` name, in the paper's order. Raises ConfigError for anything else."""
    numbered = [target for target in targets if target != CLAIMS]
    named = {cell.target for cell in (select(numbered) if numbered or not targets else [])}
    named |= set(targets) & {*settings.names(), CLAIMS}
    everything = not targets or "all" in targets
    figures = [name for name in [*named, *targets] if name.startswith("figure")]
    if figures and not everything:
        raise ConfigError(f"{figures[0]} is no table: python paper/make_figures.py {figures[0].partition('/')[0]}")
    own = [name for name, table in tables().items() if table.scale]
    every = [*(name for name in tables() if name.startswith("table")), *settings.names(), *own, CLAIMS]
    return [name for name in every if everything or name in named]


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
    order = ["cell", "row", "column", "published", "ours_mean", "ours_std", "n", "preset", "against", "difference"]
    order += ["low", "high", "p", "sees", "word", "verdict", "to_decide"]
    order += ["metric", "epochs", "origin", "source", "note", "remark", "runs"]
    digits = {
        "published": "{:.1f}",
        "ours_mean": "{:.1f}",
        "ours_std": "{:.2f}",
        **dict.fromkeys(("difference", "low", "high"), "{:+.1f}"),
        "p": "{:.2g}",
        "sees": "{:.1f}",
        "epochs": "{:.0f}",
    }
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
    return published, ours, _compared(cell, notes)


def _compared(cell: pd.Series | None, notes: Footnotes) -> str:
    """The verdict, and as a footnote what would settle an undecided one."""
    return "" if cell is None else (comparisons.words(cell) or cell["verdict"]) + notes.marks([cell["to_decide"]])


def _own(cell: pd.Series) -> str:
    spread = f" ± {cell['ours_std']:.1f}" if cell["n"] > 1 else ""
    return f"{cell['ours_mean']:.1f}{spread} ({cell['preset']}, n = {cell['n']})"


def _gains(row: Heading, cells: list[pd.Series | None], notes: Footnotes) -> list[list[str]]:
    """Of a table at a scale of its own: nothing is published, the difference is from the first row."""
    made = [cell for cell in cells if cell is not None]
    name = row.name + notes.marks(cell["note"] for cell in made)
    ours = [NONE if cell is None else _own(cell) if cell["n"] else cell["state"] for cell in cells]
    lines, gains = [[name, "ours", *ours]], [_compared(cell, notes) for cell in cells]
    first = next((cell["against"] for cell in made if cell["against"]), "")
    return [*lines, ["", f"from {first}", *gains]] if first else lines


def _legend(table: Table, frame: pd.DataFrame) -> list[str]:
    """What the metrics are, and what each preset that occurs means."""
    used = [name for name in presets() if any(frame["preset"].str.split(",").str[0] == name)]
    metrics = ", ".join(dict.fromkeys(frame["metric"]))
    return [
        f"Ours: mean ± standard deviation (std) over n seeds of {metrics}.",
        *comparisons.legend(table, frame),
        *([f"{table.scale.capitalize()}: {table.about}."] if table.scale else []),
        *(f"Preset {n}: {presets()[n].about}." for n in used),
    ]


if __name__ == "__main__":
    main_guard(main)
