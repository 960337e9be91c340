"""Another network from pre-training to features; given weights, checkpoints that stay, public ones, top-5."""

import itertools
import json
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from detection import convert
from eval import features as features_script
from eval import finetune as finetune_script
from eval import knn as knn_script
from eval import linear as linear_script
from mixmask import checkpoint, config, formats
from mixmask.backbones import build_backbone
from mixmask.config import Backbone
from mixmask.features import accuracies
from mixmask.training import progress
from mixmask.training.interrupt import Interrupt
from pretrain import train as script
from tests import foreign
from tests.conftest import LINEAR, TINY

OWN = """
from torch import nn

def make():
    body = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body)
"""
FINETUNE = """
recipe: tiny_finetune
dataset: squares
labels: 100
epochs: 1
batch_size: 16
seed: 0
backbone_lr: 0.01
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0}
schedule: {kind: cosine}
augment: {order: [crop], size: 12}
run: {workers: 0, device: cpu}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with recipes and a network of one's own."""
    for name, text in (("my_networks.py", OWN), ("tiny.yaml", TINY), ("linear.yaml", LINEAR), ("ft.yaml", FINETUNE)):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("my_networks", None)


def ok(cli, main, *words):
    status, out, err = cli(main, *words)
    assert (status, err) == (0, ""), err
    return out


def pretrain(cli, run_dir, *items):
    items = ("epochs=1", *items)
    return ok(cli, script.main, "--config", "tiny.yaml", "--run-dir", run_dir, "--set", *items)


def folder(root):
    """Two classes in folders with a space and an umlaut, and beside them nothing."""
    for i, name in enumerate(("rot und grün", "blau")):
        (root / name).mkdir(parents=True)
        for j in range(3):
            pixels = np.full((20 + 9 * j, 30, 3), 80 * i + 10 * j, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"Bild {j}.png")
    return root


def test_a_network_of_ones_own_goes_all_the_way(cli, here):
    own = ("backbone.arch=my_networks:make", "backbone.width=64", "backbone.stem=imagenet")
    out = pretrain(cli, "run", *own)
    assert "my_networks:make, stem of its own, 8 features, 0.0 M weights, 1 BatchNorms in 2 group(s)" in out
    weights = ("--checkpoint", "run/checkpoint.pt")
    assert "knn_k5_t0.1_backbone8_last" in ok(cli, knn_script.main, *weights, "--set", "knn.features=backbone")
    assert "linear_sgd_last" in ok(cli, linear_script.main, *weights, "--config", "linear.yaml")
    assert "finetune_last" in ok(cli, finetune_script.main, *weights, "--config", "ft.yaml", "--set", "bn_groups=2")
    status, _, err = cli(convert.main, "run/checkpoint.pt", "own.safetensors", "--to", "timm")
    assert status == 1 and "my_networks:make with the imagenet stem, not timm's; --to torchvision writes it" in err
    assert "my_networks:make" in ok(cli, convert.main, "run/checkpoint.pt", "own.pth", "--to", "torchvision")
    one, two = formats.read("run/checkpoint.pt"), formats.read("own.pth")
    assert one.backbone == two.backbone and one.identity == two.identity and one.mean == two.mean
    assert all(one.weights[name].equal(two.weights[name]) for name in one.weights | two.weights)
    folder(here / "Meine Bilder")
    for file in ("run/checkpoint.pt", "own.pth"):
        ok(cli, features_script.main, "--checkpoint", file, "--data", "Meine Bilder", f"{file[:3]}.npz", "--size", 12,
           "--workers", 0)  # fmt: skip
    assert np.array_equal(np.load("run.npz")["features"], np.load("own.npz")["features"])


