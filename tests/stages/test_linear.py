"""The linear probes: frozen is frozen, the last epoch is reported, a killed probe ends as if nothing had happened."""

import dataclasses
import json
import math
import os
import signal
import time

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms as T

from eval import linear as script
from eval.linear import build_classifier, probe
from mixmask import checkpoint, config, datasets
from mixmask.backbones import ResNet
from mixmask.config import ConfigError, UserError
from mixmask.features import extract
from mixmask.runs import read_log
from mixmask.training import loop
from pretrain.train import train


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    """The checkpoint of a short pre-training with constants of its own for normalisation."""
    directory = tmp_path_factory.mktemp("pretrained")
    train(tiny("epochs=3", "knn.every=0", "augment.mean=[0.4, 0.5, 0.6]", "augment.std=[0.2, 0.3, 0.4]"), directory)
    return directory / "checkpoint.pt"


# As the recipes *_linear_adam have it, and with a checkpoint every second epoch.
CACHED = (
    "features=cached",
    "init=uniform",
    "optimizer.name=adam",
    "optimizer.lr=0.01",
    "optimizer.weight_decay=5e-6",
    "schedule.kind=exponential",
    "schedule.last_lr=1e-6",
    "augment.order=[]",
    "epochs=5",
    "run.checkpoint_every=2",
)


@pytest.fixture(scope="module")
def undisturbed(tiny_linear, pretrained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    probe(tiny_linear(), pretrained, directory)
    return directory


def log(directory):
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_log(directory)]


def assert_same_probe(directory, undisturbed):
    a, b = (checkpoint.load(d / "checkpoint.pt") for d in (directory, undisturbed))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in ("weight", "bias"))
    momenta = (s["optimizer"]["state"][0]["momentum_buffer"] for s in (a, b))
    assert torch.equal(*momenta) and log(directory) == log(undisturbed)
    results = (json.loads((d / "result.json").read_text())["metrics"] for d in (directory, undisturbed))
    assert next(results) == next(results)


def test_classifier_starts_as_in_moco():
    """Weights N(0, 0.01), bias 0, from the seed."""
    classifier = build_classifier(2048, 1000, seed=0)
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert abs(classifier.weight.mean().item()) < 1e-4 and not classifier.bias.any()
    assert torch.equal(classifier.weight, build_classifier(2048, 1000, seed=0).weight)
    assert not torch.equal(classifier.weight, build_classifier(2048, 1000, seed=1).weight)


def test_uniform_start_is_that_of_pytorch():
    """U(-b, b) with b = 512 ** -0.5 for weights and bias (htdt, PatrickHua)."""
    found, expected = build_classifier(512, 1000, seed=0, init="uniform"), torch.nn.Linear(512, 1000)
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.1)
        assert a.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)


def test_cached_adam_is_htdts_loop(tiny_linear, pretrained, tmp_path):
    """Features once, un-augmented, as they are; Adam; ExponentialLR to 1e-6 after the last epoch."""
    metrics = probe(tiny_linear(*CACHED), pretrained, tmp_path)["metrics"]
    encoder, _, _ = checkpoint.load_encoder(pretrained)
    train, test = (datasets.load("squares", "", split) for split in ("train", "test"))
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    x_train, x_test = (encoder.backbone((d.images / 255 - mean) / std) for d in (train, test))
    classifier = build_classifier(64, 4, seed=0, init="uniform")
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2, weight_decay=5e-6)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=(1e-6 / 1e-2) ** (1 / 5))
    for epoch in range(5):
        for index in datasets.batch_indices(96, 16, 0, epoch):
            optimizer.zero_grad()
            F.cross_entropy(classifier(x_train[index]), train.labels[index]).backward()
            optimizer.step()
        scheduler.step()
    found = checkpoint.load(tmp_path / "checkpoint.pt")["model"]
    torch.testing.assert_close(found["weight"], classifier.weight.data, atol=1e-4, rtol=1e-4)
    expected = (classifier(x_test).argmax(1) == test.labels).float().mean().item() * 100
    assert metrics["linear_cached_adam_last"] == pytest.approx(expected, abs=2.6)  # one image of 40


def test_cached_features_are_computed_once(tiny_linear, pretrained, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        script, "extract", lambda model, dataset, *a: calls.append(dataset) or extract(model, dataset, *a)
    )
    monkeypatch.setattr(script, "train_batches", None)
    probe(tiny_linear(*CACHED), pretrained, tmp_path)
    assert sorted(map(len, calls)) == [40, 96]


