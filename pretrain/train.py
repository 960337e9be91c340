"""Pre-train an encoder: every framework, every method, one loop.

Example:
    python pretrain/train.py --config pretrain/configs/cifar100_moco.yaml --set method=mixmask seed=1

The run lives in runs/pretrain/<recipe>-<method>-e<epochs>-<hash>-s<seed>/. The same command resumes a run that was
stopped, and says so when it is finished. Several processes compute what one computes (docs/distributed.md):
    torchrun --nproc-per-node 4 pretrain/train.py --config pretrain/configs/imagenet_moco.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixmask import checkpoint, data, knn
from mixmask import config as configs
from mixmask.backbones import compile_backbones
from mixmask.config import ConfigError, Pretrain, UserError
from mixmask.frameworks import build_framework
from mixmask.masks import check_grid, sample_mask
from mixmask.methods import METHODS, Anchor, extra_crops
from mixmask.objective import objective
from mixmask.randomness import numpy_generator, seed_globals, torch_generator
from mixmask.runs import Run, read_log, run_directory, what_is_left
from mixmask.schedules import cautions, learning_rate
from mixmask.training import distributed
from mixmask.training.interrupt import Interrupt
from mixmask.training.optim import build_optimizer, device_name, keep_freed_memory, pick_device, set_learning_rate
from mixmask.training.progress import Progress, say
from mixmask.views import train_batches


def train(config: Pretrain, directory: Path, command: list[str] | None = None) -> dict[str, Any]:
    """Run (or resume) the pre-training that `config` describes in `directory`; returns what result.json holds.

    Raises UserError for bad configs, data and checkpoints, and when the loss is no longer finite.
    """
    check(config)
    world = distributed.find()
    configs.check_processes(config, world.size)
    device = world.device(pick_device(config.run.device))
    with distributed.start(world, device), distributed.open_run(directory, config) as run:
        with distributed.main_process_first():
            found = run.result
        if found is not None:
            say(f"{run.id} is finished: {summary(found)}; nothing to do")
            return found
        framework, optimizer = build(config, device)
        train_set, test_set = load_data(config, device)
        check_data(config, framework, train_set)
        run.describe(command)
        steps_per_epoch = len(train_set) // config.batch_size
        state = State(framework, optimizer, steps_per_epoch * config.epochs)
        with distributed.main_process_first():
            resume(run, state)
        distributed.assert_in_sync(framework.state_dict(), state.step)
        say(header(run, config, train_set, device, state.step, steps_per_epoch))
        if state.step == 0 and config.knn.every:
            run.log("epoch", -1, epoch=0, **evaluate(framework, train_set, test_set, config, device))

        work = Work()
        with Interrupt() as interrupt, explained(run, config, state, len(train_set)):
            for epoch in range(state.step // steps_per_epoch, config.epochs):
                done = state.step % steps_per_epoch
                progress = Progress(steps_per_epoch, f"epoch {epoch + 1}/{config.epochs}", done)
                clock = Clock()
                for batch in clock.waits(views(config, train_set, epoch, done, device)):
                    step = state.step
                    with work.counted():
                        values, anchors, rate = iterate(config, state, batch)
                    accumulate(state, values)
                    clock.images += config.batch_size
                    clock.flops += work.flops * world.size
                    if step % config.run.log_every == 0:
                        numbers = finite({**values, **distributed.mean(coefficients(anchors))}, step)
                        run.log("step", step, epoch=epoch + 1, **numbers, lr=rate, timing=clock.timing())
                        progress.step(loss=f"{numbers['loss']:.3f}")
                    else:
                        progress.step()
                    due = world.rank == 0 and clock.due(config.run.checkpoint_minutes)
                    stop, due = distributed.any_rank(interrupt.requested, due)
                    within_epoch = state.step % steps_per_epoch > 0  # the end of an epoch is logged before it is saved
                    if within_epoch and (stop or due):
                        save(run, config, state)
                        if stop:
                            raise KeyboardInterrupt
                progress.close()

                means = {name: total / steps_per_epoch for name, total in state.sums.items()}
                means, timing = finite(means, step), clock.timing()
                last = epoch + 1 == config.epochs
                if last or (config.knn.every and (epoch + 1) % config.knn.every == 0):
                    means.update(evaluate(framework, train_set, test_set, config, device))
                same = distributed.assert_in_sync(framework.state_dict(), state.step)
                run.log("epoch", step, epoch=epoch + 1, **means, lr=rate, **same, timing=timing)
                say(epoch_line(epoch + 1, config.epochs, means, rate, timing))
                state.sums.clear()
                state.losses.clear()
                (stop,) = distributed.any_rank(interrupt.requested)
                if last or (epoch + 1) % config.run.checkpoint_every == 0 or stop:
                    save(run, config, state)
                if stop and not last:
                    raise KeyboardInterrupt
        if world.rank == 0:
            run.finish(result(run, config, state.steps, device))
            say(f"{run.id} is finished: {summary(run.result)}")
        distributed.barrier()
        return run.result


def iterate(config: Pretrain, state: State, batch: list[Tensor]) -> tuple[dict[str, Tensor], list[Anchor], float]:
    """The paper's iteration: mixtures of x1 (Eq. 1, 2), the weighted sum over anchors (Eq. 4, 6), one step down.

    batch: x1, x2 (N, C, H, W), and MSCN's extra crops. Returns scalars for the log, the anchors, and the learning rate
    that was used. Nothing here waits for the device.
    """
    framework, optimizer, step = state.framework, state.optimizer, state.step
    (x1, x2, *crops), device = batch, batch[0].device
    own_groups = range(config.mix_groups)[distributed.local_slice(config.mix_groups)]
    rngs = [numpy_generator(config.seed, "mix", step, group) for group in own_groups]
    anchors = METHODS[config.method](config, x1, rngs, *crops)
    rate = learning_rate(config.schedule, config.optimizer.lr, step, state.steps // config.epochs, config.epochs)
    set_learning_rate(optimizer, rate)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        shuffle = torch_generator(device, config.seed, "shuffle", step)
        loss, parts, targets = objective(framework, x1, x2, anchors, shuffle)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    distributed.average(framework)
    optimizer.step()
    framework.after_step(targets, step, state.steps)
    state.step += 1
    values = {"loss": loss.detach(), **loss_parts(parts), **framework.metrics(targets)}
    return distributed.mean(values), anchors, rate


@dataclass
class State:
    """Everything that the next iteration depends on."""

    framework: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int  # of the whole run
    step: int = 0  # iterations done
    sums: dict[str, Tensor] = field(default_factory=dict)  # of this epoch's values
    losses: list[Tensor] = field(default_factory=list)  # of this epoch's iterations, or of those since the run resumed


class NonFinite(UserError):
    """The value called `name` is `number` in iteration `step`."""

    def __init__(self, name: str, number: float, step: int):
        super().__init__(f"{name} is {number} at step {step}")
        self.name, self.number, self.step = name, number, step


# ----------------------------------------------------------------------------------------------------- before


def check(config: Pretrain) -> None:
    """Raises ConfigError for settings that cannot work together, before anything is read or written."""
    if config.method not in METHODS:
        raise ConfigError(f"method: unknown '{config.method}'{configs.nearest(config.method, METHODS)}")
    for key, groups in (("backbone.bn_groups", config.backbone.bn_groups), ("mix_groups", config.mix_groups)):
        if config.batch_size % groups:
            raise ConfigError(f"{key}: {groups} groups do not divide a batch of {config.batch_size} images")
    if config.batch_size == config.backbone.bn_groups:
        raise ConfigError("backbone.bn_groups: BatchNorm needs at least two images in a group")
    for key, values in (("augment.mean", config.augment.mean), ("augment.std", config.augment.std)):
        if len(values) != 3:
            raise ConfigError(f"{key}: expected three numbers, one per channel, found {list(values)}")
    if config.method in ("mixmask", "both", "erase"):
        sample_mask(config.mask, config.augment.size, config.augment.size, numpy_generator("check"))
    if config.method in ("unmix", "mixmask", "both") and config.batch_size == config.mix_groups:
        raise ConfigError("mix_groups: a mixture needs at least two images in a group")
    check_crops(config)


def check_crops(config: Pretrain) -> None:
    """Raises ConfigError for extra crops that the augmentation does not cut, or that are too small for their masks."""
    for augment in [config.augment, *extra_crops(config)] if config.method == "mscn" else []:
        check_grid("mscn.grid", config.mscn.grid, augment.size, augment.size)
        if config.mscn.focal_prob and round(config.mscn.focal_side * augment.size) < 1:
            where = f"a window of {config.mscn.focal_side:g} of {augment.size} pixels"
            raise ConfigError(f"mscn.focal_side: {where} shows nothing; expected at least one pixel")
    if extra_crops(config) and "crop" not in config.augment.order:
        raise ConfigError("mscn.crops: augment.order has no crop, which would cut them; expected mscn.crops=0")


def load_data(config: Pretrain, device: torch.device) -> tuple[Any, Any]:
    """The verified training and test sets; those held in memory move to the device."""
    sets = []
    for split in ("train", "test"):
        options = (config.run.download, config.allow_partial_data)
        with distributed.main_process_first():
            dataset = data.load(config.dataset, config.run.data_root, split, *options)
        sets.append(dataset.to(device) if isinstance(dataset, data.Resident) else dataset)
        if dataset.note:
            say(f"note: {dataset.note}")
    return sets[0], sets[1]


def check_data(config: Pretrain, framework: nn.Module, train_set: Any) -> None:
    """Raises ConfigError for settings that this training set cannot bear."""
    images = len(train_set)
    framework.check_data(images)
    if "crop" not in config.augment.order and isinstance(train_set, data.Resident):
        side = train_set.images.shape[-1]
        if side != config.augment.size:
            raise ConfigError(f"augment.size: {config.augment.size}, but no crop resizes the images of {side} pixels")
    if config.batch_size > images:
        raise ConfigError(f"batch_size: {config.batch_size} exceeds the {images} training images")
    if config.knn.k > images:
        raise ConfigError(f"knn.k: {config.knn.k} neighbours, but there are only {images} training images")


def build(config: Pretrain, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The framework, initialised from the seed, and its optimiser; of several processes each builds the same."""
    if device.type == "cpu":
        keep_freed_memory()
    seed_globals(config.seed, "init")
    framework = build_framework(distributed.shard_config(config)).to(device).train()
    if config.run.channels_last:
        framework = framework.to(memory_format=torch.channels_last)
    if config.run.compile:
        compile_backbones(framework)
    return framework, build_optimizer(config.optimizer, framework.parameters(), framework.fixed_lr_parameters())


