"""Random streams addressed by a key such as (seed, "augment", step): nothing depends on what was drawn before.

A run that resumes at any step, or on another number of processes, draws what the undisturbed run would have drawn.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """63 bits that depend on every part of the key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on `device`, for what is drawn there (augmentations, permutations, noise)."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A generator on the host, for the few numbers that steer an iteration (masks, ratios, boxes)."""
    return np.random.Generator(np.random.PCG64(seed_of(*key)))


def seed_globals(*key: int | str) -> None:
    """Seed the global generators of Python, NumPy and PyTorch: for initial weights, and for foreign code."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
