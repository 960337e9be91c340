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
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixmask import checkpoint, data
from mixmask import config as configs
from mixmask.config import Augment, ConfigError, Linear, UserError
from mixmask.features import accuracy, extract
from mixmask.randomness import seed_of
from mixmask.runs import Run, read_log, run_directory, what_is_left
from mixmask.schedules import cautions, learning_rate
from mixmask.training.interrupt import Interrupt
from mixmask.training.optim import build_optimizer, device_name, pick_device, set_learning_rate
from mixmask.training.progress import Progress, Stopwatch, say
from mixmask.views import train_batches


def probe(config: Linear, path: Path, directory: Path) -> dict[str, Any]:
    """Train and test the classifier on the encoder of the checkpoint at `path`; returns what result.json holds.

    Raises UserError for bad configs, data and checkpoints, and if the encoder did not stay as it was.
    """
    device = pick_device(config.run.device)
    with Run(directory, config) as run:
        if run.result is not None:
            say(f"{run.id} is finished: {summary(run.result)}; nothing to do")
            return run.result
        train_set, test_set = (load(config, split, device) for split in ("train", "test"))
        steps_per_epoch = len(train_set) // config.batch_size
        if steps_per_epoch == 0:
            raise ConfigError(f"batch_size: {config.batch_size} exceeds the {len(train_set)} training images")
        encoder, recipe, _ = checkpoint.load_encoder(path, device)
        backbone, before = encoder.backbone, fingerprint(encoder)
        augment = dataclasses.replace(config.augment, mean=recipe.augment.mean, std=recipe.augment.std)
        classifier = build_classifier(backbone.features, len(train_set.classes), config.seed, config.init).to(device)
        optimizer = build_optimizer(config.optimizer, classifier.parameters())
        run.describe()
        first = resume(run, classifier, optimizer)
        say(header(run, config, recipe, train_set, first))
        test_features = extract(backbone, test_set, augment, config.test_resize, device, config.run.workers)
        batches_of = training_features(backbone, train_set, augment, config, device)

        with Interrupt() as interrupt:
            for epoch in range(first, config.epochs):
                watch, losses = Stopwatch(), []
                progress = Progress(steps_per_epoch, f"epoch {epoch + 1}/{config.epochs}")
                for step, (features, labels) in enumerate(batches_of(epoch), epoch * steps_per_epoch):
                    rate = learning_rate(config.schedule, config.optimizer.lr, step, steps_per_epoch, config.epochs)
                    set_learning_rate(optimizer, rate)
                    loss = F.cross_entropy(classifier(features), labels)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
                    progress.step()
                    interrupt.stop_if_requested()  # this epoch is made again; the ones before are saved
                progress.close()
                mean_loss = torch.stack(losses).double().mean().item()
                if what := not_finite(mean_loss, classifier):
                    where = autopsy(run, config, classifier, optimizer, losses, epoch, len(train_set))
                    what = f"{run.id}: {what} in epoch {epoch + 1}"
                    raise UserError(f"{what}; stopped, {where}, {what_is_left(run.checkpoint)}")
                values = {"loss": mean_loss, "test_top1": test(classifier, test_features, test_set.labels), "lr": rate}
                run.log("epoch", epoch, epoch=epoch + 1, **values, timing={"seconds": round(watch.lap(), 3)})
                say(epoch_line(epoch + 1, config.epochs, values))
                last = epoch + 1 == config.epochs
                if last or (epoch + 1) % config.run.checkpoint_every == 0 or interrupt.requested:
                    save(run, config, classifier, optimizer, epoch + 1)
                if not last:
                    interrupt.stop_if_requested()
        if fingerprint(encoder) != before:
            raise UserError(f"{run.id}: the frozen encoder changed during the probe; the result is not valid")
        run.finish(result(run, config, device))
        say(f"{run.id} is finished: {summary(run.result)}")
        return run.result


