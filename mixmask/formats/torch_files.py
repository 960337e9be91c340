"""Files of torch.save, in either of its two formats, and TorchScript: read without running what they hold."""

from __future__ import annotations

import pickle
import re
import types
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from mixmask import checkpoint
from mixmask.formats.source import FormatError, one_line, reason

TRUST = "if you trust whoever made the file: --trust-pickle"
OLDER = bytes.fromhex("6cfc9c46f9206aa85019")  # torch's magic number, pickled at the beginning of its older format


def torch_file(path: Path, trust_pickle: bool) -> Any:
    """What torch.save wrote; of TorchScript, which is code, the module. Raises FormatError."""
    protocol = _check_archive(path, trust_pickle) if zipfile.is_zipfile(path) else _protocol(path.open("rb").read(2))
    if protocol > 3 and not trust_pickle:
        raise FormatError(
            f"{path} is written in pickle's protocol {protocol}; without running code only protocols 2 and 3 are read; "
            f"{TRUST}"
        )
    try:
        with warnings.catch_warnings(), path.open("rb") as file:  # opened here: newer versions go by a file's name
            warnings.simplefilter("ignore", UserWarning)  # about sparse and quantized tensors, refused by name
            return torch.load(
                file, "cpu", pickle_module=TRUSTING if trust_pickle else None, weights_only=not trust_pickle
            )
    except Exception as error:  # other bytes raise almost any error in torch's reader
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is None:
            what = f"is cut off or damaged, or no checkpoint at all ({reason(error)})"
            raise FormatError(f"{path} {what}{checkpoint.remedy(path)}") from None
        raise FormatError(
            f"{path} holds pickled objects besides tensors and plain types ({name[1]}); refused, and nothing in it was "
            f"run; {TRUST}"
        ) from None


def is_older_torch(head: bytes) -> bool:
    """Whether a file that begins like this is of torch.save's older format."""
    return OLDER in head[:32]


def _check_archive(path: Path, trust_pickle: bool) -> int:
    """The protocol of the pickle in a zip archive. Raises FormatError for another archive, or a damaged one.

    The archive has checksums, which torch.load does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickled = next((name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
            if pickled is None:
                raise FormatError(f"{path} is a zip archive without a checkpoint of PyTorch (first in it: {names[:1]})")
            if any(name.endswith("/constants.pkl") for name in names) and not trust_pickle:
                raise FormatError(f"{path} is a TorchScript archive, which holds code; refused, and not run; {TRUST}")
            head = archive.open(pickled).read(2)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error) as error:
        what = f"{path} is cut off or damaged ({one_line(error)}){checkpoint.remedy(path)}"
        raise FormatError(what) from None
    what = f"is damaged: the checksum of {damaged} is wrong" if damaged else checkpoint.damage(path)
    if what:
        raise FormatError(f"{path} {what}{checkpoint.remedy(path)}")
    return _protocol(head)


def _protocol(head: bytes) -> int:
    return head[1] if head[:1] == b"\x80" and len(head) > 1 else 0


class Absent:
    """An empty stand-in for an object of a trusted file whose code is not installed (a config, a logger)."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class TrustingUnpickler(pickle.Unpickler):
    """An unpickler that runs a trusted file's code, with stand-ins for what is not installed."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name.rpartition(".")[2], (Absent,), {"__module__": module})


TRUSTING = types.ModuleType("trusting")  # what torch.load uses as its pickle module
TRUSTING.Unpickler = TrustingUnpickler
TRUSTING.load = lambda file, **options: TrustingUnpickler(file, **options).load()
