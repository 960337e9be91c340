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
  python slurm/launch.py --config RECIPE --set optimizer.lr=[0.03,0.06,0.1] seed=[0,1] --then PROBE_RECIPE
                                                                   a recipe of yours: every combination, and a probe
  python slurm/launch.py status --config RECIPE --set ...          what has become of them

Finished runs are skipped, unfinished ones go on, equal ones are shared: launching again is always safe.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import shlex
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(): no traceback of Ctrl-C during the imports


from mixmask.config import UserError, main_guard, recipe_file
from paper import cost
from paper.cells import ROOT, WITHOUT_RUNS, Cell, select, tables
from paper.presets import Budget, budget, label, missing_file, offer, presets, remark
from slurm import efficiency, graph, local, sbatch, shell, status, submit, sweep
from slurm.graph import Job

VERBS = ("status", "cancel")
NOT_NEEDED = "not needed"  # of a run that is not finished, and is not made: what needs it is finished


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build the graph, then print it, hand it to an executor, or see to what has been launched."""
    options = _parse(arguments)
    verb = options.targets[0] if options.targets[:1] in (["status"], ["cancel"]) else ""
    targets = options.targets[bool(verb) :]
    _check(options, verb, targets)
    recipes = [recipe_file(name).resolve() for name in (options.config, options.then) if name]
    cells = [] if recipes else select(targets)
    targets = targets or [options.config] * bool(recipes)
    chosen = sweep.own_budget(options.set) if recipes else budget(options.preset or "paper", options.set)
    profile = str(Path(options.cluster).resolve()) if Path(options.cluster).suffix else options.cluster
    runs_dir = _enter_repository(options.runs_dir)
    launching = not (verb or options.dry_run)
    executor = _executor(options.executor, chosen) if launching and (cells or recipes) else ""
    if executor == "slurm":
        runs_dir = runs_dir.resolve()  # its jobs run elsewhere: in a copy of the code
    if recipes:
        cells, jobs = sweep.plan(recipes, chosen, runs_dir, profile, options.gpu)
    else:
        jobs = graph.jobs(cells, chosen, runs_dir, profile, options.gpu)
    if verb != "cancel":
        graph.check_data(jobs)
    for target in set(targets) & set(WITHOUT_RUNS):
        print(f"{target} needs no runs: {WITHOUT_RUNS[target]}")
    if not cells:
        return
    if verb == "status" and options.efficiency:
        efficiency.print_efficiency(jobs, runs_dir)
    elif verb == "status":
        brief = not targets
        (status.print_brief if brief else status.print_status)(cells, jobs, runs_dir)
        if not recipes:
            print_other_presets(cells, chosen, options, runs_dir)
    elif verb == "cancel":
        status.cancel(jobs)
    elif options.dry_run:
        print_graph(cells, jobs, chosen, targets, runs_dir if options.executor == "slurm" else None, options.gpu)
    else:
        print_header(cells, jobs, chosen, targets, _states(jobs))
        execute(jobs, executor, runs_dir)
        print_next(cells, jobs, options, runs_dir)


def _check(options: argparse.Namespace, verb: str, targets: Sequence[str]) -> None:
    """Raises UserError for arguments that conflict."""
    if verb == "cancel" and not (targets or options.config):
        raise UserError("cancel: expected a target, such as table4, or all")
    if options.efficiency and verb != "status":
        raise UserError("--efficiency: only with `status`: launch.py status --efficiency TARGET")
    meant = difflib.get_close_matches(options.targets[0], VERBS, n=1) if options.targets and not verb else []
    if meant:
        raise UserError(f"unknown target '{options.targets[0]}'; did you mean '{meant[0]}'?")
    if options.config and (targets or options.preset):
        what = f"the target {targets[0]}" if targets else f"--preset {options.preset}"
        raise UserError(f"--config launches a recipe of yours: expected no other target and no preset, found {what}")
    if options.then and not options.config:
        raise UserError("--then: only with --config; a table's cells name their own evaluation")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python slurm/launch.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="table4, figure5, a cell id, wildcards; none: all")
    parser.add_argument("--preset", help=f"{', '.join(presets())} (default: paper)")
    parser.add_argument(
        "--config", metavar="RECIPE", help="a recipe of yours in place of targets; --set may list values"
    )
    parser.add_argument("--then", metavar="RECIPE", help="with --config: a probe or fine-tuning of each (eval/configs)")
    parser.add_argument("--executor", choices=["auto", "slurm", "local"], default="auto")
    parser.add_argument("--runs-dir", metavar="DIR", help="where the runs live (default: runs, in the repository)")
    parser.add_argument("--cluster", default="", metavar="NAME", help="a profile of slurm/clusters, or a YAML file")
    parser.add_argument("--gpu", default="", metavar="NAME", help="hours from this GPU's report in benchmarks/results")
    parser.add_argument("--efficiency", action="store_true", help="with status: resources requested and used")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs and their cost; run nothing")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the pre-training recipe (with --config a list is a sweep: every combination of such values); of "
        "later stages as linear.KEY, finetune.KEY, detection.KEY "
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
    """`auto` is SLURM where there is one; else smoke and the user's own run here, and the paper's budget asks first."""
    if name == "local":
        return "local"
    if shell.available():
        return "slurm"
    if name == "auto" and chosen.preset.name in ("smoke", sweep.OWN.name):
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
    states = {job.directory: job.state for job in jobs}
    wanted = graph.needed(jobs, states)
    return {where: s if s == "finished" or where in wanted else NOT_NEEDED for where, s in states.items()}


def _notes(cells: list[Cell], jobs: list[Job], chosen: Budget) -> list[str]:
    """What a reader of the cells must know, and what keeps some from being launched."""
    concerned: dict[str, list[str]] = {}
    texts = [
        (cell.id, text)
        for cell in cells
        for text in (cell.note, remark(cell, chosen), missing_file(cell, chosen), offer(cell, chosen))
    ]
    texts += [(job.id, text) for job in jobs for text in (*job.notes, graph.missing_package(job))]
    for name, text in texts:
        if text:
            concerned.setdefault(text, []).append(name)
    return [f"{_some(names)}: {text}" for text, names in concerned.items()]


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
    if batch:
        print_arrays([job for job in jobs if states[job.directory] not in ("finished", NOT_NEEDED)])
    print_costs(cells, jobs, states, gpu)


def print_arrays(todo: list[Job]) -> None:
    """Which jobs are submitted together, with cluster.parallel."""
    for group in submit.groups(todo):
        if len(group) > 1:
            ids = ", ".join(job.id for job in group)
            print(f"one array: #SBATCH --array=0-{len(group) - 1}%{group[0].resources.parallel}, of {ids}\n")


def print_costs(cells: list[Cell], jobs: list[Job], states: Mapping[Path, str], name: str = "") -> None:
    """Cells, runs and cost of each table and figure, and of all together: of GPUs in hours, of the CPU in minutes."""
    gpu = any(job.resources.gpus for job in jobs) and not all(cell.scale for cell in cells)
    wide = max(8, *(len(cell.target) for cell in cells))
    print(f"{'':<{wide}} {'cells':>5} {'runs':>5}  {'GPU-hours' if gpu else 'CPU-minutes'}")
    for target in dict.fromkeys(cell.target for cell in cells):
        own = [job for job in jobs if any(cell.split("/")[0] == target for cell in job.cells)]
        number = sum(cell.target == target for cell in cells)
        print(f"{target:<{wide}} {number:>5} {len(own):>5}  {_cost(own, gpu):.1f}")
    left = [job for job in jobs if states[job.directory] not in ("finished", NOT_NEEDED)]
    print(f"{'total':<{wide}} {len(cells):>5} {len(jobs):>5}  {_cost(jobs, gpu):.1f}, each run counted once", end="")
    print(f"; {_cost(left, gpu):.1f} left to run in {len(left)} jobs")
    print(cost.basis(name) if gpu else f"estimate: two CPU cores at an assumed {cost.CPU_TERAFLOPS} TFLOP/s")


def _cost(jobs: list[Job], gpu: bool) -> float:
    """GPU-hours, or minutes of two CPU cores: of a table at its own scale, whatever a cluster gives it."""
    known = [job for job in jobs if not math.isnan(job.hours)]
    return sum(job.gpu_hours for job in known) if gpu else 60 * sum(job.cpu_hours for job in known)


def _resources(job: Job) -> str:
    """Of the whole job, and how it is shared out where there is more than one process."""
    asked, where = job.resources, sbatch.layout(job)
    processes = where.nodes * where.tasks
    text = f"{processes if asked.gpus else 0} GPU, {processes * asked.cpus} CPUs, {processes * asked.memory_gb:g} GB"
    return text if processes == 1 else f"{text} ({where.nodes} nodes x {where.tasks} processes)"


def _duration(job: Job) -> str:
    if math.isnan(job.hours):
        return "duration unknown: your own images have not been counted"
    if job.resources.gpus:
        hours = f"{job.gpu_hours:.1f} GPU-hours" if job.gpu_hours >= 0.1 else f"{60 * job.gpu_hours:.1f} GPU-minutes"
        return f"about {hours}, in jobs of up to {job.resources.hours:g} h"
    return f"about {60 * job.cpu_hours:.1f} min on the CPU"


def print_next(cells: list[Cell], jobs: list[Job], options: argparse.Namespace, runs_dir: Path) -> None:
    """Where the results are, how to see what is to come, and what turns them into tables and figures."""
    left, found = len(graph.needed(jobs)), [job.finished_in for job in jobs]
    kept = [place for job, place in zip(jobs, found, strict=True) if place and place != job.directory]
    where = [] if len(kept) == len(jobs) else [str(runs_dir.resolve())]
    where += [f"{kept[0].parents[1]} ({len(kept)} of {len(jobs)} runs are kept there)"] if kept else []
    print(f"\nresults are in {' and '.join(where)}" + (f"; {left} of {len(jobs)} runs are to come:" if left else ""))
    own = ["--runs-dir", str(runs_dir)] if options.runs_dir else []
    if left:
        print(
            shlex.join(
                ["python", "slurm/launch.py", "status", *options.targets, *_chosen(options), *own, *_set(options)]
            )
        )
    print("what to make of them:")
    if options.config:
        last = [job for job in jobs if not any(job.directory in other.parents for other in jobs)]
        print(shlex.join(["python", "paper/compare.py", *(str(job.finished_in or job.directory) for job in last)]))
    tail = [*own, *(["--preset", options.preset or "paper", *_set(options)] if options.set else [])]
    targets = dict.fromkeys(cell.target for cell in cells if not options.config)
    for script, names in _scripts(targets).items():
        print(shlex.join(["python", script, *names, *tail]))


def _scripts(targets: Iterable[str]) -> dict[str, list[str]]:
    """Which script makes each table and figure; a table at its own scale is a table, whatever it is called."""
    made: dict[str, list[str]] = {}
    for target in targets:
        kind = "figures" if target.startswith("figure") else "tables"
        made.setdefault(f"paper/make_{kind}.py", []).append(target)
    return made


def _chosen(options: argparse.Namespace) -> list[str]:
    """What was launched, but for targets and --set."""
    words = {"--config": options.config, "--then": options.then, "--preset": options.preset}
    return [word for key, value in words.items() if value for word in (key, value)]


def _set(options: argparse.Namespace) -> list[str]:
    return ["--set", *options.set] if options.set else []


def print_other_presets(cells: list[Cell], chosen: Budget, options: argparse.Namespace, runs_dir: Path) -> None:
    """A line for each other preset of which there are runs: a demo is no run of the published budget."""
    for name in presets():
        if name != chosen.preset.name:
            begun = Counter(status.states(graph.jobs(cells, budget(name, options.set), runs_dir)))
            new = begun.pop("new", 0)
            if begun:
                counts = ", ".join(f"{number} {state}" for state, number in begun.items())
                print(f"preset {name}: {counts}" + (f", {new} not started" if new else "") + f" (--preset {name})")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main_guard(main)
