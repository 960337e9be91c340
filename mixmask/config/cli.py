"""What the entry scripts share: options, the list of a recipe's keys, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mixmask.config.errors import UserError
from mixmask.config.fields import type_hints

INTERRUPTED = 130  # exit status of a script that was told to stop, and has saved


def run_options(config: type) -> argparse.ArgumentParser:
    """The parent of the parsers of scripts that make a run of the stage whose configs are of type `config`."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="replace keys of the recipe")
    add("--run-dir", type=Path, help=f"default: RUNS_DIR/{config.stage}/<name of the run>")
    add("--runs-dir", type=Path, default=Path("runs"), help="default: runs")
    add("--keys", action=PrintKeys, nargs=0, const=config, help="list the keys of a recipe, their values and defaults")
    return parser


class PrintKeys(argparse.Action):
    """Print the keys of a config class, a line each, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for key, values, default in keys(self.const):
            print(f"{key:<32} {values}{default}")
        parser.exit()


def keys(config: type, where: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted key, its values in words, and " (default: X)" where it has one."""
    hints = type_hints(config)
    for spec in dataclasses.fields(config):
        name, hint = f"{where}{spec.name}", hints[spec.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{name}.")
        elif spec.name == "settings":
            yield "<framework>.*", "the section named after the framework", ""
        else:
            default = "" if spec.default is dataclasses.MISSING else f" (default: {spec.default!r})"
            words = spec.metadata.get("words")
            yield name, words or in_words(hint, spec.metadata.get("low"), spec.metadata.get("high")), default


def in_words(hint: Any, low: float | None = None, high: float | None = None) -> str:
    """A field's type and range."""
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        words = "a list" if rest in ([...], [Ellipsis]) else f"{1 + len(rest)} values"
        return f"{words}, each: {in_words(first, low, high)}"
    if get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(in_words(each, low, high) for each in get_args(hint))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "a section")
    if low is None and high is None:
        return words
    return f"{words}, at least {low:g}" if high is None else f"{words} from {low:g} to {high:g}"


def main_guard(main: Callable[[], Any]) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit status 1, Ctrl-C status INTERRUPTED.

    So does the death of a data worker, which PyTorch reports wherever the program happens to be.
    """
    try:
        main()
    except UserError as error:
        _complain(f"error: {error}\n")
        _tell_torchrun(f"error: {error}")
        sys.exit(1)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = "out of memory, or of space in /dev/shm (fewer: --set run.workers=2)?"
        _complain(f"error: {str(error).split('. ')[0]}: {reason} The last checkpoint is intact\n")
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("\ninterrupted: all up to the last checkpoint is kept; the same command continues\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    """To stderr in one write, so that the lines of several processes do not mix. The terminal may be gone."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _tell_torchrun(text: str) -> None:
    """Write the error where torchrun reads it, for the end of its own report, after all that this process printed."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": text, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
