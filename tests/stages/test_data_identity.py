"""What the images are belongs to a run: other images are another run, and no run goes on with others than its own."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import finetune, knn, linear
from mixmask import config as configs
from mixmask import formats
from mixmask.config import Finetune, Linear, UserError
from mixmask.datasets.settle import inherit
from mixmask.runs import read_log, read_result, run_id
from pretrain import train as script
from slurm import launch

SMALL = ("epochs=2", "backbone.width=8", "augment.size=16", "run.workers=0", "run.device=cpu", "run.download=false")


def write(root: Path, name: str, count: int, first: int = 0) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    for k in range(first, first + count):
        pixels = np.random.default_rng(k).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name / f"{k}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of 40 and 30 images, in a folder with a space and an umlaut in its name."""
    write(tmp_path / "meine Bilder ä", "hund", 40)
    write(tmp_path / "meine Bilder ä", "katze", 30)
    return tmp_path / "meine Bilder ä"


@pytest.fixture
def pretrain(cli, tmp_path):
    """`pretrain(root, *options, items)`: what the command says; its runs are in tmp_path/runs."""

    def run(root: Path, *options: object, items: tuple[str, ...] = ()) -> tuple[int, str, str]:
        words = ["--config", "pretrain/configs/folder_small_moco.yaml", "--runs-dir", tmp_path / "runs", *options]
        return cli(script.main, *words, "--set", f"run.data_root={root}", *SMALL, *items)

    return run


def runs(tmp_path: Path, stage: str = "pretrain") -> list[Path]:
    return sorted((tmp_path / "runs" / stage).iterdir())


def test_own_folder_from_pretraining_to_probes(pretrain, root, cli, tmp_path):
    status, out, _ = pretrain(root, "--verify")
    assert status == 0 and "folder: 6" in out and "batch_size: 256 becomes 16" in out
    (run,) = runs(tmp_path)
    assert any(key.startswith("knn_") for key in read_result(run)["metrics"])
    for main, stage, recipe in (
        (linear.main, "linear", "folder_linear"),
        (finetune.main, "finetune", "folder_finetune"),
    ):
        words = ["--checkpoint", run / "checkpoint.pt", "--config", f"eval/configs/{recipe}.yaml"]
        status, _, err = cli(main, *words, "--runs-dir", tmp_path / "runs", "--set", "epochs=1")
        assert status == 0, err
        assert read_result(runs(tmp_path, stage)[0])["metrics"]
    status, out, err = cli(knn.main, "--checkpoint", run / "checkpoint.pt", "--runs-dir", tmp_path / "runs")
    assert status == 0 and out.startswith("knn_k"), err


def test_images_without_labels_are_trained_on_and_not_probed(pretrain, tmp_path, cli):
    write(tmp_path, "flat", 40)
    status, out, err = pretrain(tmp_path / "flat")
    assert status == 0, err
    (run,) = runs(tmp_path)
    assert set(read_result(run)["metrics"]) == {"loss"} and "images, no labels; views" in out
    words = ["--checkpoint", run / "checkpoint.pt", "--runs-dir", tmp_path / "runs"]
    for main, more in ((knn.main, []), (linear.main, ["--config", "eval/configs/folder_linear.yaml"])):
        status, _, err = cli(main, *words, *more)
        assert status == 1 and err.count("\n") == 1 and "have no labels; expected folders, one a class" in err


def test_other_images_are_another_run_and_refused_in_its_directory(pretrain, root, tmp_path):
    assert pretrain(root)[0] == 0
    assert "nothing to do" in pretrain(root)[1]
    write(root, "katze", 8, first=30)
    status, out, _ = pretrain(root)
    assert status == 0 and "nothing to do" not in out and len(runs(tmp_path)) == 2
    (first, second) = sorted(runs(tmp_path), key=lambda run: run.stat().st_mtime)
    status, _, err = pretrain(root, "--run-dir", first)
    assert status == 1 and err.count("\n") == 1 and "holds a run of another config (data: train: 6" in err
    assert "images in 2 classes" in err.split(" now")[0].split(" there, ")[1]
    assert [line["epoch"] for line in read_log(second) if line["kind"] == "epoch"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["steps", "images", "classes"])
