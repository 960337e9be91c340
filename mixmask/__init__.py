"""MixMask for Siamese ConvNets: the library that the stages share and that other training loops can import.

The names below load on first use, so that programs which only read configs and logs start without torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

HOME = {  # name -> the module that it is from
    "Anchor": "methods",
    "METHODS": "methods",
    "vanilla": "methods",
    "mixmask": "methods",
    "unmix": "methods",
    "erase": "methods",
    "mixture": "methods",
    "partners": "methods",
    "MixMask": "mixes",
    "UnMix": "mixes",
    "Erase": "mixes",
    "Mask": "config",
    "objective": "objective",
    "sample_mask": "masks",
    "block_mask": "masks",
    "discrete_mask": "masks",
    "load_backbone": "formats",
    "FRAMEWORKS": "frameworks",
    "MoCo": "frameworks.moco",
    "SimCLR": "frameworks.simclr",
    "BYOL": "frameworks.byol",
    "SimSiam": "frameworks.simsiam",
    "BarlowTwins": "frameworks.barlow_twins",
    "SwAV": "frameworks.swav",
    "VICReg": "frameworks.vicreg",
}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'mixmask' has no attribute '{name}'")
    return getattr(import_module(f"mixmask.{HOME[name]}"), name)


class _Library(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """`mixmask.objective` is the function, also once its module of the same name has been imported."""
        super().__setattr__(name, getattr(value, name, value) if name == "objective" else value)


sys.modules[__name__].__class__ = _Library


def __dir__() -> list[str]:
    return sorted([*globals(), *HOME])
