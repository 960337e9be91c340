"""slurm/local.py: two launches at once, jobs that are told to stop, and runs that are not needed again."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixmask.config import UserError
from paper.cells import select
from paper.presets import budget
from slurm import graph, local

ROOT = Path(__file__).resolve().parents[2]

SUCCEED = "import json, sys\njson.dump({'metrics': {'a_last': 12.3}}, open(sys.argv[1], 'w'))\n"


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A pre-training and its probe that end at once, and the pre-training after them."""
    monkeypatch.setattr(local, "PRELOADED", ())
    script = tmp_path / "succeed.py"
    script.write_text(SUCCEED)
    found = graph.jobs(select(["table4"]), budget("smoke"), tmp_path / "runs")[:3]
    return [dataclasses.replace(j, command=("python", str(script), str(j.directory / "result.json"))) for j in found]


def test_runs_that_another_launch_works_on_are_left_to_it_and_the_others_done(jobs, capfdbinary):
    jobs[0].directory.mkdir(parents=True)
    with open(jobs[0].directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError) as error:
            local.launch(jobs)
    assert "left to the other process that is working on it" in str(error.value)
    assert f"{jobs[1].directory}: skipped: it needs {jobs[0].directory}" in str(error.value)
    assert [job.state for job in jobs] == ["new", "new", "finished"]


def test_a_job_that_was_told_to_stop_stops_the_launch(jobs, tmp_path, capfd):
    """As `launch.py cancel` does: the job saves and exits with status 130."""
    Path(jobs[0].command[1]).write_text("raise SystemExit(130)\n")
    with pytest.raises(SystemExit) as stopped:
        local.launch(jobs)
    assert stopped.value.code == 130 and "the same command continues" in capfd.readouterr().err
    assert [job.state for job in jobs] == ["new"] * 3


def test_a_deleted_pretraining_is_not_made_again_for_a_finished_probe(jobs, capfd):
    jobs[1].directory.mkdir(parents=True)
    (jobs[1].directory / "result.json").write_text(json.dumps({"metrics": {"loss": 1.0}}))
    local.launch(jobs[:2])
    assert jobs[0].state == "new" and "finished already" in capfd.readouterr().out


@pytest.mark.parametrize("seconds", [0.4, 1.0])
def test_ctrl_c_while_a_launch_starts_prints_no_traceback(tmp_path, seconds):
    """In a terminal the signal reaches the fork server and the job, too."""
    words = ["slurm/launch.py", "table4/*/vanilla/200", "--preset", "smoke", "--executor", "local"]
    process = subprocess.Popen(
        [sys.executable, *words, "--runs-dir", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in output + errors
