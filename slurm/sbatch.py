"""What a job requests from SLURM, and its batch script. No torch here."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmask.config import ConfigError, UserError
from mixmask.runs import read_result
from mixmask.training.processes import fitting_processes
from paper.cells import ROOT
from slurm import shell
from slurm.cluster import Cluster
from slurm.command import Command
from slurm.graph import Job

REFUSED = set("%:\\\"'\n")  # of the runs directory's path: sbatch or PYTHONPATH would take it apart
END = "slurm/batch_end.sh"  # in the copy of the code


@dataclass(frozen=True)
class Layout:
    """The processes of a job: so many nodes, so many processes (and GPUs) on each."""

    nodes: int
    tasks: int


def layout(job: Job) -> Layout:
    """The most processes that can share the run and that the settings allow, on the fewest nodes."""
    asked = job.resources
    each = max(1, asked.gpus)
    most = asked.nodes * asked.gpus or 1
    for processes in sorted(fitting_processes(job.config), reverse=True):
        for nodes in range(1, asked.nodes + 1):
            if processes <= most and processes % nodes == 0 and processes // nodes <= each:
                return Layout(nodes, processes // nodes)
    return Layout(1, 1)


def key_of(directory: Path) -> str:
    """The name of a run for SLURM: its directory."""
    return str(directory.resolve())


def options(
    job: Job, waited: list[str], snapshot: Path, before: str = "", excluded: Sequence[str] = ()
) -> dict[str, Any]:
    """sbatch's long options for `job`, which starts once the jobs `waited` have succeeded; True: without a value.

    before: a job that it waits for however that ends, if any. excluded: nodes.
    """
    asked, where = job.resources, layout(job)
    after = (f"afterok:{':'.join(waited)}," if waited else "") + (f"afterany:{before}," if before else "")
    values = {
        "job-name": f"{job.id}@{short_hash(key_of(job.directory))}",
        "comment": key_of(job.directory),
        "time": minutes(asked),
        "nodes": where.nodes,
        "ntasks-per-node": where.tasks,
        "cpus-per-task": asked.cpus,
        **_memory(asked, where),
        **_gpus(asked, where),
        **{name.replace("_", "-"): getattr(asked, name) for name in ("partition", "account", "qos", "reservation")},
        **{name.replace("_", "-"): getattr(asked, name) for name in ("constraint", "nodelist", "exclusive", "wckey")},
        **{name.replace("_", "-"): getattr(asked, name) for name in ("mail_user", "mail_type")},
        "exclude": ",".join(filter(None, [asked.exclude, *excluded])),
        "signal": f"USR2@{asked.warning_seconds}",
        "dependency": f"{after}singleton",
        "kill-on-invalid-dep": "yes",
        "requeue": True,
        "chdir": str(snapshot),
        **asked.extra,
    }
    return {name: value for name, value in values.items() if value != "" and value is not False}  # 0 is asked for


def _memory(asked: Cluster, where: Layout) -> dict[str, str]:
    """Of a node, or of a CPU, in MB; nothing where none is asked for."""
    if not asked.memory_gb:
        return {}
    if asked.memory_per_cpu:
        return {"mem-per-cpu": f"{math.ceil(1024 * asked.memory_gb / asked.cpus)}M"}
    return {"mem": f"{math.ceil(1024 * asked.memory_gb * where.tasks)}M"}


def _gpus(asked: Cluster, where: Layout) -> dict[str, str]:
    if not asked.gpus:
        return {}
    if asked.gres:
        return {"gres": ":".join(filter(None, [asked.gres, asked.gpu_type, str(where.tasks)]))}
    return {"gpus-per-node": ":".join(filter(None, [asked.gpu_type, str(where.tasks)]))}


def minutes(asked: Cluster) -> int:
    """The time limit, which SLURM has in whole minutes."""
    return max(1, round(60 * asked.hours))


def array_options(group: list[Job], snapshot: Path, manifest: Path, **others: Any) -> dict[str, Any]:
    """`options` of an array: its comment names the file that lists its runs. Its tasks share a name, so `singleton` is
    left out: it would run one at a time.
    """
    values = options(group[0], [], snapshot, **others)
    values["job-name"] = f"{group[0].stage}-{len(group)}-runs@{short_hash(str(manifest))}"
    values |= {"comment": str(manifest), "dependency": values["dependency"].removesuffix("singleton").rstrip(",")}
    return {option: value for option, value in values.items() if value != ""}


def setup(job: Job, snapshot: Path) -> list[str]:
    """The batch script's lines before srun: the user's first, so that the copy of the code stays in front."""
    return [
        "trap : TERM USR2  # what follows srun is to be reached",
        *job.resources.setup,
        f'export PYTHONPATH={shlex.quote(str(snapshot))}:"$PYTHONPATH"',
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{job.resources.cpus}}}",
        "export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}",
    ]


def srun_options(job: Job) -> list[str]:
    """srun takes neither the CPUs of a process nor the environment of the batch script for granted."""
    return ["--kill-on-bad-exit=1", "--export=ALL", f"--cpus-per-task={job.resources.cpus}", *job.resources.srun]


def teardown(job: Job, snapshot: Path, folder: Path) -> list[str]:
    """The lines after srun: requeue the job where it has asked for that, or has run out of memory."""
    limit = math.floor(1024 * job.resources.memory_limit_gb)
    where = f"{shlex.quote(str(snapshot / END))} $? {shlex.quote(str(folder))}"
    return [f"bash {where} {limit} {layout(job).tasks} {job.resources.cpus}"]


def parameters(job: Job, asked: dict[str, Any], snapshot: Path, folder: Path) -> dict[str, Any]:
    """`asked` and the script around srun, as submitit takes them."""
    named = {name.replace("-", "_"): value for name, value in asked.items()}
    return {
        "time": asked["time"],
        "wckey": asked.get("wckey"),  # submitit has one of its own
        "additional_parameters": named,
        "stderr_to_stdout": True,
        "setup": setup(job, snapshot),
        "srun_args": srun_options(job),
        "teardown": teardown(job, snapshot, folder),
    }


def batch_text(job: Job, runs_dir: Path) -> str:
    """What the batch script of `job` asks for and runs; the parents' numbers and the copy of the code are to come."""
    check([job], runs_dir)
    folder = runs_dir.resolve() / "slurm"
    snapshot = folder / "snapshots" / "<copy of the code>"
    waited = [f"<job of {parent.name}>" for parent in job.parents if read_result(parent) is None]
    asked = options(job, waited, snapshot)
    texts = {name: "" if value is True else f"={shlex.quote(str(value))}" for name, value in sorted(asked.items())}
    lines = [f"#SBATCH --{name}{text}" for name, text in texts.items()]
    python = job.resources.python or "python"
    command = shlex.join(["srun", *srun_options(job)]) + f" {python} {shlex.join(job.command[1:])}"
    return "\n".join([*lines, *setup(job, snapshot), command, *teardown(job, snapshot, folder)])


