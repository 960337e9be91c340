"""A first look at a GPU in a given number of minutes: tests, steps, a curve against the CPU's, then real runs.

examples, in a checkout (PYTHONPATH=. where the project is not installed):
  python benchmarks/gpu.py --minutes 10 --data data            all parts; into gpu_report/
  python benchmarks/gpu.py --minutes 5 --parts tests,steps     a budget in two calls:
  python benchmarks/gpu.py --minutes 8 --parts runs            goes on with the same folder
  python benchmarks/gpu.py --minutes 8 --parts runs --from gpu_report --out more     or with a copy of it
  python benchmarks/gpu.py --device cpu --minutes 2            what it does, without a GPU

It needs torch, torchvision, numpy, pillow, pyyaml, tqdm and pytest, and no network. What no longer fits into the time
is left out, with a note. The folder holds report.json, report.md, tests.txt and runs.tar (the records of runs), each
written as soon as something is known. A checkout keeps the report: benchmarks/results/NAME.json (docs/performance.md).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_runs, measure, steps, tables
from mixmask import config as configs
from mixmask.config import UserError, main_guard
from mixmask.runs import write_atomically
from mixmask.training.optim import arithmetic, pick_device

SHARES = {"tests": 0.15, "steps": 0.3, "curve": 0.05, "runs": 0.5}  # of the minutes, in this order
OUTCOME = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|SKIPPED|ERROR)", re.MULTILINE)
CURVE = 20  # steps
LEAST = 10.0  # seconds that the quickest step takes
EVERY = 10.0  # seconds after which the records of running trainings are written again


@dataclass
class Report:
    """What is known so far, on disk after every addition."""

    folder: Path
    content: dict[str, Any]

    def add(self, group: str, name: str, row: Mapping[str, Any]) -> None:
        """A row of results, tests, curve or runs; what was left out before is no longer."""
        self.content[group][name] = dict(row)
        self.content["left_out"].pop(name, None)
        self.save()
        print(f"{name}: {_short(row)}", flush=True)

    def leave_out(self, name: str, why: str) -> None:
        """Something that is not measured, and why."""
        self.content["left_out"][name] = why
        self.save()
        print(f"{name}: left out, {why}", flush=True)

    def save(self) -> None:
        """report.json and report.md, each whole at every moment."""
        write_atomically(self.folder / "report.json", json.dumps(self.content, indent=1) + "\n")
        write_atomically(self.folder / "report.md", markdown(self.content))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run each part in its share of the time left; time that the runs do not need goes to what was left out."""
    begin, options = time.monotonic(), _parse(arguments)
    end, device = begin + 60 * options.minutes, pick_device(options.device)
    report = opened(options, device)
    parts = [part for part in SHARES if part in options.parts]
    for place, part in enumerate(parts):
        left = sum(SHARES[each] for each in parts[place:])
        until = time.monotonic() + max(0.0, end - time.monotonic()) * SHARES[part] / left
        _carry_out(part, report, device, until, options)
    if "steps" in parts and time.monotonic() + LEAST < end:
        _carry_out("steps", report, device, end, options)
    if "curve" in report.content["left_out"]:
        _carry_out("curve", report, device, end, options)
    report.save()
    print(f"written: {report.folder} ({(time.monotonic() - begin) / 60:.1f} minutes)")


