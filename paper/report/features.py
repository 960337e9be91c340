"""Whether a pre-training's features collapse, run by run: what mixmask/collapse.py measured with the last k-NN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mixmask.runs import read_log
from paper.markup import Sheet

COLUMNS = ("feature_std", "effective_rank", "alignment", "uniformity")
LEGEND = (
    "Of the features that k-NN compares, at the last epoch where it was measured. feature_std: of the unit features "
    "(Chen and He 2021), 0 in collapse, at most about 1 / sqrt(D). effective_rank: RankMe (Garrido et al. 2023), "
    "1 to D. alignment and uniformity: Wang and Isola (2020), the smaller the better; in collapse both are 0. "
    "Runs that were made before these were logged are left out."
)


def sheet(directories: Mapping[str, Path]) -> Sheet | None:
    """A line for each pre-training whose log has the measures; nothing where none has."""
    body = []
    for name, directory in directories.items():
        line = last(directory) if directory.parent.name == "pretrain" else {}
        if line:
            accuracy = next((f"{value:.1f}" for key, value in line.items() if key.startswith("knn_")), "")
            body.append([name, str(line["epoch"]), accuracy, *(f"{line[key]:.4g}" for key in COLUMNS)])
    heads = [("", name) for name in ("run", "epoch", "k-NN", *COLUMNS)]
    return Sheet("features", "Features: do they collapse?", heads, body, (), (LEGEND,)) if body else None


def last(directory: Path) -> dict[str, float]:
    """The last line of the run's log that has every measure; empty where none has, as in logs of the first edition."""
    lines = (line for line in reversed(read_log(directory)) if set(COLUMNS) <= line.keys())
    return next(lines, {})
