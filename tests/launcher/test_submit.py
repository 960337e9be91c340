"""slurm/submit.py, snapshot.py and command.py as far as they need no SLURM (the rest: tests/launcher/test_slurm.py)."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from mixmask import runs
from mixmask.config import UserError
from paper.cells import select
from paper.presets import budget
from slurm import command, graph, launch, sbatch, shell, snapshot, squeue, status, submit
from slurm.squeue import Live

ROOT = Path(__file__).resolve().parents[2]


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
    log = tmp_path / "slurm" / "12_3" / "12_3_0_log.out"
    assert [place.skip_reason(job) for job in jobs] == ["finished", "", f"running, job 12_3 on n1; log: {log}", ""]
    assert place.todo == [jobs[1], jobs[3]]


def test_a_live_child_of_a_parent_that_is_submitted_again_is_submitted_again_too(tmp_path, monkeypatch):
    """It waits for a job that has failed: SLURM is about to cancel it."""
    cancelled = []
    monkeypatch.setattr(submit.squeue, "cancel", cancelled.extend)
    jobs = table4(tmp_path)[:2]
    place = placing(jobs, tmp_path, {str(jobs[1].directory): Live("7", "PENDING", "Dependency")})
    assert [place.skip_reason(job) for job in jobs] == ["", ""] and cancelled == ["7"]


def test_a_run_that_a_process_outside_slurm_works_on_is_left_to_it_and_so_is_its_child(tmp_path):
    jobs = table4(tmp_path)[:2]
    jobs[0].directory.mkdir(parents=True)
    with open(jobs[0].directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = placing(jobs, tmp_path, {})
        said = [place.skip_reason(job) for job in jobs]
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
    monkeypatch.setattr(sbatch, "fitting_processes", lambda config: fitting)
    assert sbatch.layout(with_resources(table4(tmp_path)[0], nodes=nodes, gpus=gpus)) == sbatch.Layout(*expected)


def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sbatch, "fitting_processes", lambda config: (1, 2, 4))
    job = with_resources(table4(tmp_path)[1], nodes=2, gpus=2, cpus=3, memory_gb=5, hours=0.5, partition="p")
    asked = sbatch.options(job, ["7", "8_1"], tmp_path)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == (2, 2, "2")
    assert (asked["cpus-per-task"], asked["mem"], asked["time"], asked["partition"]) == (3, "10240M", 30, "p")
    assert asked["dependency"] == "afterok:7:8_1,singleton" and asked["comment"] == str(job.directory)
    assert asked["kill-on-invalid-dep"] == "yes" and asked["requeue"] is True and "account" not in asked
    assert sbatch.srun_options(job) == ["--kill-on-bad-exit=1", "--export=ALL", "--cpus-per-task=3"]


def test_two_runs_directories_do_not_wait_for_each_other(tmp_path):
    """`singleton` goes by name, and equal runs in two directories have equal ids."""
    one, two = (sbatch.options(table4(tmp_path / name)[0], [], tmp_path)["job-name"] for name in "ab")
    assert one.split("@")[0] == two.split("@")[0] and one != two


def test_the_batch_script_is_printed_without_slurm(tmp_path):
    jobs = table4(tmp_path)
    text = sbatch.batch_text(jobs[1], tmp_path)
    assert f"afterok:<job of {jobs[0].id}>,singleton" in text and "--kill-on-bad-exit=1" in text
    finish(jobs[0])
    assert "afterok" not in sbatch.batch_text(jobs[1], tmp_path)


def test_no_character_of_the_runs_directory_s_path_is_taken_for_a_command(tmp_path):
    """The first lines of the batch script, as bash runs them."""
    place = tmp_path / "a b $(touch ran) `touch ran` & $HOME;"
    setup = "\n".join(sbatch.setup(table4(place)[0], place))
    words = ["bash", "-c", f'{setup}\nprintf %s "$PYTHONPATH"']
    done = subprocess.run(words, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "/x y"}, capture_output=True)
    assert done.stdout.decode() == f"{place}:/x y" and not (tmp_path / "ran").exists()
    assert f"'{place.resolve()}/slurm'" in sbatch.batch_text(table4(place)[0], place)


@pytest.mark.parametrize("name", ["a%j", "a:b", "a'b", 'a"b', "a\\b", "a\nb"])
def test_a_runs_directory_that_sbatch_would_expand_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(UserError, match="in its path, which sbatch or PYTHONPATH would take apart") as error:
        submit.launch(table4(tmp_path / name), tmp_path / name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("hours", "seconds", "limit"), [(0.02, 120, 60), (2, 7200, 7200)])
def test_a_warning_that_would_come_before_the_job_is_refused_by_both_keys(tmp_path, hours, seconds, limit):
    jobs = table4(tmp_path / "runs", f"cluster.hours={hours}", f"cluster.warning_seconds={seconds}")
    said = f"cluster.warning_seconds: {seconds} s before the time limit, which is {limit} s .cluster.hours {hours}.;"
    for refused in (submit.launch, lambda jobs, place: sbatch.batch_text(jobs[0], place)):
        with pytest.raises(UserError, match=said):
            refused(jobs, tmp_path / "runs")
    sbatch.check(table4(tmp_path, "cluster.hours=2", "cluster.warning_seconds=7199"), tmp_path)


def test_a_runs_directory_that_cannot_be_written_or_locked_is_one_line(tmp_path, monkeypatch):
    (tmp_path / ".launch.lock").mkdir()
    with pytest.raises(UserError, match=f"cannot write or lock {tmp_path}/.launch.lock: Is a directory"):
        submit.launch(table4(tmp_path), tmp_path)

    def unable(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(submit.fcntl, "flock", unable)
    with pytest.raises(UserError, match="No locks available"):
        submit.launch(table4(tmp_path / "runs"), tmp_path / "runs")


def test_equal_jobs_that_wait_for_none_are_an_array_where_their_number_is_limited(tmp_path):
    jobs = table4(tmp_path, "cluster.parallel=3")[:4]
    assert list(submit.groups(jobs)) == [[jobs[0], jobs[2]], [jobs[1]], [jobs[3]]]
    assert all(len(group) == 1 for group in submit.groups(table4(tmp_path)))
    asked = sbatch.array_options([jobs[0], jobs[2]], tmp_path, tmp_path / "a.json")
    assert asked["comment"].endswith("a.json") and "dependency" not in asked
    assert sbatch.array_options(jobs[:1], tmp_path, tmp_path, before="7")["dependency"] == "afterany:7"


def test_the_job_s_command_has_its_own_absolute_data_directory(tmp_path):
    job = table4(tmp_path)[0]
    assert sbatch.command(job, tmp_path).words == (*job.command, "--set", f"run.data_root={ROOT / 'data'}")
    absolute = table4(tmp_path, "run.data_root=/d")[0]
    assert sbatch.command(absolute, tmp_path).words == absolute.command
    convert = next(job for job in table7(tmp_path) if job.stage == "convert")
    assert sbatch.command(convert, tmp_path).words == convert.command  # it reads no data, and has no --set


# ---------------------------------------------------------------------------------------------- what SLURM says


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(squeue="echo ...")`: SLURM's programs as shell scripts; no others are on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(squeue, "AGAIN", 0)

    def write(**scripts):
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    return write


# An scancel that notes what it is asked for, and after which the queue is empty.
GONE = "echo $* >> {0}/cancelled; printf '#!/bin/sh\\n' > {0}/bin/squeue"


def test_slurm_is_here_or_not_or_does_not_answer(programs, monkeypatch):
    programs(sbatch="", scontrol="echo 'Slurmctld(primary) at a is DOWN'; echo 'Slurmctld(backup) at b is UP'; exit 1")
    assert shell.available()
    programs(scontrol="echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1")
    assert not shell.available()
    programs(scontrol="echo 'Slurmctld(primary) at a is DOWN'; echo '**** RESTORE ****'; exit 1")
    with pytest.raises(UserError, match=r"controller does not answer: Slurmctld\(primary\) at a is DOWN$"):
        shell.available()
    programs(scontrol="exec sleep 9", squeue="exec sleep 9")
    monkeypatch.setattr(shell, "PATIENCE", 0.1)
    for ask in (shell.available, squeue.live_jobs):
        with pytest.raises(UserError, match="controller does not answer"):
            ask()
    monkeypatch.setattr(shell.shutil, "which", lambda name: None)
    assert not shell.available()


@pytest.mark.parametrize("verb", [["status"], ["cancel"], []])
def test_where_slurm_does_not_answer_nothing_is_said_of_runs_and_nothing_runs_here(programs, tmp_path, cli, verb):
    programs(sbatch="", scontrol="echo 'Slurmctld(primary) at a is DOWN'; exit 1")
    words = [*verb, "table4", "--preset", "smoke", "--runs-dir", tmp_path / "runs"]
    status, out, errors = cli(launch.main, *words)
    assert status == 1 and not out and errors.count("\n") == 1 and "does not answer" in errors
    assert not (tmp_path / "runs").exists()


# An squeue that shows the jobs of everybody unless it is asked for this user's alone.
OURS_AND_OTHERS = """case " $* " in *" --user={0} "*) ;; *) {2} ;; esac
{1}"""


def asked_for_mine(ours, others):
    return OURS_AND_OTHERS.format(os.getuid(), *("; ".join(f"echo '{x}'" for x in part) for part in (ours, others)))


def test_each_task_of_an_array_is_the_run_at_its_place_in_the_list(programs, tmp_path):
    """12_0 the first, 12_2 the third; a number beyond the list is nobody's."""
    runs = [f"{tmp_path}/run{number}" for number in range(3)]
    (tmp_path / "array.json").write_text(json.dumps(runs))
    lines = [f"12_{task}|PENDING|(Priority)|{tmp_path}/array.json" for task in (2, 0, 3)]
    programs(squeue="\n".join(f"echo '{line}'" for line in [*lines, f"13|RUNNING|n1|{runs[1]}"]))
    assert {directory: live.job for directory, live in squeue.live_jobs().items()} == {
        runs[2]: "12_2",
        runs[0]: "12_0",
        runs[1]: "13",
    }


