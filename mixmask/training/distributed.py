"""Several processes that compute what one computes: how they find each other, and what they exchange.

Each process holds equal, contiguous rows of every batch. It draws what its rows would draw in a single process; groups
that span processes exchange their images or statistics; gradients are averaged after the backward pass. Without a
process group every function here gives back what it was given, so that one process runs the same code.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mixmask.config import ConfigError, Pretrain, UserError
from mixmask.numerics import wide
from mixmask.runs import Run
from mixmask.training import progress

LATE = 10.0  # seconds of waiting after which every process says that it waits
ARRIVAL = timedelta(minutes=10)  # for all processes to start
VARIABLES = "the process group's environment variables"
PATIENCE = timedelta(hours=1)  # for one that downloads or evaluates; one that ends is noticed at once


class LostProcess(UserError):
    """Another process of the group ended, or was never there; the text says which exchange failed."""


@dataclass(frozen=True)
class World:
    """The place of this process: `rank` among `size` processes, `local_rank` among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""  # where the processes meet: "env://", "tcp://HOST:PORT"

    def device(self, device: torch.device) -> torch.device:
        """A GPU of its own for each process of a machine. Raises ConfigError where there are too few, or one is named.

        SLURM may show each process one GPU only: that is its own.
        """
        if device.type != "cuda" or self.size == 1:
            return device
        if device.index is not None:
            raise ConfigError(f"run.device: {device} for each of {self.size} processes; expected auto, cuda or cpu")
        gpus = torch.cuda.device_count()
        bound = gpus == 1 and self.address != "env://"
        if self.local_rank >= gpus and not bound:
            raise ConfigError(f"run.device: process {self.local_rank + 1} of this machine, which has {gpus} GPU(s)")
        return torch.device("cuda", 0 if bound else self.local_rank)


# ------------------------------------------------------------------------------------------ finding each other


def find(environ: Mapping[str, str] = os.environ) -> World:
    """This process as torchrun or SLURM started it; a world of one outside of both.

    Under SLURM only the tasks of one `srun` (submitit starts its tasks so) belong together: a batch script, or a shell
    inside an allocation, is a single process. Raises ConfigError for variables that are missing or make no sense.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        world = _torchrun(environ)
    elif "SLURM_STEP_ID" in environ:
        tasks = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        rank, size = _number(environ, "SLURM_PROCID"), _number({"SLURM_NTASKS": "1", **environ}, tasks)
        world = World(rank, size, _number(environ, "SLURM_LOCALID"), _slurm_address(environ))
    elif {"RANK", "WORLD_SIZE"} <= environ.keys() and environ["WORLD_SIZE"] != "1":
        world = _torchrun(environ)
    else:
        return World()
    if not 0 <= world.rank < world.size:
        raise ConfigError(f"{VARIABLES}: rank {world.rank} of {world.size} processes")
    return world if world.size > 1 else World()


def _torchrun(environ: Mapping[str, str]) -> World:
    """As torchrun says, or whoever sets the same variables."""
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    _value(environ, "MASTER_ADDR"), _port(environ)
    return World(rank, size, _number({"LOCAL_RANK": str(rank), **environ}, "LOCAL_RANK"), "env://")


def _value(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise ConfigError(f"{VARIABLES}: {name} is missing")
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = _value(environ, name)
    if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):
        raise ConfigError(f"{VARIABLES}: {name}: expected a number, found {text!r}")
    return int(text)


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65_536:
        raise ConfigError(f"{VARIABLES}: MASTER_PORT: expected a port from 1 to 65535, found {port}")
    return port


def _slurm_address(environ: Mapping[str, str]) -> str:
    """The step's first node, and a port that follows from the job, its step and its restarts (or MASTER_PORT)."""
    nodes = environ.get("SLURM_STEP_NODELIST") or _value(environ, "SLURM_JOB_NODELIST")
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    restarts = _number({"SLURM_RESTART_COUNT": "0", **environ}, "SLURM_RESTART_COUNT")
    own = 15_000 + (job + 4001 * step + 997 * restarts) % 16_000
    port = _port(environ) if environ.get("MASTER_PORT") else own
    return f"tcp://{environ.get('MASTER_ADDR') or first_host(nodes)}:{port}"


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `n[07-12,20]-gpu,m1` -> `n07-gpu`."""
    prefix, ranges, suffix = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,]*)", nodes).groups()
    return prefix + re.split("[-,]", ranges or "")[0] + suffix


@contextlib.contextmanager
def start(world: World, device: torch.device) -> Iterator[None]:
    """The processes' group (NCCL between GPUs, Gloo between CPUs); nothing for one process. Only rank 0 speaks.

    Raises LostProcess where they do not all come. After an error the group is left to the end of the process: closing
    it in order would wait for those that are gone.
    """
    if world.size == 1:
        yield
        return
    if world.rank:
        progress.mute()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _waiting(world), _contact(f"{world.size} processes do not find each other at {world.address}"):
        store, *_ = next(dist.rendezvous(world.address, world.rank, world.size, timeout=ARRIVAL))
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
        barrier()
    yield
    barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _waiting(world: World, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """The first process says within a second for whom it waits, and where; another one where that takes long.

    A shell inside a step of several tasks looks like one of them, and would wait for the others without a word.
    """
    place = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}" if world.address == "env://" else world.address
    step = f" of SLURM step {environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}" if place == world.address else ""
    others = f"the other {world.size - 1}" if world.size > 2 else "the other one"
    text = f"note: process {world.rank + 1} of {world.size}{step} waits at {place} for {others}"
    alone = "; one process alone: srun --ntasks=1" if step else ""
    timer = threading.Timer(LATE if world.rank else 1, lambda: print(text + alone, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _contact(failure: str = "another process of this run has ended") -> Iterator[None]:
    """Exchanges inside: what PyTorch raises when a connection breaks becomes a LostProcess."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise LostProcess(f"{failure}, and says itself why ({reason}); all up to the last checkpoint is kept") from None


# ---------------------------------------------------------------------------------------------- who holds what


def rank() -> int:
    """Of this process; 0 without a group."""
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
    """The run directory for a process that writes nothing: what `Run` writes is passed over."""

    def __init__(self, directory: str | Path, config: Any):
        self.directory, self.config = Path(directory), config

    def describe(self, command: list[str] | None = None) -> None: ...

    def rewind(self, step: int, epoch: int | None = None) -> None: ...

    def log(self, kind: str, step: int, **values: Any) -> None: ...

    def sync(self) -> None: ...

    def finish(self, result: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


# -------------------------------------------------------------------------------------------------- exchanges


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """The rows (n, ...) of all processes in the order of their ranks, (size * n, ...); without gradient."""
    if size() == 1:
        return x
    rows = x.new_empty(size() * len(x), *x.shape[1:])
    with _contact():
        dist.all_gather_into_tensor(rows, x.contiguous())
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return rows.contiguous(memory_format=torch.channels_last) if channels_last else rows


class _Gather(torch.autograd.Function):
    """`gather`, and its adjoint: what the losses of all processes say of this one's rows, summed."""

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
    """Mean and biased variance, of any one shape, of all rows that `members` neighbouring processes hold, out of those
    of each one's own; with gradient. They hold equally many, and `members` divides the number of processes."""
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
    with _contact():
        dist.all_reduce(x)
    return x


def any_rank(*flags: bool) -> list[bool]:
    """Each flag, true on every process as soon as one of them says so. Exchanged between the CPUs: no GPU waits."""
    if size() == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    with _contact():
        dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes]


def barrier() -> None:
    """Wait for all processes."""
    any_rank(False)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others, who find what it has downloaded, written or refused."""
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
