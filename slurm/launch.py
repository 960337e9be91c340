"""Launch all runs that a table, a figure or a cell of the paper needs: on SLURM, or on this machine.

examples:
  python slurm/launch.py table4 --dry-run                          the jobs, their commands and their cost
  python slurm/launch.py table4                                    the published budget, on SLURM
  python slurm/launch.py table4 --preset smoke --executor local    everything in minutes, on this machine
  python slurm/launch.py 'table4/*/mixmask/200' --set epochs=100 linear.epochs=50 cluster.partition=gpu
  python slurm/launch.py 'table5/cifar100/*' figure5 --dry-run     any tables, figures and cells together
  python slurm/launch.py table6 table7 --set checkpoints.swav=swav_800ep_pretrain.pth.tar detection.run.data_root=/data
  python slurm/launch.py table4 --dry-run --executor slurm         and what each asks of SLURM
  python slurm/launch.py table4 --cluster qos_account              with what a cluster of this kind asks for
  python slurm/launch.py status table4                             what is finished, running, waiting, failed
  python slurm/launch.py status table4 --efficiency                what its jobs asked for, and what they used
  python slurm/launch.py cancel table4                             end its jobs; what was saved is kept

Finished runs are skipped, unfinished ones go on, equal ones are shared: launching again is always safe.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(): no traceback of Ctrl-C during the imports


from mixmask.config import UserError, main_guard
from paper import cost
from paper.cells import WITHOUT_RUNS, Cell, select, tables
from paper.presets import Budget, budget, label, missing_file, offer, presets, remark
from slurm import efficiency, graph, local, sbatch, shell, status, submit
from slurm.graph import Job

ROOT = Path(__file__).resolve().parents[1]

NOT_NEEDED = "not needed"  # of a run that is not finished, and is not made: what needs it is finished


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build the graph, then print it, hand it to an executor, or see to what has been launched."""
    options = _parse(arguments)
    verb = options.targets[0] if options.targets[:1] in (["status"], ["cancel"]) else ""
    targets = options.targets[bool(verb) :]
    if verb == "cancel" and not targets:
        raise UserError("cancel: expected a target, such as table4, or all")
    if options.efficiency and verb != "status":
        raise UserError("--efficiency: of `status` alone, which launches nothing: launch.py status --efficiency TARGET")
    cells = select(targets)
    chosen = budget(options.preset, options.set)
    profile = str(Path(options.cluster).resolve()) if Path(options.cluster).suffix else options.cluster
    runs_dir = _enter_repository(options.runs_dir)
    launching = not (verb or options.dry_run)
    executor = _executor(options.executor, chosen) if launching and cells else ""
    if executor == "slurm":
        runs_dir = runs_dir.resolve()  # its jobs run elsewhere: in a copy of the code
    jobs = graph.jobs(cells, chosen, runs_dir, profile, options.gpu)
    for target in set(targets) & set(WITHOUT_RUNS):
        print(f"{target} needs no runs: {WITHOUT_RUNS[target]}")
    if not cells:
        return
    if verb == "status" and options.efficiency:
        efficiency.print_efficiency(jobs, runs_dir)
    elif verb == "status":
        status.print_status(cells, jobs, runs_dir)
    elif verb == "cancel":
        status.cancel(jobs)
    elif options.dry_run:
        print_graph(cells, jobs, chosen, targets, runs_dir if options.executor == "slurm" else None, options.gpu)
    else:
        print_header(cells, jobs, chosen, targets, _states(jobs))
        execute(jobs, executor, runs_dir)
        print_next(cells, jobs, options, runs_dir)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python slurm/launch.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="table4, figure5, a cell id, wildcards; none: all")
    parser.add_argument("--preset", default="paper", help=f"{', '.join(presets())} (default: paper)")
    parser.add_argument("--executor", choices=["auto", "slurm", "local"], default="auto")
    parser.add_argument("--runs-dir", metavar="DIR", help="where the runs live (default: runs, in the repository)")
    parser.add_argument("--cluster", default="", metavar="NAME", help="a profile of slurm/clusters, or a YAML file")
    parser.add_argument("--gpu", default="", metavar="NAME", help="hours by its report in benchmarks/results")
    parser.add_argument("--efficiency", action="store_true", help="of status: what was asked for against what was used")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs and their cost; run nothing")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the pre-training recipe; of later stages as linear.KEY, finetune.KEY, detection.KEY "
        "(detection.run.data_root); of slurm/cluster.yaml as cluster.KEY, or linear.cluster.KEY; "
        "public checkpoints as checkpoints.NAME=PATH",
    )
    return parser.parse_intermixed_args(arguments)  # `status --preset smoke table4` is understood


