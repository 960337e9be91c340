"""What a job asks SLURM for: cluster.yaml, a profile of slurm/clusters, the preset's values, --set. No torch here.

Later ones override earlier ones, and values for one stage (`linear.cluster.hours`; a section `linear:` of a profile)
override general ones.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from mixmask.config import ConfigError, build, nearest, read_yaml, within
from mixmask.config.fields import DECIMAL
from mixmask.stages import STAGES
from paper.cells import ROOT
from paper.presets import Budget

# Options of sbatch that the launcher sets itself, and where else their value is said.
OWN = {
    **dict.fromkeys(("partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude"), ""),
    **dict.fromkeys(("exclusive", "wckey", "mail-user", "mail-type", "nodes"), ""),
    "time": "cluster.hours",
    **dict.fromkeys(("mem", "mem-per-cpu"), "cluster.memory_gb"),
    **dict.fromkeys(("mem-per-gpu",), "cluster.memory_gb and memory_per_cpu"),
    **dict.fromkeys(("gpus-per-node", "gres", "gpus", "gpus-per-task"), "cluster.gpus, gpu_type and gres"),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "cluster.cpus"),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu"), "a job has one process a GPU"),
    **dict.fromkeys(("output", "error", "open-mode"), "status looks for logs where they are now"),
    **dict.fromkeys(("job-name", "comment"), "the next launch recognises a job by it"),
    **dict.fromkeys(("dependency", "kill-on-invalid-dep"), "children wait for their parents by it"),
    **dict.fromkeys(("requeue", "no-requeue"), "a job goes on where it was by it"),
    "signal": "cluster.warning_seconds",
    "array": "cluster.parallel",
    "chdir": "a job runs a copy of the code",
    **dict.fromkeys(
        ("export", "export-file"),
        "a job has the environment of the launch, without SLURM's variables; cluster.setup adds to it",
    ),
    **dict.fromkeys(("wrap", "parsable", "test-only", "wait", "quiet", "help", "usage", "version"), "it reads sbatch"),
    **dict.fromkeys(("clusters", "cluster", "uid", "gid", "hold"), "the next launch would not find the job"),
}
SECTIONS = {*STAGES, "extra"}  # keys whose value has keys
DAYS = r"(?P<days>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?"
TIME = re.compile(rf"{DAYS}|(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)|(?P<only>\d+):(?P<rest>\d+)")


@dataclass(frozen=True)
class Cluster:
    """What a job asks SLURM for (slurm/cluster.yaml says what each key means)."""

    partition: str
    account: str
    qos: str
    reservation: str
    constraint: str
    nodelist: str
    exclude: str
    exclusive: bool
    nodes: int = within(1)
    gpus: int = within(0)
    gpu_type: str
    gres: str
    cpus: int = within(1)
    memory_gb: float = within(0)
    memory_per_cpu: bool
    memory_limit_gb: float = within(0)
    hours: float = within(0.01)
    warning_seconds: int = within(0)
    parallel: int = within(0)
    mail_user: str
    mail_type: str
    wckey: str
    extra: Mapping[str, Any]
    setup: tuple[str, ...]
    python: str
    srun: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            texts = [value] if isinstance(value := getattr(self, field.name), str) else value
            if isinstance(texts, list | tuple) and any("\n" in text for text in texts):
                raise ConfigError(f"cluster.{field.name}: expected one line, found {value!r}")
        for name, value in self.extra.items():
            _check_extra(str(name), value)

    def __hash__(self) -> int:  # `extra` is a mapping
        return hash(repr(self))


def _check_extra(name: str, value: Any) -> None:
    """Raises ConfigError for a wrong option, or one that is already set (sbatch accepts abbreviated names)."""
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        raise ConfigError(f"cluster.extra.{name}: expected the long name of an option of sbatch, such as licenses")
    for own in [name] if name in OWN else [own for own in OWN if own.startswith(name)]:
        where = OWN[own] or f"cluster.{own.replace('-', '_')}"
        raise ConfigError(f"cluster.extra.{name}: the launcher sets --{own} itself ({where})")
    if not isinstance(value, str | int | float) or "\n" in str(value):
        raise ConfigError(f"cluster.extra.{name}: expected a word, a number or true, found {value!r}")


def cluster(budget: Budget, stage: str = "pretrain", profile: str = "") -> Cluster:
    """What a job of `stage` asks for. Raises ConfigError for a wrong key or value, and for an unknown profile."""
    given = [_flat(read_yaml(ROOT / "slurm" / "cluster.yaml")), _flat(read_profile(profile))]
    given += [_flat(budget.preset.cluster), _flat(budget.settings.get("cluster", {}))]
    every: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for values in given:
        named = {key for key in values if key.partition(".")[0] in STAGES}
        every |= {key: value for key, value in values.items() if key not in named}
        if values is given[2] or values is given[3]:  # a preset's nets are small in every stage; --set is the user's
            own = {key: value for key, value in own.items() if key not in values}
        own |= {key.partition(".")[2]: values[key] for key in named if key.partition(".")[0] == stage}
    values = _nested({**every, **STAGES[stage].resources, **own})
    return build(Cluster, {key: _said(key, value) for key, value in values.items()}, "cluster")


def read_profile(name: str) -> dict[str, Any]:
    """slurm/clusters/NAME.yaml, or a file of the user's; nothing where no name is given. Raises ConfigError."""
    if not name:
        return {}
    if name.endswith((".yaml", ".yml")):
        return read_yaml(Path(name))
    known = sorted(path.stem for path in (ROOT / "slurm" / "clusters").glob("*.yaml"))
    if name not in known:
        hint = nearest(name, known)
        raise ConfigError(f"--cluster {name}: expected a file NAME.yaml, or a profile of slurm/clusters{hint}")
    return read_yaml(ROOT / "slurm" / "clusters" / f"{name}.yaml")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections (`extra`, a stage's) as dotted keys; one without keys is none."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        section = str(key).rpartition(".")[2] in SECTIONS
        if section and value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"cluster.{key}: expected keys and values, found {value!r}")
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{name}": inner for name, inner in _flat(value).items()}
        elif not section:
            flat[str(key)] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys of `extra` as its section."""
    values = {key: value for key, value in flat.items() if not key.startswith("extra.")}
    extra = {key.removeprefix("extra."): value for key, value in flat.items() if key.startswith("extra.")}
    return {**values, "extra": extra}


KINDS = {field.name: field.type for field in dataclasses.fields(Cluster)}


def _said(key: str, value: Any) -> Any:
    """A value as its key has it: a word may look like a whole number, a list may be one line, hours a SLURM time."""
    kind = KINDS.get(key)
    if kind == "str" and (value is None or type(value) in (int, date)):
        return "" if value is None else str(value)
    if kind == "str" and not isinstance(value, str):
        raise ConfigError(f"cluster.{key}: expected a word, found {value!r}; quote it: cluster.{key}=\"'...'\"")
    if kind == "tuple[str, ...]" and (value is None or isinstance(value, str)):
        return (value,) if value else ()
    if key == "hours" and isinstance(value, str) and (time := TIME.fullmatch(value)):
        return _hours(**{name: int(text or 0) for name, text in time.groupdict().items()})
    if key == "hours" and isinstance(value, str) and not DECIMAL.fullmatch(value):
        forms = "or as SLURM has it: 30:00, 24:00:00, 2-00:00:00"
        raise ConfigError(f"cluster.hours: expected a number, found {value!r}; {forms}")
    return value


def _hours(days: int, h: int, m: int, s: int, hours: int, minutes: int, seconds: int, only: int, rest: int) -> float:
    """Of D-H[:M[:S]], H:M:S or M:S, in whole minutes, as SLURM has it."""
    whole = 24 * 60 * days + 60 * (h + hours) + m + minutes + only
    return math.ceil(whole + (s + seconds + rest) / 60) / 60
