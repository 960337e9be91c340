"""Linear probe: a linear classifier on the frozen encoder's pooled features (Table 9, right; Section 4.2).

Example:
    python eval/linear.py --checkpoint runs/pretrain/RUN/checkpoint.pt --config eval/configs/imagenet_linear.yaml
    python eval/linear.py --checkpoint runs/pretrain/RUN/checkpoint.pt --config eval/configs/cifar100_linear_adam.yaml

The training features are those of views that are cropped and flipped anew each epoch (`features: augmented`), or those
of the test transform, computed once (`features: cached`). Frozen means: evaluation mode, no gradient, and afterwards a
check that no parameter or buffer has changed. The test accuracy of every epoch is logged; the last one is reported, the
best one noted. The same command resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmask import checkpoint, datasets, formats
from mixmask import config as configs
from mixmask.config import Augment, ConfigError, Linear, UserError
from mixmask.datasets.base import in_words
from mixmask.datasets.settle import inherit, settle
from mixmask.datasets.views import check_augment, train_batches
from mixmask.features import accuracies, extract, resize_of
from mixmask.formats import Source, frozen_encoder
from mixmask.networks import feature_width
from mixmask.randomness import seed_of
from mixmask.runs import Run, run_directory
from mixmask.schedules import cautions, learning_rate
from mixmask.training.loop import Loop, finished
from mixmask.training.optim import build_optimizer, pick_device
from mixmask.training.progress import say
from mixmask.training.state import TrainState
from mixmask.training.supervised import fit, result_of


def probe(
    config: Linear,
    path: Path,
    directory: Path | None = None,
    foreign: Source | None = None,
    runs_dir: Path = Path("runs"),
) -> dict[str, Any]:
    """Train and test the classifier on the encoder of the checkpoint at `path`; returns what result.json holds.

    directory: the run's own; by default below `runs_dir`, named after the config and its data.
    foreign: what was read from it, where it is somebody else's.
    Raises UserError for bad configs, data and checkpoints, and if the encoder did not stay as it was.
    """
    config, device = settle(config), pick_device(config.run.device)
    with Run(directory or run_directory(runs_dir, config), config) as run:
        if result := finished(run):
            return result
        train_set, test_set = load_data(config, device)
        encoder, mean, std, origin = frozen_encoder(path, foreign, device)
        backbone, before = encoder.backbone, checkpoint.digest(encoder.state_dict())
        mean, std = config.augment.mean or mean, config.augment.std or std
        augment = dataclasses.replace(config.augment, mean=mean, std=std)
        width = feature_width(backbone, config.augment.size)
        classifier = build_classifier(width, len(train_set.classes), config.seed, config.init).to(device)
        optimizer = build_optimizer(config.optimizer, classifier.parameters())
        run.describe()
        steps_per_epoch = len(train_set) // config.batch_size
        state = TrainState(classifier, optimizer, config.epochs, steps_per_epoch, data=datasets.counts(train_set))
        rates = functools.partial(learning_rates, config, state.steps_per_epoch)
        loop = Loop(run, config, state, rates, functools.partial(batch_images, config, train_set))
        loop.resume()
        say(header(run, config, origin, train_set, state.step / state.steps_per_epoch))
        test_features = extract(
            backbone, test_set, augment, resize_of(config, test_set), device, config.run.workers, config.run.eval_batch
        )
        batches_of = training_features(backbone, train_set, augment, config, device)
        measure = functools.partial(test, classifier, test_features, test_set.labels)

        with loop.running():
            for epoch in loop.epochs():
                for features, labels in loop.batches(batches_of(epoch, loop.skip)):
                    loop.log(fit(state, features, labels, rates(state.step)))
                    loop.save_if_due()
                loop.end_epoch(measure)
        if checkpoint.digest(encoder.state_dict()) != before:
            raise UserError(f"{run.id}: the frozen encoder changed during the probe; the result is not valid")
        source = foreign.format if foreign else "mixmask"
        return loop.finish(result_of(run, config, metric_name(config), device, format=source))


def learning_rates(config: Linear, steps_per_epoch: int, step: int) -> dict[str, float]:
    """The rate of a step."""
    return {"lr": learning_rate(config.schedule, config.optimizer.lr, step, steps_per_epoch, config.epochs)}


def batch_images(config: Linear, train_set: datasets.Resident | datasets.Files, epoch: int) -> Tensor:
    """The indices of an epoch's images, (steps, batch)."""
    return datasets.batch_indices(len(train_set), config.batch_size, config.seed, epoch)


