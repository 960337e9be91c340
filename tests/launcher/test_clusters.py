"""The launcher on clusters, and from shells, that are not as a fresh one is: what real ones enforce, and bring along.

On a real SLURM (tests/slurm_cluster.py) that enforces accounts, limits, QoS and wckeys, and has small arrays.
"""

import dataclasses
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixmask.config import UserError
from paper.cells import select
from paper.presets import budget
from slurm import graph, sbatch, squeue, status, submit
from slurm.shell import clean
from tests import slurm_cluster
from tests.launcher.jobs import STAGE, key, lines, numbers, shell, started, wait, wait_finished

ROOT = Path(__file__).resolve().parents[2]
REASON = slurm_cluster.obstacle()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(REASON), reason=f"no private SLURM here: {REASON}")]

SETTINGS = """
AccountingStorageEnforce=associations,limits,qos,wckeys
TrackWCKey=yes
MaxArraySize=4
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
PartitionName=queue Nodes=ALL AllowQos=gold MaxTime=INFINITE State=UP
"""

# Writes the job's environment, and a result.
TELL = """
import json, os, pathlib, sys
home = pathlib.Path(sys.argv[1])
home.mkdir(parents=True, exist_ok=True)
(home / f"environment{os.environ['SLURM_PROCID']}").write_text(json.dumps(dict(os.environ)))
(home / "result.json").write_text(json.dumps({"metrics": {"loss": 1.0}}))
"""


@pytest.fixture(scope="session")
def strict():
    with slurm_cluster.running(SETTINGS) as started:
        environment = {**os.environ, **started.environment}
        for words in (
            ["add", "qos", "gold"],
            ["add", "account", "lab"],
            ["add", "user", "root", "account=lab", "qos=normal,gold", "wckey=proj"],
        ):
            subprocess.run(["sacctmgr", "-i", *words], env=environment, check=True, capture_output=True)
        yield started


@pytest.fixture
def jobs(strict, tmp_path, monkeypatch):
    """`jobs(2, "cluster.qos=gold", script=...)`: the first pre-trainings of Table 4, which run this script."""
    monkeypatch.setenv("SLURM_CONF", strict.environment["SLURM_CONF"])

    def make(number, *settings, script=TELL, arguments=()):
        path = tmp_path / "stage.py"
        path.write_text(script)
        chosen = budget("smoke", ["cluster.memory_gb=1", *settings])
        found = [job for job in graph.jobs(select(["table4"]), chosen, tmp_path / "runs") if not job.parents]
        words = [("python", str(path), str(job.directory), *arguments) for job in found]
        return [dataclasses.replace(job, command=word) for job, word in zip(found[:number], words, strict=False)]

    yield make
    subprocess.run(["scancel", "--me"], check=True, env=clean())
    wait(40, lambda: not squeue.live_jobs(), "the queue is empty")


def environment(job, process=0):
    return json.loads((job.directory / f"environment{process}").read_text())


def told_of(job):
    """Of the run's last job: account, QoS, wckey and partition, as accounting has them."""
    words = ["sacct", "-n", "-P", "-X", "-o", "Account,QOS,WCKey,Partition", "-j", numbers(job)[-1]]
    rows = shell(*words).split()
    return rows[-1].split("|") if rows else [""] * 4  # slurmdbd has not heard of it yet


# --------------------------------------------------------------------------------- the shell that launches

BROUGHT = {  # by salloc, an array job, torchrun, a user's defaults
    "SLURM_JOB_ID": "7",
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_MEM_PER_CPU": "500",
    "SLURM_MEM_PER_GPU": "500",
    "SLURM_GPUS": "2",
    "SLURM_GPUS_PER_NODE": "2",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SBATCH_EXPORT": "NONE",
    "SLURM_EXPORT_ENV": "NONE",
    "SBATCH_PARTITION": "nowhere",
    "SBATCH_TIMELIMIT": "0:01",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_JOB_NAME": "one",
    "SBATCH_WCKEY": "unknown",
    "SUBMITIT_EXECUTOR": "local",
    "PMI_RANK": "1",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "nowhere",
    "MASTER_PORT": "29500",
    "CUDA_VISIBLE_DEVICES": "1",
}


