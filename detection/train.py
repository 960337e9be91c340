"""Train a detector on a pre-trained backbone: Faster R-CNN on VOC, Mask R-CNN on COCO (Section 4.5, Table 7).

examples:
  python detection/convert.py runs/pretrain/RUN/checkpoint.pt backbone.pkl
  python detection/train.py --config detection/configs/voc.yaml --weights backbone.pkl --set seed=1
  torchrun --nproc-per-node 4 detection/train.py --config detection/configs/coco.yaml --weights backbone.pkl
  python detection/train.py --eval-only --run-dir runs/detection/RUN          test its last checkpoint again

Needs Detectron2 (`make detectron2`) and the data sets (docs/detection.md). Weights that do not fit the recipe, data
sets that are not whole, and faults in their annotations and images are refused before training. The same command
resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection import datasets, weights
from mixmask import checkpoint
from mixmask import config as configs
from mixmask.config import ConfigError, Detection, UserError
from mixmask.randomness import seed_globals
from mixmask.runs import Run, read_log, run_directory, write_atomically
from mixmask.training import distributed, rendezvous
from mixmask.training.loop import Loop, finished, headline, seconds
from mixmask.training.nonfinite import finite
from mixmask.training.optim import device_name, pick_device
from mixmask.training.progress import Progress, say
from mixmask.training.state import TrainState

if importlib.util.find_spec("detectron2"):  # `require_detectron2` says how to install it
    from detection import evaluation, loading, model


def train(
    config: Detection, backbone: weights.Weights, directory: Path | None = None, runs_dir: Path = Path("runs")
) -> dict[str, Any]:
    """Train and test a detector on `backbone`; returns what result.json holds.

    directory: the run's own; by default below `runs_dir`, named after the config and its data.
    Raises UserError for bad configs, weights and data, and when the loss is no longer finite.
    """
    datasets.check_task(config.task, config.detectron2)
    weights.check_recipe(config.detectron2, backbone.note)
    world, device, cfg = prepare(config)
    check_norm(cfg.MODEL.RESNETS.NORM, device, world.size)
    config = datasets.settle(config)
    directory = directory or run_directory(runs_dir, config)
    with rendezvous.start(world, device), distributed.open_run(directory, config) as run:
        if result := finished(run):
            return result
        with distributed.main_process_first():
            data = datasets.prepare(config, directory)
        task, detector = loading.task(config, cfg, data), model.build(cfg, config.seed, backbone)
        optimizer, scheduler = model.optimisation(cfg, detector)
        state = TrainState(detector, optimizer, 1, cfg.SOLVER.MAX_ITER, parts={"scheduler": scheduler})
        run.describe()
        loop = Iterations(run, task, state)
        loop.resume()
        norm = model.norm_used(cfg, world.size)
        say(header(run, task, backbone, norm, data.notes, state))
        if state.step < state.steps:
            learn(loop, task)
        metrics = test(run, task, state)
        loop.save()
        about = {"norm": norm, "processes": world.size, "notes": data.notes, "detectron2": model.version()}
        return loop.finish(result_of(run, config, backbone, metrics, device) | about if world.rank == 0 else {})


def prepare(config: Detection) -> tuple[rendezvous.World, torch.device, Any]:
    """The process's place, its device, and Detectron2's config. Raises UserError, before anything is read."""
    require_detectron2()
    world = rendezvous.find()
    device = world.device(pick_device(config.run.device))
    cfg = model.settings(config, device)
    datasets.check_batches(cfg.SOLVER.IMS_PER_BATCH, config.group, world.size)
    return world, device, cfg


def require_detectron2() -> None:
    """Raises UserError where it is not installed."""
    if importlib.util.find_spec("detectron2") is None:
        raise UserError("detection needs Detectron2, which is not installed: make detectron2 (docs/detection.md)")


def check_norm(norm: str, device: torch.device, processes: int) -> None:
    """Raises ConfigError for PyTorch's SyncBN between CPUs, which it does not do."""
    if norm == "SyncBN" and processes > 1 and device.type == "cpu":
        raise ConfigError("detectron2.MODEL.RESNETS.NORM: SyncBN between processes needs GPUs; expected naiveSyncBN")