def load_data(config: Linear, device: torch.device) -> list[Any]:
    """The verified training and test sets; held on the device where they fit in memory. Raises ConfigError."""
    sets = [datasets.load_split(config, split) for split in ("train", "test")]
    if config.batch_size > len(sets[0]):
        raise ConfigError(f"batch_size: {config.batch_size} exceeds the {len(sets[0])} training images")
    if config.features == "augmented":
        check_augment(sets[0], config.augment)
    return [one.to(device) if isinstance(one, datasets.Resident) else one for one in sets]


def build_classifier(features: int, classes: int, seed: int, init: str = "normal") -> nn.Linear:
    """`normal`: weights N(0, 0.01), bias 0 (MoCo's main_lincls.py); `uniform`: both U(-b, b), b = features ** -0.5."""
    classifier = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(seed_of(seed, "classifier"))
    with torch.no_grad():
        if init == "normal":
            classifier.weight.normal_(0, 0.01, generator=generator)
            classifier.bias.zero_()
        else:
            for parameter in classifier.parameters():
                parameter.uniform_(-(features**-0.5), features**-0.5, generator=generator)
    return classifier


def training_features(
    backbone: nn.Module,
    train_set: datasets.Resident | datasets.Files,
    augment: Augment,
    config: Linear,
    device: torch.device,
) -> Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]:
    """A function of epoch and steps to skip: the shuffled batches of features (N, D), without gradient, labels (N,)."""
    labels, workers = train_set.labels.to(device), config.run.workers

    def augmented(epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = (config.batch_size, config.seed, epoch)
        for (images,), indices in train_batches(train_set, augment, *sizes, 1, device, workers, skip):
            with torch.no_grad():
                features = backbone(images)  # evaluation mode: running statistics
            yield features, labels[indices.to(device)]

    def cached(epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batch_images(config, train_set, epoch)[skip:].to(device):
            yield bank[indices.to(bank.device)].to(device), labels[indices]

    if config.features == "augmented":
        return augmented
    bank = extract(
        backbone, train_set, augment, resize_of(config, train_set), device, config.run.workers, config.run.eval_batch
    )
    return cached


@torch.no_grad()
def test(classifier: nn.Module, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy on the test images' features (N, D), in percent."""
    scores = classifier(features.to(next(classifier.parameters()).device))
    return accuracies(scores, labels)


def metric_name(config: Linear) -> str:
    """The protocol, for the metric's name: linear_sgd (views cropped anew each epoch) or linear_cached_adam."""
    return f"linear_{'cached_' if config.features == 'cached' else ''}{config.optimizer.name}"


def header(run: Run, config: Linear, origin: str, train_set: Any, done: float) -> str:
    notes = cautions(config.schedule, len(train_set) // config.batch_size, config.epochs)
    return (
        f"{run.id}" + (f" (resumed at epoch {done:.2f})" if done else "") + "\n"
        f"  encoder of {config.checkpoint} ({origin})\n"
        f"  {config.dataset}: {in_words(len(train_set), train_set.classes)}; "
        f"total batch {config.batch_size}, {config.epochs} epochs; "
        f"{config.features} features; {config.optimizer.name}, lr {config.optimizer.lr:g} (used as it is)"
        + "".join(f"\n  note: {note}" for note in notes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[formats.reading_options(), configs.run_options(Linear)],
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint.pt of ours or in a public format")
    parser.add_argument("--config", required=True, help="a recipe, such as eval/configs/imagenet_linear.yaml")
    args = parser.parse_args()
    source = formats.read(args.checkpoint, **formats.reading(args))
    foreign = source if source.recipe is None else None
    values = configs.read_yaml(args.config)
    if source.recipe is not None:
        values = inherit(values, configs.to_dict(source.recipe))
    config = configs.resolve(values, configs.parse_overrides(args.set), Linear)
    config = dataclasses.replace(config, checkpoint=source.identity)
    probe(config, args.checkpoint, args.run_dir, foreign, args.runs_dir)


if __name__ == "__main__":
    configs.main_guard(main)
