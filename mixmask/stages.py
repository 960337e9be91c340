"""The stages of a number, as data: the script that runs each, its recipes and configs, what it reads and makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixmask import config as configs


@dataclass(frozen=True)
class Stage:
    """A stage: the script that runs it, where its recipes are, the class of its configs, what it reads and makes."""

    script: str
    recipes: str  # empty: it has none
    config: type
    after: str = ""  # the stage whose product it reads
    takes: str = "--checkpoint"  # the option that names this product; empty: the first argument, before its own product
    gives: str = "checkpoint.pt"  # its own product, in its run directory
    package: str = ""  # what it needs beside the environment
    repeatable: bool = False  # it takes seconds: a lost product is simply made again
    resources: Mapping[str, Any] = field(default_factory=dict)  # where it needs less than slurm/cluster.yaml says
    data: str = "data"  # the key of its configs that says which images, where they are not the published ones
    identity: str = "mixmask.datasets.settle:identity"  # MODULE:FUNCTION, which of a config gives that key's value


STAGES = {
    "pretrain": Stage("pretrain/train.py", "pretrain/configs", configs.Pretrain),
    "linear": Stage("eval/linear.py", "eval/configs", configs.Linear, after="pretrain"),
    "finetune": Stage("eval/finetune.py", "eval/configs", configs.Finetune, after="pretrain"),
    "convert": Stage(
        *("detection/convert.py", "", configs.Convert, "pretrain"),
        takes="",
        gives="backbone.pkl",
        repeatable=True,
        resources={"gpus": 0, "nodes": 1, "cpus": 1, "memory_gb": 4, "hours": 1},
    ),
    "detection": Stage(
        *("detection/train.py", "detection/configs", configs.Detection, "convert"),
        takes="--weights",
        package="detectron2",
        data="content",
        identity="detection.datasets:identity",
    ),
}
