"""What this project asks of Detectron2: the detector, its batches, its evaluation. Importing this needs Detectron2."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

with warnings.catch_warnings():  # about pkg_resources, which it still uses
    warnings.simplefilter("ignore")
    from detectron2.config import CfgNode, get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
    from detectron2.data.common import DatasetFromList
    from detectron2.data.datasets import register_coco_instances, register_pascal_voc
    from detectron2.evaluation import (
        COCOEvaluator,
        DatasetEvaluator,
        DatasetEvaluators,
        PascalVOCDetectionEvaluator,
        inference_on_dataset,
    )
    from detectron2.layers import get_norm
    from detectron2.modeling import build_model
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
    from detectron2.solver import build_lr_scheduler, build_optimizer
    from detectron2.utils.events import EventStorage
    from fvcore.nn.precise_bn import update_bn_stats

from detection import weights
from detection.datasets import Found, Position, batches
from mixmask.config import ConfigError, Detection, UserError
from mixmask.datasets import DataError
from mixmask.randomness import seed_globals, seed_of
from mixmask.training import distributed

warnings.filterwarnings("ignore", "torch.meshgrid")  # Detectron2's anchors; PyTorch means to change its default
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # about a function that Detectron2 calls


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """Res5ROIHeads with a normalisation after res5 (MoCo, appendix; `detection/train_net.py` there)."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        stage, channels = super()._build_res5_block(cfg)
        stage.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return stage, channels


@dataclass(frozen=True)
class Task:
    """A recipe on the data sets that were found."""

    config: Detection
    cfg: CfgNode  # the recipe over Detectron2's defaults
    images: list[dict]  # all training images with annotations, in Detectron2's form
    test: str  # under which name Detectron2 knows the test split


def task(config: Detection, cfg: CfgNode, training: list[Found], test: Found) -> Task:
    """Reads the training images' annotations."""
    names = [register(split, config.task) for split in training]
    return Task(config, cfg, get_detection_dataset_dicts(names, filter_empty=True), register(test, config.task))


def settings(config: Detection, device: torch.device) -> CfgNode:
    """The recipe over Detectron2's defaults. Raises ConfigError for keys and values that Detectron2 does not know."""
    cfg = get_cfg()
    try:
        cfg.merge_from_other_cfg(CfgNode(copy.deepcopy(dict(config.detectron2))))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"detectron2: {' '.join(str(error).split())}") from None
    for key in ("MAX_ITER", "IMS_PER_BATCH"):
        if cfg.SOLVER[key] < 1:
            raise ConfigError(f"detectron2.SOLVER.{key}: expected at least 1, found {cfg.SOLVER[key]}")
    if list(cfg.SOLVER.STEPS) != sorted(cfg.SOLVER.STEPS):
        raise ConfigError(f"detectron2.SOLVER.STEPS: expected the smaller first, found {list(cfg.SOLVER.STEPS)}")
    cfg.MODEL.DEVICE = str(device)
    cfg.DATALOADER.NUM_WORKERS = config.run.workers
    cfg.freeze()
    return cfg


def build(cfg: CfgNode, seed: int, backbone: weights.Weights) -> nn.Module:
    """The detector: its backbone from the file, the rest initialised from the seed. Raises ConfigError."""
    seed_globals(seed, "detection", "init")
    model = build_model(cfg)
    model.load_state_dict(weights.placed(model.state_dict(), backbone.tensors))
    return model.train()


