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
from slurm import gpus, graph, local

ROOT = Path(__file__).resolve().parents[2]

SUCCEED = "import json, sys\njson.dump({'metrics': {'a_last': 12.3}}, open(sys.argv[1], 'w'))\n"


@pytest.fixture
def jobs(tmp_path):
    """A pre-training and its probe that end at once, and the pre-training after them."""
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


# The job waits until the other has begun, or for ten seconds.
MEET = """
import json, pathlib, sys, time
result, name, other = (pathlib.Path(word) for word in sys.argv[1:])
name.touch()
print("in two", end=" ", flush=True)
end = time.monotonic() + 10
while not other.exists() and time.monotonic() < end:
    time.sleep(0.01)
print("pieces", flush=True)
json.dump({"metrics": {"met": float(other.exists())}}, open(result, "w"))
"""


@pytest.mark.parametrize(("cpus", "met"), [(1, 1.0), (2, 0.0)])
def test_independent_jobs_run_side_by_side_as_far_as_the_cores_bear(jobs, tmp_path, monkeypatch, capfd, cpus, met):
    """And each line that they print is whole, behind the number of its job."""
    monkeypatch.setattr(local, "_cores", lambda: 2)
    script = tmp_path / "meet.py"
    script.write_text(MEET if met else MEET.replace("+ 10", "+ 0.2"))
    pair = []
    for job, name, other in (jobs[0], "a", "b"), (jobs[2], "b", "a"):
        words = ("python", str(script), str(job.directory / "result.json"), f"{tmp_path}/{name}", f"{tmp_path}/{other}")
        pair.append(dataclasses.replace(job, command=words, resources=dataclasses.replace(job.resources, cpus=cpus)))
    local.launch(pair)
    results = [json.loads((job.directory / "result.json").read_text())["metrics"]["met"] for job in pair]
    assert min(results) == met
    assert {"[1/2] in two pieces", "[2/2] in two pieces"} <= set(capfd.readouterr().out.splitlines())


def test_a_job_fits_beside_others_as_cores_and_memory_bear_and_a_gpu_is_never_shared(jobs, monkeypatch):
    def asks(device="auto", **values):
        config = dataclasses.replace(jobs[0].config, run=dataclasses.replace(jobs[0].config.run, device=device))
        resources = dataclasses.replace(jobs[0].resources, **values)
        return dataclasses.replace(jobs[0], config=config, resources=resources)

    monkeypatch.setattr(local, "_cores", lambda: 8)
    small = asks(cpus=3, memory_gb=1)
    assert local.fits(asks(cpus=99), []) and local.fits(small, [small]) and not local.fits(small, [small, small])
    assert not local.fits(asks(memory_gb=10**6), [small])
    assert not local.fits(asks(gpus=1), [small]) and not local.fits(small, [asks(gpus=1)])
    one, on_cpu, second = asks(gpus=1, cpus=8), asks("cpu", gpus=1, cpus=5), asks("cuda:1", gpus=1)
    assert local.fits(one, [one, small], visible=2) and not local.fits(one, [one, one], visible=2)
    assert local.fits(on_cpu, [one, one], visible=2) and not local.fits(on_cpu, [on_cpu, one], visible=2)
    assert local.fits(asks(gpus=4), [one], visible=2)  # one process: one GPU
    assert not local.fits(second, [one], visible=2) and not local.fits(one, [second], visible=2)


def fake_smi(folder, prints, status=0):
    """nvidia-smi, alone on PATH."""
    folder.mkdir()
    script = folder / "nvidia-smi"
    script.write_text(f"#!{sys.executable}\nprint({prints!r})\nraise SystemExit({status})\n")
    script.chmod(0o755)
    return str(folder)


TWO = "GPU 0: NVIDIA H100 (UUID: GPU-3a)\n  MIG 1g.10gb Device 0: (UUID: MIG-7)\nGPU 1: NVIDIA H100 (UUID: GPU-4b)"


@pytest.mark.parametrize(
    ("named", "prints", "expected"),
    [
        (None, TWO, ["0", "1"]),
        (None, "NVIDIA-SMI has failed because it couldn't communicate with the driver", []),
        (None, None, []),
        ("1, 3", TWO, ["1", "3"]),
        ("GPU-4b,MIG-7", None, ["GPU-4b", "MIG-7"]),
        ("", TWO, []),
        ("-1", TWO, []),
        ("0,-1,1", TWO, ["0"]),
    ],
)
def test_visible_gpus_are_those_of_the_variable_or_of_nvidia_smi(tmp_path, monkeypatch, named, prints, expected):
    monkeypatch.setenv("PATH", fake_smi(tmp_path / "bin", prints, status=9 * (not expected)) if prints else "")
    assert gpus.visible({} if named is None else {"CUDA_VISIBLE_DEVICES": named}) == expected


def test_each_visible_gpu_has_one_job_at_a_time_which_sees_no_other(jobs, tmp_path, monkeypatch, capfd):
    """Three jobs on two GPUs: two meet, each on its own; the third comes when one of them has ended."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", fake_smi(tmp_path / "bin", TWO))
    script = tmp_path / "meet.py"
    script.write_text(MEET + "print('sees', __import__('os').environ['CUDA_VISIBLE_DEVICES'])\n")
    three = []
    for job, name, other in (jobs[0], "a", "b"), (jobs[2], "b", "a"), (jobs[1], "c", "a"):
        words = ("python", str(script), str(job.directory / "result.json"), f"{tmp_path}/{name}", f"{tmp_path}/{other}")
        resources = dataclasses.replace(job.resources, gpus=1, cpus=99)
        three.append(dataclasses.replace(job, command=words, parents=(), resources=resources))
    local.launch(three)
    lines = capfd.readouterr().out.splitlines()
    assert "one job on each visible GPU: 0, 1" in lines
    assert {line.split()[-1] for line in lines if "sees" in line} == {"0", "1"}
    for number in "123":
        start = next(line for line in lines if line.startswith(f"[{number}/3]") and " on GPU " in line)
        assert f"[{number}/3] sees {start[-1]}" in lines
    begins = [i for i, line in enumerate(lines) if " on GPU " in line]
    assert begins[:2] == [begins[0], begins[0] + 1] and any(" done in " in line for line in lines[: begins[2]])


def test_a_second_signal_does_not_wait_for_a_job_that_does_not_end(jobs, tmp_path):
    """The first one asks both; whoever ignores it is killed by the second."""
    script = tmp_path / "stay.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1]).with_name('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    job = dataclasses.replace(jobs[0], command=("python", str(script), *jobs[0].command[2:]))
    if not (launcher := os.fork()):
        try:
            local.launch([job])
        except SystemExit as exit:
            os._exit(exit.code)
        os._exit(1)
    pid, start = job.directory / "pid", time.monotonic()
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() - start < 20
        time.sleep(0.05)
    for _ in range(2):
        os.kill(launcher, signal.SIGTERM)
        time.sleep(0.5)
    assert os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]) == 130
    assert not Path(f"/proc/{pid.read_text()}").exists()


@pytest.mark.parametrize("seconds", [0.4, 1.0])
def test_ctrl_c_while_a_launch_starts_prints_no_traceback(tmp_path, seconds):
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
