"""paper/publish.py: what goes out loads in torchvision and timm with the card's own lines, and says what it is."""

import json
import re

import pytest
import torch
import yaml

from mixmask import checkpoint, formats
from mixmask import config as configs
from mixmask.frameworks import build_framework
from mixmask.runs import Run
from paper import publish


def finished(directory, config):
    """A run as pre-training leaves it, with the weights of the seed."""
    torch.manual_seed(config.seed)
    model = build_framework(config)
    for part in model.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    with Run(directory, config) as run:
        run.describe(["train.py"])
        checkpoint.save(run.checkpoint, {**run.about, "step": 12, "steps": 12, "epoch": 2, "model": model.state_dict()})
        run.finish(
            {"run": run.id, "metrics": {"loss": 1.0, "knn_k5_t0.1_out8_last": 41.5, "knn_k5_t0.1_out8_best": 42}}
        )
        return run.id, model.encoder.backbone.eval()


@pytest.fixture
def full(tiny):
    """A ResNet-18 of full width with the stem that torchvision and timm have."""
    return tiny("backbone.arch=resnet18", "backbone.width=64", "backbone.stem=imagenet", "augment.size=64")


def blocks(directory):
    text = (directory / "README.md").read_text(encoding="utf-8")
    return [block.replace("DIR", str(directory)) for block in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)]


def same_features(block, backbone, directory):
    names = {}
    exec(block, names)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(names["model"].eval()(x), backbone(x), atol=1e-5)


def test_the_cards_lines_load_the_same_network_in_timm_and_torchvision(full, cli, tmp_path):
    pytest.importorskip("timm")
    _, backbone = finished(tmp_path / "runs/pretrain/a", full)
    status, out, error = cli(publish.main, tmp_path / "runs/pretrain/a", tmp_path / "out")
    assert status == 0, error
    assert "README.md, config.json, config.yaml, model.safetensors, model.safetensors.json, result.json in" in out
    of_timm, of_torchvision = blocks(tmp_path / "out")
    assert "timm.create_model" in of_timm and "torchvision.models.resnet18" in of_torchvision
    same_features(of_timm, backbone, tmp_path)
    same_features(of_torchvision, backbone, tmp_path)


@pytest.mark.parametrize("stem, width", [("cifar", 64), ("tiny", 64), ("cifar", 8)])
def test_the_cards_lines_load_small_stems_and_other_widths(stem, width, tiny, cli, tmp_path):
    _, backbone = finished(
        tmp_path / "runs/pretrain/a", tiny("backbone.arch=resnet18", f"backbone.width={width}", f"backbone.stem={stem}")
    )
    assert cli(publish.main, tmp_path / "runs/pretrain/a", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "config.json").exists()  # timm could not build it by name
    (block,) = blocks(tmp_path / "out")
    same_features(block, backbone, tmp_path)


def test_the_cards_lines_load_another_network_of_timm(tiny, cli, tmp_path):
    pytest.importorskip("timm")
    items = ("backbone.arch=timm/resnet18", "backbone.width=64", "backbone.stem=cifar", "augment.size=32")
    _, backbone = finished(tmp_path / "runs/pretrain/a", tiny(*items))
    status, _, error = cli(publish.main, tmp_path / "runs/pretrain/a", tmp_path / "out")
    assert status == 0, error
    (block,) = blocks(tmp_path / "out")
    same_features(block, backbone, tmp_path)


def test_the_card_has_recipe_seed_commit_terms_and_each_number_with_its_protocol(tiny, tiny_linear, cli, tmp_path):
    encoder, _ = finished(tmp_path / "runs/pretrain/a", tiny("seed=3", "method=both"))
    for place, of in (("one", encoder), ("other", "another-run")):
        probe = tiny_linear(f"checkpoint={of}")
        with Run(tmp_path / "runs/linear" / place, probe) as run:
            run.describe(["linear.py"])
            run.finish({"run": run.id, "metrics": {"linear_sgd_last": 55.25 if place == "one" else 1.0}})
    assert cli(publish.main, tmp_path / "runs/pretrain/a", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for words in (
        "MixMask with Un-Mix",
        "MoCo",
        "seed 3",
        "for 2 epochs",
        "mean 0.5, 0.5, 0.5",
        "code's licence is MIT",
    ):
        assert words in text, words
    commit = json.loads((tmp_path / "runs/pretrain/a/environment.json").read_text())["commit"]
    assert f"`{commit}`" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert rows == ["| pretrain | `knn_k5_t0.1_out8_last` | 41.50 |", "| linear | `linear_sgd_last` | 55.25 |"]
    recipe = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert configs.resolve(recipe, {}, configs.Pretrain) == tiny("seed=3", "method=both")


def test_a_data_set_that_the_card_does_not_know_is_not_called_the_publishers_own(tiny, cli, tmp_path):
    finished(tmp_path / "runs/pretrain/a", config := tiny())
    assert config.dataset not in publish.LICENCES
    assert cli(publish.main, tmp_path / "runs/pretrain/a", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert publish.UNKNOWN in text and "the publisher's own" not in text and publish.NOT_IN_PAPER in text


def test_no_place_of_the_machine_goes_out(tiny, cli, tmp_path):
    run = tmp_path / "runs/pretrain/a"
    finished(run, tiny(f"run.data_root={tmp_path}/data"))
    words = (
        f"python pretrain/train.py --config a.yaml --set epochs=2 --run-dir '{run}' --set run.data_root={tmp_path}/data"
    )
    (run / "command.txt").write_text(words + "\n")
    assert cli(publish.main, run, tmp_path / "out")[0] == 0
    texts = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert [name for name, text in texts.items() if str(tmp_path).encode() in text] == []
    assert b"\npython pretrain/train.py --config a.yaml --set epochs=2\n" in texts["README.md"]


def test_what_went_out_is_read_again_as_that_runs_weights(full, cli, tmp_path):
    encoder, backbone = finished(tmp_path / "runs/pretrain/a", full)
    assert cli(publish.main, tmp_path / "runs/pretrain/a", tmp_path / "out")[0] == 0
    source = formats.read(tmp_path / "out" / "model.safetensors")
    assert source.identity.startswith(encoder)
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in source.weights.items())


def test_a_run_that_cannot_go_out_is_one_line_and_nothing_is_written(tiny, cli, tmp_path):
    run = tmp_path / "runs/pretrain/a"
    finished(run, tiny())
    (tmp_path / "there").mkdir()
    assert "there exists" in cli(publish.main, run, tmp_path / "there")[2]
    assert "no such run directory" in cli(publish.main, run / "x", tmp_path / "out")[2]
    (run / "checkpoint.pt").rename(run / "gone")
    assert "checkpoint.pt is missing" in cli(publish.main, run, tmp_path / "out")[2]
    (run / "checkpoint.pt").write_bytes((run / "gone").read_bytes()[:-100])
    assert "damaged" in cli(publish.main, run, tmp_path / "out")[2]
    (run / "result.json").unlink()
    assert "is not finished" in cli(publish.main, run, tmp_path / "out")[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "there"]
