"""Checkpoints: the last two kept, written atomically, tensors and plain types only, read without executing anything.

Beside checkpoint.pt and checkpoint.previous.pt lies checkpoint.sha256, the SHA-256 of both: the CRCs inside the zip
archive that torch.save writes do not cover its directory, where a flipped bit can exchange one tensor for another.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mixmask import config as configs
from mixmask.backbones import Encoder
from mixmask.config import ConfigError, Pretrain, UserError
from mixmask.frameworks import build_framework
from mixmask.runs import discard, file_sha256, previous_checkpoint, what_is_left, write_atomically
from mixmask.training.progress import say

FORMAT = 1
NO_CHECKPOINT = "is cut off or damaged, or no checkpoint at all; nothing in it was run"


class CheckpointError(UserError):
    """A checkpoint cannot be used; the text names the file and the reason."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Make `state` the last checkpoint and keep the one before: at any instant one of the two is there and whole.

    Written beside, flushed to disk, its digest noted, renamed. Raises CheckpointError where that fails.
    """
    temporary = path.with_name(f".{path.name}.new")  # one name: what a crash left behind is overwritten
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        digests = [file_sha256(temporary), *_digests(path)][:3]  # of the new one, and of the two that are there
        write_atomically(digest_file(path), "".join(f"{digest}\n" for digest in digests))
        if path.exists() and damage(path) is None:  # a damaged one must not replace a whole one
            os.replace(path, previous_checkpoint(path))
        os.replace(temporary, path)
    except (OSError, RuntimeError, UserError) as error:  # RuntimeError: torch's writer, after a write that failed
        discard(temporary)
        causes = [getattr(e, "strerror", None) for e in (error, error.__context__)]
        reason = next(filter(None, causes), f"is the disk full? {one_line(error)}")
        raise CheckpointError(f"cannot write {path}: {reason}; {_left(path)}") from None


def keep(path: Path, epoch: int) -> None:
    """Give the checkpoint at `path` a second name, which no later one takes. Raises CheckpointError."""
    kept = kept_checkpoint(path, epoch)
    temporary = kept.with_name(f".{kept.name}.new")
    try:
        discard(temporary)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        write_atomically(digest_file(kept), "".join(f"{digest}\n" for digest in _digests(path)[:1]))
        os.replace(temporary, kept)
    except OSError as error:
        discard(temporary)
        raise CheckpointError(f"cannot write {kept}: {error.strerror}; {_left(path)}") from None


def kept_checkpoint(path: Path, epoch: int) -> Path:
    """Where `keep` keeps it: checkpoint.epoch0100.pt."""
    return path.with_name(f"{path.stem}.epoch{epoch:04}{path.suffix}")


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over every tensor with its name, bit by bit."""
    sha = hashlib.sha256()
    for name, value in weights.items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _left(path: Path) -> str:
    """After a save that failed."""
    left = what_is_left(path.with_name("checkpoint.pt"))
    return left.replace("last checkpoint", "checkpoint before")


def digest_file(path: Path) -> Path:
    """The file with the digests of the checkpoint at `path` and of the previous one, one per line."""
    return path.with_name(path.name.replace(".previous", "")).with_suffix(".sha256")


def _digests(path: Path) -> list[str]:
    try:
        words = digest_file(path).read_text(encoding="ascii").split()
        return words if all(re.fullmatch("[0-9a-f]{64}", word) for word in words) else []  # a list of sha256sum's
    except (FileNotFoundError, UnicodeDecodeError):
        return []


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of the file; None if nothing is. Without a digest the archive's CRCs are checked."""
    digests = _digests(path)
    if digests and file_sha256(path) in digests:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            member = None if digests else archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, ValueError, RuntimeError, EOFError):
        return NO_CHECKPOINT
    if digests:
        return f"is damaged: its checksum (SHA-256) is not in {digest_file(path).name}; nothing in it was run"
    return f"is damaged: the checksum of {member} is wrong" if member else None


def load_last(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or the previous one and a line that says so; None if there is neither.

    Raises CheckpointError naming every file that is there, and what is wrong with it.
    """
    failures = []
    for candidate in (path, previous_checkpoint(path)):
        if not candidate.exists():
            continue
        try:
            state = load(candidate)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        if candidate != path:
            problem = failures[0] if failures else f"{path} is missing"
            say(f"{problem}; resuming from the previous one, {candidate.name}")
        return state
    if failures:
        raise CheckpointError("; ".join(failures) + "; move the run's directory away to start it again")
    return None


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this project. Raises CheckpointError: absent, cut off, damaged, foreign, or with code in it."""
    try:
        with open(path, "rb"):  # an absent file, a folder: the errors below
            wrong = damage(Path(path))
        if wrong:
            raise CheckpointError(f"{path} {wrong}{remedy(Path(path))}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint: {path}{remedy(Path(path))}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a directory; expected a file: {Path(path) / 'checkpoint.pt'}?") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds pickled objects besides tensors and plain types; refused, and nothing in it was run"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("config"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of this project (no config in it)")
    return state


def remedy(path: Path) -> str:
    """What to do about a damaged checkpoint of a finished run, which would not be made again by itself."""
    if path.name != "checkpoint.pt" or not path.with_name("result.json").exists():
        return ""
    return "; its run is finished: restore an intact copy, or move it and result.json away to repeat the run"


def one_line(error: Exception) -> str:
    """The beginning of an exception's text, without its line breaks."""
    return " ".join(str(error).split())[:120]


def pretraining(state: Mapping[str, Any], path: str | Path) -> tuple[Pretrain, str]:
    """The recipe of a pre-training checkpoint, and whose weights it holds: RUN, or RUN@STEP before the run's end.

    Raises CheckpointError for a checkpoint of another stage.
    """
    try:
        recipe = configs.resolve(state["config"], {}, Pretrain)
    except ConfigError as error:
        raise CheckpointError(f"{path} is not a pre-training checkpoint: {error}") from None
    missing = [name for name in ("run", "model", "step", "steps") if name not in state]
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint: it has no '{missing[0]}'")
    step, steps = state["step"], state["steps"]
    return recipe, state["run"] if step == steps else f"{state['run']}@{step}"


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Strictly: every key, every shape. Raises CheckpointError naming the first that differs."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or extra or shapes:
        first = (missing + extra + sorted(shapes))[0]
        here, there = (tuple(w[first].shape) if first in w else "absent" for w in (own, weights))
        raise CheckpointError(
            f"{path} is of another architecture: {len(missing)} keys missing, {len(extra)} unexpected, "
            f"{len(shapes)} of another shape; first: '{first}' (expected {here}, found {there})"
        )
    module.load_state_dict(weights)


def load_encoder(path: str | Path, device: torch.device | str = "cpu") -> tuple[Encoder, Pretrain, str]:
    """The frozen encoder of a pre-training checkpoint, in evaluation mode; its recipe; whose weights."""
    state = load(path)
    recipe, identity = pretraining(state, path)
    framework = build_framework(recipe)
    load_weights(framework, state["model"], path)
    encoder = framework.encoder.requires_grad_(False).eval().to(device)
    if recipe.run.channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)
    return encoder, recipe, identity


def random_states() -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain types."""
    version, keys, gauss = random.getstate()
    name, numpy_keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(keys), gauss],
        "numpy": [name, torch.from_numpy(numpy_keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Undo what happened since `random_states()`."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, numpy_keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
