"""Several processes compute what one computes: losses, weights, statistics and queue; and they end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask import checkpoint, datasets
from mixmask import config as configs
from mixmask.config import ConfigError
from mixmask.datasets.views import train_batches
from mixmask.frameworks import build_framework
from mixmask.runs import read_log
from mixmask.training import distributed, rendezvous
from mixmask.training.processes import check_processes, fitting_processes
from mixmask.training.rendezvous import World, find, first_host
from pretrain import train as script
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[2]
FOUR = ("mix_groups=4", "backbone.bn_groups=4", "run.log_every=1", "mscn.grid=3", "mscn.crop_size=8", "mscn.crops=1")
CASES = [("vanilla", True), ("unmix", False), ("mixmask", True), ("mixmask", False), ("both", True), ("erase", False)]
CASES += [("mscn", True)]


def launch(
    config: configs.Pretrain, directory: Path, processes: int, alter: Callable[[int], object] = lambda rank: None
) -> list[int]:
    """Train in `processes` children, in the environment that torchrun gives; `alter(rank)` comes first in each."""
    port = free_port()
    return [start(config, directory, rank, processes, port, alter) for rank in range(processes)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(config: configs.Pretrain, directory: Path, rank: int, processes: int, port: int, alter: Callable) -> int:
    """One of the children: its process id. What `alter(rank)` returns is called after the training."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            after = alter(rank)
            configs.main_guard(lambda: train(config, directory))
            if after:
                after()
            status = 0
        except SystemExit as exit:
            status = exit.code
        finally:
            os._exit(status)
    return pid