def _enter_repository(given: str | None) -> Path:
    """Commands name scripts and recipes as seen from the repository's root, so that is where they run.

    Returns the runs directory: the repository's own, or the one given, as seen from where the caller was.
    """
    runs_dir = Path(given or "runs")
    if Path.cwd() != ROOT:
        runs_dir = runs_dir.resolve() if given else runs_dir
        os.chdir(ROOT)
    return runs_dir


def _executor(name: str, chosen: Budget) -> str:
    """`auto` is SLURM where there is one; without it the smoke preset runs here, and the paper's budget asks first."""
    if name == "local":
        return "local"
    if shell.available():
        return "slurm"
    if name == "auto" and chosen.preset.name == "smoke":
        return "local"
    raise UserError(
        "no SLURM was found (no sbatch on PATH, or no configuration): type --executor local to run on this "
        "machine, --preset smoke for a trial of minutes, or --dry-run to see the jobs and their cost"
    )


def execute(jobs: list[Job], executor: str, runs_dir: Path) -> None:
    """Hand the graph to an executor. Raises UserError where a checkpoint or a package that is needed is not there."""
    graph.check_products(jobs)
    graph.check_packages(jobs)
    if executor == "slurm":
        submit.launch(jobs, runs_dir)
    else:
        local.launch(jobs)


# ------------------------------------------------------------------------------------------------------ printing


def print_header(
    cells: list[Cell], jobs: list[Job], chosen: Budget, targets: list[str], states: Mapping[Path, str]
) -> None:
    """What was asked, and how many runs it takes."""
    stages = ", ".join(f"{number} {stage}" for stage, number in Counter(job.stage for job in jobs).items())
    counts = ", ".join(f"{number} {state}" for state, number in Counter(states.values()).items())
    print(f"target  {' '.join(targets) or 'all'}")
    for shown, about in dict.fromkeys((label(cell, chosen), _about(cell, chosen)) for cell in cells):
        print(f"preset  {shown}: {about}")
    print(f"cells   {len(cells)}")
    print(f"runs    {len(jobs)} distinct ({stages}): {counts}")
    for note in _notes(cells, jobs, chosen):
        print(f"note    {note}")
    print(flush=True)


def _about(cell: Cell, chosen: Budget) -> str:
    """What its label means: the preset, or the scale that the cell's own table has."""
    return chosen.preset.about if label(cell, chosen) == chosen.label else tables()[cell.target].about


def _states(jobs: list[Job]) -> dict[Path, str]:
    """What each run is, by directory, looked up once: finished, unfinished, new or not needed."""
    found = {job.directory: job.state for job in jobs}
    wanted = graph.needed(jobs, found)
    return {where: s if s == "finished" or where in wanted else NOT_NEEDED for where, s in found.items()}


def _notes(cells: list[Cell], jobs: list[Job], chosen: Budget) -> list[str]:
    """What a reader of the cells must know, and what keeps some from being launched."""
    found: dict[str, list[str]] = {}
    texts = [
        (cell.id, text)
        for cell in cells
        for text in (cell.note, remark(cell, chosen), missing_file(cell, chosen), offer(cell, chosen))
    ]
    texts += [(job.id, text) for job in jobs for text in (*job.notes, graph.missing_package(job))]
    for name, text in texts:
        if text:
            found.setdefault(text, []).append(name)
    return [f"{_some(names)}: {text}" for text, names in found.items()]


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)})"


