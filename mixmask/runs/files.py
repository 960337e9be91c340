"""Files that a crash leaves whole, and what tells one file from another."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
from pathlib import Path

from mixmask.config import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old text or the new, never a part.

    Raises UserError where the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        discard(temporary)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def discard(path: Path) -> None:
    """Delete a file that is no longer needed, if the system allows it."""
    with contextlib.suppress(OSError):
        path.unlink()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def file_identity(path: str | Path) -> str:
    """The identity of a checkpoint that none of our runs wrote: <name>@<first eight digits of its SHA-256>."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "_", Path(path).stem)
    return f"{name}@{file_sha256(path)[:8]}"


def read_text(path: Path) -> str:
    """The text of a file, unpacked where its name ends in .gz; nothing where there is no such file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read().decode(errors="replace")  # a damaged line is named by its number
    except FileNotFoundError:
        return ""
    except (OSError, EOFError) as error:  # a packed file that is cut short ends too early
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