def test_checkpoint_of_other_data_is_refused_with_both_numbers(tiny, tmp_path, name):
    """Of a run whose identity does not hold its data, such as one of a published set that was exchanged."""
    from mixmask import checkpoint
    from mixmask.config import UserError
    from pretrain.train import train

    train(tiny("epochs=1", "knn.every=0"), tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    state = checkpoint.load(path)
    assert state["data"] == {"images": 96, "classes": 4} and state["steps"] == 6
    there = {"steps": 7, "images": 1234, "classes": 5}[name]
    if name == "steps":
        state["steps"] = there
    else:
        state["data"][name] = there
    checkpoint.save(path, {key: value for key, value in state.items() if key != "format"})
    (tmp_path / "run" / "result.json").unlink()
    here = {"steps": 6, "images": 96, "classes": 4}[name]
    with pytest.raises(UserError, match=rf"is of a run of {there:,} {name}, and there are {here} now"):
        train(tiny("epochs=1", "knn.every=0"), tmp_path / "run")


def test_partial_imagenet_is_another_run_for_other_classes(tmp_path, cli, monkeypatch):
    """As five classes of ImageNet beside five others: "finished, nothing to do" with the first ones' result."""
    for data, classes in (("one", ("n01", "n02")), ("two", ("n03", "n04"))):
        for wnid in classes:
            write(tmp_path / data / "train", wnid, 16)
            write(tmp_path / data / "val", wnid, 4)
    small = [
        "batch_size=8",
        "mix_groups=1",
        "backbone.bn_groups=1",
        "moco.queue=16",
        "knn.k=3",
        "allow_partial_data=true",
    ]
    small += ["backbone.arch=resnet18", "mask.grid=2", "epochs=1"]
    for data in ("one", "two", "one"):
        words = ["--config", "pretrain/configs/imagenet_moco.yaml", "--runs-dir", tmp_path / "runs", "--set", *SMALL]
        status, out, err = cli(script.main, *words, *small, f"run.data_root={tmp_path / data}")
        assert status == 0, err
    assert "nothing to do" in out and len(runs(tmp_path)) == 2
    ids = {json.loads((run / "result.json").read_text())["run"] for run in runs(tmp_path)}
    assert ids == {run.name for run in runs(tmp_path)}
    shutil.rmtree(tmp_path / "runs")


def test_settling_is_part_of_training_whoever_calls_it(root, tmp_path):
    """As another program does, which has no `main`: other images are another run, and the numbers fit them."""
    items = configs.parse_overrides([f"run.data_root={root}", *SMALL, "epochs=1", "knn.every=0"])
    config = configs.load("pretrain/configs/folder_small_moco.yaml", items)
    for _ in range(2):
        script.train(config, runs_dir=tmp_path / "runs")
    (run,) = runs(tmp_path)
    noted = configs.load(run / "config.yaml")
    assert noted.data.startswith("train: 6") and noted.batch_size == 16 and run_id(noted) == run.name
    write(root, "katze", 8, first=30)
    script.train(config, runs_dir=tmp_path / "runs")
    assert len(runs(tmp_path)) == 2
    source = formats.read(run / "checkpoint.pt")
    for stage, recipe, cls in (("linear", "folder_linear", Linear), ("finetune", "folder_finetune", Finetune)):
        values = inherit(configs.read_yaml(f"eval/configs/{recipe}.yaml"), configs.to_dict(source.recipe))
        probe = dataclasses.replace(configs.resolve(values, {"epochs": 1}, cls), checkpoint=source.identity)
        if stage == "linear":
            linear.probe(probe, run / "checkpoint.pt", runs_dir=tmp_path / "runs")
        else:
            finetune.finetune(probe, source, runs_dir=tmp_path / "runs")
        noted = configs.load(runs(tmp_path, stage)[0] / "config.yaml", cls=cls)
        assert noted.data.startswith("train: 7") and noted.batch_size <= 16


def test_launcher_refuses_a_run_of_other_images(root, tmp_path, capsys, monkeypatch):
    """Its ids come from recipes alone: `finished` would be said of the images that lay there before."""
    monkeypatch.chdir(launch.ROOT)
    words = ["table1/cifar100/grid/2", "--preset", "smoke", "--executor", "local", "--runs-dir"]
    words += [str(tmp_path / "runs"), "--set", "dataset=folder", f"run.data_root={root}", *SMALL]
    words += ["epochs=1", "knn.every=0", "moco.queue=16", "batch_size=16", "mix_groups=1", "backbone.bn_groups=1"]
    launch.main(words)
    launch.main(words)
    assert "1 finished" in capsys.readouterr().out
    write(root, "katze", 8, first=30)
    for verb in ([], ["status"]):
        with pytest.raises(UserError, match=r"is of other images \(train: 6\d images .* there, train: 7\d .* now\)"):
            launch.main([*verb, *words])
    shutil.rmtree(root)
    launch.main(["status", *words])
    assert "is not known: run.data_root" in capsys.readouterr().out