def resume(run: Run, state: State) -> None:
    """Fill `state` from the last whole checkpoint, where there is one; log lines after it are dropped."""
    saved = checkpoint.load_last(run.checkpoint)
    if saved is None:
        run.rewind(-1)
        return
    checkpoint.load_weights(state.framework, saved["model"], run.checkpoint)
    state.optimizer.load_state_dict(saved["optimizer"])
    checkpoint.restore_random_states(saved["random"])
    device = next(state.framework.parameters()).device
    state.sums = {name: total.to(device) for name, total in saved["sums"].items()}
    state.step = saved["step"]
    run.rewind(state.step)


def save(run: Run, config: Pretrain, state: State) -> None:
    """Write the state and the log to disk. Raises NonFinite, and saves nothing, where a number is not finite.

    All processes hold the same state; the first writes it, and the others wait: one that ended now would, through
    torchrun or SLURM, take the first with it.
    """
    model = state.framework.state_dict()
    norm = nn.utils.get_total_norm([value for value in model.values() if value.is_floating_point()])
    finite({**state.sums, "the norm of weights and buffers": norm}, state.step - 1)
    with distributed.main_process_first():
        if distributed.rank() == 0:
            run.sync()
            checkpoint.save(run.checkpoint, snapshot(run, config, state))


