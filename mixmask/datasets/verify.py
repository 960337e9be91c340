"""Decodes every image of a data set once, before a training that would hit the damaged ones hours later."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from mixmask.datasets.base import DataError, Files, Resident
from mixmask.datasets.loading import ImageReader
from mixmask.training.progress import Progress, say


def verify(dataset: Resident | Files) -> None:
    """Raises DataError, with their number and the first three, for files that are not images."""
    if isinstance(dataset, Resident):  # all have been decoded
        return
    reader, errors = ImageReader.of(dataset), []
    progress = Progress(len(dataset), "verify")

    def check(index: int) -> str:
        try:
            reader[index]
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for error in pool.map(check, range(len(dataset))):
            errors += [error] if error else []
            progress.step()
    progress.close()
    if errors:
        shown = "; ".join(errors[:3]) + (f"; and {len(errors) - 3:,} more" if len(errors) > 3 else "")
        raise DataError(f"{len(errors):,} of {len(dataset):,} files cannot be read: {shown}")
    say(f"verified: {len(dataset):,} images")
