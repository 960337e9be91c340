"""Random streams: no two keys share one, and all global generators follow a seed."""

from __future__ import annotations

import random

import numpy as np
import torch

from mixmask.randomness import numpy_generator, seed_globals, seed_of, torch_generator


def test_each_part_of_a_key_counts_and_where_it_ends():
    keys = [
        (1, "mix", 1, 12),
        (1, "mix", 11, 2),
        (1, "mix", 112),
        (11, "mix", 1, 2),
        (1, "mix", 12, 1),
        (1, "order", 1, 12),
    ]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert len({float(numpy_generator(*key).random()) for key in keys}) == len(keys)
    assert len({float(torch.rand((), generator=torch_generator("cpu", *key))) for key in keys}) == len(keys)
    assert seed_of(*keys[0]) == seed_of(*keys[0]) and 0 <= seed_of(*keys[0]) < 2**63


def test_one_seed_is_that_of_python_numpy_and_torch():
    def drawn(*key: int | str) -> tuple[float, float, float]:
        seed_globals(*key)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first, other = drawn(0, "init"), drawn(1, "init")
    assert drawn(0, "init") == first and all(a != b for a, b in zip(first, other, strict=True))
