"""Fine-tuning: a whole network, trained on some of the labels from a checkpoint's backbone (Tables 6 and 10).

Example:
    python eval/finetune.py --checkpoint runs/pretrain/RUN/checkpoint.pt \\
        --config eval/configs/imagenet_finetune_1percent.yaml
    python eval/finetune.py --checkpoint moco_v2_800ep_pretrain.pth.tar \\
        --config eval/configs/imagenet_finetune_10percent.yaml --set run.data_root=DIR
    python eval/finetune.py --checkpoint runs/pretrain/RUN/checkpoint.pt \\
        --config eval/configs/cifar100_finetune_1percent.yaml --set init=random

The checkpoint is one of ours or of a public format (docs/checkpoints.md). Backbone and classifier have a learning rate
each and one schedule; BatchNorm trains too. The test accuracy of every epoch is logged; the last one is reported, the
best one noted. `init=random` is the baseline: the same architecture without the weights. The same command resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask import checkpoint, datasets, formats, labels
from mixmask import config as configs
from mixmask.backbones import Encoder, build_backbone
from mixmask.config import Augment, ConfigError, Finetune, UserError
from mixmask.datasets.views import train_batches
from mixmask.features import accuracy, extract
from mixmask.formats import Source
from mixmask.randomness import seed_globals, seed_of
from mixmask.runs import Run, read_log, run_directory, what_is_left
from mixmask.schedules import cautions, learning_rate
from mixmask.training.interrupt import Interrupt
from mixmask.training.optim import build_optimizer, device_name, pick_device
from mixmask.training.progress import Progress, Stopwatch, say


def finetune(config: Finetune, source: Source, directory: Path) -> dict[str, Any]:
    """Train and test the network that `source` begins; returns what result.json holds.

    Raises UserError for bad configs, data and checkpoints, and when the loss is no longer finite.
    """
    check(config)
    device = pick_device(config.run.device)
    with Run(directory, config) as run:
        if run.result is not None:
            say(f"{run.id} is finished: {summary(run.result)}; nothing to do")
            return run.result
        train_set, test_set, indices, labelled = load_data(config, device)
        augment = dataclasses.replace(
            config.augment, mean=config.augment.mean or source.mean, std=config.augment.std or source.std
        )
        model = build_model(config, source, len(train_set.classes)).to(device)
        steps_per_epoch = len(train_set) // config.batch_size
        state = State(model, build_groups(config, model), steps_per_epoch * config.epochs)
        run.describe()
        resume(run, state)
        say(header(run, config, source, train_set, labelled, state.step))

        with Interrupt() as interrupt:
            for epoch in range(state.step // steps_per_epoch, config.epochs):
                done, watch, saved = state.step % steps_per_epoch, Stopwatch(), time.monotonic()
                progress = Progress(steps_per_epoch, f"epoch {epoch + 1}/{config.epochs}", done)
                for images, targets in batches(config, train_set, augment, epoch, done, device):
                    rates = set_rates(state.optimizer, config, state.step, steps_per_epoch)
                    loss = F.cross_entropy(model(images), targets)
                    state.optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    state.optimizer.step()
                    state.losses.append(loss.detach())
                    state.step += 1
                    progress.step()
                    minutes = (time.monotonic() - saved) / 60
                    within_epoch = state.step % steps_per_epoch > 0  # the end of an epoch is logged before it is saved
                    if within_epoch and (interrupt.requested or minutes > config.run.checkpoint_minutes):
                        save(run, config, state, indices)
                        saved = time.monotonic()
                        interrupt.stop_if_requested()
                progress.close()
                check_finite(run, config, state, indices)
                values = {
                    "loss": torch.stack(state.losses).double().mean().item(),
                    "test_top1": test(model, test_set, augment, config, device),
                    **rates,
                }
                run.log("epoch", state.step - 1, epoch=epoch + 1, **values, timing={"seconds": round(watch.lap(), 3)})
                say(epoch_line(epoch + 1, config.epochs, values))
                state.losses.clear()
                last = epoch + 1 == config.epochs
                if last or (epoch + 1) % config.run.checkpoint_every == 0 or interrupt.requested:
                    save(run, config, state, indices)
                if not last:
                    interrupt.stop_if_requested()
        run.finish(result(run, config, source, labelled, device))
        say(f"{run.id} is finished: {summary(run.result)}")
        return run.result


@dataclass
class State:
    """Everything that the next iteration depends on: what is random follows from the seed and the step."""

    model: Encoder
    optimizer: torch.optim.Optimizer
    steps: int  # of the whole run
    step: int = 0  # iterations done
    losses: list[Tensor] = field(default_factory=list)  # of this epoch


# ----------------------------------------------------------------------------------------------------- before


def check(config: Finetune) -> None:
    """Raises ConfigError for settings that cannot work together, before anything is read or written."""
    if config.batch_size % config.bn_groups:
        raise ConfigError(f"bn_groups: {config.bn_groups} groups do not divide a batch of {config.batch_size} images")
    if config.batch_size == config.bn_groups:
        raise ConfigError("bn_groups: BatchNorm needs at least two images in a group")
    for key, values in (("augment.mean", config.augment.mean), ("augment.std", config.augment.std)):
        if len(values) not in (0, 3):
            raise ConfigError(f"{key}: expected three numbers, one per channel, or none, found {list(values)}")


def load_data(config: Finetune, device: torch.device) -> tuple[Any, Any, Tensor, str]:
    """The labelled training images, the test images (held on the device where they fit), and which are labelled.

    The last by their indices (N,) in the whole training set, and in words.
    """
    sets = []
    for split in ("train", "test"):
        dataset = datasets.load(
            config.dataset, config.run.data_root, split, config.run.download, config.allow_partial_data
        )
        if dataset.note:
            say(f"note: {dataset.note}")
        sets.append(dataset)
    indices, labelled = labels.choose(sets[0], config)
    check_data(config, sets[0], len(indices))
    sets[0] = sets[0].take(indices)
    train_set, test_set = (s.to(device) if isinstance(s, datasets.Resident) else s for s in sets)
    return train_set, test_set, indices, labelled


def check_data(config: Finetune, train_set: Any, labelled: int) -> None:
    """Raises ConfigError for settings that this training set cannot bear."""
    if config.batch_size > labelled:
        raise ConfigError(f"batch_size: {config.batch_size} exceeds the {labelled} labelled training images")
    if "crop" not in config.augment.order and isinstance(train_set, datasets.Resident):
        side = train_set.images.shape[-1]
        if side != config.augment.size:
            raise ConfigError(f"augment.size: {config.augment.size}, but no crop resizes the images of {side} pixels")


def build_model(config: Finetune, source: Source, classes: int) -> Encoder:
    """The backbone, with the checkpoint's weights or fresh ones, and a classifier N(0, 0.01), bias 0 (Barlow Twins)."""
    seed_globals(config.seed, "init")
    backbone = build_backbone(dataclasses.replace(source.backbone, bn_groups=config.bn_groups))
    if config.init == "checkpoint":
        checkpoint.load_weights(backbone, source.weights, source.identity)
    classifier = nn.Linear(backbone.features, classes)
    with torch.no_grad():
        classifier.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed_of(config.seed, "classifier")))
        classifier.bias.zero_()
    model = Encoder(backbone, classifier).train()
    return model.to(memory_format=torch.channels_last) if config.run.channels_last else model


