"""Write the generated parts of the documents, the blocks between markers.

    python docs/generate.py            writes what is stale, and names it
    python docs/generate.py --check    writes nothing; status 1 where something is stale

A block begins with `<!-- generated: NAME ARGUMENT -->` and ends with `<!-- end -->`; NAME is a key of BLOCKS.
"""

from __future__ import annotations

import argparse
import ast
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from mixmask.config import UserError, main_guard

ROOT = Path(__file__).resolve().parents[1]

MARK = re.compile(r"<!-- generated: (\w+)(?: ([^\n]+?))? -->\n(.*?)<!-- end -->", re.DOTALL)


def main() -> None:
    """Bring every document up to date, or name those that are not."""
    parser = argparse.ArgumentParser(
        prog="python docs/generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where something is stale")
    options = parser.parse_args()
    stale = []
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = current(path, old)
        if old == new:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not options.check:
            path.write_text(new, encoding="utf-8")
            print(f"written: {stale[-1]}")
    if options.check and stale:
        raise UserError(f"stale: {', '.join(stale)}; run python docs/generate.py")


def documents() -> list[Path]:
    """All that can hold something generated."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").glob("*.md")])


def current(path: Path, text: str) -> str:
    """The document as it should be."""
    return MARK.sub(lambda found: _block(path, found), text)


def _block(path: Path, match: re.Match[str]) -> str:
    name, argument, _ = match.groups()
    if name not in BLOCKS:
        raise UserError(f"{path}: unknown block '{name}' (blocks: {', '.join(BLOCKS)})")
    opening = match.group().partition("\n")[0]
    return f"{opening}\n{BLOCKS[name](*([argument] if argument else []))}\n<!-- end -->"


# -------------------------------------------------------------------------------------------------------- blocks


def results() -> str:
    """How many of each table's published numbers have been replicated by the runs in results/."""
    from paper.cells import tables
    from paper.collect import collect
    from paper.presets import budget
    from paper.report.numbers import STATES, count

    shown = ("agrees", "differs", "undecided", "absent", "public")
    lines = [f"| table | numbers | {' | '.join(STATES[key] for key in shown)} |", "|---|" + "---|" * (len(shown) + 1)]
    for table in tables().values():
        published = sum(cell.published is not None for cell in table.cells)
        if published:
            counts = count([collect(table, [budget("paper")], [ROOT / "results"])])
            values = [published, *(counts[key] for key in shown)]
            lines.append(f"| {table.title} | {' | '.join(map(str, values))} |")
    return "\n".join(lines)


def kept() -> str:
    """How many runs of each stage are in results/, and where they ran."""
    from mixmask.runs import read_result

    runs_kept = [
        (path.parent.name, read_result(path)["device"]) for path in (ROOT / "results").glob("*/*") if path.is_dir()
    ]
    words = {
        "pretrain": "pre-trainings",
        "linear": "linear probes",
        "finetune": "fine-tunings",
        "detection": "detections",
    }
    counts = [f"{sum(s == stage for s, _ in runs_kept)} {word}" for stage, word in words.items()]
    devices = ", ".join(sorted({device for _, device in runs_kept}))
    return f"Kept in `results/`: {', '.join(c for c in counts if not c.startswith('0 '))} (device: {devices})."


def claimed() -> str:
    """How the paper's claims stand: by its own numbers, and by the runs in results/."""
    from paper import claims
    from paper.presets import budget

    frame = claims.collected(budget("paper"), [ROOT / "results"])
    contradicted = frame[frame["printed"].str.startswith(claims.CONTRADICTED)]
    lines = [claims.sheet(frame).legend[0], "", "Contradicted by the paper's own tables:", ""]
    return "\n".join([*lines, *(f"* {row['claim']}: {row['printed']}." for _, row in contradicted.iterrows())])


def claims() -> str:
    """Every claim of the paper: its own numbers, the runs in results/, the cheapest launch that would decide it."""
    from paper import claims
    from paper.markup import markdown
    from paper.presets import budget

    return markdown(claims.sheet(claims.collected(budget("paper"), [ROOT / "results"]))).strip()