def test_jobs_of_other_users_are_not_ours(programs, tmp_path):
    ours, others = [f"7|RUNNING|n1|{tmp_path}/a"], [f"8|RUNNING|n1|{tmp_path}/b", f"9|RUNNING|n1|{tmp_path}/a"]
    programs(squeue=asked_for_mine(ours, others))
    assert [(directory, live.job) for directory, live in squeue.all_jobs()] == [(f"{tmp_path}/a", "7")]
    programs(squeue=asked_for_mine(["", "7|FAILED"], ["7|COMPLETED"]))
    assert squeue.ended_as(["7"]) == {"7": "FAILED"}


def test_lines_of_a_comment_of_another_job_are_no_jobs_and_an_answer_that_is_no_list_is_refused(programs, tmp_path):
    """sbatch --comment="$(git log -1)" is printed as it stands; an error on standard output is no empty queue."""
    lines = ["6|RUNNING|n1|commit 1", "", "    words|more", f"7|PENDING|(None)|{tmp_path}/a"]
    programs(squeue="\n".join(f"echo '{line}'" for line in lines))
    assert {directory: live.job for directory, live in squeue.all_jobs()}[f"{tmp_path}/a"] == "7"
    programs(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller'")
    with pytest.raises(UserError, match="squeue: expected jobs, found 'slurm_load_jobs error: "):
        squeue.all_jobs()
    programs(squeue="exit 0")
    assert squeue.all_jobs() == []


def test_the_controller_is_believed_over_accounting_which_is_asked_for_what_the_controller_has_forgotten(
    programs, tmp_path
):
    """A job that was requeued runs again, while accounting still has its first end."""
    programs(
        squeue="echo '7|RUNNING'; echo '8|FAILED'; echo '10|PENDING'",
        sacct=f'echo "$*" > {tmp_path}/asked\n'
        "echo '7|NODE_FAIL'; echo '8|COMPLETED'; echo '9|TIMEOUT'; echo '10|CANCELLED by 0'; echo '11_[3-5]|CANCELLED'",
    )
    found = squeue.ended_as(["7", "8", "9", "10", "11_4", "12"])
    assert found == {"8": "FAILED", "9": "TIMEOUT", "11_4": "CANCELLED"}
    assert (tmp_path / "asked").read_text().split()[-2:] == ["--jobs", "11,12,9"]


def test_tasks_of_an_array_that_never_began_are_known_under_its_number(programs):
    """Real answers of SLURM 22.05 after `scancel` of an array whose first task ran: none of them names the others."""
    programs(squeue="echo '9|CANCELLED'; echo '9_0|CANCELLED'")
    assert squeue.ended_as(["9_0", "9_2"]) == dict.fromkeys(["9_0", "9_2"], "CANCELLED")
    tasks = r"case $* in *9_2*) ;; *) echo '9_0|FAILED'; echo '9_[2-5%2]|CANCELLED by 0';; esac"
    programs(squeue="true", sacct=tasks)
    assert squeue.ended_as(["9_0", "9_2"]) == {"9_0": "FAILED", "9_2": "CANCELLED"}


NO_END = "it will not start by itself: cancel, fix, launch again"


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("PENDING", "(PartitionConfig)", f"stuck, job 7: PartitionConfig; {NO_END}"),
        ("PENDING", "(PartitionTimeLimit)", f"stuck, job 7: PartitionTimeLimit; {NO_END}"),
        ("PENDING", "(QOSMaxWallDurationPerJobLimit)", f"stuck, job 7: QOSMaxWallDurationPerJobLimit; {NO_END}"),
        ("PENDING", "(JobHeldUser)", "held, job 7: JobHeldUser; it starts after: scontrol release 7"),
        (
            *("PENDING", "(launch failed requeued held)"),
            "held, job 7: launch failed requeued held; it starts after: scontrol release 7",
        ),
        ("REQUEUE_HOLD", "(job requeued in held state)", "held, job 7: job requeued in held state; scontrol release 7"),
        ("SUSPENDED", "n1", "suspended, job 7: n1; it goes on when SLURM lets it; by hand: scontrol resume 7"),
        ("COMPLETING", "n1", "ending, job 7: n1; look again in a minute"),
        ("CONFIGURING", "n1", "starting, job 7: n1; its nodes are being made ready"),
        ("POWER_UP_NODE", "n1", "starting, job 7: n1; its nodes are being made ready"),
        ("STAGE_OUT", "n1", "ending, job 7: n1; look again in a minute"),
        ("REQUEUED", "(None)", "waiting, job 7: None"),
        ("RESV_DEL_HOLD", "(None)", "held, job 7: None; its reservation is gone: cancel, fix, launch again"),
        ("PENDING", "(Resources)", "waiting, job 7: Resources"),
        ("PENDING", "(Dependency)", "waiting, job 7: Dependency"),
        ("PENDING", "(QOSMaxJobsPerUserLimit)", "waiting, job 7: QOSMaxJobsPerUserLimit"),
        ("PENDING", "(BeginTime)", "waiting, job 7: BeginTime"),
    ],
)
def test_each_state_of_a_job_has_its_own_word_and_what_to_do(programs, tmp_path, state, reason, said):
    jobs = table4(tmp_path)
    programs(sbatch="", scontrol="echo 'Slurmctld(primary) at a is UP'")
    programs(squeue=f"echo '7|{state}|{reason}|{jobs[0].directory}'")
    assert placing(jobs, tmp_path, squeue.live_jobs()).skip_reason(jobs[0]) == said
    report = status.reports(jobs, tmp_path)[jobs[0].directory]
    assert f"{report.state}, {report.text}" == said


