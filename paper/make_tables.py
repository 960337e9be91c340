"""Write the paper's tables with our numbers beside the published ones: Markdown, LaTeX and CSV.

examples:
  python paper/make_tables.py                      every table, from runs/, into paper/output/
  python paper/make_tables.py table4 --runs-dir /scratch/runs --out tables
  python paper/make_tables.py table4 --preset paper --set epochs=100      the runs launched with the same --set

Each cell shows the runs of the paper's budget where there are some, else those of the smoke preset, marked as such:
a smoke number is never compared with a published one. Where there is no run, the table says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402

from mixmask.config import UserError, main_guard  # noqa: E402
from mixmask.runs import read_result, write_atomically  # noqa: E402
from paper.cells import Cell, Table, select, tables  # noqa: E402
from paper.presets import Budget, budget, directory, presets, steps  # noqa: E402

NO_RUN = "no run yet"
NOT_COMPARABLE = "not comparable"
TEX = str.maketrans({"\\": r"\textbackslash{}", "±": r"$\pm$", **{c: "\\" + c for c in "%&_#${}"}})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write the three files of each table, print the Markdown."""
    options = _parse(arguments)
    cells = select(options.targets)
    names = [options.preset] if options.preset else list(presets())
    budgets = [budget(name, options.set) for name in names]
    for name in dict.fromkeys(cell.target for cell in cells):
        table = tables()[name]
        frame = collect(table, budgets, Path(options.runs_dir))
        print(markdown(table, frame))
        for path in write(table, frame, Path(options.out)):
            print(f"written: {path}")
        print()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python paper/make_tables.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="table4, or one of its cells; none: all")
    parser.add_argument("--runs-dir", default="runs", metavar="DIR", help="where the runs are (default: runs)")
    parser.add_argument("--out", default="paper/output", metavar="DIR", help="default: paper/output")
    parser.add_argument("--preset", help=f"only the runs of this preset: {', '.join(presets())}")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as given to slurm/launch.py"
    )
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------- reading


def collect(table: Table, budgets: Iterable[Budget], runs_dir: Path) -> pd.DataFrame:
    """One row a cell: the published value, and ours from the first of `budgets` that has runs.

    ours_mean, ours_std (over seeds, n - 1 in the denominator; empty for one seed), n, preset, difference (empty
    where the preset is not the paper's), epochs (of our pre-training), runs.
    """
    rows = []
    for cell in table.cells:
        ours = next((runs for runs in (_runs(cell, b, runs_dir) for b in budgets) if len(runs)), None)
        rows.append({**_published(cell), **(_nothing() if ours is None else _summary(cell, ours))})
    return pd.DataFrame(rows)


def _runs(cell: Cell, budget: Budget, runs_dir: Path) -> pd.DataFrame:
    """The finished runs of `cell`, one row a seed."""
    rows = []
    for seed in budget.seeds(cell):
        chain = steps(cell, seed, budget)
        where = directory(runs_dir, chain[-1])
        result = read_result(where)
        if result is not None:
            value = _metric(result, cell.metric, where)
            rows.append({"value": value, "run": where.name, "epochs": chain[0].config.epochs, "budget": budget})
    return pd.DataFrame(rows)


def _metric(result: dict[str, Any], name: str, where: Path) -> float:
    try:
        return float(result["metrics"][name])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where / 'result.json'}: no metric '{name}'; move the run away to run it again") from None


def _published(cell: Cell) -> dict[str, Any]:
    return {
        "cell": cell.id,
        "row": cell.row,
        "column": cell.column,
        "published": cell.published,
        "origin": cell.origin,
        "source": cell.source,
        "metric": cell.metric,
        "note": cell.note,
    }


def _nothing() -> dict[str, Any]:
    return {"ours_mean": None, "ours_std": None, "n": 0, "preset": "", "difference": None, "epochs": None, "runs": ""}


def _summary(cell: Cell, runs: pd.DataFrame) -> dict[str, Any]:
    mean, budget = runs["value"].mean(), runs["budget"].iloc[0]
    return {
        "ours_mean": mean,
        "ours_std": runs["value"].std(),
        "n": len(runs),
        "preset": budget.label,
        "difference": mean - cell.published if budget.replicates else None,
        "epochs": runs["epochs"].iloc[0],
        "runs": " ".join(runs["run"]),
    }


# ------------------------------------------------------------------------------------------------------- writing


