"""Several processes that compute what one computes: what each holds, and what they exchange.

Each process holds equal, contiguous rows of every batch. It draws what its rows would draw in a single process; groups
that span processes exchange their images or statistics; gradients are averaged after the backward pass. Without a
process group every function here gives back what it was given, so that one process runs the same code.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mixmask.config import Pretrain, UserError
from mixmask.numerics import wide
from mixmask.runs import Run


class LostProcess(UserError):
    """Another process of the group ended, or was never there; the text says which exchange failed."""


# ---------------------------------------------------------------------------------------------- who holds what


def rank() -> int:
    """This process's rank; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_slice(n: int) -> slice:
    """Those of n rows (images, groups) that this process holds. Raises ValueError where they cannot be shared."""
    if n % size():
        raise ValueError(f"{n} rows cannot be shared equally by {size()} processes")
    each = n // size()
    return slice(rank() * each, (rank() + 1) * each)


def shard_config(recipe: Pretrain) -> Pretrain:
    """The recipe for the rows that this process holds: its share of the batch and of the groups."""
    backbone = replace(recipe.backbone, bn_groups=max(1, recipe.backbone.bn_groups // size()))
    part = {"batch_size": recipe.batch_size // size(), "mix_groups": max(1, recipe.mix_groups // size())}
    return replace(recipe, backbone=backbone, **part)


def open_run(directory: str | Path, config: Any) -> Run:
    """The run directory, which the first process holds and writes to; the others only read."""
    return (Follower if rank() else Run)(directory, config)


class Follower(Run):
    """The run directory for a process that writes nothing: the writes of `Run` do nothing."""

    def __init__(self, directory: str | Path, config: Any):
        self.directory, self.config = Path(directory), config

    def describe(self, command: list[str] | None = None) -> None: ...

    def rewind(self, step: int, epoch: int | None = None) -> None: ...

    def log(self, kind: str, step: int, **values: Any) -> None: ...

    def sync(self) -> None: ...

    def finish(self, result: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


# -------------------------------------------------------------------------------------------------- exchanges


@contextlib.contextmanager
def contact(failure: str = "another process of this run has ended") -> Iterator[None]:
    """Exchanges inside: what PyTorch raises when a connection breaks becomes a LostProcess."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise LostProcess(f"{failure}, and reports why ({reason}); all up to the last checkpoint is kept") from None


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """The rows (n, ...) of all processes in the order of their ranks, (size * n, ...); without gradient."""
    if size() == 1:
        return x
    rows = x.new_empty(size() * len(x), *x.shape[1:])
    with contact():
        dist.all_gather_into_tensor(rows, x.contiguous())
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return rows.contiguous(memory_format=torch.channels_last) if channels_last else rows


class _Gather(torch.autograd.Function):
    """`gather`, and its adjoint: the gradients of all processes' losses for this one's rows, summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """(n, ...) -> (size * n, ...)."""
        return gather(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """(size * n, ...) -> (n, ...)."""
        return _sum(gradient.clone(memory_format=torch.contiguous_format))[local_slice(len(gradient))]


def gather_with_gradient(x: Tensor) -> Tensor:
    """The rows (n, ...) of all processes, (size * n, ...), through which the gradient flows back to each of them."""
    return x if size() == 1 else _Gather.apply(x)


def shared_statistics(mean: Tensor, var: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all rows of `members` neighbouring processes, from each one's own (any shape); with
    gradient. They hold equally many rows, and `members` divides the number of processes."""
    everyones = gather_with_gradient(torch.stack((mean, var))[None])  # (size, 2, ...)
    first = rank() // members * members
    means, variances = everyones[first : first + members].unbind(1)
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


@torch.no_grad()
def average(model: nn.Module) -> None:
    """Gradients and BatchNorm's running statistics become their means over the processes, in one exchange.

    A process's loss is the mean over its rows, so the mean of the gradients is the gradient of the mean over all rows.
    A running statistic is linear in the batch's statistics, so its mean is that of one process with all groups; taken
    in every step, it does not depend on when a checkpoint is written. Every process ends with the same bits.
    """
    if size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    statistics = [s for m in model.modules() if getattr(m, "running_mean", None) is not None for s in _running(m)]
    tensors = gradients + statistics
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    _sum(flat).div_(size())
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _running(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var


def mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each scalar's mean over the processes, in float64."""
    if size() == 1 or not values:
        return dict(values)
    total = _sum(torch.stack([wide(value) for value in values.values()]))
    return dict(zip(values, total.div_(size()).unbind(), strict=True))


def _sum(x: Tensor) -> Tensor:
    with contact():
        dist.all_reduce(x)
    return x


def any_rank(*flags: bool) -> list[bool]:
    """Each flag, true on every process as soon as one of them says so. Exchanged between the CPUs: no GPU waits."""
    if size() == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    with contact():
        dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes]


def barrier() -> None:
    """Wait for all processes."""
    any_rank(False)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, which find what it has downloaded, written or refused."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


# --------------------------------------------------------------------------------------------------- agreement


def checksum(state: Mapping[str, Tensor], start: int = 0) -> int:
    """CRC-32 of every bit of a state dict, tensors of any shape and device; in [0, 2^32)."""
    for tensor in state.values():
        start = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), start)
    return start


def assert_in_sync(state: Mapping[str, Tensor], step: int) -> dict[str, Any]:
    """For the log: how many processes, and the checksum of the state dict (weights, statistics, queue) they all hold.

    Empty for one process. Raises UserError where one holds other bits, or is at another step.
    """
    if size() == 1:
        return {}
    own = checksum(state, step)
    checksums = gather(torch.tensor([own])).tolist()
    if len(set(checksums)) > 1:
        sums = ", ".join(f"{value:08x}" for value in checksums)
        raise UserError(f"step {step}: the processes differ (checksums {sums}); do all see the same run directory?")
    return {"processes": size(), "checksum": f"{own:08x}"}
