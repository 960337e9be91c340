"""What a change that should change no number left as it was: this tree against a commit, by one command.

    python tests/same_as.py f965d4b            run ids and commands, loss curves and weights, resuming, tables
    python tests/same_as.py HEAD~3 --only ids resume

Both trees train small nets on the embedded photographs, minutes in all. Curves and weights are compared bit by bit.
Exits with status 1 where something differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["all", "reduced", "reduced_masks", "reduced_frameworks"]
SMALL = ["dataset=photos", "epochs=2", "backbone.width=8", "run.workers=0", "run.device=cpu", "run.log_every=1"]
RUNS = {  # recipe -> overrides
    "cifar100_reduced_moco": [f"method={m}" for m in ("vanilla", "unmix", "mixmask", "both", "erase", "mscn")],
    "cifar100_simclr": ["method=mixmask"],
    "cifar100_byol": ["method=mixmask"],
    "cifar100_simsiam": ["method=mixmask"],
}
CHANGED = {"cifar100_simsiam": "its stem is initialised as its source's"}
AS_BEFORE = {"cifar100_simsiam": ["backbone.stem_init=default"]}  # what takes a changed recipe back
RESUMED = ("cifar100_reduced_moco", "method=mixmask")


def python(tree: Path, *words: object, check: bool = True) -> str:
    """What a script of the tree prints."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=tree, env=environment, check=check, capture_output=True, text=True).stdout


def training(recipe: str, item: str, directory: Path) -> list[object]:
    """The words that train a small net by `recipe`."""
    own = {
        "cifar100_reduced_moco": ["moco.queue=512"],
        "cifar100_simsiam": ["schedule.warmup_epochs=1"],
    }.get(recipe, ["schedule.warmup_iterations=5", "schedule.milestones=[-1]"])
    small = [
        *SMALL,
        *own,
        *([] if recipe.endswith("reduced_moco") else ["batch_size=128", "backbone.stem=tiny", "knn.k=20"]),
    ]
    config = f"pretrain/configs/{recipe}.yaml"
    return ["pretrain/train.py", "--config", config, "--run-dir", directory, "--set", *small, item]


def curve(directory: Path) -> list[dict]:
    """The log without what the clock says."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    return torch.load(directory / "checkpoint.pt", weights_only=True)["model"]


def equal_runs(old: Path, new: Path) -> bool:
    """Weights, and all that the old code logs, bit by bit. The new code may log more."""
    first, second = weights(old), weights(new)
    before, after = curve(old), curve(new)
    return (
        len(before) == len(after)
        and all(a.items() <= b.items() for a, b in zip(before, after, strict=True))
        and first.keys() == second.keys()
        and all(torch.equal(first[k], second[k]) for k in first)
    )


# -------------------------------------------------------------------------------------------------- what is compared


def ids(old: Path, new: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    """Run ids and job commands of every cell, but for the order of a command's overrides. Cells may have been added."""
    before, after = jobs(old, scratch), jobs(new, scratch)
    gone = before.keys() - after.keys()
    expected = {run for run in gone if any(f"{recipe}-" in run for recipe in CHANGED)}
    yield f"ids of {len(before)} runs, but for {len(expected)} changed on purpose ({CHANGED})", gone == expected
    shared = before.keys() & after.keys()
    yield f"commands of {len(shared)} runs", all(sorted(before[run]) == sorted(after[run]) for run in shared)


def jobs(tree: Path, scratch: Path) -> dict[str, list[str]]:
    """Run -> the words of its command, as a dry run prints them."""
    printed = python(tree, "slurm/launch.py", *TARGETS, "--dry-run", "--runs-dir", scratch / "none")
    back = {item for items in AS_BEFORE.values() for item in items}
    commands = [line.split() for line in printed.splitlines() if line.startswith("python ")]
    return {words[-1]: [word for word in words if word not in back] for words in commands}


def curves(old: Path, new: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    """Loss curves, k-NN and weights."""
    for recipe, items in RUNS.items():
        for item in items:
            for tree, back in ((old, []), (new, AS_BEFORE.get(recipe, []))):
                python(tree, *training(recipe, item, scratch / tree.name / recipe / item), *back)
            yield f"curve of {recipe}, {item}", equal_runs(*(scratch / t.name / recipe / item for t in (old, new)))


def resume(old: Path, new: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    """A run that the old code began and the new code ends."""
    whole, mixed = scratch / "whole", scratch / "mixed"
    python(old, *training(*RESUMED, whole))
    command = [sys.executable, *map(str, training(*RESUMED, mixed))]
    environment = {**os.environ, "PYTHONPATH": str(old), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=old, env=environment, stdout=subprocess.DEVNULL)
    log = mixed / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait()
    python(new, *training(*RESUMED, mixed))
    yield "a checkpoint of the old code resumed by the new", equal_runs(whole, mixed)


def tables(old: Path, new: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    """The tables of results/, as CSV: our means, which no verdict's wording touches."""
    for tree in (old, new):
        python(tree, "paper/make_tables.py", "--runs-dir", ROOT / "results", "--out", scratch / tree.name / "tables")
    for path in sorted((scratch / old.name / "tables").glob("*.csv")):
        before, after = (_means(scratch / tree.name / "tables" / path.name) for tree in (old, new))
        more = {cell for cell in before.keys() & after.keys() if after[cell]["n"] > before[cell]["n"]}
        same = all(before[cell] == after.get(cell) for cell in before.keys() - more)
        yield f"means of {path.stem}" + (f", but for {len(more)} cells that have more seeds now" if more else ""), same


def _means(path: Path) -> dict[str, dict[str, Any]]:
    """Cell -> what is published and what is ours, as written, and of how many seeds. Cells may have been added."""
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    kept = ("published", "ours_mean", "ours")
    return {
        row.get("cell", str(number)): {**{key: row.get(key, "") for key in kept}, "n": int(row.get("n") or 0)}
        for number, row in enumerate(rows)
    }


CHECKS: dict[str, Callable] = {"ids": ids, "curves": curves, "resume": resume, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="default: all")
    options = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", old, options.commit], check=True)
        try:
            for name in options.only:
                for what, same in CHECKS[name](old, ROOT, Path(folder) / name):
                    print(f"{'same' if same else 'DIFFERENT':<10}{what}", flush=True)
                    different += not same
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", old], check=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