def wait(children: list[int]) -> list[int]:
    """Exit statuses, or minus the signal that killed a child."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def wait_for_lines(directory: Path, lines: int) -> None:
    deadline = time.monotonic() + 30
    while len(read_log(directory)) < lines and time.monotonic() < deadline:
        time.sleep(0.002)


def slowly(rank: int) -> None:
    """Each step takes a while, so that a signal finds the process at work."""
    step = script.set_learning_rate
    script.set_learning_rate = lambda *a: (time.sleep(0.05), step(*a))


def in_double(rank: int) -> None:
    """Weights, images and all that follows from them in float64; without k-NN."""
    build, views = script.build, script.views

    def build_double(*arguments):
        framework, optimizer = build(*arguments)
        return framework.double(), optimizer

    script.build, script.evaluate = build_double, lambda *_, **__: {}
    script.views = lambda *arguments: ([x.double() for x in batch] for batch in views(*arguments))


def log(directory: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_log(directory)]


def losses(directory: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in read_log(directory) if line["kind"] == "step"], dtype=torch.float64)


def model(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(directory / "checkpoint.pt")["model"]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the largest differing element, relative to the largest element."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


# -------------------------------------------------------------------------------------------- the same computation


@pytest.mark.parametrize(("method", "symmetric"), CASES)
def test_two_and_four_processes_compute_what_one_computes(tiny, tmp_path, method, symmetric):
    """In float64 what is left is the order of summation: 1e-14 in the loss, more in what training amplifies."""
    config = tiny(*FOUR, f"method={method}", f"moco.symmetric={symmetric}", "epochs=1", "erase.fill=noise")
    several = (2, 4) if (method, symmetric) == ("mixmask", False) else (4,)
    for processes in (1, *several):
        assert not any(wait(launch(config, tmp_path / str(processes), processes, in_double)))
    one, alone = model(tmp_path / "1"), log(tmp_path / "1")
    for processes in several:
        shared, lines = model(tmp_path / str(processes)), log(tmp_path / str(processes))
        assert distance(losses(tmp_path / str(processes)), losses(tmp_path / "1")) < 1e-11
        assert {k: distance(shared[k].double(), one[k].double()) < 1e-8 for k in one} == dict.fromkeys(one, True)
        for line, expected in zip(lines, alone, strict=True):
            assert all(line[k] == pytest.approx(v, rel=1e-8) for k, v in expected.items() if k != "kind")


def test_float32_curves_start_together(tiny, tmp_path):
    """Sums in another order, which training then amplifies (this net, with 4 images a group, a thousandfold a step)."""
    config = tiny(*FOUR, "moco.shuffle_bn=false", "epochs=1", "knn.every=0")
    for processes in (1, 4):
        assert not any(wait(launch(config, tmp_path / str(processes), processes)))
    one, four = losses(tmp_path / "1"), losses(tmp_path / "4")
    assert distance(four[:1], one[:1]) < 5e-7 and distance(four[1:2], one[1:2]) < 1e-4


def test_processes_hold_the_same_bits_and_the_log_has_their_checksum(tiny, tmp_path):
    def keep(rank):
        built, build = [], script.build
        script.build = lambda *a: built.append(build(*a)) or built[0]
        return lambda: torch.save(built[0][0].state_dict(), tmp_path / f"{rank}.pt")

    assert not any(wait(launch(tiny(*FOUR, "epochs=1"), tmp_path / "run", 4, keep)))
    saved = model(tmp_path / "run")
    for rank in range(4):
        held = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert held.keys() == saved.keys() and all(torch.equal(held[k], saved[k]) for k in saved)
    last = log(tmp_path / "run")[-1]
    assert (last["processes"], last["checksum"]) == (4, f"{distributed.checksum(saved, 6):08x}")


def test_processes_that_differ_are_found_out(tiny, tmp_path, capfd):
    def spoil(rank):
        if rank == 1:
            script.average = distributed.average
            distributed.average = lambda framework: (script.average(framework), framework.queue[0].neg_())

    assert wait(launch(tiny(*FOUR), tmp_path, 2, spoil)) == [1, 1]
    assert re.findall(r"error: step 6: the processes differ \(checksums \w{8}, \w{8}\)", capfd.readouterr().err)


@pytest.mark.parametrize("files", [False, True])
def test_a_process_reads_and_augments_its_rows_as_in_the_whole_batch(tiny, tmp_path, files):
    config = tiny("augment.order=[crop, flip, jitter, grayscale, blur]", "augment.blur_prob=0.5")
    dataset = datasets.load("squares", "", "train")
    if files:
        paths = [str(tmp_path / f"{number}.png") for number in range(24)]
        for path, image in zip(paths, dataset.images.permute(0, 2, 3, 1).numpy(), strict=False):
            Image.fromarray(np.ascontiguousarray(image)).save(path)
        dataset = datasets.Files(paths, dataset.labels[:24], dataset.classes, "squares")
    arguments = (dataset, config.augment, 8, 3, 1, 2, torch.device("cpu"))
    whole = list(train_batches(*arguments, skip=1, crops=[config.augment]))
    for rows in (slice(0, 4), slice(6, 8)):
        part = list(train_batches(*arguments, skip=1, crops=[config.augment], rows=rows))
        for (views, indices), (own_views, own_indices) in zip(whole, part, strict=True):
            assert torch.equal(indices[rows], own_indices)
            assert all(torch.equal(a[rows], b) for a, b in zip(views, own_views, strict=True))


# ------------------------------------------------------------------------------------------- one run, one directory


def test_only_the_first_process_writes_and_speaks(tiny, tmp_path, capfd):
    assert not any(wait(launch(tiny(*FOUR, "epochs=1"), tmp_path / "two", 2)))
    out, err = capfd.readouterr()
    assert out.count("epoch 1/1  loss") == 1 and out.count("2 processes of 8 images each") == 1 and err == ""
    train(tiny(*FOUR, "epochs=1"), tmp_path / "one")
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    assert wait(launch(tiny(*FOUR, "epochs=1"), tmp_path / "two", 4)) == [0, 0, 0, 0]
    assert capfd.readouterr().out.count("nothing to do") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_of_four_processes_continues_with_fewer(tiny, tmp_path, processes):
    config = tiny(*FOUR)
    children = launch(config, tmp_path / "run", 4, lambda rank: (slowly(rank), in_double(rank))[1])
    wait_for_lines(tmp_path / "run", 4)
    os.kill(children[2], signal.SIGTERM)
    assert wait(children) == [130] * 4
    assert 0 < checkpoint.load(tmp_path / "run/checkpoint.pt")["step"] < 12
    assert not any(wait(launch(config, tmp_path / "run", processes, in_double)))
    assert not any(wait(launch(config, tmp_path / "one", 1, in_double)))
    assert [line["step"] for line in log(tmp_path / "run")] == [line["step"] for line in log(tmp_path / "one")]
    assert distance(losses(tmp_path / "run"), losses(tmp_path / "one")) < 1e-10


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """A run of two processes."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert not any(wait(launch(tiny(*FOUR), directory, 2)))
    return directory


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_on_one_process_stops_all_and_loses_nothing(tiny, tmp_path, capfd, undisturbed, number):
    """Stopped at the same step, resumed, equal to the undisturbed run bit by bit."""
    config = tiny(*FOUR)
    children = launch(config, tmp_path / "run", 2, slowly)
    wait_for_lines(tmp_path / "run", 9)
    os.kill(children[1], number)
    assert wait(children) == [130, 130] and "the same command continues" in capfd.readouterr().err
    assert not any(wait(launch(config, tmp_path / "run", 2)))
    assert log(tmp_path / "run") == log(undisturbed)
    stopped, whole = model(tmp_path / "run"), model(undisturbed)
    assert all(torch.equal(stopped[k], whole[k]) for k in whole)


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_killed_process_ends_the_others_within_seconds(tiny, tmp_path, capfd, victim):
    children = launch(tiny(*FOUR), tmp_path, 4, slowly)
    wait_for_lines(tmp_path, 4)
    os.kill(children[victim], signal.SIGKILL)
    killed = time.monotonic()
    statuses = wait(children)
    assert time.monotonic() - killed < 10
    assert statuses == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and all("another process of this run has ended" in line for line in errors)