# ------------------------------------------------------------------------------------------------------- training


class Iterations(Loop):
    """The loop kit for Detectron2, which has no epochs: the run is a single one of SOLVER.MAX_ITER steps."""

    def __init__(self, run: Run, task: Any, state: TrainState):
        super().__init__(run, task.config, state, lambda step: {"lr": self.lr.get(step)}, lambda epoch: torch.empty(0))
        self.task = task
        self.lr: dict[int, float] = {}  # of the steps since the last line, and of that

    def _about(self, step: int) -> dict[str, Any]:
        """What the report says of a step: its rate, its images and those of the previous step."""
        files = {i: loading.files(self.task, "train", i) for i in range(max(0, step - 1), step + 1)}
        return {**self.rates(step), "files": files}

    def log(self, losses: dict[str, Tensor]) -> None:
        """Count a step; its line every `run.log_every` steps. Raises NonFiniteError."""
        state, step, every = self.state, self.state.step - 1, self.config.run.log_every
        means = distributed.mean(losses)
        state.add({"loss": means["loss"]})
        self.clock.images += self.task.cfg.SOLVER.IMS_PER_BATCH
        if step % every and state.step < state.steps:
            self.progress.step()
            return
        values = finite(means, step)
        self.run.log("step", step, **values, lr=self.lr[step], timing=self.clock.timing())
        self.progress.step(loss=f"{values['loss']:.3f}")
        if step % max(1, state.steps // 20) < every or state.step == state.steps:
            say(f"iteration {state.step}/{state.steps}  loss {values['loss']:.4f}  lr {self.lr[step]:g}")
        self.clock.restart()
        state.start_epoch()
        self.lr = {step: self.lr[step]}


def learn(loop: Iterations, task: Any) -> None:
    """The iterations that are left, with their log, checkpoints and tests on the way."""
    state, every = loop.state, task.config.eval_every
    loop.progress = Progress(state.steps, "training", state.step)
    training = loading.training_batches(task, "train", state.step)
    with loop.running(), evaluation.EventStorage(state.step), training as batches:
        for batch in loop.clock.waits(batches):
            if every and state.step and state.step % every == 0:
                finite({"the norm of weights and buffers": state.model_norm}, state.step - 1)
                test(loop.run, task, state)
            loop.lr[state.step] = state.optimizer.param_groups[0]["lr"]
            loop.log(iterate(state, batch, task.config.seed))
            loop.save_if_due()
            if state.step == state.steps:
                loop.save()
                break
    loop.progress.close()


def iterate(state: TrainState, batch: list[dict], seed: int) -> dict[str, Tensor]:
    """One step on this process's images; its losses, and their sum as "loss". Raises NonFiniteError."""
    seed_globals(seed, "detection", state.step, distributed.rank())  # which anchors and regions are sampled
    losses = forward(state.model, batch)
    loss = sum(losses.values())
    if distributed.any_rank("proposals" in losses)[0]:
        finite(distributed.mean({"loss": loss.detach()}), state.step)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    distributed.average(state.model)
    state.optimizer.step()
    state.parts["scheduler"].step()
    state.step += 1
    return {"loss": loss.detach(), **{name: part.detach() for name, part in losses.items()}}


def forward(detector: torch.nn.Module, batch: list[dict]) -> dict[str, Tensor]:
    """The losses by their names; only "proposals", which is NaN, where Detectron2 refuses its own proposals as such."""
    try:
        return detector(batch)
    except FloatingPointError:
        return {"proposals": torch.tensor(math.nan, device=next(detector.parameters()).device)}


def test(run: Run, task: Any, state: TrainState) -> dict[str, float]:
    """AP of the weights as they are, with BatchNorm's precise statistics; into the log as well."""
    start = time.perf_counter()
    evaluation.precise_statistics(state.model, task)
    metrics = evaluation.evaluate(state.model, task, run.directory)
    run.log("test", state.step, **metrics, timing={"seconds": round(time.perf_counter() - start, 3)})
    say(f"iteration {state.step}: {headline({'metrics': metrics})}")
    return metrics


def test_only(config: Detection, directory: Path | None = None, runs_dir: Path = Path("runs")) -> dict[str, Any]:
    """Test the last checkpoint of a run again; returns what evaluation.json in its directory holds.

    directory: as of `train`.
    The weights of a finished run are tested as they are, others with BatchNorm's precise statistics.
    Raises UserError where there is no checkpoint, and as `train` does.
    """
    world, device, cfg = prepare(config)
    config = datasets.settle(config)
    directory = directory or run_directory(runs_dir, config)
    with rendezvous.start(world, device), distributed.open_run(directory, config) as run:
        with distributed.main_process_first():
            saved = checkpoint.load_last(run.checkpoint)
            if saved is None:
                raise UserError(f"{run.checkpoint}: no checkpoint to test; train first, without --eval-only")
            data = datasets.prepare(config, directory)
        task, detector = loading.task(config, cfg, data), model.build(cfg, config.seed)
        checkpoint.load_weights(detector, saved["model"], run.checkpoint)
        if run.result is None:
            evaluation.precise_statistics(detector, task)
        metrics = evaluation.evaluate(detector, task, directory)
        tested = {"run": run.id, "step": saved["step"], "metrics": metrics, "notes": data.notes}
        if world.rank == 0:
            say(f"{run.id}, iteration {saved['step']}: {headline(tested)}")
            write_atomically(directory / "evaluation.json", json.dumps(tested, indent=1) + "\n")
        return tested


# --------------------------------------------------------------------------------------------------------- results


def result_of(
    run: Run, config: Detection, backbone: weights.Weights, metrics: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """What result.json holds: the metrics of the last iteration, in percent, and whose weights it began with."""
    run.sync()
    return {
        "run": run.id,
        "checkpoint": config.checkpoint,
        "format": backbone.note["source"]["format"],
        "metrics": {name: value for name, value in metrics.items() if name != "detections"},
        "detections": metrics["detections"],
        "iterations": configs.flatten(config.detectron2)["SOLVER.MAX_ITER"],
        "seed": config.seed,
        "weights": {"sha256": backbone.note["sha256"], "tensors": len(backbone.tensors), "dropped": backbone.dropped},
        "device": device_name(device),
        "timing": seconds(read_log(run.directory)),
    }


def header(run: Run, task: Any, backbone: weights.Weights, norm: str, notes: list[str], state: TrainState) -> str:
    """What is about to run, with the numbers that are actually used."""
    fresh = [part for part in weights.NEW if any(name.startswith(part) for name in state.model.state_dict())]
    solver, dropped = task.cfg.SOLVER, ", ".join(f"{what} {count}" for what, count in backbone.dropped.items())
    return (
        f"{run.id}" + (f" (resumed after iteration {state.step})" if state.step else "") + "\n"
        f"  weights of {task.config.checkpoint}: {len(backbone.tensors)} tensors set, dropped: {dropped or 'none'}; "
        f"at random: {', '.join(fresh)}\n"
        f"  {task.config.task}: {len(task.images)} training images; total batch {solver.IMS_PER_BATCH}, "
        f"{solver.MAX_ITER} iterations, lr {solver.BASE_LR:g} (used as it is); {norm}"
        + "".join(f"\n  note: {note}" for note in notes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[configs.run_options(Detection)],
    )
    parser.add_argument("--config", help="detection/configs/voc.yaml or coco.yaml")
    parser.add_argument("--weights", type=Path, help="a .pkl that detection/convert.py wrote")
    parser.add_argument(
        "--eval-only", action="store_true", help="test the run's last checkpoint again; --run-dir is enough to name it"
    )
    args = parser.parse_args()
    overrides = configs.parse_overrides(args.set)
    if args.eval_only and args.run_dir and not (args.config or args.weights):
        test_only(configs.load(args.run_dir / "config.yaml", overrides, Detection), args.run_dir)
        return
    if not (args.config and args.weights):
        parser.error("--config and --weights are needed; with --eval-only, --run-dir is enough")
    config, backbone = configs.load(args.config, overrides, Detection), weights.read(args.weights)
    config = dataclasses.replace(config, checkpoint=backbone.note["identity"])
    places = {"directory": args.run_dir, "runs_dir": args.runs_dir}
    test_only(config, **places) if args.eval_only else train(config, backbone, **places)


if __name__ == "__main__":
    configs.main_guard(main)