def write(table: Table, frame: pd.DataFrame, out: Path) -> list[Path]:
    """table4.md, table4.tex, table4.csv in `out`. Raises UserError where it cannot be written."""
    texts = {"md": markdown(table, frame), "tex": latex(table, frame), "csv": csv(frame)}
    paths = [out / f"{table.name}.{kind}" for kind in texts]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, texts.values(), strict=True):
            write_atomically(path, text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    return paths


def csv(frame: pd.DataFrame) -> str:
    """One line a cell; percentages with one decimal as in the paper, the standard deviation with two."""
    order = ["cell", "row", "column", "published", "ours_mean", "ours_std", "n", "preset", "difference"]
    order += ["metric", "epochs", "origin", "source", "note", "runs"]
    digits = {
        "published": "{:.1f}",
        "ours_mean": "{:.1f}",
        "ours_std": "{:.2f}",
        "difference": "{:+.1f}",
        "epochs": "{:.0f}",
    }
    shown = frame.assign(**{k: [f.format(v) if pd.notna(v) else "" for v in frame[k]] for k, f in digits.items()})
    return shown[order].to_csv(index=False, lineterminator="\n")


def markdown(table: Table, frame: pd.DataFrame) -> str:
    """The table with its columns aligned, and the footnotes."""
    grid, notes = _grid(table, frame)
    subheads = [f"{c}: published" if k == 0 else ("ours", "difference")[k - 1] for c in table.columns for k in range(3)]
    lines = [["Method", *subheads], *grid]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    footnotes = [f"[{number}] {text}" for number, text in enumerate(notes, 1)]
    return "\n\n".join([f"**{table.title}**", "\n".join(rows), *footnotes, *_legend(frame)]) + "\n"


def latex(table: Table, frame: pd.DataFrame) -> str:
    """The table for LaTeX with booktabs."""
    grid, notes = _grid(table, frame)
    heads = " & ".join(rf"\multicolumn{{3}}{{c}}{{{_tex(column)}}}" for column in table.columns)
    rules = " ".join(rf"\cmidrule(lr){{{2 + 3 * i}-{4 + 3 * i}}}" for i in range(len(table.columns)))
    subheads = " & ".join(["published & ours & difference"] * len(table.columns))
    rows = [" & ".join(_tex(text) for text in line) + r" \\" for line in grid]
    footnotes = [_tex(f"[{number}] {text}") + r" \\" for number, text in enumerate(notes, 1)]
    legend = [_tex(text) + r" \\" for text in _legend(frame)]
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(table.title.partition(': ')[2])}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{l{'rll' * len(table.columns)}}}",
        r"\toprule",
        rf" & {heads} \\",
        rules,
        rf"Method & {subheads} \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\medskip\footnotesize\raggedright",
        *footnotes,
        *legend,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _grid(table: Table, frame: pd.DataFrame) -> tuple[list[list[str]], list[str]]:
    """The body: for each method, published, ours and difference of each column; and the footnotes in order."""
    notes: list[str] = []
    lines = []
    for row, cells in frame.groupby("row", sort=False):
        by_column = {cell["column"]: cell for _, cell in cells.iterrows()}
        line = [str(row) + _marks(cells["note"], notes)]
        for column in table.columns:
            line += _triple(by_column[column], notes) if column in by_column else ["", "", ""]
        lines.append(line)
    return lines, notes


def _triple(cell: pd.Series, notes: list[str]) -> list[str]:
    origin = "" if cell["origin"] == "own" else f"published value {cell['origin']}: {cell['source']}"
    published = f"{cell['published']:.1f}" + _marks([origin], notes)
    if not cell["n"]:
        return [published, NO_RUN, ""]
    spread = f" ± {cell['ours_std']:.1f}" if cell["n"] > 1 else ""
    ours = f"{cell['ours_mean']:.1f}{spread} ({cell['preset']}, n = {cell['n']})"
    difference = f"{cell['difference']:+.1f}" if pd.notna(cell["difference"]) else NOT_COMPARABLE
    return [published, ours, difference]


def _marks(texts: Iterable[str], notes: list[str]) -> str:
    """` [2]` for each distinct text, which joins the footnotes where it is new."""
    marks = ""
    for text in dict.fromkeys(text for text in texts if text):
        if text not in notes:
            notes.append(text)
        marks += f" [{notes.index(text) + 1}]"
    return marks


def _legend(frame: pd.DataFrame) -> list[str]:
    """What the metric is, and what each preset that occurs means."""
    used = [name for name in presets() if any(frame["preset"].str.split(",").str[0] == name)]
    metrics = ", ".join(dict.fromkeys(frame["metric"]))
    return [
        f"Ours: mean ± standard deviation over n seeds of {metrics}.",
        *(f"Preset {n}: {presets()[n].about}." for n in used),
    ]


def _tex(text: str) -> str:
    return text.translate(TEX)


if __name__ == "__main__":
    main_guard(main)
