"""A benchmark's JSON as Markdown tables. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmask.config import UserError

RESULTS = Path(__file__).resolve().parent / "results"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _interval(ends: Sequence[float]) -> str:
    return " to ".join(f"{end:.3f}" for end in ends)


def _seconds(value: float) -> str:
    return f"{value:.2f}"


Column = tuple[str, str, Callable[[Any], str]]  # heading, key, format

GROUPS: dict[str, tuple[str, list[Column]]] = {
    "steps": (
        "Training steps: the median of {steps}, after a warm-up",
        [
            ("batch", "batch", str),
            ("precision", "precision", str),
            ("images/s", "images_per_second", "{:,.1f}".format),
            ("ms/step", "ms_per_step", "{:,.1f}".format),
            ("TFLOP/s", "tflop_per_second", "{:.3f}".format),
            ("of peak", "share_of_peak", "{:.0%}".format),
            ("data wait", "data_wait", "{:.1%}".format),
            ("peak memory, GiB", "peak_memory_gib", "{:.2f}".format),
            ("launches", "launches", "{:,}".format),
            ("compiled", "launches_compiled", "{:,}".format),
            ("images/s against plain", "ratio", _ratio),
        ],
    ),
    "against": (
        "Steps on the CPU, at an earlier commit and now, in turn: seconds, medians of {steps} pairs",
        [
            ("before", "before", str),
            ("batch", "batch", str),
            ("precision", "precision", str),
            ("CPU time before", "cpu_before", _seconds),
            ("now", "cpu_now", _seconds),
            ("now / before", "cpu_ratio", "{:.3f}".format),
            ("its 95 %", "cpu_interval", _interval),
            ("wall time before", "wall_before", _seconds),
            ("now", "wall_now", _seconds),
            ("now / before", "wall_ratio", "{:.3f}".format),
            ("its 95 %", "wall_interval", _interval),
        ],
    ),
    "input": (
        "The input alone: two augmented views of each image",
        [("rate", "per_second", "{:,.0f}".format), ("unit", "unit", str), ("against plain", "ratio", _ratio)],
    ),
    "knn": (
        "k-NN: k = 200, 128 numbers a vector",
        [
            ("bank", "bank", "{:,}".format),
            ("queries", "queries", "{:,}".format),
            ("seconds", "seconds", _seconds),
            ("against plain", "ratio", _ratio),
        ],
    ),
    "launcher": (
        "The launcher and the tables: whole commands, the best of three",
        [("runs", "runs", "{:,}".format), ("seconds", "seconds", _seconds), ("bar", "bar", "< {:g}".format)],
    ),
    "profile": (
        "Where a step's time goes",
        [("ms a step", "ms", "{:,.1f}".format), ("share", "share", "{:.1%}".format)],
    ),
}


def markdown(report: Mapping[str, Any], groups: Iterable[str] = tuple(GROUPS)) -> str:
    """A report: what it was measured on, then a table for each of `groups` that was measured."""
    parts = [about(report)]
    for group in groups:
        title, columns = GROUPS[group]
        rows = {name: row for name, row in report["results"].items() if name.split("/")[0] == group}
        if rows:
            steps = next((row["steps"] for row in rows.values() if "steps" in row), "")
            parts += [f"*{title.format(steps=steps)}.*", table(rows, columns)]
    return "\n\n".join(parts)


def about(report: Mapping[str, Any]) -> str:
    """Device, threads, versions, commit, peak."""
    m = report["machine"]
    code = (m["code"] or m["commit"] or "unknown")[:12]
    on_gpu = f" (CUDA {m['cuda']}, cuDNN {m['cudnn']}; {m['processor']})" if m["type"] == "cuda" else ""
    peaks = ", ".join(f"{name} {value:.3f}" for name, value in report["peak"].items())
    return (
        f"{m['device']}{on_gpu}; {m['threads']} threads. Python {m['python']}, torch {m['torch']}, torchvision "
        f"{m['torchvision']}, NumPy {m['numpy']}, Pillow {m['pillow']}. Code of commit `{code}`"
        f"{' with changes' if m['modified'] else ''}, measured {m['time'][:10]}"
        f"{', quick: few repetitions' if report['quick'] else ''}."
        + (f" Peak, TFLOP/s of a large matrix product: {peaks}; a multiply-add counts 2." if peaks else "")
    )


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Markdown, its columns aligned; a number that is not there stays empty."""
    body = [["", *(heading for heading, _, _ in columns)]]
    for name, row in rows.items():
        values = [form(row[key]) if row.get(key) is not None else "" for _, key, form in columns]
        body.append([name.partition("/")[2], *values])
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    lines = [
        "| " + " | ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in body
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join(f"{line} |" if line is not rule else f"{line}|" for line in [lines[0], rule, *lines[1:]])


def read(name: str) -> dict[str, Any]:
    """The report benchmarks/results/NAME.json. Raises UserError where it is not one."""
    return load(RESULTS / f"{name}.json")


def load(path: Path) -> dict[str, Any]:
    """The report in a file. Raises UserError where it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a benchmark's report ({error})") from None
