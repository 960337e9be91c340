"""How the processes of a run find each other: started by torchrun or SLURM, or by whoever sets the same variables."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from mixmask.config import ConfigError
from mixmask.training import progress
from mixmask.training.distributed import barrier, contact

LATE = 10.0  # seconds of waiting after which every process says that it waits
ARRIVAL = timedelta(minutes=10)  # for all processes to start
VARIABLES = "the process group's environment variables"
PATIENCE = timedelta(hours=1)  # for one that downloads or evaluates; one that ends is noticed at once


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

    Raises LostProcess if not all of them come. After an error the group stays open until the process exits: closing
    it would wait for those that are gone.
    """
    if world.size == 1:
        yield
        return
    if world.rank:
        progress.mute()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _waiting(world), contact(f"{world.size} processes did not find each other at {world.address}"):
        store, *_ = next(dist.rendezvous(world.address, world.rank, world.size, timeout=ARRIVAL))
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
        barrier()
    yield
    barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _waiting(world: World, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """The first process says within a second for whom it waits, and where; others only if it takes long.

    A shell inside a step of several tasks looks like one of them, and would wait silently for the others.
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