def load(config: Linear, split: str, device: torch.device) -> data.Resident | data.Files:
    """The verified data set; held on the device where it fits in memory."""
    options = (config.run.download, config.allow_partial_data)
    dataset = data.load(config.dataset, config.run.data_root, split, *options)
    return dataset.to(device) if isinstance(dataset, data.Resident) else dataset


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer, bit by bit."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    backbone: nn.Module, train_set: data.Resident | data.Files, augment: Augment, config: Linear, device: torch.device
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """A function of the epoch: its shuffled batches of features (N, D), without gradient, and labels (N,)."""
    labels, options = train_set.labels.to(device), (config.batch_size, config.seed)

    def augmented(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for (images,), indices in train_batches(train_set, augment, *options, epoch, 1, device, config.run.workers):
            with torch.no_grad():
                features = backbone(images)  # evaluation mode: running statistics
            yield features, labels[indices.to(device)]

    def cached(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in data.batch_indices(len(bank), *options, epoch).to(device):
            yield bank[indices], labels[indices]

    if config.features == "augmented":
        return augmented
    bank = extract(backbone, train_set, augment, config.test_resize, device, config.run.workers)
    return cached


@torch.no_grad()
def test(classifier: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy on the test images' features (N, D), in percent."""
    return accuracy(classifier(features).argmax(dim=1), labels)


def resume(run: Run, classifier: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Epochs done; loads the last whole checkpoint where there is one."""
    state = checkpoint.load_last(run.checkpoint)
    if state is None:
        run.rewind(-1)
        return 0
    checkpoint.load_weights(classifier, state["model"], run.checkpoint)
    optimizer.load_state_dict(state["optimizer"])
    run.rewind(state["epoch"])
    return state["epoch"]


def save(run: Run, config: Linear, classifier: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    run.sync()
    checkpoint.save(run.checkpoint, snapshot(run, config, classifier, optimizer, epoch))


def snapshot(
    run: Run, config: Linear, classifier: nn.Module, optimizer: torch.optim.Optimizer, epoch: int
) -> dict[str, Any]:
    """What a checkpoint holds."""
    state = {"run": run.id, "config": configs.to_dict(config), "epoch": epoch}
    return {**state, "model": classifier.state_dict(), "optimizer": optimizer.state_dict()}


def not_finite(mean_loss: float, classifier: nn.Module) -> str:
    """What is not finite after an epoch, in words; "" where all is."""
    norm = nn.utils.get_total_norm([parameter.detach() for parameter in classifier.parameters()]).item()
    numbers = {"the loss": mean_loss, "the norm of the weights": norm}
    return next((f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number)), "")


def autopsy(
    run: Run,
    config: Linear,
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[Tensor],
    epoch: int,
    images: int,
) -> str:
    """Save the first step of the epoch whose loss is not finite, its images' indices, and the state; says where."""
    position = [math.isfinite(loss) for loss in [*losses[:-1], math.nan]].index(False)  # the last one: by its update
    batches = data.batch_indices(images, config.batch_size, config.seed, epoch)
    step = epoch * len(batches) + position
    report = {
        "run": run.id,
        "step": step,
        "epoch": epoch + 1,
        "lr": learning_rate(config.schedule, config.optimizer.lr, step, len(batches), config.epochs),
        "indices": {epoch * len(batches) + i: batches[i].tolist() for i in range(max(0, position - 1), position + 1)},
    }
    return checkpoint.post_mortem(run, report, snapshot(run, config, classifier, optimizer, epoch))


def result(run: Run, config: Linear, device: torch.device) -> dict[str, Any]:
    """Last and best test accuracy, under the protocol's name."""
    run.sync()
    epochs = [line for line in read_log(run.directory) if line["kind"] == "epoch"]
    name = metric_name(config)
    return {
        "run": run.id,
        "checkpoint": config.checkpoint,
        "metrics": {
            f"{name}_last": epochs[-1]["test_top1"],
            f"{name}_best": max(line["test_top1"] for line in epochs),
        },
        "epochs": config.epochs,
        "device": device_name(device),
        "timing": {"seconds": round(sum(line["timing"]["seconds"] for line in epochs), 1)},
    }


def metric_name(config: Linear) -> str:
    """The protocol, for the metric's name: linear_sgd (views cropped anew each epoch) or linear_cached_adam."""
    return f"linear_{'cached_' if config.features == 'cached' else ''}{config.optimizer.name}"


def epoch_line(epoch: int, epochs: int, values: dict[str, float]) -> str:
    return f"epoch {epoch}/{epochs}  loss {values['loss']:.4f}  top-1 {values['test_top1']:.2f} %  lr {values['lr']:g}"


def summary(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f} %" for name, value in result["metrics"].items())


def header(run: Run, config: Linear, recipe: Any, train_set: Any, first: int) -> str:
    notes = cautions(config.schedule, len(train_set) // config.batch_size, config.epochs)
    return (
        f"{run.id}" + (f" (resumed after epoch {first})" if first else "") + "\n"
        f"  encoder of {config.checkpoint} ({recipe.framework}, {recipe.method})\n"
        f"  {config.dataset}: {len(train_set)} images, {len(train_set.classes)} classes; "
        f"total batch {config.batch_size}, {config.epochs} epochs; "
        f"{config.features} features; {config.optimizer.name}, lr {config.optimizer.lr:g} (used as it is)"
        + "".join(f"\n  note: {note}" for note in notes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a pre-training run's checkpoint.pt")
    parser.add_argument("--config", required=True, help="a recipe, such as eval/configs/imagenet_linear.yaml")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="replace keys of the recipe"
    )
    parser.add_argument("--run-dir", type=Path, help="default: RUNS_DIR/linear/<name of the run>")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: runs")
    args = parser.parse_args()
    state = checkpoint.load(args.checkpoint)
    _, identity = checkpoint.pretraining(state, args.checkpoint)
    values = {**configs.read_yaml(args.config), "run": state["config"]["run"]}  # data where the pre-training found it
    config = configs.resolve(values, configs.parse_overrides(args.set), Linear)
    config = dataclasses.replace(config, checkpoint=identity)
    probe(config, args.checkpoint, args.run_dir or run_directory(args.runs_dir, "linear", config))


if __name__ == "__main__":
    configs.main_guard(main)
