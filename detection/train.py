"""Train a detector on a pre-trained backbone: Faster R-CNN on VOC, Mask R-CNN on COCO (Section 4.5, Table 7).

Example:
    python detection/convert.py runs/pretrain/RUN/checkpoint.pt backbone.pkl
    python detection/train.py --config detection/configs/voc.yaml --weights backbone.pkl --set seed=1
    torchrun --nproc-per-node 8 detection/train.py --config detection/configs/coco.yaml --weights backbone.pkl

Needs Detectron2 (`make detectron2`) and the data sets (docs/detection.md). Weights that do not fit the recipe, and data
sets that are not whole, are refused before training. The same command resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detection import datasets, weights
from mixmask import checkpoint
from mixmask import config as configs
from mixmask.config import ConfigError, Detection, UserError
from mixmask.randomness import seed_globals
from mixmask.runs import Run, read_log, run_directory, what_is_left, write_atomically
from mixmask.training import distributed
from mixmask.training.distributed import Follower
from mixmask.training.interrupt import Interrupt
from mixmask.training.optim import device_name, pick_device
from mixmask.training.progress import Progress, say

if importlib.util.find_spec("detectron2"):  # `train` and `test_only` say how to install it
    from detection import evaluation, loading, model


def train(config: Detection, backbone: weights.Weights, directory: Path) -> dict[str, Any]:
    """Train and test a detector on `backbone`; returns what result.json holds.

    Raises UserError for bad configs, weights and data, and when the loss is no longer finite.
    """
    datasets.check_task(config.task, config.detectron2)
    weights.check_recipe(config.detectron2, backbone.note)
    require_detectron2()
    world = distributed.find()
    device = world.device(pick_device(config.run.device))
    cfg = model.settings(config, device)
    datasets.check_batches(cfg.SOLVER.IMS_PER_BATCH, config.group, world.size)
    check_norm(cfg.MODEL.RESNETS.NORM, device, world.size)
    with distributed.start(world, device), (Follower if world.rank else Run)(directory, config) as run:
        with distributed.main_process_first():
            result = run.result
            if result is not None:
                datasets.check_unchanged(config, directory)
                say(f"{run.id} is finished: {summary(result)}; nothing to do")
                return result
            data = datasets.prepare(config, directory)
        task, detector = loading.task(config, cfg, data), model.build(cfg, config.seed, backbone)
        state = State(detector, *model.optimisation(cfg, detector))
        run.describe()
        with distributed.main_process_first():
            resume(run, state)
        distributed.assert_in_sync(state.model.state_dict(), state.step)
        norm = model.norm_used(cfg, world.size)
        say(header(run, task, backbone, norm, data.notes, state))
        if state.step < cfg.SOLVER.MAX_ITER:
            learn(run, task, state)
        metrics = test(run, task, state)
        save(run, task, state)
        if world.rank == 0:
            about = {"norm": norm, "processes": world.size, "notes": data.notes, "detectron2": model.version()}
            run.finish(result_of(run, config, backbone, metrics, device) | about)
            say(f"{run.id} is finished: {summary(run.result)}")
        distributed.barrier()
        return run.result


def test_only(config: Detection, directory: Path) -> dict[str, Any]:
    """Test the last checkpoint of a run again; returns what evaluation.json in its directory holds.

    The weights of a finished run are tested as they are, others with BatchNorm's precise statistics.
    Raises UserError where there is no checkpoint, and as `train` does.
    """
    require_detectron2()
    world = distributed.find()
    device = world.device(pick_device(config.run.device))
    cfg = model.settings(config, device)
    datasets.check_batches(cfg.SOLVER.IMS_PER_BATCH, config.group, world.size)
    with distributed.start(world, device), (Follower if world.rank else Run)(directory, config) as run:
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
        if world.rank:
            return {}
        say(f"{run.id}, iteration {saved['step']}: {summary({'metrics': metrics})}")
        found = {"run": run.id, "step": saved["step"], "metrics": metrics, "notes": data.notes}
        write_atomically(directory / "evaluation.json", json.dumps(found, indent=1) + "\n")
        return found


@dataclasses.dataclass
class State:
    """Everything that the next iteration depends on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    step: int = 0  # iterations done
    recent: dict[int, tuple[float, Tensor]] = dataclasses.field(default_factory=dict)  # rates, losses since the log


def require_detectron2() -> None:
    """Raises UserError where it is not installed."""
    if importlib.util.find_spec("detectron2") is None:
        raise UserError("detection needs Detectron2, which is not installed: make detectron2 (docs/detection.md)")


