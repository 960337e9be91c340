"""AP of a detector on the test split, by Detectron2's evaluators, and its predictions on disk. Needs Detectron2."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

with warnings.catch_warnings():  # about pkg_resources, which it still uses
    warnings.simplefilter("ignore")
    from detectron2.evaluation import (
        COCOEvaluator,
        DatasetEvaluator,
        DatasetEvaluators,
        PascalVOCDetectionEvaluator,
        inference_on_dataset,
    )
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from detectron2.utils import comm
    from detectron2.utils.events import EventStorage
    from fvcore.nn.precise_bn import update_bn_stats

from detection.annotations import VOC_CLASSES
from detection.loading import Task, test_batches, training_batches
from mixmask.config import UserError
from mixmask.randomness import seed_globals
from mixmask.runs import write_atomically
from mixmask.training import distributed

PREDICTIONS = "predictions.json"  # in a run's directory
KINDS = {"voc": {"bbox": "box"}, "coco": {"bbox": "box", "segm": "mask"}}  # task -> Detectron2's words -> ours
SIZES = ("APs", "APm", "APl")  # objects below 32 x 32 pixels, below 96 x 96, and above


def precise_statistics(model: nn.Module, task: Task) -> None:
    """BatchNorm's running statistics become their means over TEST.PRECISE_BN.NUM_ITER batches (Detectron2's PreciseBN).

    They depend on the weights and the seed alone: doing it again changes nothing.
    """
    if not task.cfg.TEST.PRECISE_BN.ENABLED:
        return
    seed_globals(task.config.seed, "detection", "precise", distributed.rank())
    with torch.no_grad(), EventStorage(), training_batches(task, "precise") as batches:
        update_bn_stats(model, batches, task.cfg.TEST.PRECISE_BN.NUM_ITER)
    model.zero_grad(set_to_none=True)
    distributed.average(model)


def evaluate(model: nn.Module, task: Task, directory: Path) -> dict[str, float]:
    """AP of the test split in percent, under the names of Table 7, and the number of detections; {} but on rank 0.

    The detections are written to `directory`/predictions.json, in the form of COCO's results.
    """
    try:
        with test_batches(task) as batches:
            results = inference_on_dataset(model, batches, evaluators(task, directory))
        if distributed.rank():
            return {}
        if task.config.task == "coco":
            keep_predictions(directory)
    except OSError as error:  # a full disk
        raise UserError(f"cannot test, or write {directory / PREDICTIONS}: {error.strerror or error}") from None
    return table7(results, task.config.task, task.absent)


def evaluators(task: Task, directory: Path) -> DatasetEvaluators:
    """Detectron2's evaluator for the task, and one that writes and counts the detections."""
    if task.config.task == "voc":
        return DatasetEvaluators([PascalVOCDetectionEvaluator(task.test), Predictions(directory / PREDICTIONS)])
    coco = COCOEvaluator(task.test, ("bbox", "segm"), distributed=True, output_dir=str(directory / f".{PREDICTIONS}"))
    return DatasetEvaluators([coco, Predictions(None)])


class Predictions(DatasetEvaluator):
    """Counts what was detected: without any detection Detectron2 reports no AP. Writes it to `path`, if it has one.

    Categories are VOC's classes from 1 on, in alphabetical order; image_id is the image's name, as in Detectron2.
    """

    def __init__(self, path: Path | None):
        self.path = path

    def reset(self) -> None:
        self.count, self.detections = 0, []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            self.count += len(output["instances"])
            if self.path:
                self.detections += instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])

    def evaluate(self) -> dict[str, float]:
        parts = comm.gather((self.count, self.detections), dst=0)
        if self.path and comm.is_main_process():
            detections = [{**one, "category_id": one["category_id"] + 1} for _, part in parts for one in part]
            write_atomically(self.path, json.dumps(detections))
        return {"detections": sum(count for count, _ in parts)}


def keep_predictions(directory: Path) -> None:
    """Keep only the detections of what COCO's evaluator wrote; without any, an empty list."""
    folder = directory / f".{PREDICTIONS}"
    if (folder / "coco_instances_results.json").exists():
        os.replace(folder / "coco_instances_results.json", directory / PREDICTIONS)
    else:
        write_atomically(directory / PREDICTIONS, "[]")
    shutil.rmtree(folder, ignore_errors=True)


def table7(results: Mapping[str, Any], task: str, absent: Sequence[str] = ()) -> dict[str, float]:
    """{"bbox": {"AP": ...}, ...} -> {"box_AP": ..., ...}; no detections: every AP is 0. Raises UserError for NaN.

    COCO's AP of small, medium and large objects as well, of each size that the split has. `absent`: VOC's classes
    without an object, whose AP is 0 in Detectron2's mean, are left out of it.
    """
    numbers = {"detections": results["detections"]}
    scale = len(VOC_CLASSES) / (len(VOC_CLASSES) - len(absent)) if task == "voc" else 1.0
    for kind, name in KINDS[task].items():
        measured = results.get(kind, {})
        for metric in ("AP", "AP50", "AP75"):
            value = scale * float(measured.get(metric, math.nan)) if numbers["detections"] else 0.0
            if not math.isfinite(value):
                raise UserError(f"{name}_{metric} is {value}: is there a class without an object in the test split?")
            numbers[f"{name}_{metric}"] = value
        sizes = {f"{name}_{size}": float(measured[size]) for size in SIZES if size in measured}
        numbers |= {key: value for key, value in sizes.items() if math.isfinite(value)}
    return numbers