def _carry_out(part: str, report: Report, device: torch.device, until: float, options: argparse.Namespace) -> None:
    """One part. Whatever makes it fail, the others go on."""
    report.content["left_out"].pop(part, None)
    try:
        PARTS[part](report, device, until, options)
    except Exception as error:  # data that are missing, say, or a fault of ours
        if not isinstance(error, UserError):
            traceback.print_exc()
        report.leave_out(part, _first_line(error))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, rest = __doc__.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py", description=about, epilog=rest, formatter_class=form
    )
    parser.add_argument("--minutes", type=float, required=True, help="for everything, the end included")
    parser.add_argument("--parts", default=",".join(SHARES), help=f"default: {','.join(SHARES)}")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of CIFAR-100 (default: data)")
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="default: gpu_report")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="DIR", help="an earlier call's folder")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="of the trainings (default: runs)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of the runs")
    options = parser.parse_args(arguments)
    options.parts = [part.strip() for part in options.parts.split(",")]
    for part in options.parts:
        if part not in SHARES:
            raise UserError(f"--parts: unknown '{part}'; expected some of {','.join(SHARES)}")
    if options.minutes <= 0:
        raise UserError(f"--minutes: expected more than 0, found {options.minutes:g}")
    return options


def opened(options: argparse.Namespace, device: torch.device) -> Report:
    """The report in --out, or that of --from; empty where there is none. Raises UserError for another GPU's."""
    earlier = options.earlier or options.out
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror}") from None
    path, content, machine = earlier / "report.json", {}, measure.machine(device)
    if options.earlier and not path.exists():
        raise UserError(f"--from {earlier}: no report.json there")
    if path.exists():
        content = tables.load(path)
        known = (content.get("machine") or {}).get("device")
        if known != machine["device"]:
            raise UserError(f"{path} is of {known}, and this is {machine['device']}; give another --out")
        gpu_runs.unpack(earlier / "runs.tar", options.runs_dir)
    fresh = {"quick": False, "peak": {}, "results": {}, "tests": {}, "curve": {}, "runs": {}, "left_out": {}}
    return Report(options.out, fresh | content | {"machine": machine})


# ------------------------------------------------------------------------------------------------------------- tests


def run_tests(report: Report, device: torch.device, until: float, options: argparse.Namespace) -> None:
    """tests/unit/test_gpu.py in a process of its own; what it prints goes to tests.txt."""
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "tests/unit/test_gpu.py"]
    begin, path = time.monotonic(), report.folder / "tests.txt"
    with open(path, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=steps.ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(1.0, until - begin))
        except subprocess.TimeoutExpired:
            report.leave_out("the rest of the tests", "their share of the time was over")
        finally:
            process.kill()
            process.wait()
    outcomes = OUTCOME.findall(path.read_text(encoding="utf-8", errors="replace"))
    counts = {word.lower(): sum(each == word for _, each in outcomes) for word in ("PASSED", "FAILED", "SKIPPED")}
    failed = [name for name, word in outcomes if word in ("FAILED", "ERROR")]
    counts |= {"seconds": round(time.monotonic() - begin, 1), "exit": process.returncode, "names": failed}
    report.add("tests", "test_gpu.py", counts)


# ------------------------------------------------------------------------------------------------------------- steps


def step_cases(device: torch.device) -> Iterator[tuple[str, float, Any]]:
    """Name, seconds that it may take on a GPU, and what measures it; the most telling first."""
    from benchmarks import neighbours, pipelines

    on_gpu = device.type == "cuda"
    for framework, method in (("moco", "mixmask"), ("moco", "vanilla")):
        for precision in ("fp32", "bf16"):
            yield from _variants("cifar100", framework, method, precision, on_gpu)
    yield from _variants("imagenet", "moco", "mixmask", "bf16", on_gpu)
    yield "knn/predict", 10, lambda *_: neighbours.predict(device, 3)["predict"]
    if on_gpu:
        yield "knn/features and predict", 20, lambda *_: neighbours.whole(device, 3)
    yield "input/cifar", 10, lambda *_: pipelines.cifar(device, 8192, 3)
    for framework in steps.FRAMEWORKS[1:]:
        for precision in ("fp32", "bf16"):
            yield from _variants("cifar100", framework, "mixmask", precision, on_gpu)
    yield from _variants("imagenet", "moco", "mixmask", "fp32", on_gpu)
    yield from _variants("imagenet", "moco", "vanilla", "bf16", on_gpu)