def test_the_jobs_that_an_interrupted_launch_has_left_without_a_pickle_are_cancelled(programs, tmp_path, capsys):
    """Those of this launch's runs alone; in an array those tasks alone; also the second job of a run."""
    jobs = table4(tmp_path)
    one, two, other = (str(job.directory) for job in jobs[:3])
    (tmp_path / "array.json").write_text(json.dumps([one, two]))
    lines = [f"7|RUNNING|n1|{one}", f"8|PENDING|(Priority)|{one}", f"9|PENDING|(Priority)|{other}"]
    lines += [f"10_{task}|PENDING|(Priority)|{tmp_path}/array.json" for task in (0, 1)]
    programs(squeue="\n".join(f"echo '{line}'" for line in lines), scancel=GONE.format(tmp_path))
    for job in ("8", "10_0"):
        squeue.pickle_path(tmp_path, job).parent.mkdir(parents=True)
        squeue.pickle_path(tmp_path, job).touch()
    submit.clear({one, two}, tmp_path)
    assert sorted((tmp_path / "cancelled").read_text().split()) == ["10_1", "7"]
    shown = capsys.readouterr().out
    assert shown.count("\n") == 2 and f"cancelled job 7 of {one}, which an interrupted launch has left" in shown


def test_an_array_that_is_too_large_is_halved_and_no_run_is_lost(tmp_path, monkeypatch):
    jobs = [job for job in table4(tmp_path) if not job.parents]
    place, taken = placing(jobs, tmp_path, {}), []

    def at_most_two(group, asked, *_):
        if len(group) > 2:
            raise submit.Full("too many")
        taken.append(group)
        return [f"{len(taken)}_{task}" for task in range(len(group))]

    monkeypatch.setattr(submit, "_submit", at_most_two)
    monkeypatch.setattr(submit, "take", lambda *_: tmp_path / "snapshot")
    place.submit(jobs)
    assert len(jobs) > 4 and [job for group in taken for job in group] == jobs
    numbers = [place.live[submit.key_of(job.directory)].job for job in jobs]
    assert len(set(numbers)) == len(jobs) and all(number.split("_")[1] in "01" for number in numbers)


