"""From a public checkpoint to its row of Tables 6 and 7: launched, tabulated, and refused where it is another's."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from mixmask.config import UserError
from paper import make_report, make_tables
from paper.cells import select
from paper.presets import budget, directory, steps
from tests import foreign

ROOT = Path(__file__).resolve().parents[2]
AP = {"box_AP": 55.5, "box_AP50": 80.0, "box_AP75": 60.0}
SMALL = ("detection.detectron2.SOLVER.MAX_ITER=1", "detection.detectron2.SOLVER.STEPS=[]")


@pytest.fixture(scope="module")
def swav(tmp_path_factory) -> Path:
    """A whole ResNet-50 in the form of SwAV's file."""
    path = tmp_path_factory.mktemp("public") / "swav_800ep_pretrain.pth.tar"
    torch.save(foreign.swav(foreign.backbone(width=64)), path)
    return path


def needs_detectron2(test):
    absent = importlib.util.find_spec("detectron2") is None
    return pytest.mark.detectron2(pytest.mark.skipif(absent, reason="needs Detectron2 (make detectron2)")(test))


def run(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def row(cell: str, out: Path, settings: list[str]) -> pd.Series:
    """The cell in its table, of the runs in `out`/runs."""
    table = cell.partition("/")[0]
    words = ["--preset", "smoke", "--runs-dir", str(out / "runs"), "--set", *settings]
    make_tables.main([table, *words, "--out", str(out)])
    text = (out / f"{table}.csv").read_text()
    return pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, index_col=0).loc[cell]


def launch(cell: str, out: Path, settings: list[str]) -> pd.Series:
    words = ["slurm/launch.py", cell, "--preset", "smoke", "--executor", "local", "--runs-dir", out / "runs"]
    run(*words, "--set", *settings)
    report = ["--preset", "smoke", "--runs-dir", str(out / "runs"), "--set", *settings]
    make_report.main([*report, "--out", str(out / "report.html")])
    return row(cell, out, settings)


def test_table6_from_launch_to_table(tmp_path):
    path = tmp_path / "swav.pth.tar"
    torch.save(foreign.swav(foreign.backbone(width=4)), path)
    found = launch("table6/imagenet/swav/1percent", tmp_path, [f"checkpoints.swav={path}"])
    assert found["n"] == "1" and 0 <= float(found["ours_mean"]) <= 100 and "SwAV's public" in found["remark"]


@needs_detectron2
@pytest.mark.parametrize("cell", ["voc/box_AP", "coco/mask_AP"])
def test_table7_from_launch_to_table(swav, cell, tmp_path):
    found = launch(f"table7/swav/{cell}", tmp_path, [f"checkpoints.swav={swav}", *SMALL])
    assert found["n"] == "1" and 0 <= float(found["ours_mean"]) <= 100 and "SwAV's public" in found["remark"]


def test_table7_without_its_training(swav, tmp_path):
    """The conversion is made; of the detection only the result is: counted, also where the conversion is not kept."""
    settings, cell = [f"checkpoints.swav={swav}"], "table7/swav/voc/box_AP"
    convert, detection = steps(select([cell])[0], 0, budget("smoke", settings))
    where, last = directory(tmp_path / "runs", convert), directory(tmp_path / "runs", detection)
    where.mkdir(parents=True)
    run("detection/convert.py", swav, where / "backbone.pkl", "--run-dir", where)
    last.mkdir(parents=True)
    (last / "result.json").write_text(json.dumps({"metrics": AP}))
    assert row(cell, tmp_path, settings)["ours_mean"] == "55.5"
    (where / "result.json").unlink()
    assert row(cell, tmp_path, settings)["ours_mean"] == "55.5"


@pytest.mark.parametrize("place", ["convert", "detection"])
def test_another_methods_checkpoint_is_refused_whichever_run_says_so(place, tmp_path):
    file = tmp_path / "moco.pth.tar"
    file.write_bytes(b"weights")
    settings, cell = [f"checkpoints.moco_v2={file}"], "table7/moco/vanilla/voc/box_AP"
    chain = steps(select([cell])[0], 0, budget("smoke", settings))
    said = {"convert": {"source": {"format": "swav"}}, "detection": {"format": "swav"}}[place]
    for step in chain:
        where = directory(tmp_path / "runs", step)
        where.mkdir(parents=True)
        result = {"metrics": AP} | (said if step.stage == place else {})
        (where / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=f"{place}.*is of format swav, expected moco for MoCo V2"):
        row(cell, tmp_path, settings)