def _variants(dataset: str, framework: str, method: str, precision: str, on_gpu: bool) -> Iterator[tuple]:
    place = "imagenet/" if dataset == "imagenet" else ""
    for compiled in (False, True) if on_gpu else (False,):
        name = f"steps/{place}{framework}/{method}, {precision}" + (", compiled" if compiled else "")
        yield name, 120 if compiled else 20, partial(_step, (dataset, framework, method), precision, compiled)


def _step(
    case: tuple[str, str, str], precision: str, compiled: bool, device: torch.device, peaks: dict, settings: dict
) -> dict:
    torch.compiler.reset()
    measure.free(device)
    if precision not in peaks:
        peaks[precision] = measure.peak(device, precision)
    config = steps.recipe(*case, device, {**settings, "precision": precision, "run.compile": compiled})
    plan = steps.Plan(5, 10, 5) if device.type == "cuda" else steps.Plan(1, 1, 1)
    return steps.numbers(partial(steps.Ours, config, device), device, plan, peaks[precision])


def run_steps(report: Report, device: torch.device, until: float, options: argparse.Namespace) -> None:
    """Every case that is not known yet and still fits; one that fails is said, and the others go on."""
    settings = {key: value for key, value in configs.parse_overrides(options.set).items() if key in WHOLE}
    report.content["machine"]["arithmetic"] = arithmetic("fp32", device, False)
    for name, seconds, work in step_cases(device):
        if name in report.content["results"]:
            continue
        if time.monotonic() + seconds > until:
            report.leave_out(name, f"may take {seconds} s, {max(0, until - time.monotonic()):.0f} s were left")
            continue
        try:
            report.add("results", name, work(device, report.content["peak"], settings))
        except Exception as error:  # a compiler that is missing, memory that is too small: whatever it is
            report.leave_out(name, f"failed: {_first_line(error)}")


WHOLE = ("backbone.width", "batch_size")  # keys of --set that the steps take, too


# ------------------------------------------------------------------------------------------------------------- curve


def losses(config: Any, device: torch.device, batches: list[list[torch.Tensor]], dtype: torch.dtype) -> list[float]:
    """Of as many steps as there are batches, which were augmented once for all."""
    training = steps.Ours(config, device, number=2 * config.batch_size)
    training.state.model.to(dtype)
    moved = [[x.to(device, dtype) for x in batch] for batch in batches]
    return [steps.train.iterate(config, training.state, batch)[0]["loss"].item() for batch in moved]


def run_curve(report: Report, device: torch.device, until: float, options: argparse.Namespace) -> None:
    """The largest relative distance of each kind of step's losses from the CPU's in float64, on the same batches."""
    if time.monotonic() + 5 > until:
        report.leave_out("curve", "may take 5 s")
        return
    number, cpu = CURVE, torch.device("cpu")
    small = {"batch_size": 32, "backbone.width": 4, "moco.queue": 512}
    fixed = {**small, "moco.shuffle_bn": False, "run.compile": False}  # each device would shuffle in its own way
    config = steps.recipe("cifar100", "moco", "mixmask", cpu, {**fixed, "precision": "fp32"})
    data = steps.Ours(config, cpu, number=number * config.batch_size)
    batches = [next(data.batches) for _ in range(number)]
    exact = losses(config, cpu, batches, torch.float64)
    kinds = {"float64": (torch.float64, "fp32"), "fp32": (torch.float32, "fp32"), "bf16": (torch.float32, "bf16")}
    for name, (dtype, precision) in kinds.items():
        here = steps.recipe("cifar100", "moco", "mixmask", device, {**fixed, "precision": precision})
        curve = losses(here, device, batches, dtype)
        distance = max(abs(a - b) / abs(b) for a, b in zip(curve, exact, strict=True))
        row = {"steps": number, "distance": distance, "first": abs(curve[0] / exact[0] - 1)}
        report.add("curve", name, row | {"losses": curve, "exact": exact})


# -------------------------------------------------------------------------------------------------------------- runs