def print_graph(
    cells: list[Cell],
    jobs: list[Job],
    chosen: Budget,
    targets: list[str],
    batch: Path | None = None,
    gpu: str = "",
) -> None:
    """Every job, its command alone on a line, and the cost; with a runs directory `batch` each batch script, too."""
    states = _states(jobs)
    print_header(cells, jobs, chosen, targets, states)
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job.stage} {job.id}: {states[job.directory]}")
        print(f"  parents    {', '.join(map(str, job.parents)) or 'none'}")
        print(f"  resources  {_resources(job)}; {_duration(job)}")
        print(f"  cells      {', '.join(job.cells)}")
        if batch:
            print("".join(f"  {line}".rstrip() + "\n" for line in sbatch.batch_text(job, batch).splitlines()), end="")
        print(job.shell)
        print()
    print_costs(cells, jobs, states, gpu)


def print_costs(cells: list[Cell], jobs: list[Job], states: Mapping[Path, str], name: str = "") -> None:
    """Cells, runs and cost of each table and figure, and of all together."""
    gpu = bool(jobs) and bool(jobs[0].resources.gpus)
    wide = max(8, *(len(cell.target) for cell in cells))
    print(f"{'':<{wide}} {'cells':>5} {'runs':>5}  {'GPU-hours' if gpu else 'CPU-minutes'}")
    for target in dict.fromkeys(cell.target for cell in cells):
        own = [job for job in jobs if any(cell.split("/")[0] == target for cell in job.cells)]
        number = sum(cell.target == target for cell in cells)
        print(f"{target:<{wide}} {number:>5} {len(own):>5}  {_cost(own):.1f}")
    left = [job for job in jobs if states[job.directory] not in ("finished", NOT_NEEDED)]
    print(f"{'total':<{wide}} {len(cells):>5} {len(jobs):>5}  {_cost(jobs):.1f}, each run counted once", end="")
    print(f"; {_cost(left):.1f} left to run in {len(left)} jobs")
    print(cost.basis(name) if gpu else f"estimate: two CPU cores at an assumed {cost.CPU_TERAFLOPS} TFLOP/s")


def _cost(jobs: list[Job]) -> float:
    """GPU-hours, or minutes of the CPU where no GPU is asked for."""
    known = [job for job in jobs if not math.isnan(job.hours)]
    on_gpus = [job.hours for job in known if job.resources.gpus]  # a conversion beside them takes none
    return sum(on_gpus) if on_gpus else 60 * sum(job.hours for job in known)


def _resources(job: Job) -> str:
    """Of the whole job, and how it is shared out where there is more than one process."""
    asked, where = job.resources, sbatch.layout(job)
    processes = where.nodes * where.tasks
    text = f"{processes if asked.gpus else 0} GPU, {processes * asked.cpus} CPUs, {processes * asked.memory_gb:g} GB"
    return text if processes == 1 else f"{text} ({where.nodes} nodes x {where.tasks} processes)"


def _duration(job: Job) -> str:
    if math.isnan(job.hours):
        return "duration unknown: nobody has counted your own images"
    if job.resources.gpus:
        return f"about {job.gpu_hours:.1f} GPU-hours, in jobs of up to {job.resources.hours:g} h"
    return f"about {60 * job.hours:.1f} min on the CPU"


def print_next(cells: list[Cell], jobs: list[Job], options: argparse.Namespace, runs_dir: Path) -> None:
    """Where the results are, how to see what is to come, and what turns them into tables and figures."""
    left = len(graph.needed(jobs))
    own = ["--runs-dir", str(runs_dir)] if options.runs_dir else []
    print(f"\nresults are in {runs_dir.resolve()}" + (f"; {left} of {len(jobs)} runs are to come:" if left else ""))
    if left:
        print(_status(options, own))
    print("what to make of them:")
    tail = [*own, *(["--preset", options.preset, "--set", *options.set] if options.set else [])]
    targets = dict.fromkeys(cell.target for cell in cells)
    for kind in ("table", "figure"):
        names = [target for target in targets if target.startswith(kind)]
        if names:
            print(shlex.join(["python", f"paper/make_{kind}s.py", *names, *tail]))


def _status(options: argparse.Namespace, own: list[str]) -> str:
    """The command that says what has become of this launch."""
    words = ["python", "slurm/launch.py", "status", *options.targets, "--preset", options.preset, *own]
    return shlex.join(words + (["--set", *options.set] if options.set else []))


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main_guard(main)