def snapshot(run: Run, config: Pretrain, state: State) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "run": run.id,
        "config": configs.to_dict(config),
        "step": state.step,
        "steps": state.steps,
        "sums": state.sums,
        "model": state.framework.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "random": checkpoint.random_states(),
    }


# ----------------------------------------------------------------------------------------------------- during


def views(config: Pretrain, train_set: Any, epoch: int, skip: int, device: torch.device) -> Iterator[list[Tensor]]:
    """This process's rows of the epoch's batches after the first `skip`: x1, x2 (N, 3, S, S), MSCN's extra crops."""
    sizes = (config.batch_size, config.seed, epoch, 2, device, config.run.workers)
    part = {"skip": skip, "crops": extra_crops(config), "rows": distributed.local_slice(config.batch_size)}
    for batch, _ in train_batches(train_set, config.augment, *sizes, **part):
        yield [x.contiguous(memory_format=torch.channels_last) for x in batch] if config.run.channels_last else batch


def loss_parts(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weighted terms of the objective, by anchor."""
    return {f"loss_{name}": part for name, part in parts.items()}


def coefficients(anchors: list[Anchor]) -> dict[str, Tensor]:
    """Mean mixture coefficient of each mixture in its normal order (Eq. 3)."""
    mixtures = [a for a in anchors if isinstance(a.weight, Tensor) and a.order is None]
    return {f"lambda_{a.name}": a.weight.mean() for a in mixtures}


def accumulate(state: State, values: dict[str, Tensor]) -> None:
    """Add to the epoch's sums, in float64, and keep the loss, without waiting for the device."""
    for name, value in values.items():
        state.sums[name] = state.sums.get(name, 0) + value.double()
    state.losses.append(values["loss"])


def finite(values: dict[str, Tensor], step: int) -> dict[str, float]:
    """The values as numbers. Raises NonFinite when one is not finite."""
    numbers = {name: float(value) for name, value in values.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise NonFinite(name, number, step)
    return numbers


@contextlib.contextmanager
def explained(run: Run, config: Pretrain, state: State, images: int) -> Iterator[None]:
    """A NonFinite inside becomes nonfinite.json, nonfinite.pt and a UserError that says where they are.

    Losses are looked at every `run.log_every` iterations only, so the first that was not finite is searched for here;
    the saved state is that of the moment when it was noticed.
    """
    try:
        yield
    except NonFinite as error:
        finite_losses = [math.isfinite(loss) for loss in state.losses]
        step = error.step if all(finite_losses) else state.step - len(finite_losses) + finite_losses.index(False)
        where = "the first process says why"
        with distributed.main_process_first():
            if distributed.rank() == 0:
                report = {"run": run.id, **autopsy(config, state, images, step), "noticed": str(error)}
                where = checkpoint.post_mortem(run, report, snapshot(run, config, state))
        what = f"{error.name} is {error.number} at step {step}"
        raise UserError(f"{run.id}: {what}; stopped, {where}, {what_is_left(run.checkpoint)}") from None


def autopsy(config: Pretrain, state: State, images: int, step: int) -> dict[str, Any]:
    """The iteration whose loss is not finite, and the indices of its images and of those of the iteration before."""
    steps_per_epoch = state.steps // config.epochs
    epoch, first = step // steps_per_epoch, step - step % steps_per_epoch
    batches = data.batch_indices(images, config.batch_size, config.seed, epoch)
    gradients = [p.grad for p in state.framework.parameters() if p.grad is not None]
    return {
        "step": step,
        "epoch": epoch + 1,
        "lr": learning_rate(config.schedule, config.optimizer.lr, step, steps_per_epoch, config.epochs),
        "sums": {name: str(float(total)) for name, total in state.sums.items()},  # text: JSON has no NaN
        "gradient_norm": str(float(nn.utils.get_total_norm(gradients))),
        "indices": {i: batches[i - first].tolist() for i in range(max(first, step - 1), step + 1)},
    }


def evaluate(framework: nn.Module, train_set: Any, test_set: Any, config: Pretrain, device: torch.device) -> dict:
    """k-NN accuracy of the encoder as it is now; the first process measures it, and the others wait."""
    options = (config.augment, config.knn, device, config.run.workers)
    with distributed.main_process_first():
        return {} if distributed.rank() else knn.evaluate(framework.encoder, train_set, test_set, *options)


class Work:
    """Floating-point operations of one iteration in this process, counted while the first one runs.

    Matrix products and convolutions, forward and backward; a multiply-add counts two.
    """

    def __init__(self) -> None:
        self.flops = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what is inside, once."""
        if self.flops:
            yield
            return
        eager = torch.compiler.set_stance("force_eager")  # the counter sees no operation of a compiled graph
        with eager, FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()


class Clock:
    """Images, floating-point operations, seconds, and seconds spent waiting for data since the epoch began."""

    def __init__(self) -> None:
        self.images, self.flops, self.wait = 0, 0, 0.0
        self.start = self.last_due = time.perf_counter()

    def waits(self, batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
        """The batches, with the time it takes to get each counted as waiting."""
        batches = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def timing(self) -> dict[str, float]:
        """images_per_second, counted tflops_per_second and data_wait (a share, 0 to 1) since the epoch began."""
        seconds = time.perf_counter() - self.start
        return {
            "seconds": round(seconds, 3),
            "images_per_second": round(self.images / seconds, 1),
            "tflops_per_second": round(self.flops / seconds / 1e12, 4),
            "data_wait": round(self.wait / seconds, 4),
        }

    def due(self, minutes: float) -> bool:
        """Whether so many minutes have passed since the epoch began or this last said yes."""
        if time.perf_counter() - self.last_due <= 60 * minutes:
            return False
        self.last_due = time.perf_counter()
        return True


# ------------------------------------------------------------------------------------------------------ after


def result(run: Run, config: Pretrain, steps: int, device: torch.device) -> dict[str, Any]:
    """What result.json holds: each metric under its full name, after the last epoch, the best, and before training."""
    run.sync()
    epochs = [line for line in read_log(run.directory) if line["kind"] == "epoch"]
    metrics = {"loss": epochs[-1]["loss"]}
    for name in (key for key in epochs[-1] if key.startswith("knn_")):
        values = {line["epoch"]: line[name] for line in epochs if name in line}
        metrics[f"{name}_last"] = values[config.epochs]
        metrics[f"{name}_best"] = max(v for e, v in values.items() if e > 0)
        if 0 in values:
            metrics[f"{name}_init"] = values[0]
    seconds = sum(line["timing"]["seconds"] for line in epochs if "timing" in line)
    return {
        "run": run.id,
        "metrics": metrics,
        "epochs": config.epochs,
        "steps": steps,
        "device": device_name(device),
        "timing": {"seconds": round(seconds, 1)},
    }


def summary(result: dict[str, Any]) -> str:
    """The headline numbers of a result, for people."""
    shown = {k: v for k, v in result["metrics"].items() if not k.endswith("_best")}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def header(run: Run, config: Pretrain, train_set: Any, device: torch.device, step: int, steps_per_epoch: int) -> str:
    """What is about to happen, with the numbers that are really used."""
    b, o, processes = config.backbone, config.optimizer, distributed.size()
    lines = [
        f"{run.id}" + (f" (resumed at epoch {step / steps_per_epoch:.2f})" if step else ""),
        f"  {config.framework}, {config.method}; {b.arch}, {b.stem} stem, width {b.width}, "
        f"{b.bn_groups} BatchNorm group(s)",
        f"  {config.dataset}: {len(train_set)} images, {len(train_set.classes)} classes; "
        f"views of {config.augment.size} px",
        f"  total batch {config.batch_size} in {config.mix_groups} mix group(s), {steps_per_epoch} steps an epoch, "
        f"{config.epochs} epochs; {o.name}, lr {o.lr:g} (used as it is), weight decay {o.weight_decay:g}",
        *([f"  {processes} processes of {config.batch_size // processes} images each"] if processes > 1 else []),
        f"  {device}, {config.precision}, {torch.get_num_threads()} CPU threads; log in {run.directory / 'log.jsonl'}",
        *(f"  note: {text}" for text in cautions(config.schedule, steps_per_epoch, config.epochs)),
    ]
    return "\n".join(lines)


def epoch_line(epoch: int, epochs: int, means: dict[str, float], rate: float, timing: dict[str, float]) -> str:
    """One line an epoch."""
    accuracy = "".join(f"  {name} {value:.2f} %" for name, value in means.items() if name.startswith("knn_"))
    return (
        f"epoch {epoch}/{epochs}  loss {means['loss']:.4f}{accuracy}  lr {rate:.4g}  "
        f"{timing['images_per_second']:.0f} images/s  {timing['tflops_per_second']:.3g} TFLOP/s  "
        f"data wait {timing['data_wait']:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe, such as pretrain/configs/cifar100_moco.yaml")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="replace keys of the recipe"
    )
    parser.add_argument("--run-dir", type=Path, help="default: RUNS_DIR/pretrain/<name of the run>")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: runs")
    args = parser.parse_args()
    config = configs.load(args.config, configs.parse_overrides(args.set))
    train(config, args.run_dir or run_directory(args.runs_dir, "pretrain", config))


if __name__ == "__main__":
    configs.main_guard(main)
