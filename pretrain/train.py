"""Pre-train an encoder: every framework, every method, one loop.

Example:
    python pretrain/train.py --config pretrain/configs/cifar100_moco.yaml --set method=mixmask seed=1

The run lives in runs/pretrain/<recipe>-<method>-e<epochs>-<hash>-s<seed>/. The same command resumes a run that was
stopped, and says so when it is finished. Several processes compute what one computes (docs/slurm.md):
    torchrun --nproc-per-node 4 pretrain/train.py --config pretrain/configs/imagenet_moco.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmask import collapse, datasets, knn, networks, registry
from mixmask import config as configs
from mixmask.batchnorm import span_processes
from mixmask.config import Augment, Pretrain
from mixmask.config.resnets import ARCHITECTURES
from mixmask.datasets.base import in_words
from mixmask.datasets.settle import settle
from mixmask.datasets.verify import verify
from mixmask.datasets.views import train_batches
from mixmask.features import extract, shorter_side
from mixmask.frameworks import build_framework
from mixmask.methods import METHODS, Anchor, extra_crops
from mixmask.objective import in_parts, objective
from mixmask.randomness import numpy_generator, seed_globals, torch_generator
from mixmask.runs import Run, run_directory
from mixmask.schedules import cautions, learning_rate
from mixmask.training import distributed, rendezvous
from mixmask.training.checks import check, check_backbone, check_data, check_parts
from mixmask.training.initial import load_initial, settle_initial
from mixmask.training.loop import Loop, epoch_lines, finished, last_and_best, seconds
from mixmask.training.optim import (
    arithmetic,
    build_optimizer,
    compiles,
    device_name,
    keep_freed_memory,
    pick_device,
    set_learning_rate,
)
from mixmask.training.processes import check_processes
from mixmask.training.progress import say
from mixmask.training.state import TrainState


def train(
    config: Pretrain, directory: Path | None = None, command: list[str] | None = None, runs_dir: Path = Path("runs")
) -> dict[str, Any]:
    """Run (or resume) the pre-training that `config` describes; returns what result.json holds.

    directory: its own; by default below `runs_dir`, named after the config and its data.
    Raises UserError for bad configs, data and checkpoints, and when the loss is no longer finite.
    """
    config = settle_initial(settle(config))
    check(config)
    directory = directory or run_directory(runs_dir, config)
    world = rendezvous.find()
    check_processes(config, world.size)
    device = world.device(pick_device(config.run.device))
    with rendezvous.start(world, device), distributed.open_run(directory, config) as run:
        if result := finished(run):
            return result
        framework, optimizer = build(config, device)
        train_set, test_set = load_data(config, device)
        check_data(config, framework, train_set)
        run.describe(command)
        steps_per_epoch = len(train_set) // config.batch_size
        state = TrainState(framework, optimizer, config.epochs, steps_per_epoch, data=datasets.counts(train_set))
        rates = functools.partial(learning_rates, config, state.steps_per_epoch)
        images = functools.partial(datasets.batch_indices, len(train_set), config.batch_size, config.seed)
        loop = Loop(run, config, state, rates, images, step_lines=True)
        loop.resume()
        say(header(run, config, train_set, device, state))
        crops = framework.crops(config.augment)
        measure = functools.partial(evaluate, framework, train_set, test_set, config, device)
        if state.step == 0 and config.knn.every:
            run.log("epoch", -1, epoch=0, **measure(trained=False))

        with loop.running():
            for epoch in loop.epochs():
                for batch in loop.batches(views(config, train_set, epoch, loop.skip, device, crops)):
                    with loop.work.counted():
                        values, anchors = iterate(config, state, batch)
                    loop.log(values, functools.partial(of_step, framework, anchors))
                    loop.save_if_due()
                loop.end_epoch(measure if knn_is_due(config, epoch) else dict)
        return loop.finish(result_of(run, config, state.steps, device) if world.rank == 0 else {})


def iterate(config: Pretrain, state: TrainState, batch: list[Tensor]) -> tuple[dict[str, Tensor], list[Anchor]]:
    """The paper's iteration: mixtures of x1 (Eq. 1, 2), the weighted sum over anchors (Eq. 4, 6), one optimiser step.

    batch: x1, x2 (N, C, H, W), and extra crops, MSCN's or the framework's. Returns scalars for the log, and the
    anchors. Nothing here waits for the device.
    """
    framework, optimizer, step = state.model, state.optimizer, state.step
    (x1, x2, *crops), device = batch, batch[0].device
    of_method = len(extra_crops(config))
    anchors = anchors_of(config, step, x1, crops[:of_method])
    framework.before_step(step)
    set_learning_rate(optimizer, learning_rates(config, state.steps_per_epoch, step)["lr"])
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16")
    shuffle = torch_generator(device, config.seed, "shuffle", step)
    optimizer.zero_grad(set_to_none=True)
    if config.run.accumulate > 1:
        loss, parts, targets = in_parts(framework, x1, x2, anchors, config.run.accumulate, shuffle, autocast)
    else:
        with autocast():
            loss, parts, targets = objective(framework, x1, x2, anchors, shuffle, crops[of_method:])
        loss.backward()
    distributed.average(framework)
    optimizer.step()
    framework.after_step(targets, step, state.steps)
    state.step += 1
    terms = {f"loss_{name}": part for name, part in parts.items()}  # weighted, by anchor
    values = {"loss": loss.detach(), **terms, **framework.metrics(targets)}
    return distributed.mean(values), anchors


def anchors_of(config: Pretrain, step: int, x1: Tensor, crops: Sequence[Tensor]) -> list[Anchor]:
    """What the method makes of this process's rows of x1 and of its extra crops, (N, C, H, W).

    A process that holds whole mix groups draws for these alone. Where a group spans processes, the images of all are
    gathered, mixed as one process does, and it keeps its rows.
    """

    def rngs(groups: range) -> list[Any]:
        return [numpy_generator(config.seed, "mix", step, group) for group in groups]

    method, groups, spec = METHODS[config.method], range(config.mix_groups), registry.METHODS[config.method]
    if len(groups) % distributed.size() == 0:
        return method(config, x1, rngs(groups[distributed.local_slice(len(groups))]), *crops)
    if not (spec.masks or spec.mixes or spec.crops):  # nothing is drawn
        return method(config, x1, [], *crops)
    everyones = [distributed.gather(images) for images in (x1, *crops)]
    return own_rows(method(config, everyones[0], rngs(groups), *everyones[1:]), x1)


def own_rows(anchors: Sequence[Anchor], x1: Tensor) -> list[Anchor]:
    """This process's rows of the anchors of a whole batch; the clean one holds x1 (N, C, H, W) itself."""
    rows = distributed.local_slice(len(x1) * distributed.size())
    images = {id(a.images): x1 if a.clean else a.images[rows] for a in anchors}

    def cut(values: Any) -> Any:
        return values[rows] if isinstance(values, Tensor) and values.dim() else values

    return [
        dataclasses.replace(a, images=images[id(a.images)], weight=cut(a.weight), order=cut(a.order), everywhere=True)
        for a in anchors
    ]