def test_of_several_submissions_of_a_run_the_last_is_on_record(tmp_path):
    (tmp_path / "slurm").mkdir()
    for job, directory in (("7", "/a"), ("8", "/b"), ("9", "/a")):
        squeue.record(tmp_path, directory=directory, job=job)
    assert {path: values["job"] for path, values in squeue.records(tmp_path).items()} == {"/a": "9", "/b": "8"}


def test_a_run_directory_is_all_behind_the_third_bar(programs, tmp_path):
    programs(squeue=f"echo '7|RUNNING|n1|{tmp_path}/a|b'")
    assert {path: live.job for path, live in squeue.live_jobs().items()} == {f"{tmp_path}/a|b": "7"}


def test_a_cancel_that_changes_nothing_is_no_success(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(squeue, "ENDING", 0.1)
    programs(squeue=f"echo '7|RUNNING|n1|{tmp_path}/run'", scancel="true")
    with pytest.raises(UserError, match="scancel has not ended 7"):
        squeue.cancel(["7"])


def test_an_sbatch_that_fails_on_its_way_is_not_called_a_refusal(programs, tmp_path):
    job = table4(tmp_path)[0]
    programs(squeue=f"echo '7|PENDING|(Priority)|{job.directory}'", scancel=GONE.format(tmp_path))
    assert (
        submit._failure([job], "Invalid partition name", tmp_path) == f"SLURM refused {job.id}: Invalid partition name"
    )
    late = "Socket timed out on send/recv operation"
    said = submit._failure([job], late, tmp_path)
    assert "refused" not in said and f"({late}); cancelled what it has left, 7; launch again" in said
    assert (tmp_path / "cancelled").read_text() == "7\n"
    programs(squeue="true")
    assert submit._failure([job], late, tmp_path).endswith("; it is not in the queue; launch again")
    programs(squeue="exit 1")
    assert submit._failure([job], late, tmp_path).endswith("launch again: what it has left is then cancelled")


# -------------------------------------------------------------------------------------------- what a job runs


def test_a_job_ends_at_once_where_its_run_is_finished_or_its_parent_is_not(tmp_path):
    words, parent = ("python", "/nowhere.py"), str(tmp_path / "parent")
    with pytest.raises(SystemExit, match="which has no result; launch again"):
        command.Command(words, str(tmp_path / "run"), (parent,), str(tmp_path), 10)()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"metrics": {"a": 1}}')
    command.Command(words, str(tmp_path / "run"), (parent,), str(tmp_path), 10)()


