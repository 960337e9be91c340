"""A run's directory and what it holds. Nothing here imports torch."""

from mixmask.runs.directory import Run, is_busy, previous_checkpoint, run_directory, run_id, what_is_left
from mixmask.runs.files import discard, file_identity, file_sha256, write_atomically
from mixmask.runs.provenance import CODE, PACKAGES, SNAPSHOT, commit, environment
from mixmask.runs.records import ResultError, read_environments, read_log, read_result

__all__ = [
    "CODE",
    "PACKAGES",
    "SNAPSHOT",
    "ResultError",
    "Run",
    "commit",
    "discard",
    "environment",
    "file_identity",
    "file_sha256",
    "is_busy",
    "previous_checkpoint",
    "read_environments",
    "read_log",
    "read_result",
    "run_directory",
    "run_id",
    "what_is_left",
    "write_atomically",
]
