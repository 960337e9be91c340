"""Keep a finished run: its record goes to results/, where the repository holds it; its checkpoint does not.

examples:
  python paper/keep.py runs/pretrain/imagenet_moco-mixmask-e200-0a1b2c3d-s0 runs/linear/imagenet_linear-...-s0
  python paper/keep.py runs/*/cifar100_*                      every finished run of CIFAR-100

Copied are config.yaml, command.txt, environment.json, environments.jsonl where there is one, log.jsonl (packed where it
is long) and result.json; kept.json records the checkpoint's SHA-256. Nothing is moved or deleted; it says what may be.
A run of the embedded photographs is refused.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixmask.config import UserError, main_guard, read_yaml
from mixmask.runs import file_sha256, read_log, read_result
from paper.cells import ROOT

TEXTS = ("config.yaml", "command.txt", "environment.json", "result.json")
CONTINUED = "environments.jsonl"  # of a run continued by other code or on another machine
EMBEDDED = "photos"  # the data set of the smoke preset: its numbers replicate nothing
LONG = 100_000  # bytes of a log from which on it is packed


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep each run; refuse before anything is copied where one of them cannot be kept."""
    options = _parse(arguments)
    runs, results = [Path(run) for run in options.runs], Path(options.results)
    for run in runs:
        check(run)
    for run in runs:
        kept = keep(run, results)
        print(f"kept: {kept} ({_size(kept) / 1000:.0f} kB)")
        checkpoint = json.loads((kept / "kept.json").read_text(encoding="utf-8"))["checkpoint_sha256"]
        warning = f", but its checkpoint ({checkpoint[:12]}...) is copied nowhere" if checkpoint else ""
        print(f"  {run} may be deleted{warning}")
        encoder = _encoder(run)
        if (
            encoder
            and not (results / "pretrain" / encoder).exists()
            and (run.parents[1] / "pretrain" / encoder).exists()
        ):
            print(f"  its pre-training is not kept yet: {run.parents[1] / 'pretrain' / encoder}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python paper/keep.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a finished run, runs/<stage>/<run>")
    parser.add_argument("--results", default=str(ROOT / "results"), metavar="DIR", help="default: results")
    return parser.parse_args(arguments)


def check(run: Path) -> None:
    """Raises UserError for a run that is not finished, not whole, or of the embedded photographs."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    if read_result(run) is None:
        raise UserError(f"{run} is not finished: it has no result.json; launch it again to continue it")
    missing = [name for name in TEXTS if not (run / name).exists()]
    if missing:
        raise UserError(f"{run}: {missing[0]} is missing, expected {', '.join(TEXTS)}")
    if _dataset(run) == EMBEDDED:
        raise UserError(f"{run} is a run of the embedded photographs (a smoke run): it replicates nothing")


def _dataset(run: Path) -> str:
    """Of the run; where its config names none (a conversion), of its pre-training beside it."""
    config = _config(run)
    dataset = config.get("dataset") or config.get("data")  # detection has `data`
    encoder = run.parents[1] / "pretrain" / _encoder(run)
    if dataset or not _encoder(run) or not (encoder / "config.yaml").exists():
        return dataset or ""
    return _config(encoder).get("dataset", "")


def _config(run: Path) -> dict[str, Any]:
    return read_yaml(run / "config.yaml")


def _encoder(run: Path) -> str:
    """The pre-training whose encoder an evaluation took."""
    return _config(run).get("checkpoint") or ""


def keep(run: Path, results: Path) -> Path:
    """Copy the record of `run` to results/<stage>/<its id>, all of it or nothing. Raises UserError where another is."""
    result = read_result(run)
    target = results / run.resolve().parent.name / result.get("run", run.resolve().name)
    if target.exists():
        if read_result(target) != result:
            raise UserError(f"{target} holds another result of the same config; remove one of the two")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".keep-") as temporary:
            part = Path(temporary) / target.name
            part.mkdir()
            _copy(run, part)
            part.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return target


def _copy(run: Path, target: Path) -> None:
    for name in (*TEXTS, CONTINUED):
        if name != CONTINUED or (run / name).exists():
            shutil.copyfile(run / name, target / name)
    text = "".join(json.dumps(line) + "\n" for line in read_log(run)).encode()
    if len(text) < LONG:
        (target / "log.jsonl").write_bytes(text)
    else:
        (target / "log.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))
    checkpoint = run / "checkpoint.pt"
    exists = checkpoint.exists()
    kept = {
        "checkpoint_sha256": file_sha256(checkpoint) if exists else None,
        "checkpoint_bytes": checkpoint.stat().st_size if exists else None,
    }
    (target / "kept.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


if __name__ == "__main__":
    main_guard(main)
