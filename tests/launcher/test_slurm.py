"""The launcher on a real SLURM of its own (tests/slurm_cluster.py): nothing lost, nothing run twice.

What concerns the launcher alone runs a stage of a few seconds without torch; what concerns the numbers runs a cell of
Table 4 at smoke size, undisturbed and disturbed.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mixmask.config import UserError
from mixmask.runs import read_log
from paper.cells import select
from paper.presets import budget
from slurm import graph, launch, local, sbatch, snapshot, squeue, status, submit
from slurm.squeue import Live
from tests import slurm_cluster
from tests.launcher.jobs import key, lines, numbers, shell, started, undisturbed, value, wait, wait_finished

ROOT = Path(__file__).resolve().parents[2]
REASON = slurm_cluster.obstacle()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(REASON), reason=f"no private SLURM here: {REASON}")]

CELL = "table4/imagenet/moco/vanilla/200"
SHORT = ["epochs=3", "linear.epochs=2", "linear.schedule.milestones=[1]"]

# ------------------------------------------------------------------------------------------ a cell, in earnest


def command(runs_dir, *words):
    names = [CELL, "--preset", "smoke", "--runs-dir", str(runs_dir), "--set", *SHORT, "cluster.constraint=n2"]
    return [sys.executable, "slurm/launch.py", *words, *names]


def cell_jobs(runs_dir):
    return graph.jobs(select([CELL]), budget("smoke", SHORT), runs_dir)


@pytest.fixture(scope="session")
def real(cluster, tmp_path_factory):
    """A cell launched from three shells at once, and the same elsewhere, to be disturbed; both in the background."""
    quiet, disturbed = (tmp_path_factory.mktemp(name) for name in ("quiet", "disturbed"))
    shells = [subprocess.Popen(command(quiet), cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    shells.append(subprocess.Popen(command(disturbed), cwd=ROOT, stdout=subprocess.PIPE, text=True))
    printed = [shell.communicate(timeout=60)[0] for shell in shells]
    assert [shell.returncode for shell in shells] == [0] * 4
    return quiet, disturbed, printed


def test_a_job_that_slurm_warns_saves_and_is_requeued(real):
    """The warning signal of a time limit: `disturbed` then goes on from its checkpoint (compared below)."""
    pretraining = cell_jobs(real[1])[0]
    wait(60, lambda: len(read_log(pretraining.directory)) > 3, "steps are logged")
    (number,) = numbers(pretraining)
    shell("scancel", "--signal=USR2", number)
    log = squeue.log_path(real[1], number)
    wait(20, lambda: f"requeueing job {number}" in log.read_text(), "the job requeues itself")
    assert (pretraining.directory / "checkpoint.pt").exists() and pretraining.state == "unfinished"
    shown = subprocess.run(command(real[1], "status"), cwd=ROOT, capture_output=True, text=True).stdout
    assert f"waiting     {pretraining.directory}: job {number}" in shown or "running" in shown
    assert "2 runs in " in shown and "0 of 1 cells are complete" in shown


# ------------------------------------------------------------------------------------------------ the launcher


def test_the_numbers_of_processes_and_nodes_and_a_dead_process_ends_its_job(stages, tmp_path):
    """Two nodes with two GPUs each, one process a GPU; process 2 dies, the others would wait for ever."""
    (job,) = stages(1, 1, "cluster.nodes=2", "cluster.gpus=2", "cluster.constraint=n1|n2")
    assert sbatch.layout(job) == sbatch.Layout(2, 2)
    script = tmp_path / "place.py"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "home = Path(sys.argv[1])\nhome.mkdir(parents=True, exist_ok=True)\n"
        "names = ('SLURM_PROCID', 'SLURMD_NODENAME', 'SLURM_LOCALID', 'CUDA_VISIBLE_DEVICES')\n"
        "(home / f'place{os.environ[names[0]]}').write_text(' '.join(os.environ[name] for name in names))\n"
        "while len(list(home.glob('place*'))) < 4: time.sleep(0.05)\n"
        "sys.exit(3) if os.environ[names[0]] == '2' else time.sleep(300)\n"
    )
    job = dataclasses.replace(job, command=("python", str(script), str(job.directory)))
    submit.launch([job], tmp_path / "runs")
    wait(30, lambda: len(list(job.directory.glob("place*"))) == 4, "four processes start")
    places = sorted(path.read_text() for path in job.directory.glob("place*"))
    assert places == ["0 n1 0 0,1", "1 n1 1 0,1", "2 n2 0 0,1", "3 n2 1 0,1"]
    wait(10, lambda: key(job) not in squeue.live_jobs(), "the job ends")
    assert squeue.ended_as(numbers(job)) == {numbers(job)[0]: "FAILED"}


def test_of_several_processes_the_one_that_was_killed_is_named_with_its_node(stages, tmp_path):
    """The others only say that they are ended; task 2 is on the other node than the batch script."""
    (job,) = stages(1, 1, "cluster.nodes=2", "cluster.gpus=2", "cluster.constraint=n1|n2")
    script = tmp_path / "die.py"
    script.write_text(
        "import os, time\nprint('epoch 1', flush=True)\n"
        "os.kill(os.getpid(), 9) if os.environ['SLURM_PROCID'] == '2' else time.sleep(300)\n"
    )
    job = dataclasses.replace(job, command=("python", str(script), str(job.directory)))
    submit.launch([job], tmp_path / "runs")
    wait(40, lambda: numbers(job) and key(job) not in squeue.live_jobs(), "the job ends")
    text = status.reports([job], tmp_path / "runs")[job.directory].text
    assert "log of task 2: " in text and "| srun: error: n2: task 2: Killed" in text


def test_a_suspended_job_is_told_and_its_log_is_found_from_the_run_s_directory(stages, tmp_path):
    (job,) = stages(1, 30)
    submit.launch([job], tmp_path / "runs")
    started(job)
    log = squeue.log_path(tmp_path / "runs", numbers(job)[0])
    assert (job.directory / "job.log").resolve() == log.resolve() and "task 0 of job" in log.read_text()
    report = status.reports([job], tmp_path / "runs")[job.directory]
    assert report.state == "running" and f"log: {log}" in report.text
    shell("scontrol", "suspend", numbers(job)[0])
    report = status.reports([job], tmp_path / "runs")[job.directory]
    assert report.state == "suspended" and f"scontrol resume {numbers(job)[0]}" in report.text
    shell("scontrol", "resume", numbers(job)[0])
    wait_finished(40, [job])


def test_an_array_runs_so_many_at_once_and_is_recognised_by_the_next_launch(stages, tmp_path, capsys):
    jobs = stages(8, 10, "cluster.parallel=2")
    submit.launch(jobs, tmp_path / "runs")
    array = {numbers(job)[0].split("_")[0] for job in jobs[::2]}
    assert len(array) == 1 and all("_" not in numbers(job)[0] for job in jobs[1::2])
    submit.launch(jobs, tmp_path / "runs")
    assert len(re.findall(": (running|waiting|ending), job ", capsys.readouterr().out)) >= 7
    wait_finished(60, jobs)
    assert all(len(numbers(job)) == len(lines(job, "starts")) == 1 for job in jobs)
    begins, ends = ([float(lines(job, name)[0].split()[-1]) for job in jobs[::2]] for name in ("starts", "ends"))
    at_once = [sum(begin <= moment < end for begin, end in zip(begins, ends, strict=True)) for moment in begins]
    assert max(at_once) == 2
    for parent, child in zip(jobs[::2], jobs[1::2], strict=True):
        assert float(lines(child, "starts")[0].split()[-1]) > float(lines(parent, "ends")[0])


def test_a_requeue_a_preemption_a_kill_and_a_failed_parent_and_the_next_launch_finishes(stages, tmp_path, capsys):
    jobs, steps, runs_dir = stages(8, 80), 80, tmp_path / "runs"
    jobs[6].directory.mkdir(parents=True)
    (jobs[6].directory / "fail").touch()
    submit.launch(jobs, runs_dir)
    for job in jobs[0:6:2]:
        started(job)
    shell("scontrol", "requeue", numbers(jobs[0])[0])
    process = int(lines(jobs[2], "starts")[0].split()[0])
    os.kill(process, signal.SIGKILL)
    wait(20, lambda: key(jobs[3]) not in squeue.live_jobs(), "the killed run's probe is cancelled")
    wait(20, lambda: key(jobs[7]) not in squeue.live_jobs(), "the failed run's probe is cancelled")
    shell("sbatch", "--partition=high", "--constraint=n1", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1")
    wait(20, lambda: squeue.live_jobs()[key(jobs[4])].state != "RUNNING", "the third run is preempted")

    found = status.reports(jobs, runs_dir)
    assert found[jobs[6].directory].state == "failed"
    assert "error: made to fail" in found[jobs[6].directory].text and "fix what" in found[jobs[6].directory].text
    assert found[jobs[7].directory] == status.Report("not started", f"it needs {jobs[6].directory}, which failed")
    assert "job " in found[jobs[4].directory].text and found[jobs[4].directory].state == "waiting"

    (jobs[6].directory / "fail").unlink()
    capsys.readouterr()
    submit.launch(jobs, runs_dir)
    assert capsys.readouterr().out.count(": submitted, job ") == 4
    wait_finished(90, jobs)
    assert [value(job) for job in jobs] == [undisturbed(steps)] * 8
    assert all(lines(job, "log") == [str(step) for step in range(1, steps + 1)] for job in jobs)
    assert [len(lines(job, "starts")) for job in jobs] == [2, 1, 2, 1, 2, 1, 2, 1]
    submit.launch(jobs, runs_dir)
    assert capsys.readouterr().out.count(": finished") == 8


def test_a_parent_that_slurm_has_forgotten_does_not_let_its_child_run(stages, tmp_path):
    """`afterok` on an unknown job counts as satisfied: the child is cancelled, and would not have run either.

    Newer SLURMs (seen with 24.11) refuse the child.
    """
    parent, child = stages(2, 5)
    stale = {key(parent): Live("999999", "RUNNING", "")}
    placing = submit.Placing([parent, child], tmp_path / "runs", live=stale)
    assert [placing.skip_reason(parent)[:23], placing.skip_reason(child)] == ["running, job 999999 on ", ""]
    try:
        placing.submit([child])
    except UserError as error:
        assert "Job dependency problem; one that it waits for has ended meanwhile: launch again" in str(error)
        return
    (number,) = numbers(child)
    log = squeue.log_path(tmp_path / "runs", number)
    wait(20, lambda: log.exists() and "which has no result; launch again" in log.read_text(), "the child refuses")
    lost = placing.lost()
    assert list(lost) == [child.directory] and "job 999999" in lost[child.directory]
    assert not lines(child, "starts")


@pytest.fixture
def full(cluster):
    """Node n1 is busy, so that jobs wait; `full()` frees it."""
    words = ["sbatch", "--parsable", "--output=/dev/null", "--constraint=n1", "--exclusive", "--wrap=sleep 60"]
    blocker = shell(*words).strip()
    yield lambda: shell("scancel", blocker)
    shell("scancel", blocker)


def _sbatch(tmp_path, monkeypatch, after):
    """An sbatch first on PATH that submits, and does not live to tell the number: `after`, in shell."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "sbatch"
    path.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" >/dev/null\n{after}\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_a_launcher_killed_when_slurm_has_its_job_leaves_one_that_the_next_launch_replaces(
    stages, full, tmp_path, monkeypatch, capsys
):
    jobs = stages(2, 5)
    with monkeypatch.context() as patch:
        _sbatch(tmp_path, patch, "kill -9 $PPID")
        if not (launcher := os.fork()):
            submit.launch(jobs, tmp_path / "runs")
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(launcher, 0)[1]) == signal.SIGKILL
    left = squeue.live_jobs()[key(jobs[0])].job
    submit.launch(jobs, tmp_path / "runs")
    shown = capsys.readouterr().out
    assert f"cancelled job {left} of {key(jobs[0])}" in shown and shown.count(": submitted, job ") == 2
    full()
    wait_finished(40, jobs)
    assert [len(lines(job, "starts")) for job in jobs] == [1, 1] and left not in numbers(jobs[0])


