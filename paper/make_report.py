"""Write the report: one page that holds every table and figure, and what is behind each number.

examples:
  python paper/make_report.py                                   from runs/ and results/ into paper/output/report.html
  python paper/make_report.py --runs-dir /scratch/runs --out report.html
  python paper/make_report.py --preset paper --set epochs=100   the runs launched with the same --set

The page is a single file that needs no network. #table4/imagenet/moco/mixmask/200 opens a number, #?q=byol+differs
searches. Figures 1 to 4 and 8 are those of docs/images; the others are drawn from the run logs.
"""

from __future__ import annotations

import argparse
import ast
import base64
import importlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from mixmask.config import UserError, main_guard
from mixmask.runs import commit, write_atomically
from paper import claims, settings
from paper.cells import ROOT, tables
from paper.collect import UNREADABLE, collect
from paper.make_figures import FIGURES, RUNS
from paper.options import own, reading_parser
from paper.presets import Budget, budget, presets
from paper.report import features, numbers, prose
from paper.report.records import Runs, record
from paper.report.render import piece, render


@dataclass(frozen=True)
class Section:
    """A table or a figure on the page."""

    name: str  # table4
    title: str
    body: Markup

    @property
    def short(self) -> str:
        """For the contents: `Table 4`."""
        return self.title.partition(":")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write the page.

    Raises UserError, when it is written, where a result could not be read: its number says so.
    """
    options = _parse(arguments)
    chosen = [options.preset] if options.preset else list(presets())
    budgets, folders = [budget(name, options.set) for name in chosen], [Path(folder) for folder in options.runs_dir]
    out, frames = Path(options.out), {name: collect(table, budgets, folders) for name, table in tables().items()}
    text = page(frames, budgets, folders)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    write_atomically(out, text)
    print(f"written: {out} ({len(text.encode()) / 1e6:.1f} MB)")
    reasons = dict.fromkeys(cell["note"] for f in frames.values() for _, cell in f[f["state"] == UNREADABLE].iterrows())
    if reasons:
        raise UserError("; ".join(reasons))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = reading_parser("make_report", __doc__)
    parser.add_argument("--out", default=own("paper/output/report.html"), metavar="FILE", help="default: %(default)s")
    return parser.parse_args(arguments)


def page(frames: dict[str, pd.DataFrame], budgets: Sequence[Budget], folders: Sequence[Path]) -> str:
    """The whole page, of the cells of every table and figure."""
    runs = Runs.find(folders)
    parts = [*_tables(frames, runs), *_figures(frames, runs, budgets, folders), *_own(frames, runs)]
    parts.sort(key=lambda part: part.name.startswith(("table", "figure")))  # what was run at its own scale: first
    if measured := features.sheet(runs.directories):
        parts.append(Section(measured.name, measured.title, numbers.sheet(measured)))
    parts = [*_whole(budgets, folders), *parts]
    counts = numbers.count(frames.values())
    ledger = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8").partition("\n")[2]
    return render(
        "page.html",
        style=piece("style.css"),
        script=piece("script.js"),
        commit=(commit()["commit"] or "")[:10],
        folders=folders,
        parts=parts,
        published=counts.total() - counts["ours"],
        states=[
            {"key": key, "name": name, "meaning": numbers.MEANING[key], "count": counts[key]}
            for key, name in numbers.STATES.items()
        ],
        fidelity=prose.to_html(ledger, item="fidelity", top=2),
        records=_records(frames.values(), runs),
        unfinished=runs.unfinished(),
    )


# ----------------------------------------------------------------------------------------------------- the parts


def _tables(frames: dict[str, pd.DataFrame], runs: Runs) -> Iterator[Section]:
    for name, frame in frames.items():
        if name.startswith("table"):
            yield _numbers(name, frame, runs)
    for name in settings.names():
        sheet = settings.sheet(name, settings.collect(name))
        yield Section(name, sheet.title, numbers.sheet(sheet))


def _whole(budgets: Sequence[Budget], folders: Sequence[Path]) -> Iterator[Section]:
    """All numbers in one picture, and the paper's claims."""
    title = _first_line(ROOT / "paper" / "figures" / "replication.py")
    yield Section("replication", title, _image("svg+xml", _drawn("replication", budgets, folders), title))
    yield Section("claims", claims.TITLE, numbers.sheet(claims.sheet(claims.collected(budgets[0], folders))))


def _own(frames: dict[str, pd.DataFrame], runs: Runs) -> Iterator[Section]:
    """Tables at a scale of their own; one that has a figure stands with it."""
    for name, frame in frames.items():
        if tables()[name].scale and name not in FIGURES:
            yield _numbers(name, frame, runs)


def _numbers(name: str, frame: pd.DataFrame, runs: Runs) -> Section:
    return Section(name, tables()[name].title, numbers.table(tables()[name], frame, runs))


def _figures(
    frames: dict[str, pd.DataFrame], runs: Runs, budgets: Sequence[Budget], folders: Sequence[Path]
) -> Iterator[Section]:
    for name in (name for name in FIGURES if name != "replication"):
        title = _first_line(ROOT / "paper" / "figures" / f"{name}.py")
        if name in RUNS:
            picture = _image("svg+xml", _drawn(name, budgets, folders), title)
            yield Section(name, title, picture + numbers.table(tables()[name], frames[name], runs))
        else:
            data = (ROOT / "docs" / "images" / f"{name}.png").read_bytes()
            picture = _image("png", data, title, f"python paper/make_figures.py {name}")
            yield Section(name, title, picture)


def _first_line(path: Path) -> str:
    """What a figure shows, from its file, which is not imported: some need torch."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n")[0].rstrip(".")


def _drawn(name: str, budgets: Sequence[Budget], folders: Sequence[Path]) -> bytes:
    """A figure of run logs, as SVG."""
    from matplotlib import pyplot as plt

    from paper.figures import style

    style.use()
    figure, file = importlib.import_module(f"paper.figures.{name}").draw(budgets, folders), io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def _image(kind: str, data: bytes, title: str, command: str = "") -> Markup:
    return render("figure.html", kind=kind, data=base64.b64encode(data).decode(), title=title, command=command)


def _records(frames: Iterable[pd.DataFrame], runs: Runs) -> list[Markup]:
    """Each run that a number comes from, once."""
    names = dict.fromkeys(
        name for frame in frames for cell in frame["runs"] for run in cell.split() for name in runs.chain(run)
    )
    return [record(name, runs.directories[name]) for name in names if name in runs.directories]


if __name__ == "__main__":
    main_guard(main)
