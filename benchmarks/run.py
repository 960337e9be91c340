"""Measure this machine: training steps, the input, k-NN, the launcher and the tables; ours beside a plain reference.

examples:
  python benchmarks/run.py                              everything but the profile (two CPU cores: six minutes)
  python benchmarks/run.py --quick                      few repetitions, MoCo alone (under a minute)
  python benchmarks/run.py steps/moco input             MoCo's steps and the input
  python benchmarks/run.py 'steps/*/mixmask' --json mixmask.json --set batch_size=128
  python benchmarks/run.py profile                      where the time of a step goes
  python benchmarks/run.py input/jpeg --jpeg /data/imagenet/val
  python benchmarks/run.py 'against/moco/*' --before f965d4b   steps on the CPU, at a commit and now, in turn

A rate with a ratio beside it has a partner, measured in the same run: the same work written the usual way
(benchmarks/plain.py). TFLOP/s are counted while the step runs, and compared with a large matrix product on the same
device. docs/performance.md has results, and what the columns mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import tables
from mixmask import config as configs
from mixmask.config import UserError, main_guard

Numbers = dict[str, dict[str, Any]]  # case -> what was measured
PARTNERS = {"steps": "images_per_second", "input": "per_second", "knn": "seconds"}  # group -> what a ratio is of


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table as soon as each group is done, write the JSON."""
    options = _parse(arguments)
    if options.add and not options.json:
        raise UserError("--add: expected --json FILE, whose numbers are kept")
    report = {"quick": options.quick, "machine": {}, "peak": {}, "results": {}}
    for name, work in chosen(cases(options, report["peak"]), options.targets).items():
        print(f"measuring {name}", file=sys.stderr, flush=True)
        report["results"].update(work())
    report["machine"] = _machine(options)
    if options.add:
        report = added(report, options.json)
    compare(report["results"])
    print(tables.markdown(report))
    if options.json:
        write(options.json, report)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = ", ".join(tables.GROUPS)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{groups}, or a case of one; wildcards")
    parser.add_argument("--quick", action="store_true", help="few repetitions, and MoCo alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number, with versions and commit")
    parser.add_argument("--add", action="store_true", help="keep what FILE holds of the same machine and code")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--runs", type=int, default=1000, help="finished runs for the launcher (default: 1000)")
    parser.add_argument(
        "--before", metavar="COMMIT", default="HEAD", help="of `against`: what these steps are beside (default: HEAD)"
    )
    parser.add_argument("--jpeg", metavar="DIR", help="CLASS/IMAGE.JPEG files in place of generated ones")
    sets = {"nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"}
    parser.add_argument("--set", **sets, help="replace keys of the recipes, such as batch_size=128 run.channels_last=0")
    return parser.parse_args(arguments)


def chosen(all_cases: Mapping[str, Callable[[], Numbers]], targets: Sequence[str]) -> dict[str, Callable[[], Numbers]]:
    """The cases that `targets` name, in order; none: all but the profile and those against a commit.

    Raises UserError for a target that names none.
    """
    for target in targets:
        if not any(_named(target, name) for name in all_cases):
            raise UserError(f"unknown target '{target}'; expected one of {', '.join(all_cases)}")
    wanted = list(targets) or [group for group in tables.GROUPS if group not in ("profile", "against")]
    return {name: work for name, work in all_cases.items() if any(_named(target, name) for target in wanted)}


def _named(target: str, name: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"{target}/*")


def compare(results: Numbers) -> None:
    """Give each case whose plain partner was measured, too, the ratio to it: above 1 is faster."""
    for name, row in results.items():
        group = name.split("/")[0]
        partner = results.get(row.get("partner") or f"{name}/plain")
        if partner is None or partner is row or group not in PARTNERS:
            continue
        ratio = row[PARTNERS[group]] / partner[PARTNERS[group]]
        row["ratio"] = 1 / ratio if group == "knn" else ratio


def added(report: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The report with the other numbers of the one at `path`, where there is one, in the order of the cases.

    Raises UserError where that one is of another machine, environment or code.
    """
    if not path.exists():
        return dict(report)
    known = json.loads(path.read_text(encoding="utf-8"))
    for key in sorted(known["machine"].keys() | report["machine"].keys()):
        was, now = known["machine"].get(key), report["machine"].get(key)
        if key not in ("time", "commit", "modified", "changes") and was != now:
            raise UserError(f"{path}: {key} is {was} there and {now} here; measure all of it anew, without --add")
    peaks, results = ({**known[key], **report[key]} for key in ("peak", "results"))
    return {**report, "quick": known["quick"] or report["quick"], "peak": peaks, "results": results}


def write(path: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON. Raises UserError where it cannot be written."""
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"\nwritten: {path}")


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import measure
    from mixmask.training.optim import pick_device

    return measure.machine(pick_device(options.device))


# ---------------------------------------------------------------------------------------------------------- cases


def cases(options: argparse.Namespace, peaks: dict[str, float]) -> dict[str, Callable[[], Numbers]]:
    """Every case by name; `peaks` is filled with the TFLOP/s of each precision as they are needed."""
    parts = (step_cases, against_cases, input_cases, knn_cases)
    return {name: work for part in parts for name, work in part(options, peaks)} | {
        "launcher": partial(launcher, options),
        "profile": partial(profile, options),
    }


