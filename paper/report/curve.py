"""A run's log -> small curves, as SVG inside of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from paper.report.render import render

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 300, 110, 44, 16, 16  # of the picture and of what surrounds its curve
POINTS = 150  # more are thinned out: no eye tells the difference at this size
# How the names of what is drawn begin.
DRAWN = ("loss", "knn_", "test_", "box_AP", "mask_AP", "feature_std", "effective_rank", "alignment", "uniformity")


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """One SVG for the loss, one for each accuracy and measure of the features that has been logged more than once."""
    return [draw(name, sorted(points.items())) for name, points in quantities(lines).items() if len(points) > 1]


def quantities(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Loss, accuracies, measures of the features, by epoch; by iteration where a log knows no epochs (detection)."""
    by_name: dict[str, dict[int, float]] = {}
    by = unit(lines)
    for line in (line for line in lines if by == "iteration" or line["kind"] == "epoch"):
        for name, value in line.items():
            if name.startswith(DRAWN) and isinstance(value, int | float):
                by_name.setdefault(name, {})[line["step" if by == "iteration" else "epoch"]] = value
    return {name: points for name, points in by_name.items() if name == "loss" or not name.startswith("loss")}


def unit(lines: Sequence[Mapping[str, Any]]) -> str:
    """What a log counts: epochs, or iterations."""
    return "epoch" if any(line["kind"] == "epoch" for line in lines) else "iteration"


def draw(name: str, points: Sequence[tuple[float, float]]) -> Markup:
    """The curve between its least and its greatest value, which stand at the axis; its name and last value above."""
    thin = list(points[:: max(1, len(points) // POINTS)])
    thin += [] if thin[-1] == points[-1] else [points[-1]]
    xs, ys = zip(*points, strict=True)
    path = " ".join(f"{_place(x, xs, LEFT, WIDTH - 4):.1f},{_place(y, ys, HEIGHT - BOTTOM, TOP):.1f}" for x, y in thin)
    low, high = min(ys), max(ys)
    title = f"{name}: {ys[-1]:.4g} at {xs[-1]:g}"
    texts = [
        (LEFT, 10, "start", title),
        (LEFT - 4, TOP + 6, "end", f"{high:.4g}"),
        (LEFT - 4, HEIGHT - BOTTOM, "end", f"{low:.4g}"),
        (LEFT, HEIGHT - 3, "start", f"{min(xs):g}"),
        (WIDTH - 4, HEIGHT - 3, "end", f"{max(xs):g}"),
    ]
    frame = f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - 4}"
    return render("curve.svg", width=WIDTH, height=HEIGHT, title=title, axis=frame, points=path, labels=texts)


def _place(value: float, values: Sequence[float], start: float, end: float) -> float:
    """Where `value` stands between `start` and `end`; in the middle where all values are equal."""
    low, high = min(values), max(values)
    return (start + end) / 2 if low == high else start + (end - start) * (value - low) / (high - low)