def test_nothing_that_the_launching_shell_brings_along_reaches_the_jobs(jobs, tmp_path, monkeypatch):
    for name, value in BROUGHT.items():
        monkeypatch.setenv(name, value)
    pair = jobs(2)
    submit.launch(pair, tmp_path / "runs")
    wait_finished(40, pair)
    for job in pair:
        got = environment(job)
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "PMI_RANK", "SBATCH_PARTITION"} & got.keys()
        assert got["SLURM_NTASKS"] == "1" and got["SLURM_JOB_ID"] == numbers(job)[0]
        assert got["SLURM_JOB_NAME"].startswith(job.id) and got["HOME"] == os.environ["HOME"]
        told = shell("scontrol", "show", "job", numbers(job)[0])
        assert "Requeue=1" in told and "Partition=low" in told and "TimeLimit=01:00:00" in told
    assert os.environ["RANK"] == "1"  # of this shell


@pytest.mark.parametrize(
    "asked", [["--mem-per-cpu=500"], ["--gpus=1"], ["--gpus-per-node=1"], ["--ntasks=1", "--gpus-per-task=1"]], ids=str
)
def test_a_launch_from_within_an_allocation(jobs, tmp_path, asked):
    (job,) = jobs(1)
    code = (
        "import pickle, sys\nfrom pathlib import Path\nfrom slurm import submit\n"
        "submit.launch(pickle.load(open(sys.argv[1], 'rb')), Path(sys.argv[2]))"
    )
    pickled = tmp_path / "jobs.pkl"
    pickled.write_bytes(pickle.dumps([job]))
    words = ["salloc", *asked, sys.executable, "-c", code, str(pickled), str(tmp_path / "runs")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    wait_finished(40, [job])


def test_live_jobs_are_seen_and_cancelled_whatever_the_user_s_defaults_are(jobs, tmp_path, monkeypatch, capsys):
    (job,) = jobs(1, script=STAGE, arguments=("600",))
    for name, value in {
        "SQUEUE_PARTITION": "high",
        "SQUEUE_STATES": "FAILED",
        "SQUEUE_FORMAT": "%i",
        "SQUEUE_USERS": "nobody",
        "SCANCEL_PARTITION": "high",
        "SCANCEL_STATE": "PENDING",
        "SCANCEL_INTERACTIVE": "1",
        "SLURM_CLUSTERS": "elsewhere",
    }.items():
        monkeypatch.setenv(name, value)
    submit.launch([job], tmp_path / "runs")
    started(job)
    submit.launch([job], tmp_path / "runs")
    assert capsys.readouterr().out.count("submitted") == 1
    assert status.reports([job], tmp_path / "runs")[job.directory].state == "running"
    status.cancel([job])
    assert not {live.job for live in squeue.live_jobs().values() if live.state == "RUNNING"}
    wait(20, lambda: status.reports([job], tmp_path / "runs")[job.directory].state == "cancelled", "it is cancelled")


# ----------------------------------------------------------------------------------- what a cluster asks for


def test_no_wckey_is_sent_where_none_is_said_and_the_user_s_where_one_is(jobs, tmp_path):
    plain, own = jobs(1)[0], jobs(2, "cluster.wckey=proj")[1]
    submit.launch([plain], tmp_path / "runs")
    submit.launch([own], tmp_path / "runs")
    wait_finished(40, [plain, own])
    wait(20, lambda: told_of(own)[2] == "proj", "accounting has the key")
    assert told_of(plain)[2] in ("", "*", "*proj")  # the asterisk: the cluster has put the user's default there


def test_a_queue_that_wants_an_account_and_a_qos_gets_them_and_any_other_option(jobs, tmp_path):
    settings = ["cluster.partition=queue", "cluster.account=lab", "cluster.qos=gold", "cluster.extra.nice=7"]
    settings += ["cluster.nodelist=n2", "cluster.exclusive=true", "cluster.gpus=1", "cluster.gres=gpu"]
    settings += ["cluster.memory_gb=0", "cluster.mail_user=nobody", "cluster.mail_type=FAIL", "run.device=cpu"]
    settings += ["cluster.setup=['export SAID=before', 'export SAID=$SAID-python']"]
    (job,) = jobs(1, *settings)
    submit.launch([job], tmp_path / "runs")
    wait_finished(40, [job])
    told = shell("scontrol", "show", "job", numbers(job)[0])
    expected = ["Partition=queue", "Account=lab", "QOS=gold", "Nice=7", "NodeList=n2", "OverSubscribe=NO", "NumCPUs=4"]
    assert [word for word in expected if word not in told] == [] and re.search(
        "TresPerNode=gres.gpu:1", told
    )  # a colon, later a slash
    got = environment(job)
    assert got["SAID"] == "before-python" and "SLURM_MEM_PER_NODE" not in got and "SLURM_MEM_PER_CPU" not in got


def test_a_queue_that_refuses_the_job_for_ever_is_told(jobs, tmp_path, capsys):
    (job,) = jobs(1, "cluster.partition=queue")
    submit.launch([job], tmp_path / "runs")
    wait(20, lambda: squeue.live_jobs()[key(job)].word == "stuck", "the queue has looked at it")
    submit.launch([job], tmp_path / "runs")
    assert (
        "not permitted to use this partition" in (shown := capsys.readouterr().out) and "cancel, fix, launch" in shown
    )


def test_a_job_that_no_node_can_hold_is_refused_before_anything_is_submitted(jobs, tmp_path):
    small, large = jobs(1)[0], jobs(2, "cluster.memory_gb=99")[1]
    with pytest.raises(UserError, match=r"0 GPUs, 1 CPUs, 99 GB of a node, and no node .* 2 GPUs, 4 CPUs, 16 GB"):
        submit.launch([small, large], tmp_path / "runs")
    assert not squeue.live_jobs()
    assert max(sbatch.nodes_of("queue")) == sbatch.Node(2, 4, 16000)


def test_more_nodes_in_a_list_than_the_job_has_are_refused_with_the_key_that_is_meant(jobs, tmp_path):
    with pytest.raises(
        UserError, match=r"invalid number of nodes .*; a job takes all nodes .*: cluster\.exclude names"
    ):
        submit.launch(jobs(1, "cluster.nodelist=n[1-2]"), tmp_path / "runs")
    assert not squeue.live_jobs()


def test_an_array_is_cut_where_slurm_takes_none_so_long_and_still_runs_so_many_at_once(jobs, tmp_path):
    """MaxArraySize=4: indices 0 to 3."""
    six = jobs(6, "cluster.parallel=1", script=STAGE, arguments=("2",))
    submit.launch(six[:1], tmp_path / "runs")
    submit.launch(six, tmp_path / "runs")  # what the first launch has left in the queue counts
    arrays = {numbers(job)[0].split("_")[0] for job in six}
    assert len(arrays) == 3 and squeue.live_jobs().keys() == {key(job) for job in six}
    wait_finished(60, six)
    times = sorted((float(lines(job, "starts")[0].split()[-1]), float(lines(job, "ends")[0])) for job in six)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(times))