def build_groups(config: Finetune, model: Encoder) -> torch.optim.Optimizer:
    """The optimiser of two parameter groups: the backbone, the classifier."""
    optimizer = build_optimizer(config.optimizer, model.backbone.parameters())
    optimizer.add_param_group({"params": list(model.head.parameters())})
    return optimizer


def resume(run: Run, state: State) -> None:
    """Fill `state` from the last whole checkpoint, where there is one; log lines after it are dropped."""
    saved = checkpoint.load_last(run.checkpoint)
    if saved is None:
        run.rewind(-1)
        return
    missing = [name for name in ("model", "optimizer", "step", "losses") if name not in saved]
    if missing:
        raise checkpoint.CheckpointError(
            f"{run.checkpoint} is not a checkpoint of fine-tuning: no '{missing[0]}' in it"
        )
    checkpoint.load_weights(state.model, saved["model"], run.checkpoint)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.losses = list(saved["losses"].to(next(state.model.parameters()).device))
    state.step = saved["step"]
    run.rewind(state.step)


# ----------------------------------------------------------------------------------------------------- during


def batches(config: Finetune, train_set: Any, augment: Augment, epoch: int, skip: int, device: torch.device) -> Any:
    """The epoch's batches after the first `skip`: images (N, 3, S, S), classes (N,)."""
    targets, options = train_set.labels.to(device), (config.batch_size, config.seed, epoch, 1, device)
    for (images,), indices in train_batches(train_set, augment, *options, config.run.workers, skip):
        if config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        yield images, targets[indices.to(device)]