def run_runs(report: Report, device: torch.device, until: float, options: argparse.Namespace) -> None:
    """Group by group, each at the largest budget that fits; their records are written as they grow."""
    until -= gpu_runs.STOPPING
    given = (device, options.data, options.runs_dir, configs.parse_overrides(options.set))
    peaks = report.content["peak"]
    if "bf16" not in peaks:  # the fastest that there is
        peaks["bf16"] = measure.peak(device, "bf16")
    runs = gpu_runs.Runs(*given, peak=max(peaks.values()))
    for overrides in gpu_runs.GROUPS:
        name = ", ".join(" ".join(map(str, each.values())) for each in overrides)
        group, why = runs.fitting(overrides, until - time.monotonic())
        if not group:
            report.leave_out(f"runs: {name}", why)
            continue
        together = runs.together(group)
        more = {"side_by_side": together, "expected": {run.config.method: runs.measured(run) for run in group}}

        def noted(ends: Mapping[str, str], group=group, more=more) -> None:
            gpu_runs.pack(options.runs_dir, report.folder / "runs.tar")
            for run in group:
                end = {"end": ends[run.directory.name]} if ends.get(run.directory.name) else {}
                report.content["runs"][run.directory.name] = run.row(**more, **end)
            report.save()

        noted(gpu_runs.carry_out(group, together, until, _now_and_then(partial(noted, {}))))
        report.content["left_out"].pop(f"runs: {name}", None)
        for run in group:
            print(f"{run.directory.name}: {_short(report.content['runs'][run.directory.name])}", flush=True)
    report.save()


def _now_and_then(work: Any) -> Any:
    last = [time.monotonic()]

    def call() -> None:
        if time.monotonic() - last[0] > EVERY:
            work()
            last[0] = time.monotonic()

    return call


PARTS = {"tests": run_tests, "steps": run_steps, "curve": run_curve, "runs": run_runs}


# ------------------------------------------------------------------------------------------------------------ report


def markdown(content: Mapping[str, Any]) -> str:
    """The report for people."""
    parts = ["# A first look at a GPU", tables.markdown(content, ("steps", "input", "knn"))]
    for name, row in content["tests"].items():
        failed = f": {', '.join(row['names'])}" if row["names"] else ""
        counts = f"{row['passed']} passed, {row['skipped']} skipped, {row['failed']} failed{failed}"
        parts.append(f"*Tests.* `{name}`: {counts}; {row['seconds']:.0f} s (tests.txt).")
    if content["curve"]:
        rows = [f"{name}: {row['distance']:.1e}" for name, row in content["curve"].items()]
        number = next(iter(content["curve"].values()))["steps"]
        parts.append(
            f"*Curve.* Largest relative distance of {number} losses from the CPU's in float64: {'; '.join(rows)}."
        )
    if content["runs"]:
        lines = ["| run | state | epochs | loss, accuracy |", "|---|---|---|---|"]
        for name, row in content["runs"].items():
            state = f"{row['state']} ({row['end']})" if row.get("end") else row["state"]
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in row["metrics"].items())
            lines.append(f"| {name} | {state} | {row['epoch']} of {row['epochs']} | {numbers} |")
        parts += ["*Runs* (records in runs.tar).", "\n".join(lines)]
    if content["left_out"]:
        parts.append("*Left out.*\n\n" + "\n".join(f"* {name}: {why}" for name, why in content["left_out"].items()))
    return "\n\n".join(parts) + "\n"


def _short(row: Mapping[str, Any]) -> str:
    """Its numbers, for a line."""
    shown = {**row, **(row.get("metrics") or {})}
    numbers = {key: f"{value:.4g}" for key, value in shown.items() if isinstance(value, float)}
    words = {key: str(value) for key, value in shown.items() if isinstance(value, int | str) and value != ""}
    return ", ".join(f"{key} {value}" for key, value in (words | numbers).items())


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every `finally`
    main_guard(main)