@pytest.mark.parametrize("parallel", [0, 4])
def test_what_does_not_fit_now_is_said_and_the_next_launch_goes_on(jobs, tmp_path, capsys, parallel):
    five = jobs(5, f"cluster.parallel={parallel}")
    shell("sacctmgr", "-i", "modify", "user", "root", "account=root", "set", "MaxSubmitJobs=2")
    try:
        submit.launch(five, tmp_path / "runs")
        shown = capsys.readouterr().out
        assert shown.count("submitted, job") == 2 and "3 runs are left for the next launch" in shown
        assert "AssocMaxSubmitJobLimit" in shown
        wait_finished(40, five[:2])
    finally:
        shell("sacctmgr", "-i", "modify", "user", "root", "account=root", "set", "MaxSubmitJobs=-1")
    submit.launch(five, tmp_path / "runs")
    assert capsys.readouterr().out.count("submitted, job") == 3
    wait_finished(40, five)


# ------------------------------------------------------------------------------------------ jobs that learn

GREEDY = """
import json, os, pathlib, sys
home = pathlib.Path(sys.argv[1])
home.mkdir(parents=True, exist_ok=True)
memory = int(os.environ["SLURM_MEM_PER_NODE"])
open(home / "memory", "a").write(f"{memory}\\n")
if memory < 2000:
    print("slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed.")
    sys.stdout.flush()
    os.kill(os.getpid(), 9)
(home / "result.json").write_text(json.dumps({"metrics": {"loss": 1.0}}))
"""


