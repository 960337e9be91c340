"""Where a number comes from: a run's config, command, commit, environment, metrics and curves, as HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mixmask.config import read_yaml
from mixmask.runs import read_environments, read_log, read_result
from paper.report.curve import curves
from paper.report.render import render


@dataclass(frozen=True)
class Runs:
    """The runs that lie in some folders, by their names; where two have one name, the first."""

    directories: Mapping[str, Path]  # finished and unfinished ones

    @classmethod
    def find(cls, folders: Iterable[Path]) -> Runs:
        directories: dict[str, Path] = {}
        for folder in folders:
            for path in sorted(folder.glob("*/*/config.yaml")) + sorted(folder.glob("*/*/result.json")):
                directories.setdefault(path.parent.name, path.parent)
        return cls(directories)

    def chain(self, name: str) -> list[str]:
        """The runs that `name` needs, itself last: the pre-training before its evaluation."""
        parent = _checkpoint_of(self.directories[name]) if name in self.directories else ""
        return [*(self.chain(parent) if parent in self.directories and parent != name else []), name]

    def unfinished(self) -> list[tuple[str, str]]:
        """Name and last logged epoch of each run without a result."""
        names = [name for name, path in self.directories.items() if not (path / "result.json").exists()]
        return [(name, _last_epoch(self.directories[name])) for name in names]


def _checkpoint_of(directory: Path) -> str:
    """Whose weights an evaluation took: the identity of another run, or of a file."""
    path = directory / "config.yaml"
    config = read_yaml(path) if path.exists() else {}
    return config.get("checkpoint") or (read_result(directory) or {}).get("checkpoint", "")


def _last_epoch(directory: Path) -> str:
    epochs = [line["epoch"] for line in read_log(directory) if "epoch" in line]
    return f"epoch {max(epochs)}" if epochs else "nothing logged yet"


def record(name: str, directory: Path) -> Markup:
    """A run: `<details id="run/NAME">`, its parts in `<div class="record">`."""
    result, environment = read_result(directory) or {}, _environment(directory)
    facts = {
        "metrics": ", ".join(f"{key} {value:.4g}" for key, value in result.get("metrics", {}).items()),
        "commit": _commit(environment),
        "environment": ", ".join(f"{k} {v}" for k, v in environment.items() if v and k not in ("commit", "modified")),
        "continued": "; ".join(f"step {e['step']}: {e['changed']}" for e in read_environments(directory)[1:]),
        "device": result.get("device", ""),
        "time": _duration(result.get("timing", {}).get("seconds")),
        "weights of": _checkpoint_of(directory),
        "checkpoint": _sha256(directory),
    }
    files = {"command": _read(directory / "command.txt"), "config": _read(directory / "config.yaml")}
    return render(
        "record.html",
        name=name,
        stage=directory.parent.name,
        last=_last(result),
        facts={fact: value for fact, value in facts.items() if value not in ("", None)},
        curves=curves(read_log(directory)),
        texts={title: text.strip() for title, text in files.items() if text},
    )


def _last(result: Mapping[str, Any]) -> str:
    """The first metric of the last epoch, for a list of runs."""
    metrics = result.get("metrics", {}).items()
    return next((f"{key} {value:.1f}" for key, value in metrics if key.endswith("_last")), "")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_read(path) or "{}")


def _environment(directory: Path) -> dict[str, Any]:
    return _json(directory / "environment.json")


def _commit(environment: Mapping[str, Any]) -> str:
    changed = " and changes that were not committed" if environment.get("modified") else ""
    return f"{environment.get('commit') or 'unknown'}{changed}" if environment else ""


def _sha256(directory: Path) -> str:
    sha256 = _json(directory / "kept.json").get("checkpoint_sha256")
    return f"SHA-256 {sha256}" if sha256 else ""


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"