@pytest.fixture
def batch_end(programs, tmp_path):
    """`batch_end(...)`: the end of job 5's batch script; returns what was asked of scontrol, and what was printed."""
    folder = tmp_path / "slurm" / "5"
    folder.mkdir(parents=True)
    start = "submitit INFO (...) - Starting with JobEnvironment(...)"

    def run(state="RUNNING", status=1, limit=0, log=(), **memory):
        (folder / "5_0_log.out").write_text("\n".join([start, *log]) + "\n")
        nodes = """[ "$2" = --partition=small ] && printf '16000\\n24000+\\n8000\\n'"""
        programs(squeue=f"echo {state}", scontrol=f'echo "$*" >> {tmp_path}/asked', sinfo=nodes)
        words = ["bash", ROOT / "slurm" / "batch_end.sh", status, tmp_path / "slurm", limit, 2, 4]
        environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "5", **memory}
        done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True)
        assert done.returncode == status and not done.stderr
        asked = tmp_path / "asked"
        return asked.read_text().splitlines() if asked.exists() else [], done.stdout

    return run


@pytest.mark.parametrize(("state", "asked"), [("RUNNING", ["requeue 5"]), ("COMPLETING", []), ("", [])])
def test_a_job_that_has_asked_for_it_is_requeued_unless_it_is_being_cancelled(batch_end, tmp_path, state, asked):
    assert batch_end()[0] == []
    (tmp_path / "slurm" / "5" / "requeue").touch()
    assert batch_end(state, 130)[0] == asked and not (tmp_path / "slurm" / "5" / "requeue").exists()


