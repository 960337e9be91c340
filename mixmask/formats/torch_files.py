"""Files of torch.save: read without running what they hold, and the state dict inside."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmask import checkpoint
from mixmask.formats.source import FormatError, one_line, reason, word


def torch_file(path: Path, trust_pickle: bool) -> Any:
    """What torch.save wrote, in either of its two file formats."""
    _check_archive(path)
    try:
        with warnings.catch_warnings():  # about sparse and quantized tensors, which are refused by name
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except (ImportError, AttributeError) as error:
        raise FormatError(f"{path} needs code that is not here ({one_line(error)})") from None
    except Exception as error:  # bytes that are no checkpoint end in any error of torch's reader
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is None:
            what = f"is cut off or damaged, or no checkpoint at all ({reason(error)})"
            raise FormatError(f"{path} {what}{checkpoint.remedy(path)}") from None
        raise FormatError(
            f"{path} holds pickled objects besides tensors and plain types ({name[1]}); refused, and nothing in it was "
            "run; if you trust whoever made the file: --trust-pickle"
        ) from None


def _check_archive(path: Path) -> None:
    """The newer of the two formats, a zip archive, has checksums, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        what = f"{path} is cut off or damaged ({one_line(error)}){checkpoint.remedy(path)}"
        raise FormatError(what) from None
    what = f"is damaged: the checksum of {damaged} is wrong" if damaged else checkpoint.damage(path)
    if what:
        raise FormatError(f"{path} {what}{checkpoint.remedy(path)}")


def tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The state dict: the file's content itself, or its entry `state_dict` or `model`."""
    if isinstance(state, dict):
        inner = _state_dicts(state)
        if len(inner) > 1:
            raise FormatError(f"{path} has both 'state_dict' and 'model'; expected one of them")
        state = state[inner[0]] if inner else state
    if not isinstance(state, dict):
        raise FormatError(f"{path} holds a {type(state).__name__}; expected names and tensors (a state dict)")
    other = [k for k, v in state.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if other or not state:
        found = f"{other[0]!r} is a {type(state[other[0]]).__name__}" if other else "nothing in it"
        raise FormatError(
            f"{path} holds no state dict ({found}; entries: {', '.join(map(str, list(state)[:6])) or 'none'}); "
            "expected tensors by name, as such or under 'state_dict' or 'model'"
        )
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "on the meta device" if value.is_meta else word(value.layout)
            raise FormatError(f"{path}: '{key}' is {kind}; expected a dense tensor with its values")
    return {key: value.detach() for key, value in state.items()}


def _state_dicts(state: dict[str, Any]) -> list[str]:
    return [name for name in ("state_dict", "model") if isinstance(state.get(name), dict)]


def entries(state: dict[str, Any]) -> dict[str, int]:
    """What stands beside the state dict and is more than a plain value: "entry NAME" -> how many entries it has."""
    used = _state_dicts(state)
    parts = {k: v for k, v in state.items() if used and k not in used and isinstance(v, dict | list | Tensor)}
    return {f"entry {k}": 1 if isinstance(v, Tensor) else len(v) for k, v in parts.items()}
