"""Draw the paper's figures with this repository's code, as PNG and PDF.

examples:
  python paper/make_figures.py                     every figure, from runs/, into paper/output/
  python paper/make_figures.py figure1 figure5 --runs-dir /scratch/runs --out figures
  python paper/make_figures.py figure7 --preset paper --set epochs=100     the runs launched with the same --set

Figures 5, 6 and 7 are drawn from run logs: those of the paper's budget where there are some, else those of a smaller
preset, marked as such. A curve that has no run yet is absent, and the figure names it. `replication` sets every
published number against ours; `reduced` and `reduced_long` have the curves of our small CPU runs.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from mixmask.config import ConfigError, UserError, main_guard, nearest
from paper.cells import WITHOUT_RUNS
from paper.options import own, reading_parser
from paper.presets import budget, presets

FIGURES = ("replication", *(f"figure{number}" for number in range(1, 9)), "reduced", "reduced_long")
RUNS = tuple(name for name in FIGURES if name not in WITHOUT_RUNS)  # drawn from runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw each figure, write its two files."""
    options = _parse(arguments)
    targets = _select(options.targets)
    names = [options.preset] if options.preset else list(presets())
    budgets = [budget(name, options.set) for name in names]
    from paper.figures import style

    style.use()
    for target in targets:
        draw = importlib.import_module(f"paper.figures.{target}").draw
        figure = draw(budgets, [Path(folder) for folder in options.runs_dir]) if target in RUNS else draw()
        for path in _write(figure, target, Path(options.out), options.small):
            print(f"written: {path}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = reading_parser("make_figures", __doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(FIGURES)}, wildcards; none: all")
    parser.add_argument("--out", default=own("paper/output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="PNG in 256 colours, for a web page (docs/images)")
    return parser.parse_args(arguments)


def _select(targets: Iterable[str]) -> list[str]:
    """The figures that `targets` name, each once. Raises ConfigError for a target that names none."""
    wanted = set()
    for target in list(targets) or ["all"]:
        fitting = [figure for figure in FIGURES if target == "all" or fnmatch.fnmatchcase(figure, target)]
        if not fitting:
            raise ConfigError(f"unknown figure '{target}'{nearest(target, FIGURES)}")
        wanted.update(fitting)
    return [figure for figure in FIGURES if figure in wanted]


def _write(figure, name: str, out: Path, small: bool) -> list[Path]:
    """figure1.png and figure1.pdf in `out`. Raises UserError where they cannot be written."""
    from matplotlib import pyplot as plt

    paths = [out / f"{name}.{kind}" for kind in ("png", "pdf")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[0])
        if small:
            _shrink(paths[0])
        figure.savefig(paths[1], metadata={"CreationDate": None})
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    plt.close(figure)
    return paths


def _shrink(path: Path) -> None:
    """To 256 colours, in a few seconds: a photograph takes a third of the space."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(256, kmeans=1).save(path, optimize=True, dpi=image.info["dpi"])


if __name__ == "__main__":
    main_guard(main)
