"""Where a run is made: versions, machine and commit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = "COMMIT.json"  # at the root of a copy of the code
CODE = ("commit", "modified", "changes", "snapshot")  # keys of an environment that say which code it was
ORDER = ("threads", "processes")  # ... and in which order sums are made
CONTINUATION = ("step", "time", "changed")  # what a line of environments.jsonl has besides an environment
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm", "scikit-image", "pandas", "submitit")


def environment() -> dict[str, Any]:
    """Versions, machine and commit, as plain types."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        **parallelism(),
        **versions,
        **commit(),
    }


def parallelism() -> dict[str, int]:
    """Threads and processes of a program that uses torch: they decide the order of sums."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {"threads": torch.get_num_threads(), "processes": torch.distributed.get_world_size() if group else 1}


def short(value: Any) -> str:
    """For a line: a commit by its first twelve digits."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{40}", text) else text


def commit() -> dict[str, Any]:
    """The repository's commit and whether the working tree differs from it; None outside a repository.

    `changes`, where it differs: eight digits of the SHA-256 of the difference, to tell one edit from another.

    A copy of the code that a launch has made (slurm/snapshot.py) says itself what it is a copy of.
    """
    if (ROOT / SNAPSHOT).exists():
        return json.loads((ROOT / SNAPSHOT).read_text(encoding="utf-8"))
    try:
        head = _git("rev-parse", "HEAD")
        if not _git("status", "--porcelain", "-uno").strip():
            return {"commit": head.strip(), "modified": False}
        changes = hashlib.sha256(_git("diff", "--binary", "HEAD").encode(errors="replace")).hexdigest()[:8]
        return {"commit": head.strip(), "modified": True, "changes": changes}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "modified": None}


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=20)
    return answer.stdout