def step_cases(options: argparse.Namespace, peaks: dict[str, float]) -> Iterator[tuple[str, Callable[[], Numbers]]]:
    """Each framework with each mixture; MoCo's plain partners; on a GPU the paper's main ImageNet run."""
    from benchmarks import steps
    from mixmask.training.optim import pick_device

    device = pick_device(options.device)
    for framework in steps.FRAMEWORKS[: 1 if options.quick else None]:
        for method in steps.MIXTURES:
            yield from _step(options, peaks, device, "cifar100", framework, method)
    if device.type == "cuda" or any("imagenet" in target for target in options.targets):
        yield from _step(options, peaks, device, "imagenet", "moco", "mixmask")


def _step(options, peaks, device, dataset, framework, method) -> Iterator[tuple[str, Callable[[], Numbers]]]:
    name = f"steps/{'imagenet/' if dataset == 'imagenet' else ''}{framework}/{method}"
    asked = (options, peaks, device, dataset, framework, method)
    yield name, lambda: {name: step(*asked)}
    if framework == "moco":
        yield f"{name}/plain", lambda: {f"{name}/plain": step(*asked, usual=True)}


def step(options, peaks, device, dataset, framework, method, usual: bool = False) -> dict[str, Any]:
    """One row of the table of steps."""
    from benchmarks import measure, pipelines, steps

    overrides = {**configs.parse_overrides(options.set), **({"precision": "fp32"} if usual else {})}
    config = steps.recipe(dataset, framework, method, device, overrides)
    if config.precision not in peaks:
        peaks[config.precision] = measure.peak(device, config.precision)
    plan = steps.Plan(5, 10, 10) if device.type == "cuda" else steps.Plan(3, 1, 1)
    if options.quick:
        plan = steps.Plan(1, plan.block, 1)
    if usual:
        build = partial(steps.Plain, config=config, device=device, workers=pipelines.workers_here())
        return steps.numbers(build, device, plan, peaks[config.precision])
    counted = {"launches": steps.launches(config, device)}
    if not options.quick:  # tracing takes a while
        counted["launches_compiled"] = steps.launches(config, device, compiled=True)
    build = partial(steps.Ours, config=config, device=device)
    return {**steps.numbers(build, device, plan, peaks[config.precision]), **counted}


def against_cases(options: argparse.Namespace, peaks: object) -> Iterator[tuple[str, Callable[[], Numbers]]]:
    """Steps of this code beside those of the commit --before."""
    from benchmarks import against, steps

    overrides, pairs = configs.parse_overrides(options.set), 2 if options.quick else 15
    for framework, method in itertools.product(steps.FRAMEWORKS, steps.MIXTURES):
        name, asked = f"against/{framework}/{method}", (options.before, framework, method, overrides, pairs)
        yield name, lambda name=name, asked=asked: {name: against.numbers(*asked)}


def input_cases(options: argparse.Namespace, peaks: object) -> Iterator[tuple[str, Callable[[], Numbers]]]:
    """Two views from memory and from JPEG files."""
    from benchmarks import pipelines
    from mixmask.training.optim import pick_device

    pairs, repeats = (2048, 1) if options.quick else (8192, 3)
    name = "input/cifar"
    yield name, lambda: {name: pipelines.cifar(pick_device(options.device), pairs, repeats)}
    yield f"{name}/plain", lambda: {f"{name}/plain": pipelines.cifar_plain(2048 if options.quick else 4096)}

    def jpeg() -> Numbers:
        number = 32 if options.quick else 128
        with pipelines.jpeg_files(options.jpeg, number) as root:
            rates = pipelines.jpeg(root, number, repeats)
        partner = {"partner": "input/jpeg, one core: plain"}
        return {f"input/jpeg, one core: {key}": {**row, **partner} for key, row in rates.items()}

    yield "input/jpeg", jpeg


def knn_cases(options: argparse.Namespace, peaks: object) -> Iterator[tuple[str, Callable[[], Numbers]]]:
    """The classifier alone; on a GPU with the features, too."""
    from benchmarks import neighbours
    from mixmask.training.optim import pick_device

    device = pick_device(options.device)
    repeats, queries = (1, 2000) if options.quick else (3, 10_000)
    yield "knn/predict", lambda: _under("knn", neighbours.predict(device, repeats, queries=queries))
    if device.type == "cuda" or "knn/features" in options.targets:
        yield "knn/features", lambda: {"knn/features and predict": neighbours.whole(device, repeats)}


def launcher(options: argparse.Namespace) -> Numbers:
    """Start-up times; the launcher and the tables over `--runs` runs, and over twice as many."""
    from benchmarks import launcher

    found = {f"{script} --help": launcher.start(script) for script in ("slurm/launch.py", "paper/make_tables.py")}
    for runs in (options.runs,) if options.quick else (options.runs, 2 * options.runs):
        with tempfile.TemporaryDirectory() as folder:
            taken = launcher.with_runs(runs, Path(folder) / "runs")
        bars = launcher.BARS if runs == 1000 else {}
        found[f"launch.py all --dry-run, {runs} runs"] = {**taken["launch"], "bar": bars.get("launch")}
        found[f"make_tables.py, {runs} runs"] = {**taken["tables"], "bar": bars.get("tables")}
    return _under("launcher", found)


def profile(options: argparse.Namespace) -> Numbers:
    """One step of MoCo with MixMask, by class of operation."""
    from benchmarks import profiling, steps
    from mixmask.training.optim import pick_device

    device = pick_device(options.device)
    config = steps.recipe("cifar100", "moco", "mixmask", device, configs.parse_overrides(options.set))
    return _under("profile", profiling.numbers(profiling.Marked(config, device), 1 if device.type == "cpu" else 10))


def _under(group: str, found: Numbers) -> Numbers:
    return {f"{group}/{name}": row for name, row in found.items()}


if __name__ == "__main__":
    main_guard(main)