def test_a_loss_that_is_not_finite_stops_all_processes(tiny, tmp_path, capfd):
    """Each says so, at the same step; the first one writes what it was, once."""
    children, started = launch(tiny(*FOUR, "optimizer.lr=1e5", "epochs=20"), tmp_path, 2), time.monotonic()
    assert wait(children) == [1, 1] and time.monotonic() - started < 60
    said = r"error: \S+: \S+ is (?:nan|inf) at step (\d+); stopped, (.*), no checkpoint was written yet\n"
    steps, where = zip(*re.findall(said, capfd.readouterr().err), strict=True)
    written = f"batch and state are in {tmp_path / 'nonfinite.json'} and nonfinite.pt"
    assert len(set(steps)) == 1 and sorted(where) == [written, "the first process says why"]
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == int(steps[0]) and {len(batch) for batch in report["indices"].values()} == {16}
    assert checkpoint.load(tmp_path / "nonfinite.pt")["step"] > report["step"]


def test_bad_input_of_the_first_process_ends_the_others(tiny, tmp_path, capfd):
    config = tiny(*FOUR, "dataset=cifar100", "run.download=false", f"run.data_root={tmp_path / 'nowhere'}")
    assert wait(launch(config, tmp_path / "run", 2)) == [1, 1]
    err = capfd.readouterr().err
    assert "does not exist" in err and "another process of this run has ended" in err


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("items", "processes", "words"),
    [
        (FOUR, 3, r"3 processes do not fit \(batch_size=16 is no multiple\); numbers that do: 1, 2, 4, 8$"),
        (FOUR, 16, r"16 processes do not fit \(batch_size=16: each needs two images.*: 1, 2, 4, 8$"),
        (
            ("batch_size=48", "backbone.bn_groups=8"),
            6,
            r"backbone.bn_groups=8: a multiple or a divisor.*: 1, 2, 4, 8, 16, 24$",
        ),
        (
            (*FOUR, "run.accumulate=2"),
            8,
            r"\(with run.accumulate=2, mix_groups=4 must be a multiple; or run.accumulate=1\); .*: 1, 2, 4$",
        ),
    ],
)
def test_a_number_that_splits_a_group_is_refused(tiny, tmp_path, monkeypatch, items, processes, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(processes if name == "WORLD_SIZE" else 0))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match=words):
        train(tiny(*items), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fitting_processes_of_every_recipe():
    """What divides the batch: groups and losses that span processes are exchanged. Only pre-training is shared."""
    found = {path.stem: fitting_processes(configs.load(path)) for path in (ROOT / "pretrain/configs").glob("*")}
    assert len(found) >= 20 and all({1, 2, 4, 8} <= set(fitting) for fitting in found.values())
    assert found["cifar100_simclr"] == tuple(2**k for k in range(9))
    assert fitting_processes(configs.Execution()) == (1,)
    with pytest.raises(ConfigError, match=r"2 processes do not fit \(only pre-training and detection can be shared"):
        check_processes(configs.Execution(), 2)


# ------------------------------------------------------------------------------------------- finding each other

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
BATCH |= {"SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(5, 8, 1, "env://")),
        ({**STEP, **TORCHRUN}, World(5, 8, 1, "env://")),  # torchrun inside a SLURM job
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, World()),
        ({"WORLD_SIZE": "8"}, World()),  # left over from something else
        (STEP, World(3, 4, 1, "tcp://gpu07:15077")),
        ({**STEP, "SLURM_RESTART_COUNT": "2"}, World(3, 4, 1, "tcp://gpu07:17071")),
        ({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}, World(3, 4, 1, "tcp://10.0.0.1:4000")),
        ({**STEP, "SLURM_STEP_NODELIST": "gpu08"}, World(3, 4, 1, "tcp://gpu08:15077")),
        (BATCH, World()),  # a batch script of four tasks that runs its commands without srun
        ({k: v for k, v in BATCH.items() if k != "SLURM_PROCID"}, World()),  # a shell inside salloc
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World()),  # a job of one task
    ],
)
def test_place_among_the_processes(environ, world):
    assert find(environ) == world


