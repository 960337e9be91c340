"""What every training stage sets up."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from mixmask.training.optim import keep_freed_memory
if {keep}: keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # freed blocks are too small for the next one, by its alignment, until neighbours have merged
    before = faults()
    torch.empty(2**24).fill_(1)  # 64 MiB, freed at once
    found = faults() - before
print(found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    found = {}
    for keep in (False, True):
        run = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
        )
        found[keep] = int(run.stdout)
    assert found[True] <= found[False] / 10
