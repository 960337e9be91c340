"""What runs have left behind: results, logs and environments, read with errors that name the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mixmask.config import UserError
from mixmask.runs.files import read_text


class ResultError(UserError):
    """A run's result cannot be read; the text names the file and the reason."""


def read_result(directory: str | Path) -> dict[str, Any] | None:
    """The result of a finished run; None where there is none yet.

    Raises ResultError for a file that cannot be read, is not JSON, or holds no finite metrics.
    """
    path = Path(directory) / "result.json"
    if path.exists() and not path.is_file():
        raise ResultError(f"{path} is not a file; move it away to run again")
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not valid JSON ({error}); move it away to run again") from None


def _checked(result: Any, path: Path) -> dict[str, Any]:
    """`result` if it has finite metrics. Raises ResultError for anything else, as an edit by hand leaves behind."""
    metrics = result.get("metrics") if isinstance(result, dict) else None
    if not isinstance(metrics, dict) or not metrics:
        raise ResultError(f"{path} holds no metrics; move it away to run again")
    for name, value in metrics.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ResultError(f"{path}: {name} is {value!r}, expected a number; move it away to run again")
    return result


def read_log(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, or of log.jsonl.gz (results/); a last line that a crash cut short is left out.

    Raises UserError where the file cannot be read, and for a line that is not JSON or has no step.
    """
    path = Path(directory) / "log.jsonl"
    if not path.exists():
        path = path.with_name("log.jsonl.gz")
    texts = read_text(path).split("\n")[:-1]
    return [_log_line(text, f"{path}, line {number}") for number, text in enumerate(texts, 1)]


def _log_line(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        raise UserError(f"{where}: not valid JSON; delete the line to go on without it") from None
    if not isinstance(line, dict) or "step" not in line:
        raise UserError(f"{where}: no 'step' in it; delete the line to go on without it")
    return line


def read_environments(directory: str | Path) -> list[dict[str, Any]]:
    """environment.json of a run ({} where there is none), and each line of its environments.jsonl.

    Raises UserError where one is not valid JSON.
    """
    first, others = Path(directory) / "environment.json", Path(directory) / "environments.jsonl"
    environments = []
    for path, text in [(first, read_text(first) or "{}"), *((others, line) for line in read_text(others).splitlines())]:
        try:
            environments.append(json.loads(text))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); move it away to go on without it") from None
    return environments
