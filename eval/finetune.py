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
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmask import checkpoint, datasets, formats, labels
from mixmask import config as configs
from mixmask.backbones import Encoder, build_backbone
from mixmask.config import Augment, ConfigError, Finetune
from mixmask.datasets.settle import inherit, settle
from mixmask.datasets.views import check_augment, train_batches
from mixmask.features import accuracies, extract, resize_of
from mixmask.formats import Source
from mixmask.networks import feature_width
from mixmask.randomness import seed_globals, seed_of
from mixmask.runs import Run, run_directory
from mixmask.schedules import cautions, learning_rate
from mixmask.training.loop import Loop, finished
from mixmask.training.optim import build_optimizer, pick_device
from mixmask.training.progress import say
from mixmask.training.state import TrainState
from mixmask.training.supervised import fit, result_of


def finetune(
    config: Finetune, source: Source, directory: Path | None = None, runs_dir: Path = Path("runs")
) -> dict[str, Any]:
    """Train and test the network that `source` begins; returns what result.json holds.

    directory: the run's own; by default below `runs_dir`, named after the config and its data.
    Raises UserError for bad configs, data and checkpoints, and when the loss is no longer finite.
    """
    config = settle(config)
    check(config)
    device = pick_device(config.run.device)
    with Run(directory or run_directory(runs_dir, config), config) as run:
        if result := finished(run):
            return result
        train_set, test_set, indices, labelled = load_data(config, device)
        mean, std = config.augment.mean or source.mean, config.augment.std or source.std
        augment = dataclasses.replace(config.augment, mean=mean, std=std)
        model = build_model(config, source, len(train_set.classes)).to(device)
        run.describe()
        steps_per_epoch = len(train_set) // config.batch_size
        state = TrainState(
            model, build_groups(config, model), config.epochs, steps_per_epoch, data=datasets.counts(train_set)
        )
        rates = functools.partial(learning_rates, config, state.steps_per_epoch)
        loop = Loop(run, config, state, rates, functools.partial(batch_images, config, indices))
        loop.resume()
        say(header(run, config, source, train_set, labelled, state.step))
        measure = functools.partial(test, model, test_set, augment, config, device)

        with loop.running():
            for epoch in loop.epochs():
                for images, targets in loop.batches(batches(config, train_set, augment, epoch, loop.skip, device)):
                    loop.log(fit(state, images, targets, rates(state.step)))
                    loop.save_if_due()
                loop.end_epoch(measure)
        origin = {"format": source.format, "init": config.init, "labels": labelled}
        return loop.finish(result_of(run, config, metric_name(config), device, **origin))


def learning_rates(config: Finetune, steps_per_epoch: int, step: int) -> dict[str, float]:
    """The step's two rates, one schedule for both, in the order of the optimiser's groups: backbone, classifier."""
    bases = {"backbone_lr": config.backbone_lr, "lr": config.optimizer.lr}
    return {k: learning_rate(config.schedule, b, step, steps_per_epoch, config.epochs) for k, b in bases.items()}


def batch_images(config: Finetune, labelled: Tensor, epoch: int) -> Tensor:
    """The indices of an epoch's images in the whole training set, (steps, batch); `labelled` (N,) are in use."""
    return labelled[datasets.batch_indices(len(labelled), config.batch_size, config.seed, epoch)]


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
        dataset = datasets.load_split(config, split)
        if dataset.note:
            say(f"note: {dataset.note}")
        sets.append(dataset)
    indices, labelled = labels.choose(sets[0], config)
    check_data(config, sets[0], len(indices))
    sets[0] = sets[0].take(indices)
    train_set, test_set = (s.to(device) if isinstance(s, datasets.Resident) else s for s in sets)
    return train_set, test_set, indices, labelled


def check_data(config: Finetune, train_set: Any, labelled: int) -> None:
    """Raises ConfigError for settings that do not fit this training set."""
    if config.batch_size > labelled:
        raise ConfigError(f"batch_size: {config.batch_size} exceeds the {labelled} labelled training images")
    check_augment(train_set, config.augment)


def build_model(config: Finetune, source: Source, classes: int) -> Encoder:
    """The backbone, with the checkpoint's weights or fresh ones, and a classifier N(0, 0.01), bias 0 (Barlow Twins)."""
    seed_globals(config.seed, "init")
    backbone = build_backbone(dataclasses.replace(source.backbone, bn_groups=config.bn_groups), key="bn_groups")
    if config.init == "checkpoint":
        checkpoint.load_weights(backbone, source.weights, source.identity)
    classifier = nn.Linear(feature_width(backbone, config.augment.size), classes)
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


# ----------------------------------------------------------------------------------------------------- during


def batches(
    config: Finetune, train_set: Any, augment: Augment, epoch: int, skip: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches after the first `skip`: images (N, 3, S, S), classes (N,)."""
    targets, options = train_set.labels.to(device), (config.batch_size, config.seed, epoch, 1, device)
    for (images,), indices in train_batches(train_set, augment, *options, config.run.workers, skip):
        if config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        yield images, targets[indices.to(device)]


def test(model: Encoder, test_set: Any, augment: Augment, config: Finetune, device: torch.device) -> dict[str, float]:
    """Top-1 and top-5 accuracy with running statistics, in percent; the model goes back to training."""
    scores = extract(
        model.eval(), test_set, augment, resize_of(config, test_set), device, config.run.workers, config.run.eval_batch
    )
    model.train()
    return accuracies(scores, test_set.labels)


# ------------------------------------------------------------------------------------------------------ after


def metric_name(config: Finetune) -> str:
    """finetune, or scratch where the backbone began at random: no table takes one for the other."""
    return "finetune" if config.init == "checkpoint" else "scratch"


def header(run: Run, config: Finetune, source: Source, train_set: Any, labelled: str, step: int) -> str:
    """What is about to run, with the numbers that are actually used."""
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
        values = inherit(values, configs.to_dict(source.recipe))
    config = configs.resolve(values, configs.parse_overrides(overrides), Finetune)
    return dataclasses.replace(config, checkpoint=source.identity)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[formats.reading_options(), configs.run_options(Finetune)],
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint.pt of ours or in a public format")
    parser.add_argument(
        "--config", required=True, help="a recipe, such as eval/configs/imagenet_finetune_1percent.yaml"
    )
    args = parser.parse_args()
    source = formats.read(args.checkpoint, **formats.reading(args))
    config, note = labels.settle(resolve(args.config, args.set, source))
    if note:
        say(f"note: {note}")
    finetune(config, source, args.run_dir, args.runs_dir)


if __name__ == "__main__":
    configs.main_guard(main)