@pytest.mark.parametrize(
    "environ",
    [
        {**TORCHRUN, "RANK": "eight"},
        {**TORCHRUN, "RANK": "8"},
        {**TORCHRUN, "RANK": "-1"},
        {k: v for k, v in STEP.items() if k != "SLURM_JOB_NODELIST"},
        {k: v for k, v in STEP.items() if k != "SLURM_LOCALID"},
        {**TORCHRUN, "LOCAL_RANK": "first"},
        {**TORCHRUN, "MASTER_PORT": "0"},
        {**TORCHRUN, "MASTER_PORT": "65536"},
        {**STEP, "MASTER_PORT": "abc"},
    ],
)
def test_environment_that_makes_no_sense_is_refused(environ):
    with pytest.raises(ConfigError, match="the process group's environment variables"):
        find(environ)


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_several_processes_that_are_not_told_where_to_meet_are_refused(name):
    """They would each train alone, in the same directory."""
    for environ in ({**TORCHRUN, name: ""}, {k: v for k, v in TORCHRUN.items() if k != name}):
        with pytest.raises(ConfigError, match=f"environment variables: {name} is missing$"):
            find(environ)


def test_a_port_that_is_no_number_is_one_line():
    with pytest.raises(ConfigError, match=r"variables: MASTER_PORT: expected a number, found 'abc'$"):
        find({**TORCHRUN, "MASTER_PORT": "abc"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("a-[007,9-12]-ib,b3", "a-007-ib"), ("r2n[03-04],r1", "r2n03")],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    gpu, torchrun, slurm = torch.device("cuda"), World(5, 8, 1, "env://"), World(3, 4, 1, "tcp://n1:15000")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torchrun.device(gpu) == slurm.device(gpu) == torch.device("cuda:1")
    assert torchrun.device(torch.device("cpu")) == torch.device("cpu") and World().device(gpu) == gpu
    with pytest.raises(ConfigError, match=r"run.device: cuda:1 for each of 8 processes"):
        torchrun.device(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert slurm.device(gpu) == torch.device("cuda:0")  # SLURM shows each process its own
    with pytest.raises(ConfigError, match="process 2 of this machine, which has 1 GPU"):
        torchrun.device(gpu)


def test_error_lines_of_several_processes_do_not_run_together(monkeypatch):
    """Each is written at once, with its end of line."""
    written = []

    class Stderr:
        write, flush = staticmethod(written.append), staticmethod(lambda: None)

    def fail() -> None:
        raise ConfigError("seed: expected a number")

    monkeypatch.setattr(sys, "stderr", Stderr)
    with pytest.raises(SystemExit):
        configs.main_guard(fail)
    assert written == ["error: seed: expected a number\n"]


def test_checksum_covers_weights_statistics_and_queue(tiny):
    state = build_framework(tiny()).state_dict()
    whole = distributed.checksum(state)
    for name in ("encoder.backbone.conv1.weight", "encoder.backbone.bn1.running_var", "queue", "pointer"):
        flipped = state[name].clone()
        flipped.reshape(-1).view(torch.uint8)[0] ^= 1
        assert distributed.checksum({**state, name: flipped}) != whole


def test_one_process_exchanges_nothing():
    x, flags = torch.randn(3, 2), (True, False)
    assert distributed.gather(x) is x and distributed.any_rank(*flags) == list(flags)
    assert distributed.local_slice(6) == slice(0, 6) and distributed.assert_in_sync({"x": x}, 1) == {}
    assert (distributed.rank(), distributed.size()) == (0, 1) and not torch.distributed.is_initialized()


def test_processes_that_do_not_come_are_named(tmp_path, tiny, monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "ARRIVAL", timedelta(seconds=1))
    children = [start(tiny(*FOUR), tmp_path, 0, 2, free_port(), lambda rank: None)]
    assert wait(children) == [1]
    assert re.search(r"error: 2 processes did not find each other at env://", capfd.readouterr().err)


def torchrun(tmp_path, *sets):
    """Two processes, by the command as one types it."""
    small = "dataset=photos mix_groups=2 backbone.bn_groups=2 backbone.width=2 epochs=1 knn.every=0 moco.queue=512"
    small += " knn.k=5 run.device=cpu augment.size=8 backbone.stem=tiny"
    sets = [*small.split(), *sets]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "pretrain/train.py"]
    command += ["--config", "pretrain/configs/cifar100_moco.yaml", "--run-dir", str(tmp_path), "--set", *sets]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command[5:5] = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)


