"""Seconds, memory, counted work, and the machine that they were measured on."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import resource
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixmask.runs import environment
from mixmask.training.clock import Work
from mixmask.training.optim import device_name

MATMUL = {"cpu": 2048, "cuda": 8192}  # side of the square matrices whose product is the peak
CODE = ("mixmask", "pretrain", "eval", "slurm", "paper", "requirements.lock")  # what is measured
GIB = 2**30


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, until the device is done."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def repeated(work: Callable[[], Any], device: torch.device, repeats: int, warm: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm` calls that do not count."""
    for _ in range(warm):
        work()
    return [seconds(work, device) for _ in range(repeats)]


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def counted_flop(work: Callable[[], Any]) -> int:
    """FLOP of `work`, counted as the training counts its own: 2 for each multiply-add, nothing for elementwise work."""
    meter = Work()
    with meter.counted():
        work()
    return meter.flops


class Launches(TorchDispatchMode):
    """Counts the operations inside that are neither views nor allocations: on a GPU each launches a kernel, or several.

    What `backend` compiled counts as one for each call of a graph, forward or backward, whatever is inside of it.
    """

    ALLOCATIONS = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "detach", "alias")  # what their names begin with

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.graphs, self._inside = Counter(), 0, False

    def __enter__(self):
        self.operations.clear()
        self.graphs = 0
        return super().__enter__()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: compiled graphs run inside this mode as they do outside."""
        return True

    @property
    def total(self) -> int:
        """Operations and calls of graphs."""
        return self.operations.total() + self.graphs

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        on_tensors = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, result)))
        if on_tensors and not (self._inside or operation.is_view or name.startswith(self.ALLOCATIONS)):
            self.operations[name] += 1
        return result

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """For torch.compile: runs each graph as it was traced, which needs no compiler, and counts its calls."""
        counted = {"fw_compiler": self._counted, "bw_compiler": self._counted}
        return aot_autograd(**counted, keep_inference_input_mutations=True)(graph, inputs)

    def _counted(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.graphs += 1
            self._inside = True
            try:
                return graph(*args)
            finally:
                self._inside = False

        return make_boxed_func(call)


def peak(device: torch.device, precision: str, repeats: int = 10) -> float:
    """TFLOP/s of a large matrix product in the precision ("bf16", or "fp32": on a GPU TF32, as in convolutions), the
    best of `repeats`."""
    side = MATMUL[device.type]
    a, b = torch.randn(2, side, side, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        return 2 * side**3 / min(repeated(lambda: a @ b, device, repeats, warm=3)) / 1e12
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --------------------------------------------------------------------------------------------------------- memory


def free(device: torch.device) -> None:
    """Free unreferenced memory, the GPU's too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Peak memory counts anew from here (on a CPU: on Linux; elsewhere it is the peak since the process began)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on a GPU; on a CPU resident memory of the process, the interpreter and the data set included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    if status.exists():  # of this process alone: ru_maxrss begins with that of the process which started it
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / GIB
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


# -------------------------------------------------------------------------------------------------------- machine


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on: device, threads, versions, and which code."""
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if device.type == "cuda" else {}
    return {
        "device": device_name(device) if device.type == "cuda" else processor(),
        "type": device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_commit(),
        **cuda,
        **environment(),
    }


def processor() -> str:
    """The CPU's name as the system gives it, with its number of cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def code_commit() -> str | None:
    """The last commit that changed what is measured; None outside a repository."""
    command = ["git", "log", "-1", "--format=%H", "--", *CODE]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        root = Path(__file__).resolve().parents[1]
        answer = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, timeout=20)
        return answer.stdout.strip() or None
    return None
