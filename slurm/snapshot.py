"""The code as it is at a launch, copied: what a job runs does not change while it waits. No torch here.

runs/slurm/snapshots/<commit>-<hash8 of its files>/    one for each state of the code, used again while it is the same
    COMMIT.json    the commit, and whether the files differ from it
    changes.diff   how
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from mixmask.config import UserError
from mixmask.runs import SNAPSHOT

CODE = (".py", ".yaml", ".sh")  # of files that git does not know yet, those that a job may need
SKIPPED = {"runs", "data", "build", "dist", "__pycache__"}
COPIES = "slurm/snapshots"  # in a runs directory
WRITTEN = (COPIES, "command.txt")  # what a directory holds that is one of runs, or a run's own


def take(root: Path, folder: Path) -> Path:
    """A copy in `folder` of the files below `root` that git tracks, and of new code; returns the copy's directory.

    What runs and launches have written below `root` is no code, wherever it is.

    Raises UserError where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as temporary:
            copy = Path(temporary) / "code"
            digest = _copy(root, copy)
            commit = _git(root, "rev-parse", "HEAD").strip() or None
            place = folder / f"{commit[:12] if commit else 'unknown'}-{digest}"
            if not place.exists():
                _record(root, copy, commit, place.name)
                copy.rename(place)
            return place
    except OSError as error:
        raise UserError(f"cannot copy the code to {folder}: {error.strerror}") from None


def _copy(root: Path, copy: Path) -> str:
    """Copy the files; returns eight digits of the hash of what was copied."""
    digest = hashlib.sha256()
    for name in files(root):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target)
        digest.update(f"{name}\0".encode() + hashlib.sha256(target.read_bytes()).digest())
    return digest.hexdigest()[:8]


def files(root: Path) -> list[str]:
    """What belongs to the code, by name: as git says, or without git every code file; nothing a run wrote."""
    tracked = _git(root, "ls-files", "-z").split("\0")
    if tracked == [""]:
        names = [p.relative_to(root) for suffix in CODE for p in root.rglob(f"*{suffix}")]
        names = [n for n in names if not SKIPPED & set(n.parts) and not any(p[0] == "." for p in n.parts)]
        return sorted(str(name) for name in names if not _written(root, name))
    new = [n for n in _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0") if n.endswith(CODE)]
    new = [name for name in new if not _written(root, Path(name))]
    return sorted(name for name in {*tracked, *new} if (root / name).is_file())


def _written(root: Path, name: Path) -> bool:
    """Whether a launch or a run has written this file: a copy of the code, or a file in a directory of runs."""
    folders = [root / folder for folder in name.parents[:-1]]
    return f"/{COPIES}/" in f"/{name}" or any((folder / mark).exists() for folder in folders for mark in WRITTEN)


def _record(root: Path, copy: Path, commit: str | None, name: str) -> None:
    """Record in the copy what it is a copy of."""
    diff = _git(root, "--work-tree", str(copy), "diff", "--binary", "HEAD") if commit else ""
    new = sorted(set(files(root)) - set(_git(root, "ls-files", "-z").split("\0"))) if commit else []
    (copy / "changes.diff").write_text(diff, encoding="utf-8")
    said = {"commit": commit, "modified": bool(diff or new) if commit else None, "snapshot": name}
    (copy / SNAPSHOT).write_text(json.dumps(said) + "\n", encoding="utf-8")


def _git(root: Path, *words: str) -> str:
    """Git's answer about the repository whose root is `root`; nothing where there is none."""
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), *words]
    if words[0] == "--work-tree":
        command = ["git", "--git-dir", str(root / ".git"), *words]
    answer = subprocess.run(
        command, capture_output=True, text=True, errors="surrogateescape", env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    )
    return answer.stdout if answer.returncode == 0 else ""
