"""Any number of runs beside each other: their names, a table of their last numbers, and one picture of their curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmask.config import UserError, flatten, read_yaml
from paper.report.curve import quantities, unit

COLUMNS = 4  # panels beside each other
ABSENT = "absent"


def names(runs: Sequence[Path]) -> list[str]:
    """`optimizer.lr=0.03 seed=0`: of each run the keys in which they differ; its directory's name where none does.

    What differs with the recipe alone is not repeated, nor are seeds of pre-trainings that all evaluations share.
    """
    configs = [deciding(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    if all(config.get("pretrain.seed", ABSENT) == config.get("seed") for config in configs):
        del keys["pretrain.seed"]
    differing = [key for key in keys if key == "recipe" and _differ(configs, key)]
    for recipe in {str(config.get("recipe")) for config in configs}:
        same = [config for config in configs if str(config.get("recipe")) == recipe]
        differing += [key for key in keys if key not in differing and _differ(same, key)]
    labels = [" ".join(f"{key}={_shown(config.get(key, ABSENT))}" for key in differing) for config in configs]
    return [name if name and labels.count(name) == 1 else run.name for name, run in zip(labels, runs, strict=True)]


def _differ(configs: Sequence[Mapping[str, Any]], key: str) -> bool:
    return len({str(config.get(key, ABSENT)) for config in configs}) > 1


def deciding(run: Path) -> dict[str, Any]:
    """Dotted keys of all that decides a run's numbers.

    Of an evaluation also those of its pre-training, if that lies beside it, as pretrain.KEY in place of its name.
    """
    config = read_yaml(run / "config.yaml")
    flat = {key: value for key, value in flatten(config).items() if not key.startswith("run.")}
    parent = run.parent.parent / "pretrain" / str(config.get("checkpoint") or ".")
    if not (parent / "config.yaml").exists():
        return flat
    del flat["checkpoint"]
    return flat | {f"pretrain.{key}": value for key, value in deciding(parent).items()}


def _shown(value: Any) -> str:
    return str(value).replace(" ", "").replace("'", "")


def table(names: Sequence[str], logs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """A line for each run: how far it has come, and each quantity's last value; of accuracies the best, too."""
    curves = [quantities(log) for log in logs]
    columns = list(dict.fromkeys(name for each in curves for name in each))
    rows = [["run", "come to", *columns]]
    for name, each, log in zip(names, curves, logs, strict=True):
        last = max((max(points) for points in each.values()), default=0)
        rows.append([name, f"{unit(log)} {last}", *(_last(column, each.get(column, {})) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _last(name: str, points: Mapping[int, float]) -> str:
    if not points:
        return "-"
    last, best = points[max(points)], max(points.values())
    accuracy = name.startswith(("knn_", "test_", "box_AP", "mask_AP"))
    return f"{last:.2f} (best {best:.2f})" if accuracy and best > last else f"{last:.2f}" if accuracy else f"{last:.4g}"


def draw(names: Sequence[str], logs: Sequence[Sequence[Mapping[str, Any]]], out: Path) -> None:
    """A panel for each quantity, a line for each run, as a PNG. Raises UserError where nothing is logged."""
    from matplotlib import pyplot as plt

    curves = [quantities(log) for log in logs]
    quantity = list(dict.fromkeys(name for each in curves for name in each))
    if not quantity:
        raise UserError("none of the runs has logged an epoch yet")
    figure, axes = panels(quantity, unit(logs[0]))
    colors = plt.get_cmap("viridis")
    for number, (name, each) in enumerate(zip(names, curves, strict=True)):
        color = colors(0.9 * number / max(1, len(names) - 1))
        for ax, title in zip(axes, quantity, strict=True):
            points = sorted(each.get(title, {}).items())
            ax.plot(
                [x for x, _ in points], [y for _, y in points], color=color, marker=".", markersize=3, linewidth=1.2
            )
        axes[0].plot([], [], color=color, label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2 if len(names) > 4 else 1)
    save(figure, out)


def panels(names: Sequence[str], by: str) -> tuple[Any, list[Any]]:
    """A figure with a titled panel for each name, at most COLUMNS in a row, over epochs or iterations."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from paper.figures import style

    style.use()
    columns, rows = min(COLUMNS, len(names)), math.ceil(len(names) / COLUMNS)
    size = (3.2 * columns, 2.6 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for ax in axes[len(names) :]:
        ax.remove()
    for ax, name in zip(axes, names, strict=False):
        ax.set(title=name, xlabel=by)
        ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10]))
    return figure, axes[: len(names)]


def save(figure: Any, out: Path) -> None:
    """Write the figure, and forget it. Raises UserError where that is not possible."""
    from matplotlib import pyplot as plt

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    plt.close(figure)