def test_the_features_of_a_folder(cli, here):
    pretrain(cli, "run")
    root = folder(here / "Meine Bilder")
    words = ("--checkpoint", "run/checkpoint.pt", "--workers", 0)
    ok(cli, features_script.main, *words, "--data", root, "out.npz")
    found = np.load("out.npz")
    assert found["features"].shape == (6, 64) and found["features"].dtype == np.float32
    assert found["classes"].tolist() == ["blau", "rot und grün"] and found["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["files"].tolist() == [f"{name}/Bild {j}.png" for name in found["classes"] for j in range(3)]
    model = formats.load_backbone("run/checkpoint.pt")
    image = torch.full((1, 3, 12, 12), 90 / 255)  # blau/Bild 1: one colour, whatever the crop
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found["features"][1:2]), model((image - 0.5) / 0.25))
    ok(cli, features_script.main, *words, "--data", root / "blau", "flat.npz")
    assert np.load("flat.npz")["labels"].tolist() == [-1, -1, -1] and not len(np.load("flat.npz")["classes"])


def test_features_of_two_splits_by_a_public_checkpoint(cli, here):
    """Each row stands beside its file, and images are normalised as the file's network has them."""
    torch.save(foreign.backbone("resnet18", width=8), "public.pth")
    for number, place in enumerate(("train/a/1", "train/b/1", "val/a/0", "val/b/2")):
        path = here / "split" / f"{place}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((40, 40, 3), 50 * number, np.uint8)).save(path)
    words = ("--checkpoint", "public.pth", "--workers", 0, "--size", 32)
    ok(cli, features_script.main, *words, "--data", here / "split", "out.npz")
    found, model = np.load("out.npz"), formats.load_backbone("public.pth")
    assert found["files"].tolist() == ["train/a/1.png", "train/b/1.png", "val/a/0.png", "val/b/2.png"]
    assert found["labels"].tolist() == [0, 1, 0, 1]
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = torch.stack([(torch.full((3, 32, 32), 50 * number / 255) - mean) / std for number in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found["features"]), model(images))


@pytest.mark.parametrize(
    "words, message",
    [
        (("--data", ".", "out.npy"), "OUT: expected a name that ends in .npz, found out.npy"),
        (("--data", ".", "no/out.npz"), "OUT: no such directory: no"),
        (("--data", "nowhere", "out.npz"), "--data: no such folder: nowhere"),
        (("--data", ".", "out.npz", "--size", -3), "--size: expected at least 0, found -3"),
        (("--data", ".", "out.npz"), "no images under"),
        (("--data", ".", "out.npz", "--arch", "timm/nonsense"), "timm has no network 'nonsense'"),
    ],
)
def test_features_that_cannot_be_had_are_refused_in_one_line(cli, here, words, message):
    pretrain(cli, "run", "epochs=1")
    (here / "empty").mkdir()
    words = [("empty" if word == "." else word) for word in words]
    if "--arch" in words:
        torch.save(build_backbone(Backbone("resnet18", "imagenet", 64, 1)).state_dict(), "foreign.pth")
    file = "foreign.pth" if "--arch" in words else "run/checkpoint.pt"
    status, _, err = cli(features_script.main, "--checkpoint", file, *words)
    assert status == 1 and message in err and err.count("\n") == 1
    assert not list(here.glob("*.npz")) and not list(here.glob(".*npz*"))


def test_a_file_of_a_named_network(here, cli):
    net = build_backbone(Backbone("timm/convnext_atto", "imagenet", 64, 1))
    torch.save({"state_dict": {**net.state_dict(), "head.fc.weight": torch.zeros(3, 320)}}, "convnext.pth")
    source = formats.read("convnext.pth", arch="timm/convnext_atto")
    assert source.dropped == {"head": 1} or sum(source.dropped.values()) == 1
    assert checkpoint.digest(source.weights) == checkpoint.digest(net.state_dict())
    with pytest.raises(formats.FormatError, match=r"is no timm/convnext_femto: of its \d+ tensors it lacks|is \(40"):
        formats.read("convnext.pth", arch="timm/convnext_femto")
    with pytest.raises(formats.FormatError, match=r"lacks .* and has"):
        formats.read("convnext.pth", arch="torchvision/resnet34")


# --------------------------------------------------------------------------------------------- given weights


