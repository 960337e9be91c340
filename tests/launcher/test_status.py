"""slurm/status.py without SLURM: what it says of runs on this machine, from results, locks and logs alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paper.cells import select
from paper.presets import budget
from slurm import graph, launch, logs, shell, squeue, status

ROOT = Path(__file__).resolve().parents[2]
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
    monkeypatch.setattr(shell, "available", lambda: False)
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
    assert logs.time_left(jobs[0].config, [line]) == 4 * 2000 / 100 - 10


def test_a_log_that_is_just_being_written_is_read_as_far_as_it_goes(jobs):
    write_log(jobs[0], {"kind": "step", "step": 1, "epoch": 1, "loss": 2.0})
    with open(jobs[0].directory / "log.jsonl", "a") as log:
        log.write('{"kind": "step", "epo')
    assert "loss 2.000" in logs.progress(jobs[0])


def test_stopped_says_how_far_it_came_and_failed_quotes_its_log(jobs, tmp_path):
    (jobs[0].directory / "config.yaml").touch()
    write_log(jobs[0], {"kind": "epoch", "step": 30, "epoch": 1, "loss": 6.0, "timing": {"seconds": 9.0}})
    assert report(jobs, tmp_path)[0].state == "stopped" and "epoch 1/4" in report(jobs, tmp_path)[0].text
    (jobs[0].directory / "output.log").write_text("epoch 1\nerror: no such file: data\n")
    first, second = report(jobs, tmp_path)
    assert first.state == "failed" and "| error: no such file: data" in first.text and "fix what" in first.text
    assert second == status.Report("not started", f"it needs {jobs[0].directory}, which failed")


def test_a_result_that_is_kept_beside_the_runs_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(shell, "available", lambda: False)
    _, second = jobs = graph.jobs(select([CELL]), budget("smoke"), tmp_path / "runs")
    kept = tmp_path / "results" / second.stage / second.id
    kept.mkdir(parents=True)
    (kept / "result.json").write_text('{"metrics": {"linear_sgd_last": 61.25}}')
    found = report(jobs, tmp_path / "runs")
    assert found[0].state == "not needed"
    assert found[1] == status.Report("finished", f"linear_sgd_last 61.2 %; kept in {kept}")
    (kept / "result.json").write_text("{")
    assert f"unreadable result: {kept}" in report(jobs, tmp_path / "runs")[1].text


def status_of(tmp_path, capsys):
    launch.main(["status", CELL, "--preset", "smoke", "--runs-dir", str(tmp_path)])
    return capsys.readouterr().out


def test_a_result_that_cannot_be_read_is_named_in_its_own_line(jobs, tmp_path, capsys):
    path = jobs[0].directory / "result.json"
    broken = ["{", '{"metrics": 1}', "\xff"]
    for text in broken:
        path.write_bytes(text.encode("latin-1"))
        assert f"failed      {jobs[0].directory}: unreadable result: {path} " in status_of(tmp_path, capsys)
        assert report(jobs, tmp_path)[1].text == f"it needs {jobs[0].directory}, which failed"
    assert "move it away to run again" in report(jobs, tmp_path)[0].text


def test_a_result_of_another_preset_that_cannot_be_read_is_none(jobs, tmp_path, capsys):
    (jobs[0].directory / "result.json").write_text("{")
    launch.main(["status", CELL, "--runs-dir", str(tmp_path)])
    assert "preset smoke: 1 unfinished" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_not_printed(jobs, tmp_path, capsys):
    text = "\x1b]0;title\x07\x1b[2J\x9b31m\terror\n\x1b[1merror: \u202ebad\n\x1b[0m"
    (jobs[0].directory / "output.log").write_text(f"{text}\nerror: \x1b[31mbad\n")
    shown = status_of(tmp_path, capsys)
    assert "| error: ?[31mbad" in shown and all(letter.isprintable() or letter == "\n" for letter in shown)


# ------------------------------------------------------------------------------------------ jobs that have failed


@pytest.fixture
def ended(jobs, tmp_path, monkeypatch):
    """SLURM answers, none of its jobs is live, and job 12 of the given run has ended as FAILED."""
    monkeypatch.setattr(shell, "available", lambda: True)
    monkeypatch.setattr(squeue, "live_jobs", dict)
    monkeypatch.setattr(squeue, "ended_as", lambda numbers: dict.fromkeys(numbers, "FAILED"))
    monkeypatch.setattr(squeue, "AGAIN", 0)

    def write(job, *logs):
        folder = tmp_path / "slurm" / "12"
        folder.mkdir(parents=True, exist_ok=True)
        squeue.record(tmp_path, directory=str(job.directory.resolve()), job="12")
        for task, lines in enumerate(logs):
            (folder / f"12_{task}_log.out").write_text("".join(f"{line}\n" for line in lines))
        return report(jobs, tmp_path)[jobs.index(job)].text

    return write


def quoted(text):
    return [line.strip().removeprefix("|").strip() for line in text.splitlines()[1:]]


GONE = "error: another process of this run has ended, and reports why (reset by peer); the last checkpoint is intact"
SRUN = "srun: error: n1: task 2: Exited with exit code 1"
START = "submitit INFO (2026-01-01 00:00:00,000) - Starting with JobEnvironment(job_id=12, hostname=n1)"


def test_of_several_processes_the_one_that_failed_by_itself_is_quoted(jobs, ended):
    own = ["epoch 1", "error: no such file: data", "Terminated"]
    text = ended(jobs[0], ["epoch 1", GONE, SRUN], ["epoch 1", GONE], own, *[[GONE]] * 8, ["error: later"])
    assert "log of task 2: " in text and "12_2_log.out" in text
    assert quoted(text) == ["epoch 1", "error: no such file: data"]


def test_a_traceback_is_quoted_where_no_process_has_a_line_of_its_own(jobs, ended):
    text = ended(jobs[0], [GONE, SRUN], ["Traceback", "  x = 1", "KeyError: 'a'", "slurmstepd: error: ***"])
    assert "log of task 1: " in text and quoted(text) == ["Traceback", "x = 1", "KeyError: 'a'"]


def test_the_first_process_of_which_srun_says_that_it_was_killed_is_named_with_its_node(jobs, ended):
    """Those that it took with it come later, and say less."""
    killed = "srun: error: n2: task 2: Killed"
    first = ["epoch 1", GONE, killed, "srun: Terminating StepId=12.0", "srun: error: n1: tasks 0-1: Killed"]
    text = ended(jobs[0], first, ["epoch 1", GONE], ["epoch 1", "epoch 2"])
    assert "log of task 2: " in text and quoted(text) == ["epoch 1", "epoch 2", killed]


def test_the_end_of_another_is_quoted_where_there_is_nothing_else(jobs, ended):
    text = ended(jobs[0], ["epoch 1", GONE], ["epoch 1"])
    assert "log of task 0: " in text and quoted(text) == ["epoch 1", GONE]


@pytest.mark.parametrize(
    "line",
    [
        "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.",
        "srun: error: Unable to create step for job 12: Invalid generic resource (gres) specification",
    ],
)
def test_a_step_that_was_not_started_is_told_in_the_words_of_srun(jobs, ended, line):
    assert quoted(ended(jobs[0], [line])) == [line]


def test_a_job_that_was_cancelled_is_no_failure_and_its_child_waits_for_a_launch(jobs, tmp_path, ended, monkeypatch):
    monkeypatch.setattr(squeue, "ended_as", lambda numbers: dict.fromkeys(numbers, "CANCELLED"))
    assert ended(jobs[0]).startswith("job 12; launch again: it has saved nothing yet")
    (jobs[0].directory / "checkpoint.pt").touch()
    assert ended(jobs[0]).startswith("job 12; launch again: it goes on from its last checkpoint")
    first, second = report(jobs, tmp_path)
    assert first.state == "cancelled"
    assert second == status.Report("not started", f"it needs {jobs[0].directory}, which was cancelled")


def test_a_running_job_is_told_with_its_log_and_with_how_long_it_has_been_silent(jobs, tmp_path, ended, monkeypatch):
    live = {str(jobs[0].directory.resolve()): squeue.Live("12", "RUNNING", "n1")}
    monkeypatch.setattr(squeue, "live_jobs", lambda: live)
    write_log(jobs[0], {"kind": "step", "step": 1, "epoch": 1, "loss": 2.0})
    said = "job 12 on n1, epoch 1/4, loss 2.000"
    log = f"; log: {tmp_path}/slurm/12/12_0_log.out"
    assert report(jobs, tmp_path)[0] == status.Report("running", said + log)
    os.utime(jobs[0].directory / "log.jsonl", (0, time.time() - 3605))
    assert report(jobs, tmp_path)[0] == status.Report("running", f"{said}, last log line 1 h 0 min ago{log}")


def test_an_accounting_that_does_not_answer_costs_seconds_and_is_noted(jobs, tmp_path, monkeypatch, capsys):
    for name, text in {"squeue": "", "sacct": "exec sleep 60"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(squeue, "ACCOUNTING", 0.2)
    monkeypatch.setattr(squeue, "silent", set())
    start = time.monotonic()
    assert squeue.ended_as(["7"]) == {} and time.monotonic() - start < 5
    assert squeue.ended_as(["7"]) == {}  # the second look does not wait again
    assert capsys.readouterr().out.count("note: sacct has not answered within 0.2 s") == 1


def test_a_job_that_could_not_end_before_its_deadline_is_told_which_key_says_it(jobs, ended, monkeypatch):
    monkeypatch.setattr(squeue, "ended_as", lambda numbers: dict.fromkeys(numbers, "DEADLINE"))
    assert "job 12 DEADLINE; launch again: it has saved nothing yet, with a later cluster.extra.deadline" in ended(
        jobs[0]
    )


def test_of_a_job_that_was_requeued_only_the_last_start_counts(jobs, ended):
    text = ended(
        jobs[0], [START, "error: old", START, "epoch 2", "error: new", "srun: error: x: Exited with exit code 1"]
    )
    assert "; log: " in text and quoted(text) == ["epoch 2", "error: new"]


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("error: no such checkpoint: {}/checkpoint.pt", "move its result.json away and launch again"),
        (
            "error: {}/checkpoint.pt is damaged: its checksum (SHA-256) is wrong",
            "move its result.json and the damaged file away and launch again",
        ),
    ],
)
def test_a_finished_parent_whose_checkpoint_is_lost_is_to_be_made_anew(jobs, tmp_path, ended, line, advice):
    parent, child = jobs
    (parent.directory / "result.json").write_text('{"metrics": {"loss": 1.5}}')
    line = line.format(parent.directory)
    assert f"what {parent.directory} has made is lost: {advice}" in ended(child, [line])
    (tmp_path / "slurm" / "jobs.jsonl").unlink()
    (child.directory / "output.log").write_text(f"{line}\n")
    assert advice in report(jobs, tmp_path)[1].text
    (parent.directory / "result.json").unlink()
    assert "is lost" not in report(jobs, tmp_path)[1].text


def test_a_record_of_a_submission_that_a_crash_cut_short_is_passed_over(jobs, tmp_path, ended):
    ended(jobs[0], ["error: bad"])
    with open(tmp_path / "slurm" / "jobs.jsonl", "a") as file:
        file.write(f'{{"directory": "{jobs[0].directory}", "jo')
    assert "job 12 FAILED" in report(jobs, tmp_path)[0].text


# ----------------------------------------------------------------------------------------- the summary, and cancel


def test_the_summary_counts_runs_and_cells(jobs, tmp_path, capsys):
    for job in jobs:
        (job.directory / "result.json").write_text('{"metrics": {"loss": 1.5}}')
    launch.main(["status", CELL, "--preset", "smoke", "--runs-dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("loss 1.500") == 2 and f"2 runs in {tmp_path}: 2 finished; 1 of 1 cells are complete" in shown


@pytest.mark.parametrize(("state", "complete"), [("finished", 1), ("not needed", 1), ("running", 0), ("failed", 0)])
def test_a_cell_is_complete_when_its_last_run_is(jobs, tmp_path, capsys, monkeypatch, state, complete):
    reports = {jobs[0].directory: status.Report("finished"), jobs[1].directory: status.Report(state)}
    monkeypatch.setattr(status, "reports", lambda *_: reports)
    launch.main(["status", CELL, "--preset", "smoke", "--runs-dir", str(tmp_path)])
    assert f"{complete} of 1 cells are complete" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["cancelled", "not started"])
def test_a_run_that_cannot_start_names_the_parent_that_failed(jobs, state):
    seen = {jobs[0].directory: status.Report("failed")}
    found = status._blamed(status.Report(state), jobs[1], seen)
    assert found == status.Report("not started", f"it needs {jobs[0].directory}, which failed")


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


# --------------------------------------------------------------------------------------------- what is printed


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(shell, "available", lambda: False)


def test_a_cell_without_a_run_of_ours_is_not_complete(tmp_path, capsys, nothing_runs):
    launch.main(["status", "table6/imagenet/swav/1percent", "--runs-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "no run       of ours leads to it: a public checkpoint does" in said
    assert "0 of 0 cells are complete; 1 more have no run of ours" in said


def test_without_a_target_a_line_for_each_table_counts(tmp_path, capsys, nothing_runs):
    for job in graph.jobs(select(["table3/*"])[:1], budget("paper"), tmp_path):
        job.directory.mkdir(parents=True)
        (job.directory / "result.json").write_text('{"metrics": {"loss": 1.0}}')
    launch.main(["status", "--runs-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 20
    assert "table3   1 of 3 cells complete; runs: 2 finished, 4 not started" in lines
    assert lines[-1] == "each run: python slurm/launch.py status TARGET"


def test_runs_of_another_preset_are_named_with_the_option_that_shows_them(tmp_path, capsys, nothing_runs):
    smoke = graph.jobs(select(["table4"]), budget("smoke"), tmp_path)
    for job in smoke[:3]:
        job.directory.mkdir(parents=True)
    (smoke[0].directory / "result.json").write_text('{"metrics": {"loss": 1.0}}')
    (smoke[2].directory / "config.yaml").write_text("")
    launch.main(["status", "table4", "--runs-dir", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"preset smoke: 1 finished, 1 unfinished, {len(smoke) - 2} not started (--preset smoke)"
    launch.main(["status", "table4", "--runs-dir", str(tmp_path), "--preset", "smoke"])
    assert "\npreset " not in capsys.readouterr().out
