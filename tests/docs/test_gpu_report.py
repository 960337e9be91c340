"""benchmarks/gpu.py on the CPU: every part, in its time; budgets; what a stop leaves behind."""

import json
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gpu, gpu_runs, measure
from mixmask.config import UserError

CPU = torch.device("cpu")
SMALL = ["dataset=folder", "backbone.width=4", "batch_size=16", "backbone.bn_groups=2", "moco.queue=32", "knn.k=5"]


@pytest.fixture
def images(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    for number in range(96):
        path = tmp_path / "images" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def words(tmp_path, images, *more, out="out"):
    where = ["--data", images, "--out", tmp_path / out, "--runs-dir", tmp_path / "runs"]
    return [str(word) for word in ["--device", "cpu", *where, *more]]


def test_every_part_is_written_and_a_second_call_goes_on(tmp_path, images, monkeypatch, capsys):
    monkeypatch.setitem(measure.MATMUL, "cpu", 128)
    monkeypatch.setattr(gpu_runs, "GROUPS", gpu_runs.GROUPS[:1])
    monkeypatch.setattr(gpu, "CURVE", 2)
    given = words(tmp_path, images, "--minutes", "20", "--set", *SMALL, "epochs=1")
    known = list(gpu.step_cases(CPU))[:1]
    monkeypatch.setattr(gpu, "step_cases", lambda device: known)
    gpu.main(given)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.json",
        "report.md",
        "runs.tar",
        "tests.txt",
    ]
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["tests"]["test_gpu.py"]["failed"] == 0 and not found["left_out"]
    assert found["results"]["steps/moco/mixmask, fp32"]["images_per_second"] > 0
    assert found["curve"]["float64"]["distance"] == 0 < found["curve"]["fp32"]["distance"] < 0.1
    assert [row["state"] for row in found["runs"].values()] == ["finished"] * 2
    with tarfile.open(tmp_path / "out/runs.tar") as tar:
        names = tar.getnames()
    assert sum(name.endswith("/result.json") for name in names) == 2 and not any("checkpoint" in name for name in names)
    text = (tmp_path / "out/report.md").read_text()
    assert "moco/mixmask, fp32" in text and "finished | 1 of 1" in text

    elsewhere = ["--from", tmp_path / "out", "--runs-dir", tmp_path / "others", "--parts", "steps,runs"]
    begin = time.monotonic()
    gpu.main(words(tmp_path, images, "--minutes", "1", *elsewhere, "--set", *SMALL, "epochs=1", out="more"))
    assert time.monotonic() - begin < 20  # nothing was measured or trained again
    again = json.loads((tmp_path / "more/report.json").read_text())
    assert again["results"] == found["results"] and again["runs"].keys() == found["runs"].keys()


def test_a_run_whose_time_is_over_stops_with_a_checkpoint_and_says_so(tmp_path, images):
    runs = gpu_runs.Runs(CPU, images, tmp_path / "runs", dict(item.split("=") for item in SMALL) | LONG)
    (run,) = (runs.plan("cifar100_reduced_moco", {"method": "vanilla"}),)

    def seen():
        if (run.directory / "checkpoint.pt").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # as a signal would, in the middle
        gpu_runs.carry_out([run], 1, time.monotonic() + 120, seen)
    assert 0 < run.epochs_done < 2000 and run.row()["state"] == "not finished"
    ends = gpu_runs.carry_out([run], 1, time.monotonic() + 1, lambda: None)
    assert ends == {run.directory.name: "the time was over: the same command goes on"}


LONG = {"batch_size": 16, "backbone.width": 4, "backbone.bn_groups": 2, "moco.queue": 32, "knn.k": 5, "epochs": 2000}


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(1e6, 200), (2 * 200 * 1.1 + 50, 200), (2 * 200 * 1.1 - 1, 100), (30, 6), (5, None)]
)
def test_the_largest_budget_that_fits_is_taken(tmp_path, seconds, epochs, monkeypatch):
    cost = {"start": 0.0, "epoch": 1.0, "knn": 0.0, "gib": 1.0}
    monkeypatch.setattr(gpu_runs.Runs, "measured", lambda self, run: cost)
    runs = gpu_runs.Runs(CPU, tmp_path, tmp_path / "runs")
    group, why = runs.fitting(gpu_runs.GROUPS[0], seconds)
    assert [run.config.epochs for run in group] == [epochs] * 2 if epochs else not group
    assert epochs or why == "cifar100_reduced_moco of 6 epochs would take 13 s, and 5 s are left"


def test_what_is_hopeless_is_not_measured(tmp_path):
    runs = gpu_runs.Runs(CPU, tmp_path, tmp_path / "runs", peak=1e-3)  # there are no data here to measure on
    group, why = runs.fitting(gpu_runs.GROUPS[0], 10)
    assert not group and "would take at least" in why


def test_a_report_of_another_device_and_a_wrong_part_are_refused(tmp_path, cli):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text(json.dumps({"machine": {"device": "another"}}))
    with pytest.raises(UserError, match="is of another, and this is"):
        gpu.main(words(tmp_path, tmp_path, "--minutes", "1"))
    with pytest.raises(UserError, match="--parts: unknown 'stepz'; expected some of tests,steps,curve,runs"):
        gpu.main(words(tmp_path, tmp_path, "--minutes", "1", "--parts", "stepz"))
    with pytest.raises(UserError, match="no 'cuda' here"):
        gpu.main(["--minutes", "1", "--out", str(tmp_path / "new")])


def test_missing_data_end_the_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(measure.MATMUL, "cpu", 128)
    gpu.main(words(tmp_path, tmp_path / "nowhere", "--minutes", "10", "--parts", "runs", "--set", "epochs=1"))
    (why,) = json.loads((tmp_path / "out/report.json").read_text())["left_out"].values()
    assert "nowhere" in why


def test_whatever_fails_ends_neither_the_other_steps_nor_the_other_parts(tmp_path, images, monkeypatch, capsys):
    def fails(*_):
        raise TypeError("a kernel\nof another version")

    cases = [("steps/a", 0, fails), ("steps/b", 0, lambda *_: {"ms_per_step": 2.0, "steps": 1})]
    monkeypatch.setattr(gpu, "step_cases", lambda device: cases)
    monkeypatch.setitem(gpu.PARTS, "tests", fails)
    monkeypatch.setitem(gpu.PARTS, "curve", fails)
    gpu.main(words(tmp_path, images, "--minutes", "1", "--parts", "tests,steps,curve"))
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["left_out"] == {"tests": "a kernel", "steps/a": "failed: a kernel", "curve": "a kernel"}
    assert found["results"] == {"steps/b": {"ms_per_step": 2.0, "steps": 1}}
    assert "of another version" in capsys.readouterr().err  # where it happened


def test_time_that_the_runs_do_not_need_is_for_what_was_left_out(tmp_path, images, monkeypatch):
    monkeypatch.setattr(gpu, "SHARES", {"steps": 0.0, "runs": 1.0})
    monkeypatch.setattr(gpu, "step_cases", lambda device: [("steps/b", 5, lambda *_: {"ms_per_step": 2.0, "steps": 1})])
    monkeypatch.setitem(gpu.PARTS, "runs", lambda report, *_: left_out.update(report.content["left_out"]))
    left_out = {}
    gpu.main(words(tmp_path, images, "--minutes", "1", "--parts", "steps,runs"))
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert list(left_out) == list(found["results"]) == ["steps/b"] and not found["left_out"]
