"""The wheel: what is in it; in an empty environment it imports, mixes and trains on the embedded photographs."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mixmask import config as configs
from mixmask.config import recipe_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "dataset=photos epochs=1 batch_size=250 method=mixmask backbone.width=4 backbone.bn_groups=1 moco.queue=500 "
    "moco.shuffle_bn=false knn.k=20 knn.every=0 run.workers=0 run.device=cpu"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the tracked files alone, as from a clean clone."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in names:
        if name.startswith(("mixmask/", "pretrain/", "eval/")) or "/" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    (found,) = (folder / "dist").iterdir()
    return found


def test_the_wheel_holds_the_library_the_two_stages_and_their_recipes(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("mixmask-")}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mixmask").rglob("*.py")}
    stages = {
        f"mixmask/{path.relative_to(ROOT).as_posix()}"
        for stage in ("pretrain", "eval")
        for path in [*(ROOT / stage).glob("*.py"), *(ROOT / stage).glob("configs/*.yaml")]
    }
    assert held == library | stages


def test_the_wheels_metadata_name_version_licence_and_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    text = archive.read(name).decode()
    assert "License-Expression: MIT" in text and "Provides-Extra: train" in text and "Requires-Dist: torch>=" in text


@pytest.mark.slow
def test_the_wheel_imports_mixes_and_trains_in_an_empty_environment(wheel, tmp_path):
    """An environment of its own, which sees this one's other packages but nothing of this checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    _, *paths = dict.fromkeys(["", sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "others.pth").write_text(
        "\n".join(paths)
    )  # a .pth in a .pth's folder is not read: no checkout
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        done = subprocess.run(
            [python, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    code = (
        "import mixmask, numpy, torch; x = torch.randn(4, 3, 32, 32); "
        "mask = mixmask.Mask('block', 'repaired', grid=4, ratio=0.5); "
        "mixed, switched = mixmask.mixmask(x, mask, [numpy.random.default_rng(0)]); "
        "print(mixmask.__file__, tuple(mixed.images.shape))"
    )
    where, shape = run("-c", code).strip().split(" ", 1)
    assert Path(where).is_relative_to(tmp_path) and shape == "(4, 3, 32, 32)"
    run("-m", "mixmask.pretrain.train", "--config", "cifar100_moco", "--set", *SMALL.split())
    (result,) = tmp_path.glob("runs/pretrain/*/result.json")
    assert json.loads(result.read_text())["metrics"]["knn_k20_t0.1_out128_last"] > 100 / 16


def test_a_recipes_bare_name_is_the_recipe_that_came_with_the_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert configs.load("cifar100_moco").recipe == "cifar100_moco"
    assert recipe_file("cifar100_linear_sgd.yaml").parent == ROOT / "eval" / "configs"
    (tmp_path / "cifar100_moco").write_text("recipe: mine\n")
    assert recipe_file("cifar100_moco") == Path("cifar100_moco")  # a file of the user's goes first
    for name in ("cifar100_mocco", "pretrain/configs/cifar100_moco"):
        with pytest.raises(configs.ConfigError, match=f"no such config file: {name}"):
            configs.load(name)
