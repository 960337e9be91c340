"""benchmarks/gpu.py: what fits is measured, what does not is said, and all of it is in one small folder."""

import json
import time
import zipfile

import pytest

from benchmarks import gpu


def test_in_no_time_everything_is_skipped_and_said_to_be(tmp_path):
    out = tmp_path / "report"
    given = ["--minutes", "0.05", "--device", "cpu", "--data", str(tmp_path), "--runs-dir", str(tmp_path / "runs")]
    gpu.main([*given, "--out", str(out)])
    assert len(list(out.iterdir())) <= 8 and {"report.json", "report.md", "tests.txt"} <= {
        p.name for p in out.iterdir()
    }
    report = json.loads((out / "report.json").read_text())
    assert report["machine"]["type"] == "cpu" and report["results"] == {}
    assert {"steps/cifar100/moco/mixmask/compiled/bf16", "knn", "curve/eager", "runs/mixmask"} <= set(report["skipped"])
    assert "Skipped, for want of time: steps/" in (out / "report.md").read_text()


def test_no_time_at_all_and_an_unknown_device_are_refused(tmp_path):
    with pytest.raises(gpu.UserError, match="--minutes: expected a number above 0, found 0"):
        gpu.main(["--minutes", "0"])
    with pytest.raises(gpu.UserError, match="--device cuda:99"):
        gpu.main(["--minutes", "1", "--device", "cuda:99", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("rate", "seconds", "budget"),
    [(25_000, 500, "200 epochs"), (25_000, 300, "100 epochs"), (25_000, 100, "reduced"), (None, 9e9, "reduced")],
)
def test_the_largest_budget_that_fits_is_chosen(tmp_path, rate, seconds, budget):
    (tmp_path / "cifar-100-python").mkdir()
    options = gpu._parse(["--data", str(tmp_path)])
    row = {"images_per_second": rate, "batch": 512}
    report = {"results": {"steps/cifar100/moco/mixmask/eager/fp32": row} if rate else {}}
    assert gpu.largest_budget(options, report, seconds)[2] == budget


def test_without_data_a_tiny_run_is_carried_out_and_its_records_kept(tmp_path):
    options = gpu._parse(["--data", str(tmp_path), "--device", "cpu", "--runs-dir", str(tmp_path / "runs")])
    options.out = tmp_path
    report, clock = {"results": {}, "skipped": []}, gpu.Time(time.monotonic(), 400)
    gpu.runs(options, clock, report)
    assert {row["status"] for row in report["results"].values()} == {"finished"}, report
    names = zipfile.ZipFile(tmp_path / "runs.zip").namelist()
    assert len({name.split("/")[0] for name in names}) == 2 and sum(name.endswith("result.json") for name in names) == 2


def test_a_run_without_time_is_stopped_and_can_be_resumed(tmp_path):
    recipe, tiny, _ = gpu.largest_budget(gpu._parse(["--data", str(tmp_path)]), {"results": {}}, 60)
    settings = {**tiny, "run.device": "cpu", "epochs": 200}
    row = gpu.carried_out(recipe, settings, tmp_path / "runs", 25)
    assert row["status"].startswith("stopped, exit status") and row["seconds"] < 25 + gpu.GRACE + 1
    assert list((tmp_path / "runs").glob("pretrain/*/checkpoint.pt"))


def test_a_case_that_fails_is_a_line_of_the_report():
    found = gpu.measured(
        "step", 120, device="cpu", dataset="cifar100", framework="nonesuch", precision="fp32", compiled=False
    )
    assert "nonesuch" in found["failed"]
    assert gpu.measured("machine", 0.01, device="cpu") == {"failed": "stopped after 0 s"}