def test_a_run_begins_with_given_weights_and_is_named_by_them(cli, here):
    pretrain(cli, "first")
    out = pretrain(cli, "second", "seed=1", "run.init=first/checkpoint.pt", "optimizer.lr=0", "moco.momentum=1")
    assert "note: the backbone begins with the weights of tiny-mixmask-e1-" in out
    first, second = (checkpoint.load(f"{name}/checkpoint.pt")["model"] for name in ("first", "second"))
    weights = [n for n in first if ".backbone." in n and not n.endswith(("_mean", "_var", "_tracked"))]
    assert len(weights) > 70 and all(
        first[f"encoder.backbone.{n.split('.backbone.')[1]}"].equal(second[n]) for n in weights
    )
    named = config.load("second/config.yaml")
    assert len(named.init) == 16 and config.hash8(named) != config.hash8(config.load("first/config.yaml"))
    os.rename("first/checkpoint.pt", "moved.pt")
    assert "is finished" in pretrain(
        cli, "second", "seed=1", "run.init=moved.pt", "optimizer.lr=0", "moco.momentum=1"
    )  # the weights count, not their file


def test_other_weights_are_refused_in_one_line(cli, here):
    pretrain(cli, "first")
    pretrain(cli, "wide", "backbone.width=4")
    pretrain(cli, "second", "run.init=first/checkpoint.pt")
    torch.save({"state_dict": {}, "args": types.SimpleNamespace()}, "pickled.pt")
    for items, message in (
        (["run.init=nowhere.pt"], "run.init: no such file: nowhere.pt"),
        (
            ["run.init=pickled.pt"],
            "--trust-pickle; an option of detection/convert.py, which writes",
        ),
        (
            ["run.init=wide/checkpoint.pt"],
            "wide/checkpoint.pt holds a resnet10 of width 4 with the tiny stem;",
        ),
        (["run.init=first/checkpoint.pt", "backbone.arch=resnet50"], "expected a resnet50 of width 8"),
        (["run.init=first/checkpoint.pt", "backbone.stem=cifar"], "expected a resnet10 of width 8 with the cifar stem"),
        (["run.init=first/config.yaml"], "first/config.yaml"),
        (["init=0123456789abcdef"], "init: the run starts from weights that are not given; expected run.init=FILE"),
    ):
        words = ("--config", "tiny.yaml", "--run-dir", "third", "--set", *items)
        status, _, err = cli(script.main, *words)
        assert status == 1 and message in err and err.count("\n") == 1, err
        assert not (here / "third").exists()
    status, _, err = cli(script.main, "--config", "tiny.yaml", "--run-dir", "second", "--set", "epochs=1")
    assert status == 1 and "init" in err  # the same run without its weights is another


def test_an_evaluation_does_not_take_over_what_a_pretraining_alone_does(cli, here):
    pretrain(cli, "first")
    pretrain(cli, "second", "run.init=first/checkpoint.pt", "run.accumulate=2", "run.keep_every=1")
    weights = ("--checkpoint", "second/checkpoint.pt", "--config", "linear.yaml", "--run-dir", "probe")
    status, _, err = cli(linear_script.main, *weights, "--set", "run.accumulate=2")
    assert status == 1 and "run.accumulate: only a pre-training takes it; found 2" in err
    ok(cli, linear_script.main, *weights)
    assert [path.name for path in (here / "probe").glob("checkpoint*.pt")] == ["checkpoint.pt"]
    ok(cli, knn_script.main, "--checkpoint", "second/checkpoint.pt")


# ------------------------------------------------------------------------------------- checkpoints that stay


def test_every_nth_checkpoint_stays(cli, here):
    ok(cli, script.main, "--config", "tiny.yaml", "--run-dir", "run", "--set",
       "epochs=5", "run.keep_every=2", "run.checkpoint_every=5", "knn.every=0")  # fmt: skip
    kept = sorted(path.name for path in (here / "run").glob("checkpoint*.pt"))
    assert kept == ["checkpoint.epoch0002.pt", "checkpoint.epoch0004.pt", "checkpoint.pt"]
    assert [checkpoint.load(here / "run" / name)["step"] for name in kept] == [12, 24, 30]
    assert "knn_" in ok(cli, knn_script.main, "--checkpoint", "run/checkpoint.epoch0002.pt")
    (here / "run/checkpoint.epoch0002.pt").write_bytes((here / "run/checkpoint.epoch0004.pt").read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match=r"is not in checkpoint\.epoch0002\.sha256"):
        checkpoint.load("run/checkpoint.epoch0002.pt")