def learning_rates(config: Pretrain, steps_per_epoch: int, step: int) -> dict[str, float]:
    """The rate of a step."""
    rate = learning_rate(config.schedule, config.optimizer.lr, step, steps_per_epoch, config.epochs)
    return {"lr": rate}


# ----------------------------------------------------------------------------------------------------- before


def load_data(config: Pretrain, device: torch.device) -> tuple[Any, Any]:
    """The verified training and test sets; those held in memory move to the device."""
    sets = []
    for split in ("train", "test"):
        with distributed.main_process_first():
            dataset = datasets.load_split(config, split)
        sets.append(dataset.to(device) if isinstance(dataset, datasets.Resident) else dataset)
        if dataset.note:
            say(f"note: {dataset.note}")
    return sets[0], sets[1]


def build(config: Pretrain, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The framework, initialised from the seed, and its optimiser; of several processes each builds the same."""
    if device.type == "cpu":
        keep_freed_memory()
    seed_globals(config.seed, "init")
    framework = build_framework(distributed.shard_config(config), functools.partial(load_initial, config))
    framework = framework.to(device).train()
    span_processes(framework, max(1, distributed.size() // config.backbone.bn_groups))
    check_backbone(config, framework)
    check_parts(config, framework)
    if config.run.channels_last:
        framework = framework.to(memory_format=torch.channels_last)
    if compiles(config.run.compile, device):
        framework.compile_parts()
    return framework, build_optimizer(config.optimizer, framework.parameters(), framework.fixed_lr_parameters())


# ----------------------------------------------------------------------------------------------------- during


def views(
    config: Pretrain, train_set: Any, epoch: int, skip: int, device: torch.device, crops: Sequence[Augment] = ()
) -> Iterator[list[Tensor]]:
    """This process's rows of the epoch's batches after the first `skip`: x1, x2 (N, 3, S, S), the extra crops.

    `crops`: those of the framework; MSCN's take their place.
    """
    sizes = (config.batch_size, config.seed, epoch, 2, device, config.run.workers)
    part = {"skip": skip, "crops": extra_crops(config) or crops, "rows": distributed.local_slice(config.batch_size)}
    part["compiled"] = compiles(config.run.compile, device)
    for batch, _ in train_batches(train_set, config.augment, *sizes, **part):
        yield [x.contiguous(memory_format=torch.channels_last) for x in batch] if config.run.channels_last else batch


def of_step(framework: nn.Module, anchors: list[Anchor]) -> dict[str, Tensor]:
    """For logged steps only: the norm of all gradients, and the mean mixture coefficient (Eq. 3) of each mixture in
    normal order. Other steps compute nothing."""
    gradients = [p.grad for p in framework.parameters() if p.grad is not None]
    mixtures = [a for a in anchors if isinstance(a.weight, Tensor) and a.order is None]
    norm = {"gradient_norm": nn.utils.get_total_norm(gradients)}
    return norm | {f"lambda_{a.name}": a.weight.mean() for a in mixtures}


def evaluate(
    framework: nn.Module, train_set: Any, test_set: Any, config: Pretrain, device: torch.device, trained: bool = True
) -> dict[str, float]:
    """k-NN accuracy of the encoder as it is now, and the measures of collapse, with a warning if it is `trained`.
    The first process measures, and the others wait; without test images there is no accuracy."""
    run = config.run
    with distributed.main_process_first():
        if distributed.rank():
            return {}
        with knn.evaluated(framework.encoder, config.knn) as model:
            features = functools.partial(features_of, model, config=config, device=device)
            bank, accuracy = features(train_set), {}
            if len(test_set):
                accuracy = knn.score(config.knn, bank, features(test_set).to(device), train_set, test_set)
            if measured := collapse.measures(bank):
                draws = (config.augment, config.seed, device, run.workers, run.eval_batch)
                measured["alignment"] = collapse.alignment(model, train_set, *draws)
        if trained and (line := collapse.warning(measured, bank.shape[1])):
            say(line)
        return {**accuracy, **measured}


def features_of(model: nn.Module, dataset: Any, config: Pretrain, device: torch.device) -> Tensor:
    """Features (N, D) of the images, as k-NN sees them; of a sample of them where nobody has labelled them."""
    if not dataset.classes:
        dataset = dataset.take(collapse.evenly(len(dataset), collapse.SAMPLE))
    run, resize = config.run, shorter_side(config.augment, dataset)
    return extract(model, dataset, config.augment, resize, device, run.workers, run.eval_batch)


def knn_is_due(config: Pretrain, epoch: int) -> bool:
    """Whether k-NN is measured after this epoch (counted from 0): after the last one always."""
    every = config.knn.every
    return epoch + 1 == config.epochs or (every > 0 and (epoch + 1) % every == 0)


# ------------------------------------------------------------------------------------------------------ after


def result_of(run: Run, config: Pretrain, steps: int, device: torch.device) -> dict[str, Any]:
    """What result.json holds: each metric under its full name, after the last epoch, the best, and before training."""
    lines = epoch_lines(run)
    metrics = {"loss": lines[-1]["loss"]}
    for name in (key for key in lines[-1] if key.startswith("knn_")):
        metrics |= last_and_best(lines, name, name)
    return {
        "metrics": metrics,
        "epochs": config.epochs,
        "steps": steps,
        "device": device_name(device),
        "timing": seconds(lines),
    }


def header(run: Run, config: Pretrain, train_set: Any, device: torch.device, state: TrainState) -> str:
    """What is about to run, with the numbers that are actually used."""
    o, processes = config.optimizer, distributed.size()
    step, steps_per_epoch = state.step, state.steps_per_epoch
    lines = [
        f"{run.id}" + (f" (resumed at epoch {step / steps_per_epoch:.2f})" if step else ""),
        f"  {config.framework}, {config.method}; {backbone_in_words(config, state.model)}",
        f"  {config.dataset}: {in_words(len(train_set), train_set.classes)}; views of {config.augment.size} px",
        f"  total batch {config.batch_size} in {config.mix_groups} mix group(s), {steps_per_epoch} steps an epoch, "
        f"{config.epochs} epochs; {o.name}, lr {o.lr:g} (used as it is), weight decay {o.weight_decay:g}",
        *([f"  {processes} processes of {config.batch_size // processes} images each"] if processes > 1 else []),
        f"  {device}, {arithmetic(config.precision, device, compiles(config.run.compile, device))}, "
        f"{torch.get_num_threads()} CPU threads; log in {run.directory / 'log.jsonl'}",
        *(f"  note: {text}" for text in cautions(config.schedule, steps_per_epoch, config.epochs)),
    ]
    return "\n".join(lines)


def backbone_in_words(config: Pretrain, framework: nn.Module) -> str:
    b = config.backbone
    if b.arch not in ARCHITECTURES:
        return networks.described(b, framework.encoder.backbone)
    return f"{b.arch}, {b.stem} stem, width {b.width}, {b.bn_groups} BatchNorm group(s)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[configs.run_options(Pretrain)],
    )
    parser.add_argument("--config", required=True, help="a recipe, such as pretrain/configs/cifar100_moco.yaml")
    parser.add_argument("--verify", action="store_true", help="decode every image once before training")
    args = parser.parse_args()
    config = configs.load(args.config, configs.parse_overrides(args.set))
    for split in ("train", "test") if args.verify else ():
        verify(datasets.load_split(config, split))
    train(config, args.run_dir, runs_dir=args.runs_dir)


if __name__ == "__main__":
    configs.main_guard(main)
