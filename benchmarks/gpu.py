"""A first look at a GPU machine in the minutes given: tests, steps, k-NN, input, a loss curve, then real runs.

examples:
  python benchmarks/gpu.py --minutes 10 --data data       with CIFAR-100 in data/ (no network is used)
  python benchmarks/gpu.py --minutes 2 --device cpu       the same on a CPU, with narrow nets

Needs torch, torchvision, numpy, pillow, pyyaml, tqdm and pytest. What no longer fits is skipped, and said to be. The
folder --out gets report.json, report.md, tests.txt and, of the real runs, runs.zip; the runs themselves are in
--runs-dir, and the same command resumes them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # the project need not be installed
    sys.path[0] = str(ROOT)

from benchmarks import tables  # noqa: E402
from mixmask import config as configs  # noqa: E402
from mixmask.config import UserError, main_guard  # noqa: E402
from mixmask.runs import run_directory, write_atomically  # noqa: E402

FRAMEWORKS = ("moco", "simclr", "byol", "simsiam")
GOALS = {"cifar100": "2.0 s an epoch in bf16, 3.5 s in TF32 (H200)", "imagenet": "2,500 images/s in bf16 (H200)"}
RECORDS = ("command.txt", "config.yaml", "environment.json", "log.jsonl", "result.json")
GRACE = 25  # seconds in which a run that is stopped writes its checkpoint
NARROW = {"backbone.width": 16, "batch_size": 32}  # what a CPU does in seconds
TINY = {"dataset": "photos", "epochs": 2, "batch_size": 250, "backbone.width": 4, "augment.size": 16, "knn.k": 20}


@dataclass
class Time:
    """The minutes given. Each stage has to be over when its share of them is."""

    start: float
    seconds: float
    share: float = 1.0

    def left(self) -> float:
        """Seconds to the end of the present stage."""
        return self.start + self.share * self.seconds - time.monotonic()


def main(arguments: Sequence[str] | None = None) -> None:
    """Stage after stage; the report is written anew after each."""
    options = _parse(arguments)
    if options.case:
        print("RESULT", json.dumps(CASES[options.case](**json.loads(options.values))))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    clock = Time(time.monotonic(), 60 * options.minutes)
    report: dict[str, Any] = {"minutes": options.minutes, "skipped": [], "results": {}}
    for name, share, stage in STAGES:
        clock.share = share
        print(f"{name}: up to {max(clock.left(), 0):.0f} s", file=sys.stderr, flush=True)
        stage(options, clock, report)
        report["seconds"] = round(time.monotonic() - clock.start, 1)
        write_atomically(options.out / "report.json", json.dumps(report, indent=1) + "\n")
        write_atomically(options.out / "report.md", markdown(report))
    print(f"written: {options.out / 'report.md'}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, more = __doc__.partition("\n\n")
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python benchmarks/gpu.py", description=about, epilog=more, formatter_class=kind)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it (default: 10)")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where CIFAR-100 is (default: data)")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="default: gpu-report")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    parser.add_argument("--values", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        raise UserError(f"--minutes: expected a number above 0, found {options.minutes:g}")
    return options


# --------------------------------------------------------------------------------------------------------- stages


def test(options: argparse.Namespace, clock: Time, report: dict[str, Any]) -> None:
    """The machine, and the tests that need a GPU."""
    report["machine"] = measured("machine", 120, device=options.device)
    if "failed" in report["machine"]:
        raise UserError(f"--device {options.device}: {report['machine']['failed']}")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--noconftest", "-o", "addopts=", "tests/unit/test_gpu.py"]
    with (options.out / "tests.txt").open("w") as log:
        try:
            limit = max(clock.left(), 1)
            done = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, timeout=limit)
            status = {0: "passed, or skipped where there is no GPU", 1: "failed"}.get(done.returncode, "did not run")
        except subprocess.TimeoutExpired:
            status = "stopped: no time left"
    lines = (options.out / "tests.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    report["tests"] = {"status": status, "summary": lines[-1] if lines else ""}


def steps(options: argparse.Namespace, clock: Time, report: dict[str, Any]) -> None:
    """MoCo on CIFAR-100 and ImageNet in all variants, then the other frameworks in the fastest two."""
    variants = [(precision, compiled) for precision in ("bf16", "fp32") for compiled in (True, False)]
    asked = [("cifar100", "moco", *variant) for variant in variants]
    if options.device != "cpu":
        asked += [("imagenet", "moco", "bf16", True), ("imagenet", "moco", "bf16", False)]
    asked += [("cifar100", framework, "bf16", compiled) for framework in FRAMEWORKS[1:] for compiled in (True, False)]
    for dataset, framework, precision, compiled in asked:
        name = f"steps/{dataset}/{framework}/mixmask/{'compiled' if compiled else 'eager'}"
        values = {"dataset": dataset, "framework": framework, "precision": precision, "compiled": compiled}
        collect(f"{name}/{precision}", "step", options, clock, report, **values)


def others(options: argparse.Namespace, clock: Time, report: dict[str, Any]) -> None:
    """k-NN and the augmentation alone."""
    for case in ("knn", "input"):
        collect(case, case, options, clock, report)


def curve(options: argparse.Namespace, clock: Time, report: dict[str, Any]) -> None:
    """Twenty steps on the same batches as on the CPU."""
    for compiled in (False, True):
        collect(f"curve/{'compiled' if compiled else 'eager'}", "curve", options, clock, report, compiled=compiled)


def runs(options: argparse.Namespace, clock: Time, report: dict[str, Any]) -> None:
    """Step (a) 1 of docs/replication.md: MoCo, MixMask and vanilla, each at the largest budget that fits."""
    methods, started = ["mixmask", "vanilla"], []
    for number, method in enumerate(methods):
        name, seconds = f"runs/{method}", (clock.left() - GRACE) / (len(methods) - number)
        if seconds < 20:
            report["skipped"].append(name)
            continue
        recipe, overrides, budget = largest_budget(options, report, seconds)
        settings = {**overrides, "method": method, "run.device": options.device, "run.download": False}
        settings |= {"run.data_root": str(options.data), "run.checkpoint_minutes": 1}
        report["results"][name] = {"budget": budget, **carried_out(recipe, settings, options.runs_dir, seconds)}
        started.append(run_directory(options.runs_dir, "pretrain", configs.load(recipe, settings)))
    _keep_records(options, started)


def largest_budget(options, report: Mapping[str, Any], seconds: float) -> tuple[Path, dict[str, Any], str]:
    """Recipe, overrides and name of the largest budget that fits: 200 or 100 epochs, reduced, or (no data) tiny."""
    folder = ROOT / "pretrain" / "configs"
    if not any((options.data / name).exists() for name in ("cifar-100-python", "cifar-100-python.tar.gz")):
        return folder / "cifar100_moco.yaml", dict(TINY), f"tiny: no CIFAR-100 in {options.data}"
    rates = [
        row["images_per_second"]
        for name, row in report["results"].items()
        if name.startswith("steps/cifar100/moco/") and name.endswith("eager/fp32") and row.get("batch") == 512
    ]
    for epochs in (200, 100):
        if rates and 1.1 * epochs * 50_000 / max(rates) < seconds:
            return folder / "cifar100_moco.yaml", {"epochs": epochs}, f"{epochs} epochs"
    return folder / "cifar100_reduced_moco.yaml", {}, "reduced"


def carried_out(recipe: Path, settings: Mapping[str, Any], runs_dir: Path, seconds: float) -> dict[str, Any]:
    """A pre-training for so long; then it is asked to stop, and can be resumed."""
    words = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items()]
    command = [sys.executable, "pretrain/train.py", "--config", str(recipe), "--runs-dir", str(runs_dir.resolve())]
    start = time.monotonic()
    child = subprocess.Popen(
        [*command, "--set", *words], cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        text, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        try:
            text, _ = child.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            text, _ = child.communicate()
    last = text.decode(errors="replace").strip().splitlines()[-1:]
    status = "finished" if child.returncode == 0 else f"stopped, exit status {child.returncode}"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "says": "".join(last)}


def _keep_records(options: argparse.Namespace, directories: Sequence[Path]) -> None:
    with zipfile.ZipFile(options.out / "runs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for directory in directories:
            for record in filter(Path.exists, (directory / name for name in RECORDS)):
                archive.write(record, f"{directory.name}/{record.name}")


STAGES: tuple[tuple[str, float, Callable[..., None]], ...] = (
    ("tests", 0.30, test),
    ("steps", 0.60, steps),
    ("k-NN and input", 0.68, others),
    ("loss curve", 0.80, curve),
    ("runs", 1.00, runs),
)


# ------------------------------------------------------------------------------------------- one case, one process


def collect(name: str, case: str, options, clock: Time, report: dict[str, Any], **values: Any) -> None:
    """A case's numbers into the report; it is skipped where it is not likely to fit."""
    longest = max((row["took"] for row in report["results"].values() if row.get("case") == case), default=12.0)
    if clock.left() < longest:
        report["skipped"].append(name)
        return
    start = time.monotonic()
    found = measured(case, clock.left(), device=options.device, **values)
    report["results"][name] = {"case": case, **found, "took": round(time.monotonic() - start, 1)}


