"""The options that the scripts of tables, figures and report share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from paper.cells import ROOT
from paper.presets import presets


def reading_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of paper/NAME.py, whose docstring is `doc`: which runs are read, by folder, preset and settings."""
    about, _, examples = doc.partition("\n\n")
    result = argparse.ArgumentParser(
        prog=f"python paper/{name}.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    folders = {"nargs": "+", "default": [own("runs"), own("results")], "metavar": "DIR"}
    add("--runs-dir", **folders, help="where the runs are, the first first (default: this repository's)")
    add("--preset", help=f"only the runs of this preset: {', '.join(presets())}")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as given to slurm/launch.py")
    return result


def own(place: str) -> str:
    """A place in the repository, wherever the caller is; by its short name where the caller is at its root."""
    return place if Path.cwd() == ROOT else os.path.relpath(ROOT / place)