def test_an_sbatch_that_times_out_when_slurm_has_its_job_is_undone_and_a_launch_goes_on(
    stages, full, tmp_path, monkeypatch, capfd
):
    (job,) = stages(1, 5)
    with monkeypatch.context() as patch:
        _sbatch(tmp_path, patch, "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
        with pytest.raises(UserError, match=r"which SLURM may have accepted.*; cancelled what it has left, "):
            submit.launch([job], tmp_path / "runs")
    assert "Socket" not in capfd.readouterr().err  # it is in the error
    submit.launch([job], tmp_path / "runs")
    full()
    wait_finished(40, [job])
    assert len(lines(job, "starts")) == 1


def test_a_runs_directory_of_any_name_and_a_job_that_is_held(stages, full, tmp_path, capsys):
    (job,) = stages(1, 1)
    place = tmp_path / "a b $(touch ran) `id` & é;#"
    job = dataclasses.replace(job, directory=place / "pretrain" / job.id)
    job = dataclasses.replace(job, command=(*job.command[:2], str(job.directory), "1"))
    submit.launch([job], place)
    (number,) = numbers(job)
    shell("scontrol", "hold", number)
    submit.launch([job], place)
    status.print_status(select([CELL]), [job], place)
    shown, said = capsys.readouterr().out, f"job {number}: JobHeldAdmin; it starts after: scontrol release {number}"
    assert f": held, {said}" in shown and f"  held        {job.directory}: {said}" in shown
    full()
    shell("scontrol", "release", numbers(job)[0])
    wait_finished(40, [job])
    assert not list(place.rglob("ran"))


def test_local_leaves_a_job_of_slurm_alone(stages, tmp_path):
    (job,) = stages(1, 20)
    submit.launch([job], tmp_path / "runs")
    with pytest.raises(UserError, match="left to SLURM: job "):
        local.launch([job])
    wait_finished(40, [job])
    assert len(lines(job, "starts")) == 1


def test_a_job_runs_the_code_as_it_was_when_it_was_launched(stages, tmp_path, monkeypatch):
    code = snapshot.take(ROOT, tmp_path / "copies")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"]):
        shell("git", "-C", str(code), *words)
    monkeypatch.setattr(submit, "ROOT", code)
    script = code / "stage.py"
    say = "import json, sys\nfrom pathlib import Path\nfrom mixmask.runs import commit\nhome = Path(sys.argv[1])\n"
    say += "home.mkdir(parents=True, exist_ok=True)\nresult = {{'metrics': {{'a': {0}}}, **commit()}}\n"
    say += "(home / 'result.json').write_text(json.dumps(result))\n"
    script.write_text(say.format(1))
    (code / snapshot.SNAPSHOT).unlink()
    (job,) = stages(1, 1)
    job = dataclasses.replace(job, command=("python", "stage.py", str(job.directory)))
    blocker = shell("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 3").strip()
    monkeypatch.setattr(sbatch, "options", _after(blocker, sbatch.options))
    submit.launch([job], tmp_path / "runs")
    script.write_text(say.format(2))
    wait_finished(30, [job])
    result = json.loads((job.directory / "result.json").read_text())
    head = shell("git", "-C", str(code), "rev-parse", "HEAD").strip()
    assert result["metrics"] == {"a": 1} and result["commit"] == head and result["modified"] is True
    copy = tmp_path / "runs" / "slurm" / "snapshots" / result["snapshot"]
    assert "COMMIT.json" in (copy / "changes.diff").read_text() and (copy / "stage.py").read_text() == say.format(1)


def _after(number, options):
    def with_blocker(*arguments, **others):
        return {**options(*arguments, **others), "dependency": f"afterany:{number}"}

    return with_blocker


def test_cancel_ends_the_jobs_of_a_target_and_a_launch_goes_on(stages, tmp_path, capsys):
    jobs = stages(2, 30)
    submit.launch(jobs, tmp_path / "runs")
    started(jobs[0])
    status.cancel(jobs)
    assert "2 jobs cancelled" in capsys.readouterr().out
    wait(20, lambda: not {key(job) for job in jobs} & squeue.live_jobs().keys(), "the jobs end")
    assert status.reports(jobs, tmp_path / "runs")[jobs[0].directory].state == "cancelled"
    submit.launch(jobs, tmp_path / "runs")
    wait_finished(40, jobs)
    assert lines(jobs[0], "log") == [str(step) for step in range(1, 31)] and len(lines(jobs[0], "starts")) == 2


# ---------------------------------------------------------------------------------- the cell that began above


def without_timing(job):
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_log(job.directory)]


