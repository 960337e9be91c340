"""slurm/submit.py, snapshot.py and command.py as far as they need no SLURM (the rest: tests/test_slurm.py)."""

import dataclasses
import fcntl
import json
import subprocess
import time
from pathlib import Path

import pytest

from mixmask import runs
from paper.cells import select
from paper.presets import budget
from slurm import command, graph, snapshot, submit
from slurm.squeue import Live

ROOT = Path(__file__).resolve().parents[1]


def table4(runs_dir, *settings):
    return graph.jobs(select(["table4"]), budget("smoke", settings), Path(runs_dir))


def table7(runs_dir, cells="*"):
    return graph.jobs(select([f"table7/moco/{cells}"]), budget("smoke"), Path(runs_dir))


def finish(job, **metrics):
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "result.json").write_text(json.dumps({"metrics": metrics or {"loss": 1.0}}))


# ----------------------------------------------------------------------------------------------- what is needed


def test_a_deleted_pretraining_is_not_made_again_for_a_finished_probe(tmp_path):
    jobs = table4(tmp_path)
    finish(jobs[1])
    finish(jobs[2])
    assert graph.needed(jobs) == {job.directory for job in jobs} - {job.directory for job in jobs[:3]}


def test_a_chain_of_three_is_needed_from_its_first_missing_result_on(tmp_path):
    pretrain, convert, detect = jobs = table7(tmp_path, "mixmask/voc/box_AP")
    assert [job.stage for job in jobs] == ["pretrain", "convert", "detection"]
    assert graph.needed(jobs) == {pretrain.directory, convert.directory, detect.directory}
    finish(convert)
    assert graph.needed(jobs) == {detect.directory}
    finish(detect)
    assert graph.needed(jobs) == set()


def test_a_pretraining_that_is_a_cell_of_its_own_is_needed_though_its_probe_is_finished(tmp_path):
    jobs = table4(tmp_path)[:2]
    finish(jobs[1])
    curve = dataclasses.replace(jobs[0], cells=(*jobs[0].cells, "figure5/a/curve"))
    assert graph.needed(jobs) == set() and graph.needed([curve, jobs[1]]) == {jobs[0].directory}


def placing(jobs, tmp_path, live):
    return submit.Placing(jobs, tmp_path, live=live)


def test_finished_and_live_runs_are_left_and_the_others_are_to_do(tmp_path):
    jobs = table4(tmp_path)[:4]
    finish(jobs[0])
    place = placing(jobs, tmp_path, {str(jobs[2].directory): Live("12_3", "RUNNING", "n1")})
    assert [place.leave(job) for job in jobs] == ["finished", "", "live, job 12_3", ""]
    assert place.todo == [jobs[1], jobs[3]]


def test_a_live_child_of_a_parent_that_is_submitted_again_is_submitted_again_too(tmp_path, monkeypatch):
    """It waits for a job that has failed: SLURM is about to cancel it."""
    cancelled = []
    monkeypatch.setattr(submit.squeue, "cancel", cancelled.extend)
    jobs = table4(tmp_path)[:2]
    place = placing(jobs, tmp_path, {str(jobs[1].directory): Live("7", "PENDING", "Dependency")})
    assert [place.leave(job) for job in jobs] == ["", ""] and cancelled == ["7"]


def test_a_run_that_a_process_outside_slurm_works_on_is_left_to_it_and_so_is_its_child(tmp_path):
    jobs = table4(tmp_path)[:2]
    jobs[0].directory.mkdir(parents=True)
    with open(jobs[0].directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = placing(jobs, tmp_path, {})
        said = [place.leave(job) for job in jobs]
    assert all(f"a process outside SLURM works on {jobs[0].directory}" in text for text in said) and not place.todo


# ---------------------------------------------------------------------------------------- what is asked of SLURM


def with_resources(job, **values):
    return dataclasses.replace(job, resources=dataclasses.replace(job.resources, **values))


@pytest.mark.parametrize(
    ("nodes", "gpus", "fitting", "expected"),
    [
        (1, 0, (1, 2, 4), (1, 1)),
        (1, 3, (1, 2, 4), (1, 2)),
        (2, 2, (1, 2, 4), (2, 2)),
        (4, 8, (1, 2, 4), (1, 4)),
        (3, 2, (1, 2, 3, 6), (3, 2)),
        (2, 4, (1, 5), (1, 1)),
    ],
)
def test_a_job_has_the_most_processes_that_fit_on_the_fewest_nodes(
    tmp_path, monkeypatch, nodes, gpus, fitting, expected
):
    monkeypatch.setattr(submit, "fitting_processes", lambda config: fitting)
    assert submit.layout(with_resources(table4(tmp_path)[0], nodes=nodes, gpus=gpus)) == submit.Layout(*expected)


def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "fitting_processes", lambda config: (1, 2, 4))
    job = with_resources(table4(tmp_path)[1], nodes=2, gpus=2, cpus=3, memory_gb=5, hours=0.5, partition="p")
    asked = submit.parameters(job, ["7", "8_1"], tmp_path)
    assert (asked["nodes"], asked["ntasks_per_node"], asked["gpus_per_node"]) == (2, 2, 2)
    assert (asked["cpus_per_task"], asked["mem"], asked["time"], asked["partition"]) == (3, "10GB", 30, "p")
    assert asked["dependency"] == "afterok:7:8_1,singleton" and asked["comment"] == str(job.directory)
    assert asked["additional_parameters"]["kill-on-invalid-dep"] == "yes" and asked["additional_parameters"]["requeue"]
    assert "account" not in asked and asked["srun_args"] == ["--kill-on-bad-exit=1"]


