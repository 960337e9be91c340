"""Where the time of a training step goes, by class of operation, from torch.profiler."""

from __future__ import annotations

from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import measure
from benchmarks.steps import Ours

AUGMENTATION = "augmentation"
CLASSES = {  # class -> what the names of its operations begin with; the innermost that fits decides
    "convolution": ("aten::convolution", "aten::_convolution", "aten::mkldnn_convolution", "aten::cudnn_convolution"),
    "BatchNorm": (
        "aten::native_batch_norm",
        "aten::batch_norm",
        "aten::_batch_norm",
        "aten::cudnn_batch_norm",
        "SplitBatchNorm",
    ),
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
    "optimiser": ("Optimizer.", "aten::_foreach_"),
    "copies, layout": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::index", "aten::fill_"),
    "elementwise": ("aten::",),
    "compiled": ("Torch-Compiled Region", "CompiledFunction", "## Call CompiledFxGraph"),  # fused: not to be told apart
}
OTHER = "Python, dispatch"


class Marked(Ours):
    """A training whose augmentation can be told from the rest."""

    def views(self):  # the batches of `Ours`, each made inside a mark
        batches = super().views()
        while True:
            with record_function(AUGMENTATION):
                batch = next(batches)
            yield batch


def classified(event: FunctionEvent) -> str:
    """The class of an operation: that of a mark around it, else the innermost that its name or its callers' fits."""
    chain, parent = [event], event.cpu_parent
    while parent is not None:
        chain.append(parent)
        parent = parent.cpu_parent
    for outer in chain:
        if outer.name == AUGMENTATION:
            return AUGMENTATION
        if outer.name.startswith("Optimizer."):
            return "optimiser"
    for inner in chain:
        for name, beginnings in CLASSES.items():
            if inner.name.startswith(beginnings) and name != "elementwise":
                return name
    return "elementwise" if any(inner.name.startswith("aten::") for inner in chain) else OTHER


def by_class(training: Marked, steps: int) -> dict[str, float]:
    """Seconds a step of each class (of the device: on a GPU of its kernels), the largest first."""
    gpu = training.device.type == "cuda"
    training.step()
    training.step()
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])], acc_events=True
    ) as profiler:
        for _ in range(steps):
            training.step()
        measure.wait(training.device)
    taken: dict[str, float] = {}
    for event in profiler.events():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        name = classified(event)
        taken[name] = taken.get(name, 0.0) + own / 1e6 / steps
    return dict(sorted(taken.items(), key=lambda item: -item[1]))


def numbers(training: Marked, steps: int) -> dict[str, dict[str, Any]]:
    """{class: {"ms": a step's, "share": of all}}"""
    taken = by_class(training, steps)
    total = sum(taken.values())
    return {name: {"ms": 1000 * value, "share": value / total} for name, value in taken.items()}