def optimisation(cfg: CfgNode, model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD, and its rate: linear warm-up, then steps."""
    optimizer = build_optimizer(cfg, model)
    return optimizer, build_lr_scheduler(cfg, optimizer)


def version() -> dict[str, str | None]:
    """Detectron2's version, and the commit that it was installed from (None where pip did not note it)."""
    package = metadata.distribution("detectron2")
    source = json.loads(package.read_text("direct_url.json") or "{}")
    return {"version": package.version, "commit": source.get("vcs_info", {}).get("commit_id")}


def norm_used(cfg: CfgNode, processes: int) -> str:
    """What BatchNorm's statistics are really taken over."""
    name = cfg.MODEL.RESNETS.NORM
    each = cfg.SOLVER.IMS_PER_BATCH // processes
    if processes == 1:
        return f"BN ({name} in one process: the whole batch of {each})"
    return f"{name} ({processes} processes" + (f", each its own {each} images)" if name == "BN" else ")")


# ----------------------------------------------------------------------------------------------------------- data


def register(found: Found, task: str) -> str:
    """The name under which Detectron2 finds the split from now on."""
    name = f"{found.path.resolve()} {found.split}"
    if name not in DatasetCatalog.list():
        if task == "voc":
            register_pascal_voc(name, str(found.path), found.split, int(found.path.name.removeprefix("VOC")))
        else:
            json_file = found.path / "annotations" / f"instances_{found.split}.json"
            register_coco_instances(name, {}, str(json_file), str(found.path / found.split))
    return name


class Mapped(Dataset):
    """Training images, resized and flipped by the random numbers of their place in the stream of images."""

    def __init__(self, images: list[dict], cfg: CfgNode, seed: int, purpose: str):
        self.images, self.mapper = DatasetFromList(images), DatasetMapper(cfg, is_train=True)
        self.seed, self.purpose = seed, purpose

    def __getitem__(self, position: Position) -> dict[str, Any] | DataError:
        np.random.seed(seed_of(self.seed, "detection", self.purpose, "view", position.place) % 2**32)
        image = self.images[position.image]
        try:
            return self.mapper(image)
        except (OSError, ValueError, SyntaxError) as error:  # given back: an error in a worker arrives as a traceback
            return DataError(f"{image['file_name']} cannot be used: {' '.join(str(error).split())}")


def training_batches(task: Task, purpose: str, first: int = 0) -> Iterator[list[dict]]:
    """This process's images of each batch, endlessly, from batch `first` on. Raises DataError for a damaged file."""
    rows = distributed.local_slice(task.cfg.SOLVER.IMS_PER_BATCH)
    own = (batch[rows] for batch in itertools.islice(order(task, purpose), first, None))
    dataset = Mapped(task.images, task.cfg, task.config.seed, purpose)
    options = {"num_workers": task.config.run.workers, "collate_fn": as_list, "worker_init_fn": ignore_signals}
    for batch in DataLoader(dataset, batch_sampler=own, generator=torch.Generator(), **options):
        if errors := [item for item in batch if isinstance(item, DataError)]:
            raise errors[0]
        yield batch


def order(task: Task, purpose: str) -> Iterator[list[Position]]:
    """Which images each batch has, all processes' together; endlessly."""
    wide = [image["width"] > image["height"] for image in task.images]
    return batches(wide, task.cfg.SOLVER.IMS_PER_BATCH, task.config.group, task.config.seed, purpose)


def files(task: Task, purpose: str, step: int) -> list[str]:
    """The files of the images of batch `step`, all processes' together."""
    batch = next(itertools.islice(order(task, purpose), step, None))
    return [task.images[position.image]["file_name"] for position in batch]


def as_list(images: list) -> list:
    """Detectron2's batch is a list of images of different sizes."""
    return images


def ignore_signals(worker: int) -> None:
    """Ctrl-C and SLURM signal every process of a job: a worker goes on until its training loop is done with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------- evaluation


def precise_statistics(model: nn.Module, task: Task) -> None:
    """BatchNorm's running statistics become their means over TEST.PRECISE_BN.NUM_ITER batches (Detectron2's PreciseBN).

    They depend on the weights and the seed alone: doing it again changes nothing.
    """
    if not task.cfg.TEST.PRECISE_BN.ENABLED:
        return
    seed_globals(task.config.seed, "detection", "precise", distributed.rank())
    with torch.no_grad(), EventStorage():
        update_bn_stats(model, training_batches(task, "precise"), task.cfg.TEST.PRECISE_BN.NUM_ITER)
    model.zero_grad(set_to_none=True)
    distributed.average(model)


class Counter(DatasetEvaluator):
    """Counts what was detected: without any detection Detectron2 reports no AP."""

    def reset(self) -> None:
        self.count = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.count += sum(len(output["instances"]) for output in outputs)

    def evaluate(self) -> dict[str, float]:
        total = distributed.mean({"count": torch.tensor(float(self.count))})["count"] * distributed.size()
        return {"detections": round(float(total))}


def evaluators(name: str, task: str) -> DatasetEvaluators:
    """Detectron2's for the task, and a counter."""
    if task == "voc":
        return DatasetEvaluators([PascalVOCDetectionEvaluator(name), Counter()])
    return DatasetEvaluators([COCOEvaluator(name, ("bbox", "segm"), distributed=True), Counter()])


def evaluate(model: nn.Module, task: Task) -> dict[str, float]:
    """AP of the test split in percent, under the names of Table 7, and the number of detections; {} but on rank 0."""
    images = get_detection_dataset_dicts([task.test], filter_empty=False)
    mapper = DatasetMapper(task.cfg, is_train=False)
    loader = build_detection_test_loader(images, mapper=mapper, num_workers=task.config.run.workers)
    results = inference_on_dataset(model, loader, evaluators(task.test, task.config.task))
    return table7(results, task.config.task) if distributed.rank() == 0 else {}


def table7(results: dict[str, Any], task: str) -> dict[str, float]:
    """{"bbox": {"AP": ...}, ...} -> {"box_AP": ..., ...}; no detections: every AP is 0. Raises UserError for NaN."""
    numbers = {"detections": results["detections"]}
    for kind, name in {"voc": {"bbox": "box"}, "coco": {"bbox": "box", "segm": "mask"}}[task].items():
        for metric in ("AP", "AP50", "AP75"):
            value = float(results.get(kind, {}).get(metric, math.nan)) if numbers["detections"] else 0.0
            if not math.isfinite(value):
                raise UserError(f"{name}_{metric} is {value}: is there a class without an object in the test split?")
            numbers[f"{name}_{metric}"] = value
    return numbers
