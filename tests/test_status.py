"""slurm/status.py without SLURM: what it says of runs on this machine, from results, locks and logs alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mixmask.config import UserError
from paper.cells import select
from paper.presets import budget
from slurm import graph, launch, squeue, status

ROOT = Path(__file__).resolve().parents[1]
CELL = "table4/imagenet/moco/vanilla/200"

HOLD = """
import fcntl, pathlib, sys, time
lock = open(pathlib.Path(sys.argv[1]) / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(squeue, "available", lambda: False)
    found = graph.jobs(select([CELL]), budget("smoke"), tmp_path)
    for job in found:
        job.directory.mkdir(parents=True)
    return found


@pytest.fixture
def held(jobs):
    """Another process works on the pre-training."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, jobs[0].directory], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def write_log(job, *lines):
    (job.directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(jobs, tmp_path):
    return [status.reports(jobs, tmp_path)[job.directory] for job in jobs]


def test_nothing_started(jobs, tmp_path):
    assert report(jobs, tmp_path) == [status.Report("not started")] * 2


def test_finished_with_its_value_and_a_pretraining_that_is_not_needed_again(jobs, tmp_path):
    (jobs[1].directory / "result.json").write_text('{"metrics": {"linear_sgd_last": 61.25}}')
    first, second = report(jobs, tmp_path)
    assert first.state == "not needed" and second == status.Report("finished", "linear_sgd_last 61.2 %")


def test_running_with_epoch_loss_speed_and_time_left(jobs, tmp_path, held):
    ended = {"kind": "epoch", "step": 30, "epoch": 1, "loss": 6.0, "timing": {"seconds": 90.0}}
    timing = {"seconds": 30.0, "images_per_second": 617.4}
    write_log(jobs[0], ended, {"kind": "step", "step": 40, "epoch": 2, "loss": 5.4321, "timing": timing})
    text = report(jobs, tmp_path)[0]
    assert text.state == "running"
    assert text.text == "without SLURM, epoch 2/4, loss 5.432, 617 images/s, 4 min 0 s left"


def test_in_the_first_epoch_the_time_left_is_that_of_the_images(jobs):
    line = {"kind": "step", "step": 10, "epoch": 1, "timing": {"seconds": 10.0, "images_per_second": 100.0}}
    assert status.time_left(jobs[0].config, [line]) == 4 * 2000 / 100 - 10


def test_a_log_that_is_just_being_written_is_read_as_far_as_it_goes(jobs):
    write_log(jobs[0], {"kind": "step", "step": 1, "epoch": 1, "loss": 2.0})
    with open(jobs[0].directory / "log.jsonl", "a") as log:
        log.write('{"kind": "step", "epo')
    assert "loss 2.000" in status.progress(jobs[0])


def test_stopped_says_how_far_it_came_and_failed_quotes_its_log(jobs, tmp_path):
    (jobs[0].directory / "config.yaml").touch()
    write_log(jobs[0], {"kind": "epoch", "step": 30, "epoch": 1, "loss": 6.0, "timing": {"seconds": 9.0}})
    assert report(jobs, tmp_path)[0].state == "stopped" and "epoch 1/4" in report(jobs, tmp_path)[0].text
    (jobs[0].directory / "output.log").write_text("epoch 1\nerror: no such file: data\n")
    first, second = report(jobs, tmp_path)
    assert first.state == "failed" and "| error: no such file: data" in first.text and "mend" in first.text
    assert second == status.Report("not started", f"it needs {jobs[0].directory}, which failed")


def test_a_result_that_cannot_be_read_is_named(jobs, tmp_path):
    (jobs[1].directory / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json"):
        launch.main(["status", CELL, "--preset", "smoke", "--runs-dir", str(tmp_path)])


def test_the_summary_counts_runs_and_cells(jobs, tmp_path, capsys):
    for job in jobs:
        (job.directory / "result.json").write_text('{"metrics": {"loss": 1.5}}')
    launch.main(["status", CELL, "--preset", "smoke", "--runs-dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("loss 1.500") == 2 and "2 runs: 2 finished; 1 of 1 cells are complete" in shown


def test_cancel_asks_the_process_on_this_machine_to_save(jobs, tmp_path, held, capsys):
    launch.main(["cancel", CELL, "--preset", "smoke", "--runs-dir", str(tmp_path)])
    assert held.wait(timeout=10) == -signal.SIGINT or held.returncode == 1
    assert f"asked process {held.pid} to save and stop" in capsys.readouterr().out


def test_cancel_needs_a_target(tmp_path):
    done = subprocess.run([sys.executable, "slurm/launch.py", "cancel"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "cancel: expected a target" in done.stderr


def test_neither_status_nor_cancel_imports_torch(tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.')\nfrom slurm import launch\n"
        f"launch.main(['status', 'table4', '--runs-dir', {str(tmp_path)!r}])\n"
        f"launch.main(['cancel', 'table4', '--runs-dir', {str(tmp_path)!r}])\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path):
    (tmp_path / "yaml.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "slurm/launch.py", "all"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == -signal.SIGINT and done.stderr == ""