def table(name: str) -> str:
    """A table of numbers from the runs in results/."""
    from paper.cells import tables
    from paper.collect import collect
    from paper.make_tables import numbers
    from paper.markup import markdown
    from paper.presets import budget

    return markdown(numbers(tables()[name], collect(tables()[name], [budget("paper")], [ROOT / "results"]))).strip()


def changes(what: str) -> str:
    """TABLE | ROW - ROW; ...: how far the one row is ahead of the other in the table's first and last group of columns,
    and by how much that changed, seed by seed with 95 % t intervals, from the runs in results/."""
    from paper.cells import tables
    from paper.collect import collect
    from paper.presets import budget

    name, pairs = what.split(" | ")
    table = tables()[name]
    frame = collect(table, [budget("paper")], [ROOT / "results"])
    found = {(cell["row"], cell["column"]): cell["by_seed"] for _, cell in frame.iterrows()}
    groups, metrics = (list(dict.fromkeys(getattr(c, key) for c in table.columns)) for key in ("group", "name"))
    headings = [f"{metric}: {part}" for metric in metrics for part in (groups[0], groups[-1], "change")]
    lines = [f"| | {' | '.join(headings)} |", "|---|" + "---|" * len(headings)]
    for pair in pairs.split("; "):
        row, other = pair.split(" - ")
        shown = []
        for metric in metrics:
            early, late = (
                _by_seed(found[row, f"{group}: {metric}"], found[other, f"{group}: {metric}"])
                for group in (groups[0], groups[-1])
            )
            shown += [_interval(early), _interval(late), _interval(_by_seed(late, early))]
        lines.append(f"| {pair.replace('*', chr(92) + '*')} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _by_seed(values: dict[int, float], others: dict[int, float]) -> dict[int, float]:
    return {seed: values[seed] - others[seed] for seed in values.keys() & others.keys()}


def _interval(differences: dict[int, float]) -> str:
    """`+1.0 (-0.9 to +2.9)`, in bold where zero is outside."""
    from paper import verdicts

    found = verdicts.compare(differences, dict.fromkeys(differences, 0.0))
    if len(differences) < 2:
        return f"{found.difference:+.1f} (one seed)"
    text = f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
    return f"**{text}**" if found.word in ("ahead", "behind") else text


def curves(target: str) -> str:
    """Of the first seed of each of the cells: the loss at step 0, loss and k-NN of some epochs, from results/."""
    from mixmask.runs import read_log
    from paper.cells import select
    from paper.presets import budget, chains, located

    heading = "| run | k-NN before (%) | loss at step 0 | epochs | mean loss | k-NN after (%) |"
    lines = [heading, "|---|---|---|---|---|---|"]
    for cell in select([target]):
        pretraining = chains(cell, budget("paper"))[0][0]
        log = read_log(located([ROOT / "results"], pretraining))
        epochs = sorted({1, -(-pretraining.config.epochs // 2), pretraining.config.epochs})
        lines.append(f"| {cell.row} | {_curve(log, epochs) if log else 'not run | | | |'} |")
    return "\n".join(lines)


def runs(target: str) -> str:
    """Every pre-training of the cells that is in results/: where it ran, how long, what came out."""
    from mixmask.runs import read_result
    from paper.cells import select
    from paper.presets import budget, chains, located

    rows = {}
    for cell in select([target]):
        for pretraining, *_, probe in (chain for chain in chains(cell, budget("paper")) if len(chain) > 1):
            where = located([ROOT / "results"], pretraining)
            made, probed = read_result(where), read_result(located([ROOT / "results"], probe))
            if made and probed:
                rows.setdefault(where.name, _made(cell.row, pretraining.config.seed, where.name, made, probed))
    heading = "| run | seed | device | minutes | loss | k-NN (%) | linear (%) | record in results/pretrain/ |"
    return "\n".join([heading, "|---|---|---|---|---|---|---|---|", *rows.values()])


def _made(row: str, seed: int, name: str, made: dict, probed: dict) -> str:
    accuracy = next(value for key, value in made["metrics"].items() if key.startswith("knn_") and key.endswith("_last"))
    linear = next(value for key, value in probed["metrics"].items() if key.endswith("_last"))
    numbers = f"{made['metrics']['loss']:.2f} | {accuracy:.1f} | {linear:.1f}"
    return f"| {row} | {seed} | {made['device']} | {made['timing']['seconds'] / 60:.1f} | {numbers} | `{name}` |"


def _curve(log: list[dict], epochs: list[int]) -> str:
    start = next(line["loss"] for line in log if line["kind"] == "step" and line["step"] == 0)
    after = {line["epoch"]: line for line in log if line["kind"] == "epoch"}
    accuracy = next(key for key in after[0] if key.startswith("knn_"))
    losses, accuracies = [f"{after[e]['loss']:.2f}" for e in epochs], [f"{after[e][accuracy]:.1f}" for e in epochs]
    return f"{after[0][accuracy]:.1f} | {start:.2f} | {_some(epochs)} | {_some(losses)} | {_some(accuracies)}"


def _some(values: list) -> str:
    return ", ".join(map(str, values))


def code(place: str) -> str:
    """FILE NAME ...: functions and methods of it as they are written."""
    name, *wanted = place.split()
    text = (ROOT / name).read_text(encoding="utf-8")
    parts = [textwrap.dedent(_source(ast.parse(text), part.split("."), text)) for part in wanted]
    return "```python\n" + "\n\n\n".join(parts) + "\n```"


def _source(tree: ast.AST, names: list[str], text: str) -> str:
    """With its decorators' lines left out: they say nothing of the equation."""
    node = next(part for part in tree.body if getattr(part, "name", None) == names[0])
    if names[1:]:
        return _source(node, names[1:], text)
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])


def lines(place: str) -> str:
    """FILE | FIRST | LAST: what is between the first line that holds FIRST and the first that holds LAST."""
    name, first, last = place.split(" | ")
    text = (ROOT / name).read_text(encoding="utf-8").splitlines()
    start, end = (next(i for i, line in enumerate(text) if mark in line) for mark in (first, last))
    block = text[start + 1 : end]
    margin = min(len(line) - len(line.lstrip()) for line in block if line.strip())
    return "```python\n" + "\n".join(line[margin:] for line in block) + "\n```"


def costs() -> str:
    """What each table and figure costs at the published budget, as `slurm/launch.py --dry-run` estimates it."""
    from paper import cost
    from paper.cells import select, tables

    at_scale = [cell for name, table in tables().items() if not table.scale for cell in select([name])]
    rows = ["| target | what it is | numbers or curves | runs | GPU hours |", "|---|---|---|---|---|"]
    for target in dict.fromkeys(cell.target for cell in at_scale):
        rows.append(f"| `{target}` | {tables()[target].title.partition(': ')[2]} | {_counted(target)} |")
    for cell in ("table4/imagenet/moco/mixmask/200", "table5/cifar100/moco/mixmask"):
        rows.append(f"| `{cell}` | one cell | {_counted(cell)} |")
    whole = "the paper's, each run once: tables share many; without `table11` and the trained rows of 6 and 7"
    rows.append(f"| `all` | {whole} | {_counted('all')} |")
    return "\n".join([*rows, "", f"{cost.ASSUMPTION[:1].upper()}{cost.ASSUMPTION[1:]}."])


def _counted(target: str) -> str:
    """Numbers or curves, runs, GPU hours."""
    from paper.cells import select
    from paper.presets import budget
    from slurm import graph

    cells = select([target])
    jobs = graph.jobs(cells, budget("paper"), ROOT / "runs")
    numbers = sum(cell.published is not None or bool(cell.recipe) for cell in cells)  # rows of checkpoints alone: none
    return f"{numbers} | {len(jobs)} | {sum(job.hours for job in jobs if job.resources.gpus):,.0f}"


def benchmark(what: str) -> str:
    """NAME [GROUP ...]: the tables of benchmarks/results/NAME.json, those of the groups or all but the profile's."""
    from benchmarks import tables

    name, *groups = what.split()
    return tables.markdown(tables.read(name), groups or [group for group in tables.GROUPS if group != "profile"])


BLOCKS: dict[str, Callable[..., str]] = {
    "results": results,
    "kept": kept,
    "claimed": claimed,
    "claims": claims,
    "costs": costs,
    "table": table,
    "changes": changes,
    "curves": curves,
    "runs": runs,
    "code": code,
    "lines": lines,
    "benchmark": benchmark,
}


if __name__ == "__main__":
    main_guard(main)