def set_rates(optimizer: torch.optim.Optimizer, config: Finetune, step: int, steps_per_epoch: int) -> dict[str, float]:
    """Give the optimiser's two groups the iteration's `learning_rates`, and return these."""
    found = learning_rates(config, step, steps_per_epoch)
    for group, rate in zip(optimizer.param_groups, found.values(), strict=True):
        group["lr"] = rate
    return found


def learning_rates(config: Finetune, step: int, steps_per_epoch: int) -> dict[str, float]:
    """The iteration's two rates, one schedule for both: "lr", the classifier's, and "backbone_lr"."""
    bases = {"backbone_lr": config.backbone_lr, "lr": config.optimizer.lr}
    return {k: learning_rate(config.schedule, b, step, steps_per_epoch, config.epochs) for k, b in bases.items()}


def test(model: Encoder, test_set: Any, augment: Augment, config: Finetune, device: torch.device) -> float:
    """Top-1 accuracy with running statistics, in percent; the model goes back to training."""
    scores = extract(model.eval(), test_set, augment, config.test_resize, device, config.run.workers)
    model.train()
    return accuracy(scores.argmax(dim=1), test_set.labels)


def check_finite(run: Run, config: Finetune, state: State, labelled: Tensor) -> None:
    """Raises UserError where a loss of this epoch, a weight or a running statistic is not finite; says when it began.

    What `autopsy` finds and the state are saved beside. `labelled` (N,): the labelled images' indices.
    """
    values = [value for value in state.model.state_dict().values() if value.is_floating_point()]
    norm, loss = nn.utils.get_total_norm(values).item(), torch.stack(state.losses).double().mean().item()
    numbers = {"the loss": loss, "the norm of the weights": norm}
    what = next((f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number)), "")
    if what:
        report = {"run": run.id, **autopsy(config, state, labelled), "noticed": f"{what} after step {state.step - 1}"}
        where = checkpoint.post_mortem(run, report, snapshot(run, config, state))
        what = f"{run.id}: {what} at step {report['step']}"
        raise UserError(f"{what}; stopped, {where}, {what_is_left(run.checkpoint)}")


def autopsy(config: Finetune, state: State, labelled: Tensor) -> dict[str, Any]:
    """The epoch's first step whose loss, or else whose update, is not finite; its images and those of the step before.

    Images by their indices in the whole training set, of which `labelled` (N,) are in use.
    """
    steps_per_epoch = state.steps // config.epochs
    first = state.step - len(state.losses)  # of this epoch
    step = first + [math.isfinite(loss) for loss in [*state.losses[:-1], math.nan]].index(False)
    batches = datasets.batch_indices(len(labelled), config.batch_size, config.seed, first // steps_per_epoch)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    return {
        "step": step,
        "epoch": first // steps_per_epoch + 1,
        **learning_rates(config, step, steps_per_epoch),
        "gradient_norm": str(float(nn.utils.get_total_norm(gradients))),  # text: JSON has no NaN
        "indices": {i: labelled[batches[i - first]].tolist() for i in range(max(first, step - 1), step + 1)},
    }


def save(run: Run, config: Finetune, state: State, labelled: Tensor) -> None:
    """Write the state and the log to disk. Raises UserError, and saves nothing, where a number is not finite."""
    if state.losses:  # else the epoch's end has been checked
        check_finite(run, config, state, labelled)
    run.sync()
    checkpoint.save(run.checkpoint, snapshot(run, config, state))


