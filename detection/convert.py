"""Rewrite a backbone for other code: Detectron2 (`.pkl`), torchvision (`.pth`) or timm (`.safetensors`).

Example:
    python detection/convert.py runs/pretrain/RUN/checkpoint.pt backbone.pkl
    python detection/convert.py moco_v2_800ep_pretrain.pth.tar moco.pkl
    python detection/convert.py swav_800ep_pretrain.pth.tar swav.safetensors --to timm

What is read is recognised by its key names (docs/checkpoints.md). Every key is used, or dropped by name; a file that
is not whole, not finite or not known is refused. OUTPUT.json notes where OUTPUT is from and how its pixels were
normalised. The same command writes the same bytes again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mixmask import config as configs
from mixmask.config import Convert, UserError
from mixmask.config.resnets import ARCHITECTURES
from mixmask.formats import (
    FormatError,
    Source,
    detectron2_name,
    read,
    read_note,
    reading,
    reading_options,
    sidecar,
)
from mixmask.runs import Run, commit, discard, file_sha256
from mixmask.training.progress import say

Weights = dict[str, Tensor]  # torchvision's names


def to_detectron2(weights: Weights) -> bytes:
    """A pickle of NumPy arrays under Detectron2's names, which its checkpointer matches to a model's heuristically."""
    model = {detectron2_name(name): value.numpy() for name, value in weights.items()}
    return pickle.dumps({"model": model, "__author__": "mixmask", "matching_heuristics": True}, protocol=4)


def to_torchvision(weights: Weights) -> bytes:
    """A state dict, without `fc`."""
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def to_timm(weights: Weights) -> bytes:
    """A safetensors file: timm's ResNets have torchvision's names."""
    return safetensors.torch.save(weights, {"format": "pt"})


TARGETS: dict[str, tuple[str, Callable[[Weights], bytes]]] = {
    "detectron2": (".pkl", to_detectron2),
    "torchvision": (".pth", to_torchvision),
    "timm": (".safetensors", to_timm),
}


def convert(source: Source, path: Path, output: Path, target: str) -> dict[str, Any]:
    """Write `source`, read from `path`, to `output`, and the note beside it; returns the note.

    Raises UserError for a backbone that the target cannot hold, and rather than overwrite anything else.
    """
    check_target(source, path, target)
    check_replaceable(source, output, target)
    content = TARGETS[target][1](source.weights)
    note = {
        "target": target,
        "sha256": hashlib.sha256(content).hexdigest(),
        "identity": source.identity,
        "source": {
            "file": path.name,
            "sha256": source.sha256,
            "format": source.format,
            "taken": source.taken,
            "dropped": source.dropped,
            "added": source.added,
            "cast": source.cast,
        },
        "tensors": len(source.weights),
        "arch": source.backbone.arch,
        "stem": source.backbone.stem,
        "width": source.backbone.width,
        "channels": "RGB",
        "mean": list(source.mean),  # of pixels in [0, 1]
        "std": list(source.std),
        **commit(),
    }
    written = (json.dumps(note, indent=1) + "\n").encode()
    write_together({sidecar(output): written, output: content})  # the note first: OUTPUT alone has no origin
    return note


def check_output(path: Path, output: Path, target: str) -> None:
    """Raises UserError for an output of another extension, where nothing can be written, or that is the input."""
    suffix = TARGETS[target][0]
    if output.suffix != suffix:
        other = next((name for name, (ending, _) in TARGETS.items() if ending == output.suffix), None)
        hint = f" (or --to {other})" if other else ""
        raise UserError(f"OUTPUT: expected a name that ends in {suffix} for {target}{hint}, found {output}")
    for file in (output, sidecar(output)):
        try:
            is_directory = stat.S_ISDIR(file.lstat().st_mode)  # OSError: the name is too long, nobody may look there
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"OUTPUT: cannot write {file}: {error.strerror}") from None
        if is_directory:
            raise UserError(f"OUTPUT: {file} is a directory")
    if not output.parent.is_dir():
        raise UserError(f"OUTPUT: no such directory: {output.parent}")
    if output.exists() and path.exists() and output.samefile(path):
        raise UserError(f"OUTPUT: {output} is the input itself; give another name")
    write_together({output: None})


def check_target(source: Source, path: Path, target: str) -> None:
    """Raises FormatError for a backbone that does not fit Detectron2's R50-C4, or is not of the target's library."""
    backbone = source.backbone
    library = "timm" if backbone.arch.startswith("timm/") else "torchvision"
    if backbone.arch not in ARCHITECTURES and target not in ("detectron2", library):
        raise FormatError(f"{path} holds a {describe(source)}, not {target}'s; --to {library} writes it as it is")
    if target == "detectron2" and (backbone.arch, backbone.width, backbone.stem) != ("resnet50", 64, "imagenet"):
        raise FormatError(
            f"{path} holds a {describe(source)}; Detectron2's R50-C4 takes a resnet50 of width 64 with the imagenet "
            "stem (7 x 7, stride 2): nothing else would load; --to torchvision or --to timm write it as it is"
        )


def check_replaceable(source: Source, output: Path, target: str) -> None:
    """Raises UserError where `output`, or the note beside it, exists and is not of this very conversion."""
    note = None
    if os.path.lexists(sidecar(output)):
        try:
            note = read_note(sidecar(output))
        except FormatError as error:
            raise UserError(f"OUTPUT: {sidecar(output)} would be overwritten: {error}; move it away") from None
    same = note is not None and (note["source"]["sha256"], note["source"].get("taken", ""), note["target"]) == (
        source.sha256,
        source.taken,
        target,
    )
    if os.path.lexists(output) and not (same and note["sha256"] == file_sha256(output)):
        raise UserError(f"OUTPUT: {output} exists and holds something else; move it away, or give another name")
    if note is not None and not same:
        raise UserError(f"OUTPUT: {sidecar(output)} exists and describes another conversion; move it away")


def write_together(files: dict[Path, bytes | None]) -> None:
    """Write temporary files, flush, then rename: no file is ever half-written. None: only test whether it could be.

    Raises UserError where that fails.
    """
    temporary = {path: path.with_name(f".convert.{os.getpid()}.{i}") for i, path in enumerate(files)}
    try:
        for path, content in files.items():
            with open(temporary[path], "wb") as file:
                file.write(content or b"")
                file.flush()
                os.fsync(file.fileno())
        for path, content in files.items():
            if content is not None:
                os.replace(temporary[path], path)
    except OSError as error:
        raise UserError(f"cannot write {list(files)[-1]}: {error.strerror}") from None
    finally:
        for path in temporary.values():
            discard(path)


def convert_run(source: Source, path: Path, output: Path, target: str, directory: Path) -> None:
    """`convert` as a stage: a run directory with config, command, environment and result."""
    seed = source.recipe.seed if source.recipe else 0
    config = Convert(recipe="convert", target=target, seed=seed, checkpoint=source.identity)
    with Run(directory, config) as run:
        if run.result is not None and output.is_file() and run.result.get("sha256") == file_sha256(output):
            say(f"{run.id} is finished: {output} is whole; nothing to do")
            return
        check_target(source, path, target)
        run.describe()
        note = convert(source, path, output, target)
        say(summary(note, output))
        metrics = {"tensors": note["tensors"], "dropped": sum(source.dropped.values())}
        known = {"run": run.id, "checkpoint": source.identity, "format": source.format, "output": str(output)}
        run.finish({**known, "metrics": metrics, **note})


def describe(source: Source) -> str:
    if source.backbone.arch not in ARCHITECTURES:
        return f"{source.backbone.arch} with the {source.backbone.stem} stem"
    return f"{source.backbone.arch} of width {source.backbone.width} with the {source.backbone.stem} stem"


def account(source: Source, path: Path) -> str:
    """What was read, used and dropped."""
    dropped = ", ".join(f"{what} {count}" for what, count in sorted(source.dropped.items()))
    used, total = len(source.weights) - source.added, sum(source.dropped.values())
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (source.mean, source.std))
    taken = f": {source.taken}" if source.taken else ""
    lines = [
        f"read     {path}{taken} ({source.format}; {source.identity}; sha256 {source.sha256[:8]})",
        f"holds    a {describe(source)}; RGB pixels in [0, 1], mean {mean}, std {std}",
        f"used     {used} of {used + total} keys",
        f"dropped  {total}" + (f": {dropped}" if dropped else ""),
    ]
    if source.added:
        lines.append(f"added    {source.added} counters num_batches_tracked = 0, which files of before 2018 lack")
    if source.cast:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in source.cast.items())
        lines.append(f"cast     {kinds}, to float32 (counters of batches: to int64)")
    return "\n".join(lines)


def summary(note: dict[str, Any], output: Path) -> str:
    size = output.stat().st_size / 1e6
    return (
        f"wrote    {output} ({note['target']}; {note['tensors']} tensors, {size:.1f} MB; sha256 {note['sha256'][:8]}) "
        f"and {sidecar(output).name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[reading_options()]
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="a checkpoint of ours, or of a public code base")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="*.pkl, *.pth or *.safetensors")
    parser.add_argument("--to", choices=TARGETS, default="detectron2", help="default: detectron2")
    parser.add_argument("--run-dir", type=Path, help="also keep a run directory, as for every stage of a table")
    args = parser.parse_args()
    check_output(args.input, args.output, args.to)
    source = read(args.input, **reading(args))
    say(account(source, args.input))
    if args.run_dir:
        convert_run(source, args.input, args.output, args.to, args.run_dir)
    else:
        say(summary(convert(source, args.input, args.output, args.to), args.output))


if __name__ == "__main__":
    configs.main_guard(main)