def test_a_cell_launched_three_times_at_once_runs_once_and_the_disturbed_one_gives_equal_numbers(real, capsys):
    quiet, disturbed, printed = real
    wait_finished(120, [*cell_jobs(quiet), *cell_jobs(disturbed)])
    assert sorted(text.count(": submitted, job ") for text in printed[:3]) == [0, 0, 2]
    for job, other in zip(cell_jobs(quiet), cell_jobs(disturbed), strict=True):
        assert len(numbers(job)) == len(numbers(other)) == 1
        assert without_timing(job) == without_timing(other)
        assert (
            json.loads((job.directory / "result.json").read_text())["metrics"]
            == json.loads((other.directory / "result.json").read_text())["metrics"]
        )
    restarts = shell("sacct", "-X", "-n", "-D", "-P", "-o", "JobID", "-j", numbers(cell_jobs(disturbed)[0])[0])
    assert len(restarts.split()) == 2
    launch.main(["status", CELL, "--preset", "smoke", "--runs-dir", str(quiet), "--set", *SHORT])
    shown = capsys.readouterr().out
    assert shown.count("  finished ") == 2 and "linear_sgd_last" in shown and "1 of 1 cells are complete" in shown


@pytest.mark.slow
def test_a_node_that_dies_takes_nothing_with_it(cluster, stages, tmp_path):
    """The daemon of a node, its job steps and their processes end at once: SLURM runs the job on the other node."""
    jobs = stages(2, 100, "cluster.constraint=n1|n2")
    submit.launch(jobs, tmp_path / "runs")
    started(jobs[0])
    cluster.kill_node(squeue.live_jobs()[key(jobs[0])].reason)
    try:
        wait_finished(150, jobs)
    finally:
        cluster.start_nodes()
    assert [value(job) for job in jobs] == [undisturbed(100)] * 2
    assert lines(jobs[0], "log") == [str(step) for step in range(1, 101)] and len(lines(jobs[0], "starts")) == 2
    assert len(numbers(jobs[0])) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)  # with two other runs beside its four processes