def test_torchrun_trains_on_the_cpu(tmp_path):
    done = torchrun(tmp_path, "batch_size=500")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1  loss") == 1 and read_log(tmp_path)[-1]["processes"] == 2


def test_torchruns_report_of_a_refusal_ends_with_our_line(tmp_path):
    done = torchrun(tmp_path, "batch_size=35", "mix_groups=1", "backbone.bn_groups=1")
    refusal = "error: 2 processes do not fit (batch_size=35 is no multiple); numbers that do: 1, 5, 7"
    *_, last, rule = done.stderr.rstrip().splitlines()
    assert done.returncode == 1 and set(rule) == {"="} and last.split(" : ")[1] == refusal
    assert refusal in done.stderr.splitlines()  # ours, before torchrun has noticed


def test_a_process_that_waits_for_others_says_at_once_for_whom_and_where():
    """A shell inside an interactive step of two tasks, of which it is the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import torch\nfrom mixmask.training import rendezvous\nworld = rendezvous.find()\n"
    code += "with rendezvous.start(world, torch.device('cpu')):\n    pass\n"
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    step |= {"SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    words, environment = [sys.executable, "-c", code], {**os.environ, **step}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        process.kill()
    expected = f"note: process 1 of 2 of SLURM step 7.0 waits at tcp://localhost:{port} for the other one"
    assert line == f"{expected}; one process alone: srun --ntasks=1\n"