def snapshot(run: Run, config: Finetune, state: State) -> dict[str, Any]:
    """What a checkpoint holds."""
    content = {"run": run.id, "config": configs.to_dict(config), "step": state.step, "steps": state.steps}
    losses = torch.stack(state.losses) if state.losses else torch.zeros(0)
    return {**content, "losses": losses, "model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}


# ------------------------------------------------------------------------------------------------------ after


def result(run: Run, config: Finetune, source: Source, labelled: str, device: torch.device) -> dict[str, Any]:
    """Last and best test accuracy, what the weights came from, and which images were labelled."""
    run.sync()
    epochs = [line for line in read_log(run.directory) if line["kind"] == "epoch"]
    name = metric_name(config)
    return {
        "run": run.id,
        "checkpoint": config.checkpoint,
        "format": source.format,
        "init": config.init,
        "labels": labelled,
        "metrics": {
            f"{name}_last": epochs[-1]["test_top1"],
            f"{name}_best": max(line["test_top1"] for line in epochs),
        },
        "epochs": config.epochs,
        "device": device_name(device),
        "timing": {"seconds": round(sum(line["timing"]["seconds"] for line in epochs), 1)},
    }


def metric_name(config: Finetune) -> str:
    """finetune, or scratch where the backbone began at random: no table takes one for the other."""
    return "finetune" if config.init == "checkpoint" else "scratch"


def epoch_line(epoch: int, epochs: int, values: dict[str, float]) -> str:
    return (
        f"epoch {epoch}/{epochs}  loss {values['loss']:.4f}  top-1 {values['test_top1']:.2f} %  "
        f"lr {values['lr']:g}, backbone {values['backbone_lr']:g}"
    )


def summary(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f} %" for name, value in result["metrics"].items())


def header(run: Run, config: Finetune, source: Source, train_set: Any, labelled: str, step: int) -> str:
    """What is about to happen, with the numbers that are really used."""
    steps_per_epoch, b, o = len(train_set) // config.batch_size, source.backbone, config.optimizer
    weights = "its weights" if config.init == "checkpoint" else "random weights: the baseline"
    dropped = ", ".join(f"{count} of {what}" for what, count in source.dropped.items())
    lines = [
        f"{run.id}" + (f" (resumed at epoch {step / steps_per_epoch:.2f})" if step else ""),
        f"  backbone of {config.checkpoint} ({source.format}; {b.arch}, {b.stem} stem, width {b.width}), {weights}"
        + (f"; dropped keys: {dropped}" if dropped else ""),
        f"  {config.dataset}, {len(train_set.classes)} classes; labels: {labelled}",
        f"  total batch {config.batch_size} in {config.bn_groups} BatchNorm group(s), {steps_per_epoch} steps an epoch,"
        f" {config.epochs} epochs; {o.name}, lr {config.backbone_lr:g} (backbone) and {o.lr:g} (classifier), used as "
        "they are",
        *(f"  note: {text}" for text in cautions(config.schedule, steps_per_epoch, config.epochs)),
    ]
    return "\n".join(lines)


def resolve(config_file: str, overrides: list[str], source: Source) -> Finetune:
    """The recipe with its overrides, for the weights of `source`; where data lie is the pre-training's, if known."""
    values = configs.read_yaml(config_file)
    if source.recipe is not None:
        values["run"] = {**dataclasses.asdict(source.recipe.run), **values.get("run", {})}
    config = configs.resolve(values, configs.parse_overrides(overrides), Finetune)
    return dataclasses.replace(config, checkpoint=source.identity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint.pt of ours, or a public format's")
    parser.add_argument(
        "--config", required=True, help="a recipe, such as eval/configs/imagenet_finetune_1percent.yaml"
    )
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="replace keys of the recipe"
    )
    parser.add_argument("--run-dir", type=Path, help="default: RUNS_DIR/finetune/<name of the run>")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--trust-pickle", action="store_true", help="run the code in an old file; only if you trust it")
    args = parser.parse_args()
    source = formats.read(args.checkpoint, args.trust_pickle)
    config, note = labels.settle(resolve(args.config, args.set, source))
    if note:
        say(f"note: {note}")
    finetune(config, source, args.run_dir or run_directory(args.runs_dir, "finetune", config))


if __name__ == "__main__":
    configs.main_guard(main)