def command(job: Job, runs_dir: Path) -> Command:
    """What the job runs, with a data directory that does not depend on where it runs."""
    words = job.command
    root = job.config.run.data_root
    if "--config" in words and not Path(root).is_absolute():  # a stage without recipes reads no data
        words += ("--set", f"run.data_root={ROOT / root}")
    return Command(
        words=words,
        directory=key_of(job.directory),
        parents=tuple(map(key_of, job.parents)),
        logs=str(runs_dir.resolve() / "slurm"),
        warning_seconds=job.resources.warning_seconds,
    )


def short_hash(text: str) -> str:
    """Six hexadecimal digits, to tell names apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


# ----------------------------------------------------------------------------------- what no cluster would bear


def check(jobs: list[Job], runs_dir: Path) -> None:
    """Raises UserError for what sbatch would accept but no job would survive."""
    path = str(runs_dir.resolve())
    if wrong := ", ".join(map(repr, sorted(set(path) & REFUSED))):
        raise UserError(
            f"the runs directory {path!r} has {wrong} in its path, which sbatch or PYTHONPATH would take apart"
        )
    for asked in {job.resources for job in jobs}:
        if asked.warning_seconds >= (limit := 60 * minutes(asked)):
            raise ConfigError(
                f"cluster.warning_seconds: {asked.warning_seconds} s before the time limit, which is {limit} s "
                f"(cluster.hours {asked.hours:g}); expected less"
            )


@dataclass(frozen=True, order=True)
class Node:
    """What a node has, or a job asks of one."""

    gpus: int
    cpus: int
    memory: int  # MB

    def __str__(self) -> str:
        return f"{self.gpus} GPUs, {self.cpus} CPUs, {self.memory / 1024:.0f} GB"

    def holds(self, other: Node) -> bool:
        return self.gpus >= other.gpus and self.cpus >= other.cpus and self.memory >= other.memory


def check_nodes(jobs: list[Job]) -> None:
    """Raises UserError for a job that no node of its partition can hold, with what the largest one has."""
    for asked, where in {(job.resources, layout(job)) for job in jobs}:
        memory = math.ceil(1024 * asked.memory_gb * where.tasks)
        wanted = Node(where.tasks if asked.gpus else 0, where.tasks * asked.cpus, memory)
        nodes = nodes_of(asked.partition, asked.gpu_type)
        if nodes and not any(node.holds(wanted) for node in nodes):
            whose = f"of partition {asked.partition}" if asked.partition else "of this cluster"
            kind = f" (of type {asked.gpu_type})" if asked.gpu_type else ""
            raise UserError(
                f"a job asks for {wanted} of a node, and no node {whose} has so much: the largest has {max(nodes)}"
                f"{kind}; fewer: --set cluster.gpus, cluster.cpus (per process), cluster.memory_gb (per process)"
            )


def nodes_of(partition: str, gpu_type: str = "") -> list[Node]:
    """What the nodes of a partition (every one) have, by sinfo, with their GPUs of one type alone where it is given."""
    words = ["sinfo", "--noheader", "--Node", "--format=%c|%m|%G", *([f"--partition={partition}"] if partition else [])]
    nodes = []
    for cpus, memory, gres in re.findall(r"^\s*(\d+\+?)\|(\d+\+?)\|(.*)$", shell.ask(*words), re.MULTILINE):
        gpus = re.findall(r"\bgpu:(?:([^:,(]+):)?(\d+)", gres)
        count = sum(int(number) for kind, number in gpus if not gpu_type or kind == gpu_type)
        nodes.append(Node(count, int(cpus.rstrip("+")), int(memory.rstrip("+"))))
    return nodes