def test_a_job_that_runs_out_of_memory_comes_back_with_half_as_much_more_until_the_limit(jobs, tmp_path):
    enough, little = jobs(2, "cluster.memory_limit_gb=2", script=GREEDY)
    little = dataclasses.replace(little, resources=dataclasses.replace(little.resources, memory_limit_gb=1.2))
    submit.launch([enough, little], tmp_path / "runs")
    wait_finished(60, [enough])
    assert lines(enough, "memory") == ["1024", "1536", "2048"] and len(numbers(enough)) == 1
    wait(60, lambda: key(little) not in squeue.live_jobs(), "it gives up at its limit")
    assert lines(little, "memory") == ["1024", "1228"]
    report = status.reports([little], tmp_path / "runs")[little.directory]
    assert "error: out of memory with 1228 MB a node, and cluster.memory_limit_gb allows no more" in report.text


BROKEN = """
import json, os, pathlib, sys
home = pathlib.Path(sys.argv[1])
home.mkdir(parents=True, exist_ok=True)
if os.environ["SLURMD_NODENAME"] == "n1":
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
(home / "result.json").write_text(json.dumps({"metrics": {"loss": 1.0}}))
"""


def test_a_node_at_whose_fault_a_run_has_died_is_named_and_not_used_again(jobs, tmp_path, capsys):
    (job,) = jobs(1, "cluster.nodelist=n1", script=BROKEN)
    submit.launch([job], tmp_path / "runs")
    wait(40, lambda: key(job) not in squeue.live_jobs(), "it fails")
    report = status.reports([job], tmp_path / "runs")[job.directory]
    assert "uncorrectable ECC" in report.text and "node n1 is at fault: the next launch leaves it out" in report.text
    job = dataclasses.replace(job, resources=dataclasses.replace(job.resources, nodelist=""))
    submit.launch([job], tmp_path / "runs")
    assert "not on n1, where the node made it fail" in capsys.readouterr().out
    wait_finished(40, [job])


# ------------------------------------------------------------------------------------------------ containers

# As the real one is called; inside there is the image's Python, and no program of SLURM.
APPTAINER = """#!/bin/sh
[ "$1" = exec ] && shift
while [ "${{1#--}}" != "$1" ]; do [ "$1" = --bind ] && shift; shift; done
image=$1; shift
[ "$1" = python ] && shift
exec env PATH={bin} APPTAINER_CONTAINER="$image" {python} "$@"
"""


def test_jobs_run_inside_an_image_and_are_requeued_from_outside_of_it(jobs, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.write_text(APPTAINER.format(bin=Path(sys.executable).parent, python=sys.executable))
    apptainer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apptainer.parent}:{os.environ['PATH']}")
    python = "apptainer exec --nv --bind '$HOME' '$HOME/mixmask.sif' python".replace("'", '"')
    inside = "import shutil\nassert not shutil.which('scontrol')\nnote('images', os.environ['APPTAINER_CONTAINER'])\n"
    script = STAGE.replace("told = []", f"{inside}told = []")
    (job,) = jobs(1, f"cluster.python={python}", script=script, arguments=("60",))
    submit.launch([job], tmp_path / "runs")
    started(job)
    shell("scancel", "--signal=USR2", *numbers(job))
    wait_finished(60, [job])
    assert lines(job, "images") == [f"{os.environ['HOME']}/mixmask.sif"] * 2 and len(numbers(job)) == 1
    assert lines(job, "log") == [str(step) for step in range(1, 61)]