def check_norm(norm: str, device: torch.device, processes: int) -> None:
    """Raises ConfigError for PyTorch's SyncBN between CPUs, which it does not do."""
    if norm == "SyncBN" and processes > 1 and device.type == "cpu":
        raise ConfigError("detectron2.MODEL.RESNETS.NORM: SyncBN between processes needs GPUs; expected naiveSyncBN")


def learn(run: Run, task: Any, state: State) -> None:
    """The iterations from `state.step` to the last one, with their log, checkpoints and tests on the way."""
    config, last = task.config, task.cfg.SOLVER.MAX_ITER
    progress, clock = Progress(last, "training", state.step), Clock()
    training = loading.training_batches(task, "train", state.step)
    with Interrupt() as interrupt, evaluation.EventStorage(state.step), training as batches:
        while state.step < last:
            if config.eval_every and state.step and state.step % config.eval_every == 0:
                finite(state_norm(state), run, task, state)
                test(run, task, state)
            step, batch = state.step, clock.wait(batches)
            seed_globals(config.seed, "detection", step, distributed.rank())  # which anchors and regions are sampled
            losses, rate = forward(state.model, batch), state.optimizer.param_groups[0]["lr"]
            loss = sum(losses.values())
            state.recent[step] = rate, loss.detach()
            if distributed.any_rank("proposals" in losses)[0]:
                finite(distributed.mean({"loss": loss.detach()}), run, task, state)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            distributed.average(state.model)
            state.optimizer.step()
            state.scheduler.step()
            state.step += 1

            clock.images += task.cfg.SOLVER.IMS_PER_BATCH
            at_end = state.step == last
            if step % config.run.log_every == 0 or at_end:
                parts = {name: part.detach() for name, part in losses.items()}
                values = finite(distributed.mean({"loss": loss.detach(), **parts}), run, task, state)
                state.recent = {step: state.recent[step]}
                run.log("step", step, **values, lr=rate, timing=clock.timing())
                progress.step(loss=f"{values['loss']:.3f}")
                if step % max(1, last // 20) < config.run.log_every or at_end:
                    say(f"iteration {state.step}/{last}  loss {values['loss']:.4f}  lr {rate:g}")
            else:
                progress.step()
            due = distributed.rank() == 0 and clock.due(config.run.checkpoint_minutes)
            stop, due = distributed.any_rank(interrupt.requested, due)
            if stop or due or at_end:
                save(run, task, state)
            if stop and not at_end:
                raise KeyboardInterrupt
    progress.close()


def forward(model: nn.Module, batch: list[dict]) -> dict[str, Tensor]:
    """The losses by their names; only "proposals", which is NaN, where Detectron2 refuses its own proposals as such."""
    try:
        return model(batch)
    except FloatingPointError:
        return {"proposals": torch.tensor(math.nan, device=next(model.parameters()).device)}


def test(run: Run, task: Any, state: State) -> dict[str, float]:
    """AP of the weights as they are, with BatchNorm's precise statistics; into the log as well."""
    start = time.perf_counter()
    evaluation.precise_statistics(state.model, task)
    metrics = evaluation.evaluate(state.model, task, run.directory)
    run.log("test", state.step, **metrics, timing={"seconds": round(time.perf_counter() - start, 3)})
    say(f"iteration {state.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return metrics


def resume(run: Run, state: State) -> None:
    """Fill `state` from the last checkpoint, where there is one; log lines after it are dropped."""
    saved = checkpoint.load_last(run.checkpoint)
    if saved is None:
        run.rewind(-1)
        return
    checkpoint.load_weights(state.model, saved["model"], run.checkpoint)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scheduler.load_state_dict(saved["scheduler"])
    state.step = saved["step"]
    run.rewind(state.step)


def save(run: Run, task: Any, state: State) -> None:
    """Write the state and the log to disk. Raises UserError, and saves nothing, where a weight is not finite.

    The first process writes, and the others wait: one that ended now would take the first with it.
    """
    finite(state_norm(state), run, task, state)
    with distributed.main_process_first():
        if distributed.rank() == 0:
            run.sync()
            checkpoint.save(run.checkpoint, snapshot(run, task.config, state))


def snapshot(run: Run, config: Detection, state: State) -> dict[str, Any]:
    """What a checkpoint holds."""
    optimisation = {"optimizer": state.optimizer.state_dict(), "scheduler": state.scheduler.state_dict()}
    about = {"run": run.id, "config": configs.to_dict(config), "step": state.step}
    return {**about, "model": state.model.state_dict(), **optimisation}


def state_norm(state: State) -> dict[str, Tensor]:
    """The norm of all weights and buffers, which is finite as long as each of them is."""
    values = [value for value in state.model.state_dict().values() if value.is_floating_point()]
    return {"the norm of weights and buffers": nn.utils.get_total_norm(values)}


def finite(values: dict[str, Tensor], run: Run, task: Any, state: State) -> dict[str, float]:
    """The values, which all processes share, as numbers. Raises UserError when one is not finite; says since when.

    What `autopsy` finds and the state at this moment are saved beside.
    """
    numbers = {name: float(value) for name, value in values.items()}
    what = next((f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number)), "")
    if not what:
        return numbers
    report, where = autopsy(task, state), "the first process says why"
    with distributed.main_process_first():
        if distributed.rank() == 0:
            report = {"run": run.id, **report, "noticed": f"{what} after {state.step} iterations"}
            where = checkpoint.post_mortem(run, report, snapshot(run, task.config, state))
    raise UserError(f"{run.id}: {what} at step {report['step']}; stopped, {where}, {what_is_left(run.checkpoint)}")


def autopsy(task: Any, state: State) -> dict[str, Any]:
    """The first step whose loss, or else the last one, whose update, is not finite; its images and those of the one
    before."""
    means = distributed.mean({str(step): loss for step, (_, loss) in state.recent.items()})
    step = next((int(step) for step, loss in means.items() if not math.isfinite(loss)), state.step - 1)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    return {
        "step": step,
        "lr": state.recent[step][0] if step in state.recent else None,
        "gradient_norm": str(float(nn.utils.get_total_norm(gradients))),  # text: JSON has no NaN
        "files": {i: loading.files(task, "train", i) for i in range(max(0, step - 1), step + 1)},
    }


class Clock:
    """Images, seconds, and seconds spent waiting for data since the last log line."""

    def __init__(self) -> None:
        self.last_due = time.perf_counter()
        self.start()

    def start(self) -> None:
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    def wait(self, batches: Any) -> list:
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def timing(self) -> dict[str, float]:
        """seconds, images_per_second and data_wait (a share, 0 to 1) since the last call."""
        seconds = time.perf_counter() - self.started
        numbers = {"images_per_second": round(self.images / seconds, 2), "data_wait": round(self.waited / seconds, 4)}
        self.start()
        return {"seconds": round(seconds, 3), **numbers}

    def due(self, minutes: float) -> bool:
        """Whether so many minutes have passed since the start or since this last said yes."""
        if time.perf_counter() - self.last_due <= 60 * minutes:
            return False
        self.last_due = time.perf_counter()
        return True


def result_of(
    run: Run, config: Detection, backbone: weights.Weights, metrics: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """What result.json holds: the metrics of the last iteration, in percent, and whose weights it began with."""
    run.sync()
    seconds = sum(line["timing"]["seconds"] for line in read_log(run.directory))
    return {
        "run": run.id,
        "checkpoint": config.checkpoint,
        "metrics": {name: value for name, value in metrics.items() if name != "detections"},
        "detections": metrics["detections"],
        "iterations": configs.flatten(config.detectron2)["SOLVER.MAX_ITER"],
        "seed": config.seed,
        "format": backbone.note["source"]["format"],
        "weights": {"sha256": backbone.note["sha256"], "tensors": len(backbone.tensors), "dropped": backbone.dropped},
        "device": device_name(device),
        "timing": {"seconds": round(seconds, 1)},
    }


def summary(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())


def header(run: Run, task: Any, backbone: weights.Weights, norm: str, notes: list[str], state: State) -> str:
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
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="detection/configs/voc.yaml or coco.yaml")
    parser.add_argument("--weights", type=Path, help="a .pkl that detection/convert.py wrote")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="replace keys of the recipe"
    )
    parser.add_argument("--run-dir", type=Path, help="default: RUNS_DIR/detection/<name of the run>")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument(
        "--eval-only", action="store_true", help="test the run's last checkpoint again; --run-dir alone names the run"
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
    directory = args.run_dir or run_directory(args.runs_dir, "detection", config)
    test_only(config, directory) if args.eval_only else train(config, backbone, directory)


if __name__ == "__main__":
    configs.main_guard(main)