@pytest.mark.parametrize("items, message", [(["run.keep_every=-1"], "at least 0"), (["run.keep_every=x"], "whole")])
def test_strange_numbers_are_refused(cli, here, items, message):
    status, _, err = cli(script.main, "--config", "tiny.yaml", "--run-dir", "run", "--set", *items)
    assert status == 1 and "run.keep_every" in err and message in err


def test_none_stays_by_default(cli, here):
    pretrain(cli, "run", "run.keep_every=0")
    assert [path.name for path in (here / "run").glob("checkpoint*.pt")] == ["checkpoint.pt"]


# ------------------------------------------------------------------------------------------- public checkpoints


def test_knn_of_a_public_checkpoint(cli, here):
    weights = foreign.weights() if hasattr(foreign, "weights") else None
    net = build_backbone(Backbone("resnet18", "imagenet", 64, 1))
    weights = weights or net.state_dict()
    for name, value in weights.items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
    torch.save(weights, "resnet18.pth")
    words = ["--checkpoint", "resnet18.pth", "--runs-dir", "runs"]
    status, _, err = cli(knn_script.main, *words)
    assert status == 1 and "resnet18.pth names no protocol; expected --config, such as eval/configs/knn.yaml" in err
    words += ["--config", "knn", "--set", "dataset=squares", "knn.k=5", "run.workers=0", "run.device=cpu", "size=32"]
    status, _, err = cli(knn_script.main, *words)
    assert status == 1 and "knn.features: resnet18.pth has no head whose output could be compared" in err
    out = ok(cli, knn_script.main, *words, "knn.features=backbone")
    assert out.startswith("knn_k5_t0.1_backbone512_last")
    (result,) = (here / "runs/knn").glob("*/result.json")
    assert json.loads(result.read_text())["run"].startswith("knn-resnet18-")


# --------------------------------------------------------------------------------------------------------- top-5


def test_top5_beside_top1():
    rows = [[5, 4, 3, 2, 1, 0, -1], [0, 1, 2, 3, 4, 5, 6], [9, 0, -1, 1, 2, 3, 4], [1, 0, 0, 0, 0, 0, 2]]
    scores = torch.tensor(rows, dtype=torch.float32)
    assert accuracies(scores, torch.tensor([0, 2, 1, 6])) == {"test_top1": 50.0, "test_top5": 75.0}
    assert accuracies(scores[:, :5], torch.tensor([0, 2, 1, 4])).keys() == {"test_top1"}


# ---------------------------------------------------------------------------------- the terminal, and time that is left


def test_a_closed_terminal_costs_no_step(cli, here, monkeypatch):
    def hang_up(config, state, batch, iterate=script.iterate):
        if state.step == 8:
            os.kill(os.getpid(), signal.SIGHUP)
        return iterate(config, state, batch)

    words = ("--config", "tiny.yaml", "--set", "knn.every=0", "--run-dir")
    ok(cli, script.main, *words, "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(script, "iterate", hang_up)
        status, _, err = cli(script.main, *words, "run")
    assert status == 130 and "the same command continues" in err
    assert checkpoint.load("run/checkpoint.pt")["step"] == 9
    ok(cli, script.main, *words, "run")
    one, two = (checkpoint.load(f"{name}/checkpoint.pt")["model"] for name in ("undisturbed", "run"))
    assert all(value.equal(two[name]) for name, value in one.items())


def test_under_nohup_a_closed_terminal_stops_nothing(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested and signal.getsignal(signal.SIGTERM) == interrupt._receive
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_where_there_is_no_terminal_the_whole_runs_time_left_is_said_once_a_minute(cli, here, monkeypatch):
    ticks = itertools.count(0, 5)  # seconds: an epoch of six steps takes 35
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    out = pretrain(cli, "run", "epochs=6", "knn.every=0")
    lines = [line for line in out.splitlines() if line.endswith("left")]
    assert 2 <= len(lines) <= 3 and all("/36, " in line for line in lines)
