"""The note that `detection/convert.py` writes beside a file, for what the file does not hold itself."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixmask import config as configs
from mixmask.config import Backbone, ConfigError
from mixmask.formats.architectures import shapes
from mixmask.formats.source import FormatError, Source, one_line
from mixmask.runs import file_sha256

NOTED = frozenset(("target", "sha256", "identity", "source", "tensors", "arch", "stem", "width", "mean", "std"))


def sidecar(path: str | Path) -> Path:
    """Where `detection/convert.py` writes what a file it wrote does not hold itself."""
    return Path(f"{path}.json")


def read_sidecar(path: str | Path) -> dict[str, Any] | None:
    """What `detection/convert.py` noted of the file at `path`; None where it wrote none.

    Raises FormatError for a note that cannot be read, or that is of another file.
    """
    if not os.path.lexists(sidecar(path)):
        return None
    note = read_note(sidecar(path))
    if note["sha256"] != file_sha256(path):
        raise FormatError(f"{path} is not the file that {sidecar(path)} describes (another SHA-256): convert again")
    return note


def read_note(path: Path) -> dict[str, Any]:
    """A note of any conversion. Raises FormatError for a file that is not one, such as one of the user's own."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"cannot read {path}: {one_line(error)}") from None
    missing = sorted(NOTED - note.keys()) if isinstance(note, dict) else sorted(NOTED)
    if missing:
        raise FormatError(f"{path} is no note of a conversion: it has no '{missing[0]}'")
    _check_note(note, path)
    return note


def _check_note(note: dict[str, Any], path: Path) -> None:
    """Raises FormatError for values that `detection/convert.py` does not write."""
    triple = tuple[float, float, float]
    hints = {"target": str, "sha256": str, "identity": str, "tensors": int, "mean": triple, "std": triple}
    try:
        configs.build(Backbone, {key: note[key] for key in ("arch", "stem", "width")} | {"bn_groups": 1})
        values = {key: configs.convert(note[key], hint, key) for key, hint in hints.items()}
        if not isinstance(note["source"], dict) or not isinstance(note["source"].get("sha256"), str):
            raise ConfigError(f"source: expected a section with 'sha256', found {note['source']!r}")
        if min(values["std"]) <= 0:
            raise ConfigError(f"std: expected numbers above 0, found {note['std']}")
    except ConfigError as error:
        raise FormatError(f"{path} is no note of a conversion: {error}") from None


def with_sidecar(source: Source, path: Path) -> Source:
    """Whose weights, the kind of stem and the normalisation, of a file that we converted."""
    note = read_sidecar(path)
    if note is None:
        return source
    backbone = Backbone(note["arch"], note["stem"], note["width"], 1)
    if shapes(backbone) != shapes(source.backbone):
        what = " of width {0.width} with the {0.stem} stem".format
        raise FormatError(
            f"{sidecar(path)} describes a {backbone.arch}{what(backbone)}, but {path} holds a "
            f"{source.backbone.arch}{what(source.backbone)}"
        )
    return replace(
        source, backbone=backbone, mean=tuple(note["mean"]), std=tuple(note["std"]), identity=note["identity"]
    )