def test_sgd_recipe_tests_as_patrickhua():
    """Resize(36, bicubic), CenterCrop(32), normalised with the checkpoint's constants; within 2/255 of Pillow."""
    recipe = config.load("eval/configs/cifar100_linear_sgd.yaml", cls=config.Linear)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.randint(0, 256, (8, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    images = F.interpolate(images, 32, mode="bilinear").round().byte()
    dataset = datasets.Resident(images, torch.zeros(8, dtype=torch.int64), ("a",), "squares")
    augment = dataclasses.replace(recipe.augment, mean=mean, std=std)
    found = extract(torch.nn.Identity(), dataset, augment, recipe.test_resize, torch.device("cpu"))

    def expected(mode: T.InterpolationMode) -> torch.Tensor:
        transform = T.Compose([T.Resize(36, mode), T.CenterCrop(32), T.ToTensor(), T.Normalize(mean, std)])
        return torch.stack([transform(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in images])

    pixels = torch.tensor(std)[:, None, None] * 255
    assert ((found - expected(T.InterpolationMode.BICUBIC)) * pixels).abs().max() <= 2
    assert ((found - expected(T.InterpolationMode.BILINEAR)) * pixels).abs().max() > 4


def fingerprint(module):
    return checkpoint.digest(module.state_dict())


def test_fingerprint_sees_every_parameter_and_buffer():
    backbone = ResNet("resnet18", "tiny", width=8)
    before = fingerprint(backbone)
    assert fingerprint(backbone) == before
    for name, value in backbone.state_dict().items():
        kept = value.clone()
        value.add_(1)
        assert fingerprint(backbone) != before, name
        value.copy_(kept)
    assert fingerprint(backbone) == before


@pytest.mark.parametrize("items", [(), CACHED], ids=["augmented", "cached"])
def test_probe_whose_batchnorm_moves_is_refused(tiny_linear, pretrained, tmp_path, monkeypatch, items):
    monkeypatch.setattr(script, "extract", lambda backbone, *rest: extract(backbone.train(), *rest))
    with pytest.raises(UserError, match="frozen encoder changed"):
        probe(tiny_linear(*items), pretrained, tmp_path)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("items", [(), CACHED], ids=["augmented", "cached"])
def test_probe_changes_no_parameter_or_buffer(tiny_linear, pretrained, tmp_path, monkeypatch, items):
    encoders, load = [], checkpoint.load_encoder
    monkeypatch.setattr(checkpoint, "load_encoder", lambda *a: encoders.append(load(*a)) or encoders[0])
    probe(tiny_linear(*items), pretrained, tmp_path)
    assert fingerprint(encoders[0][0]) == fingerprint(load(pretrained)[0])
    assert all(parameter.grad is None for parameter in encoders[0][0].parameters())


def test_only_the_classifier_learns(undisturbed):
    assert checkpoint.load(undisturbed / "checkpoint.pt")["model"].keys() == {"weight", "bias"}
    assert log(undisturbed)[-1]["loss"] < math.log(4)  # better than guessing one of four classes


@pytest.mark.parametrize(("items", "uses"), [((), 2), (CACHED, 2)], ids=["augmented", "cached"])
def test_normalisation_is_that_of_the_pretraining(tiny_linear, pretrained, tmp_path, monkeypatch, items, uses):
    used, batches = [], script.train_batches
    monkeypatch.setattr(script, "train_batches", lambda d, augment, *a: used.append(augment) or batches(d, augment, *a))
    monkeypatch.setattr(script, "extract", lambda m, d, augment, *a: used.append(augment) or extract(m, d, augment, *a))
    probe(tiny_linear(*items, "epochs=1"), pretrained, tmp_path)
    assert [(a.mean, a.std) for a in used] == [((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))] * uses
    used.clear()
    probe(tiny_linear(*items, "epochs=1", "augment.mean=[0.1,0.2,0.3]"), pretrained, tmp_path / "own")
    assert [(a.mean, a.std) for a in used] == [((0.1, 0.2, 0.3), (0.2, 0.3, 0.4))] * uses  # a key that is given counts


@pytest.mark.parametrize(
    ("items", "name"),
    [
        ((), "linear_sgd"),
        (CACHED, "linear_cached_adam"),
        (("features=cached", "augment.order=[]"), "linear_cached_sgd"),
        (CACHED[1:], "linear_adam"),
    ],
)
def test_metric_names_the_protocol(tiny_linear, pretrained, tmp_path, items, name):
    metrics = probe(tiny_linear(*items, "epochs=1"), pretrained, tmp_path)["metrics"]
    assert metrics.keys() == {f"{name}_last", f"{name}_best"}


def test_cached_features_of_augmented_views_are_refused(tiny_linear):
    """They would be those of test views, under the name of another run."""
    with pytest.raises(ConfigError, match=r"augment.order: cached features are those of test views; .* found crop"):
        tiny_linear("features=cached")


def test_last_epoch_is_reported_and_the_best_noted(undisturbed):
    result = json.loads((undisturbed / "result.json").read_text())
    accuracies = [line["test_top1"] for line in log(undisturbed)]
    assert len(accuracies) == 3
    assert result["metrics"] == {"linear_sgd_last": accuracies[-1], "linear_sgd_best": max(accuracies)}


def test_best_is_noted_even_if_a_later_epoch_is_worse(tiny_linear, pretrained, tmp_path, monkeypatch):
    accuracies = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(script, "test", lambda *_: {"test_top1": next(accuracies)})
    metrics = probe(tiny_linear(), pretrained, tmp_path)["metrics"]
    assert metrics == {"linear_sgd_last": 20.0, "linear_sgd_best": 30.0}


def test_log_follows_the_step_schedule(undisturbed):
    """Table 9: the rate is divided by ten at the milestones; used as it is, whatever the batch size."""
    assert [line["lr"] for line in log(undisturbed)] == pytest.approx([0.01, 0.01, 0.001])
    assert all(line.keys() == {"kind", "step", "epoch", "loss", "test_top1", "lr"} for line in log(undisturbed))


@pytest.mark.parametrize(("lines", "delay"), [(0, 0.05), (1, 0.0), (1, 0.01), (2, 0.02)])
def test_sigkill_at_any_point_changes_nothing(tiny_linear, pretrained, tmp_path, undisturbed, lines, delay):
    pid = os.fork()
    if not pid:
        step = script.fit
        script.fit = lambda *a: (time.sleep(0.05), step(*a))[1]  # so that a signal finds it at work
        try:
            probe(tiny_linear(), pretrained, tmp_path)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30
    while len(read_log(tmp_path)) < lines and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    probe(tiny_linear(), pretrained, tmp_path)
    assert_same_probe(tmp_path, undisturbed)


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_cached_probe_repeats_what_came_after_its_checkpoint(tiny_linear, pretrained, tmp_path, monkeypatch, done):
    """A checkpoint every second epoch; stopped between the log line of an epoch and its checkpoint."""
    probe(tiny_linear(*CACHED), pretrained, tmp_path / "whole")
    line = loop.epoch_line
    monkeypatch.setattr(loop, "epoch_line", lambda epoch, *a: line(epoch, *a) if epoch <= done else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe(tiny_linear(*CACHED), pretrained, tmp_path / "stopped")
    monkeypatch.undo()
    assert len(log(tmp_path / "stopped")) == done + 1
    probe(tiny_linear(*CACHED), pretrained, tmp_path / "stopped")
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    a, b = (checkpoint.load(tmp_path / d / "checkpoint.pt")["model"] for d in ("stopped", "whole"))
    assert torch.equal(a["weight"], b["weight"]) and torch.equal(a["bias"], b["bias"])


def test_kill_before_a_checkpoint_repeats_no_line(tiny_linear, pretrained, tmp_path, undisturbed, monkeypatch):
    save = loop.Loop.save
    monkeypatch.setattr(loop.Loop, "save", lambda self: os._exit(9) if self.state.step == 12 else save(self))
    pid = os.fork()
    if not pid:
        probe(tiny_linear(), pretrained, tmp_path)
    os.waitpid(pid, 0)
    assert len(read_log(tmp_path)) == 1
    monkeypatch.undo()
    probe(tiny_linear(), pretrained, tmp_path)
    assert_same_probe(tmp_path, undisturbed)


def test_sigterm_stops_after_the_epoch_and_resumes(tiny_linear, pretrained, tmp_path, undisturbed, monkeypatch):
    test = script.test
    monkeypatch.setattr(script, "test", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or test(*a))
    with pytest.raises(KeyboardInterrupt):
        probe(tiny_linear(), pretrained, tmp_path)
    assert len(log(tmp_path)) == 1
    monkeypatch.undo()
    probe(tiny_linear(), pretrained, tmp_path)
    assert_same_probe(tmp_path, undisturbed)


def test_loss_that_is_not_finite_stops_the_probe(tiny_linear, pretrained, tmp_path):
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d; stopped"):
        probe(tiny_linear("optimizer.lr=1e38"), pretrained, tmp_path)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "checkpoint.pt").exists()


def test_finished_probe_says_so_and_changes_nothing(pretrained, linear_recipe, cli, tmp_path):
    words = ["--checkpoint", pretrained, "--config", linear_recipe, "--runs-dir", tmp_path, "--set", "epochs=1"]
    assert cli(script.main, *words)[0] == 0
    (directory,) = (tmp_path / "linear").iterdir()
    before = {path: path.read_bytes() for path in directory.iterdir()}
    status, out, _ = cli(script.main, *words)
    assert status == 0 and "nothing to do" in out
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_probes_of_two_checkpoints_never_share_a_directory(tiny_linear):
    first, second = (dataclasses.replace(tiny_linear(), checkpoint=name) for name in ("run", "run@40"))
    assert script.run_directory("runs", first) != script.run_directory("runs", second)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["bach_size=1"], "did you mean 'batch_size'"),
        (["batch_size=97"], "batch_size: 97 exceeds the 96 training images"),
        (["dataset=squers"], "unknown data set 'squers'"),
        (["optimizer.lr=-1"], "optimizer.lr: expected at least 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(pretrained, linear_recipe, cli, tmp_path, items, words):
    run = tmp_path / "run"
    command = ["--checkpoint", pretrained, "--config", linear_recipe, "--run-dir", run]
    status, _, err = cli(script.main, *command, "--set", *items)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not run.exists() or [path.name for path in run.iterdir()] == ["lock"]


def test_checkpoint_of_a_probe_is_refused(undisturbed, linear_recipe, cli, tmp_path):
    command = ["--checkpoint", undisturbed / "checkpoint.pt", "--config", linear_recipe, "--run-dir", tmp_path / "run"]
    status, _, err = cli(script.main, *command)
    assert status == 1 and "is not a pre-training checkpoint" in err and err.count("\n") == 1