def test_a_pretraining_on_two_nodes_with_two_processes_each_is_warned_goes_on_and_gives_the_loss_of_one(real, tmp_path):
    """To float32's accuracy: on one process, too, another order of summation is seen 1e-7 in the first loss and a few
    per cent after two epochs. In float64, and so exactly: tests/stages/test_distributed.py.
    """
    wide = ["run.device=cpu", "cluster.nodes=2", "cluster.gpus=2", "cluster.constraint=n1|n2"]
    job, alone = graph.jobs(select([CELL]), budget("smoke", [*SHORT, *wide]), tmp_path)[0], cell_jobs(real[0])[0]
    assert sbatch.layout(job) == sbatch.Layout(2, 2) and job.id == alone.id
    submit.launch([job], tmp_path)
    wait(90, lambda: len(read_log(job.directory)) > 3, "steps are logged")
    shell("scancel", "--signal=USR2", *numbers(job))
    wait_finished(150, [job, alone])
    log = squeue.log_path(tmp_path, numbers(job)[0]).read_text()
    assert "(resumed at epoch" in log and len(numbers(job)) == 1
    assert [line["step"] for line in read_log(job.directory)] == [line["step"] for line in read_log(alone.directory)]
    losses, expected = ([line["loss"] for line in read_log(j.directory) if "loss" in line] for j in (job, alone))
    assert losses[0] == pytest.approx(expected[0], rel=1e-6) and losses == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_warned_and_goes_on_in_the_next(stages, tmp_path):
    """A limit of one minute, which SLURM looks at every half."""
    (job,) = stages(1, 600, "cluster.hours=0.0167", "cluster.warning_seconds=30")
    submit.launch([job], tmp_path / "runs")
    wait_finished(240, [job])
    assert value(job) == undisturbed(600) and lines(job, "log") == [str(step) for step in range(1, 601)]
    assert len(lines(job, "starts")) > 1 and len(numbers(job)) == 1


def test_the_cluster_ends_when_the_tests_are_killed(tmp_path):
    """The supervisor's standard input closes with the process that holds its other end."""
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom tests import slurm_cluster\n"
        "directory = Path(sys.argv[1])\nsupervisor = slurm_cluster._supervise(directory, attached=True)\n"
        "while not (directory / 'pid' / 'munged').exists(): time.sleep(0.05)\n"
        "print(supervisor.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    place = tmp_path / "cluster"
    killed = subprocess.run(
        [sys.executable, "-c", code, str(place)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    supervisor = int(killed.stdout)
    wait(30, lambda: not slurm_cluster._alive(supervisor), "the supervisor ends")
    assert not place.exists() and str(place) not in Path("/etc/hosts").read_text()
    assert not shutil.which("pgrep") or not subprocess.run(["pgrep", "-f", str(place)], capture_output=True).stdout