def test_two_runs_directories_do_not_wait_for_each_other(tmp_path):
    """`singleton` goes by name, and equal runs in two directories have equal ids."""
    one, two = (submit.parameters(table4(tmp_path / name)[0], [], tmp_path)["job_name"] for name in "ab")
    assert one.split("@")[0] == two.split("@")[0] and one != two


def test_the_batch_script_is_printed_without_slurm(tmp_path):
    jobs = table4(tmp_path)
    text = submit.batch_text(jobs[1], tmp_path)
    assert f"afterok:<job of {jobs[0].id}>,singleton" in text and "--kill-on-bad-exit=1" in text
    finish(jobs[0])
    assert "afterok" not in submit.batch_text(jobs[1], tmp_path)


def test_equal_jobs_that_wait_for_none_are_an_array_where_their_number_is_limited(tmp_path):
    jobs = table4(tmp_path, "cluster.parallel=3")[:4]
    assert list(submit._groups(jobs)) == [[jobs[0], jobs[2]], [jobs[1]], [jobs[3]]]
    assert all(len(group) == 1 for group in submit._groups(table4(tmp_path)))
    asked = submit.array_parameters([jobs[0], jobs[2]], tmp_path, tmp_path / "a.json")
    assert asked["array_parallelism"] == 3 and asked["comment"].endswith("a.json") and "dependency" not in asked


def test_the_job_s_command_has_its_own_absolute_data_directory(tmp_path):
    job = table4(tmp_path)[0]
    assert submit.command(job).words == (*job.command, "--set", f"run.data_root={ROOT / 'data'}")
    absolute = table4(tmp_path, "run.data_root=/d")[0]
    assert submit.command(absolute).words == absolute.command
    convert = next(job for job in table7(tmp_path) if job.stage == "convert")
    assert submit.command(convert).words == convert.command  # it reads no data, and has no --set


# -------------------------------------------------------------------------------------------- what a job runs


def test_a_job_ends_at_once_where_its_run_is_finished_or_its_parent_is_not(tmp_path):
    words, parent = ("python", "/nowhere.py"), str(tmp_path / "parent")
    with pytest.raises(SystemExit, match="which has no result; launch again"):
        command.Command(words, str(tmp_path / "run"), (parent,), 10)()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"metrics": {"a": 1}}')
    command.Command(words, str(tmp_path / "run"), (parent,), 10)()


@pytest.mark.parametrize(("state", "asked"), [("RUNNING", True), ("COMPLETING", False), ("", False)])
def test_a_job_that_is_being_cancelled_is_not_requeued(tmp_path, monkeypatch, state, asked):
    for name, text in (("squeue", f"echo {state}"), ("scontrol", f"echo $* > {tmp_path}/asked")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setattr(command, "PATIENCE", 0)
    command.requeue()
    assert (tmp_path / "asked").exists() == asked
    assert not asked or (tmp_path / "asked").read_text() == "requeue 5\n"


# ---------------------------------------------------------------------------------------- the copy of the code


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "code"
    root.mkdir()
    (root / "a.py").write_text("1\n")
    (root / ".gitignore").write_text("ignored.py\n/runs/\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


def test_a_copy_is_made_once_for_each_state_of_the_code_and_says_how_it_differs(repository, monkeypatch):
    copies = repository / "runs" / "snapshots"
    first = snapshot.take(repository, copies)
    head = git(repository, "rev-parse", "HEAD").strip()
    said = {"commit": head, "modified": False, "snapshot": first.name}
    assert json.loads((first / runs.SNAPSHOT).read_text()) == said and first.name.startswith(head[:12])
    assert snapshot.take(repository, copies) == first and len(list(copies.iterdir())) == 1

    (repository / "a.py").write_text("2\n")
    for name in ("new.py", "ignored.py", "large.bin"):
        (repository / name).write_text("3\n")
    second = snapshot.take(repository, copies)
    assert second != first and json.loads((second / runs.SNAPSHOT).read_text())["modified"] is True
    assert "-1\n+2" in (second / "changes.diff").read_text()
    assert sorted(p.name for p in second.iterdir()) == sorted(
        [".gitignore", "COMMIT.json", "a.py", "changes.diff", "new.py"]
    )
    assert git(repository, "status", "--porcelain") == " M a.py\n?? large.bin\n?? new.py\n"

    monkeypatch.setattr(runs, "__file__", str(second / "mixmask" / "runs.py"))
    assert runs.environment()["commit"] == head and runs.environment()["snapshot"] == second.name


def test_a_copy_of_code_without_git_has_its_code_files_and_no_commit(tmp_path):
    for name in ("mixmask/a.py", "paper/b.yaml", "runs/c.yaml", "data/d.py", ".venv/e.py"):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    copy = snapshot.take(tmp_path / "code", tmp_path / "copies")
    assert {p.name for p in copy.rglob("*") if p.is_file()} == {"a.py", "b.yaml", "COMMIT.json", "changes.diff"}
    assert json.loads((copy / runs.SNAPSHOT).read_text())["commit"] is None


def test_a_look_at_a_run_s_lock_does_not_keep_a_run_from_starting(tmp_path, tiny):
    (tmp_path / "lock").touch()
    with open(tmp_path / "lock") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        release = subprocess.Popen(["sleep", "0.1"])
        start = time.monotonic()
        with pytest.raises(runs.UserError, match="another process"):
            runs.Run(tmp_path, tiny())
        assert 0.1 < time.monotonic() - start < 2
        release.wait()
    with runs.Run(tmp_path, tiny()):
        assert runs.is_busy(tmp_path)
    assert not runs.is_busy(tmp_path)