OOM = "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0. Some of the step tasks have been OOM Killed."


@pytest.mark.parametrize(
    ("memory", "limit", "log", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "8000"}, 64000, [OOM], "MinMemoryNode=12000"),
        ({"SLURM_MEM_PER_NODE": "8000"}, 5000, [OOM], "MinMemoryNode=10000"),  # 2 processes a node
        ({"SLURM_MEM_PER_CPU": "1000"}, 64000, ["srun: error: n1: task 0: Out Of Memory"], "MinMemoryCPU=1500"),
        ({"SLURM_MEM_PER_CPU": "1000"}, 5000, [OOM], "MinMemoryCPU=1250"),  # 4 CPUs a process
        ({"SLURM_MEM_PER_NODE": "8000"}, 4000, [OOM], ""),
        ({"SLURM_MEM_PER_NODE": "8000"}, 0, [OOM], ""),
        ({"SLURM_MEM_PER_NODE": "8000"}, 64000, ["torch.OutOfMemoryError: CUDA out of memory"], ""),
        ({}, 64000, [OOM], ""),
        ({"SLURM_MEM_PER_NODE": "18000", "SLURM_JOB_PARTITION": "small"}, 64000, [OOM], "MinMemoryNode=24000"),
        ({"SLURM_MEM_PER_CPU": "2500", "SLURM_JOB_PARTITION": "small"}, 64000, [OOM], "MinMemoryCPU=3000"),
        ({"SLURM_MEM_PER_NODE": "24000", "SLURM_JOB_PARTITION": "small"}, 64000, [OOM], ""),
    ],
)
def test_a_job_that_ran_out_of_memory_is_requeued_with_half_as_much_more_up_to_the_limit(
    batch_end, memory, limit, log, expected
):
    asked, said = batch_end(status=9, limit=limit, log=log, **memory)
    assert asked == (["requeue 5", f"update JobId=5 {expected}"] if expected else [])
    if limit == 4000:
        assert "error: out of memory with 8000 MB a node, and cluster.memory_limit_gb allows no more" in said
    if memory.get("SLURM_MEM_PER_NODE") == "24000":
        assert "with 24000 MB a node, and the largest node of partition small allows no more" in said


def test_only_the_last_start_of_a_job_counts_as_out_of_memory(batch_end):
    log = [OOM, "submitit INFO (...) - Starting with JobEnvironment(...)", "error: no such file"]
    assert batch_end(limit=64000, log=log, SLURM_MEM_PER_NODE="8000")[0] == []


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

    monkeypatch.setattr(runs.provenance, "ROOT", second)
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
        with pytest.raises(UserError, match="another process"):
            runs.Run(tmp_path, tiny())
        assert 0.1 < time.monotonic() - start < 2
        release.wait()
    with runs.Run(tmp_path, tiny()):
        assert runs.is_busy(tmp_path)
    assert not runs.is_busy(tmp_path)