def measured(case: str, seconds: float, **values: Any) -> dict[str, Any]:
    """What a case finds in a process of its own, or {"failed": why}: no crash of the device ends the report."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--case", case, "--values", json.dumps(values)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {seconds:.0f} s"}
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode == 0 and results:
        return json.loads(results[-1].removeprefix("RESULT "))
    return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _machine(device: str) -> dict[str, Any]:
    from benchmarks import measure
    from mixmask.training.optim import pick_device

    return measure.machine(pick_device(device))


def _step(device: str, dataset: str, framework: str, precision: str, compiled: bool) -> dict[str, Any]:
    import torch

    from benchmarks import measure, steps
    from mixmask.training.optim import pick_device

    place = pick_device(device)
    small = NARROW if place.type == "cpu" else {}
    overrides = {**small, "precision": precision, "run.compile": compiled}
    config = steps.recipe(dataset, framework, "mixmask", place, overrides)
    plan = steps.Plan(1, 1, 1) if place.type == "cpu" else steps.Plan(3, 10, 5)
    torch.manual_seed(0)
    found = steps.numbers(lambda: steps.Ours(config, place), place, plan, measure.peak(place, precision, 3))
    return {**found, "seconds_an_epoch": steps.IMAGES[dataset][0] / found["images_per_second"]}


def _knn(device: str) -> dict[str, Any]:
    from benchmarks import neighbours
    from mixmask.training.optim import pick_device

    return neighbours.predict(pick_device(device), 1, queries=2000)["predict"]


def _input(device: str) -> dict[str, Any]:
    from benchmarks import pipelines
    from mixmask.training.optim import pick_device

    return pipelines.cifar(pick_device(device), 4096, 1)


def _curve(device: str, compiled: bool, steps_taken: int = 20) -> dict[str, Any]:
    import torch

    from benchmarks import steps
    from mixmask.training.optim import pick_device
    from pretrain import train

    losses: dict[str, list[float]] = {}
    small = {**NARROW, "moco.shuffle_bn": False, "precision": "fp32"}  # the shuffle is drawn on the device
    for place in (torch.device("cpu"), pick_device(device)):
        on_cpu = not losses
        config = steps.recipe("cifar100", "moco", "mixmask", torch.device("cpu"), small)
        inputs = steps.Ours(config, torch.device("cpu"))
        overrides = {**small, "run.device": str(place), "run.compile": compiled and not on_cpu}
        training = steps.Ours(steps.recipe("cifar100", "moco", "mixmask", place, overrides), place)
        batches: Iterator[list[torch.Tensor]] = (
            [x.to(place) for x in next(inputs.batches)] for _ in range(steps_taken)
        )
        found = [float(train.iterate(training.config, training.state, batch)[0]["loss"]) for batch in batches]
        losses["cpu" if on_cpu else "device"] = found
    differences = [abs(a - b) / abs(a) for a, b in zip(losses["cpu"], losses["device"], strict=True)]
    return {**losses, "first_difference": differences[0], "largest_difference": max(differences)}


CASES = {"machine": _machine, "step": _step, "knn": _knn, "input": _input, "curve": _curve}


# --------------------------------------------------------------------------------------------------------- report

COLUMNS: list[tables.Column] = [
    ("batch", "batch", str),
    ("precision", "precision", str),
    ("images/s", "images_per_second", "{:,.0f}".format),
    ("ms/step", "ms_per_step", "{:,.1f}".format),
    ("s/epoch", "seconds_an_epoch", "{:,.2f}".format),
    ("TFLOP/s", "tflop_per_second", "{:,.2f}".format),
    ("of peak", "share_of_peak", "{:.0%}".format),
    ("peak memory, GiB", "peak_memory_gib", "{:.2f}".format),
    ("failed", "failed", str),
]


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    machine, results = report["machine"], report["results"]
    parts = [
        f"# {machine['device']}",
        f"{machine['time']}, torch {machine['torch']}, code of commit {(machine['code'] or 'unknown')[:12]}, "
        f"{report['seconds']:.0f} of {60 * report['minutes']:.0f} s.",
        f"GPU tests: {report['tests']['status']} ({report['tests']['summary']}).",
    ]
    of_steps = {name: row for name, row in results.items() if row.get("case") == "step"}
    if of_steps:
        parts.append(tables.table(of_steps, COLUMNS))
        if machine["type"] == "cuda":
            parts.append("Goals: " + "; ".join(f"{dataset} {goal}" for dataset, goal in GOALS.items()) + ".")
    for name, row in results.items():
        if row.get("case") != "step":
            shown = {key: value for key, value in row.items() if key not in ("case", "took", "cpu", "device")}
            parts.append(f"* {name}: " + ", ".join(f"{key} {_short(value)}" for key, value in shown.items()))
    parts.append(
        f"Skipped, for want of time: {', '.join(report['skipped']) or 'nothing'}. CUDA graphs: not offered yet."
    )
    return "\n\n".join(parts) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main_guard(main)
