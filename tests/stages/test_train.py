"""The pre-training loop: numbers that stay, runs that survive anything, bad input that touches nothing."""

import fcntl
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from eval import knn as knn_script
from eval import linear as linear_script
from mixmask import checkpoint
from mixmask import config as configs
from mixmask.config import UserError
from mixmask.runs import read_log
from mixmask.training.clock import Work
from pretrain import train as script
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[2]


def log(directory: Path) -> list[dict]:
    """The log without its timings: what two equal runs share."""
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_log(directory)]


def state(directory: Path) -> dict:
    return checkpoint.load(directory / "checkpoint.pt")


def same(a: object, b: object) -> bool:
    """Equal, bit by bit, at any depth."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(directory: Path, undisturbed: Path) -> None:
    """Weights, queue, optimiser, random states, log and result: all but the timings."""
    a, b = state(directory), state(undisturbed)
    for key in a.keys() - {"config"}:  # the config's `run` section may differ
        assert same(a[key], b[key]), key
    assert log(directory) == log(undisturbed)
    results = [json.loads((d / "result.json").read_text()) for d in (directory, undisturbed)]
    assert results[0]["metrics"] == results[1]["metrics"]


def start(config: configs.Pretrain, directory: Path) -> int:
    """Train in a child process, as the script would; its process id."""
    pid = os.fork()
    if not pid:
        status, step = 1, script.set_learning_rate
        script.set_learning_rate = lambda *a: (time.sleep(0.05), step(*a))  # so that a signal finds it at work
        try:
            configs.main_guard(lambda: train(config, directory))
            status = 0
        except SystemExit as exit:
            status = exit.code
        finally:
            os._exit(status)
    return pid


def stop(pid: int, number: int, directory: Path, lines: int, delay: float = 0.0) -> int:
    """Send the signal once the log has so many lines; the exit status, or minus the signal that killed it."""
    deadline = time.monotonic() + 30
    while len(read_log(directory)) < lines and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """The tiny run from start to end: 2 epochs of 6 steps; 1 + (3 + 1) + (3 + 1) log lines."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train(tiny(), directory)
    return directory


# ------------------------------------------------------------------------------------------------ what it computes

# SSE4.1, AVX2, AVX-512 and one or two threads differ by up to 6e-4 in the last of these losses, at step 0 by 4e-7.
CURVES = {
    "vanilla": [11.881743, 10.522741, 9.418269, 8.073326],
    "mixmask": [22.392031, 19.004749, 14.835599, 13.877708],
}


@pytest.mark.parametrize("method", CURVES)
def test_loss_curve_is_pinned(tiny, tmp_path, method):
    short = ("backbone.arch=resnet18", "epochs=1", "run.log_every=1", "knn.every=0", "optimizer.lr=0.01")
    train(tiny(f"method={method}", *short), tmp_path)
    losses = [line["loss"] for line in log(tmp_path) if line["kind"] == "step"]
    assert losses[0] == pytest.approx(CURVES[method][0], rel=2e-6)
    assert losses[:4] == pytest.approx(CURVES[method], rel=1e-3)


def test_work_is_counted_once_and_a_multiply_add_as_two():
    work, weight = Work(), torch.ones(3, 5, requires_grad=True)
    for _ in range(2):
        with work.counted():
            (torch.ones(7, 3) @ weight).sum().backward()
    assert work.flops == 2 * 7 * 3 * 5 * 2  # forward, and the gradient of the weight


def test_log_lines_hold_what_is_promised(tiny, undisturbed):
    lines = read_log(undisturbed)
    parts = {"loss", "loss_clean", "loss_mixmask", "loss_mixmask_switch", "positive_similarity"}
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [0, 2, 4, 6, 8, 10]
    timing = {"seconds", "images_per_second", "tflops_per_second", "data_wait"}
    for line in steps:
        assert line.keys() == {"kind", "step", "epoch", "lr", "lambda_mixmask", "gradient_norm", "timing", *parts}
        assert line["gradient_norm"] > 0
        assert line["timing"].keys() == timing and 0 <= line["timing"]["data_wait"] <= 1
        terms = line["loss_clean"] + line["loss_mixmask"] + line["loss_mixmask_switch"]
        assert line["loss"] == pytest.approx(terms, rel=1e-6)
    before, *epochs = [line for line in lines if line["kind"] == "epoch"]
    measured = {"knn_k5_t0.1_out8", "feature_std", "effective_rank", "alignment", "uniformity"}
    assert before.keys() == {"kind", "step", "epoch", *measured} and before["epoch"] == 0
    for number, line in enumerate(epochs, 1):
        assert line.keys() == {"kind", "step", "epoch", "lr", "timing", *measured, *parts}
        assert (line["epoch"], line["step"]) == (number, 6 * number - 1) and line["timing"].keys() == timing


def test_epoch_line_is_the_mean_over_its_steps(tiny, tmp_path):
    train(tiny("epochs=1", "run.log_every=1"), tmp_path)
    steps = [line["loss"] for line in log(tmp_path) if line["kind"] == "step"]
    assert log(tmp_path)[-1]["loss"] == pytest.approx(sum(steps) / 6, rel=1e-6)


def test_result_names_every_metric_in_full(undisturbed):
    result = json.loads((undisturbed / "result.json").read_text())
    name = "knn_k5_t0.1_out8"
    assert result["metrics"].keys() == {"loss", f"{name}_last", f"{name}_best", f"{name}_init"}
    lines = {line["epoch"]: line for line in log(undisturbed) if line["kind"] == "epoch"}
    assert result["metrics"][f"{name}_last"] == lines[2][name] and result["metrics"][f"{name}_init"] == lines[0][name]
    assert result["metrics"][f"{name}_best"] == max(lines[1][name], lines[2][name])


def test_same_seed_same_run_and_another_seed_another(tiny, tmp_path, undisturbed):
    train(tiny("seed=1"), tmp_path)
    assert log(tmp_path)[1]["loss"] != log(undisturbed)[1]["loss"]
    assert same(state(tmp_path)["config"]["mask"], state(undisturbed)["config"]["mask"])


# ------------------------------------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize(
    ("lines", "delay", "minutes"),
    [(0, 0.01, 15), (2, 0.03, 15), (5, 0.0, 15), (7, 0.02, 15), (2, 0.05, 0), (3, 0.0, 0), (8, 0.01, 0)],
)
def test_sigkill_at_any_point_changes_nothing(tiny, tmp_path, undisturbed, lines, delay, minutes):
    config = tiny(f"run.checkpoint_minutes={minutes}")
    assert stop(start(config, tmp_path), signal.SIGKILL, tmp_path, lines, delay) == -signal.SIGKILL
    train(config, tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("lines", [3, 7])
def test_ctrl_c_and_sigterm_save_and_resume(tiny, tmp_path, undisturbed, capfd, number, lines):
    assert stop(start(tiny(), tmp_path), number, tmp_path, lines) == 130
    assert "the same command continues" in capfd.readouterr().err
    assert state(tmp_path)["step"] >= log(tmp_path)[-1]["step"]
    train(tiny(), tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 11])
def test_signal_after_any_step_loses_no_line(tiny, tmp_path, undisturbed, monkeypatch, step):
    """Step 6 is an epoch's last one: its line must be written, and its sums must not reach the next epoch."""
    finish, done = script.objective, []

    def counting(*arguments):
        done.append(1)
        if len(done) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish(*arguments)

    monkeypatch.setattr(script, "objective", counting)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path)
    assert state(tmp_path)["step"] == step
    monkeypatch.undo()
    train(tiny(), tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_crash_between_the_last_checkpoint_and_the_result_is_mended(tiny, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(script, "result_of", lambda *_: os._exit(9))
    os.waitpid(start(tiny(), tmp_path), 0)
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    train(tiny(), tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_finished_run_says_so_and_changes_nothing(tiny, recipe, cli, undisturbed):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in undisturbed.iterdir()}
    status, out, err = cli(script.main, "--config", recipe, "--run-dir", undisturbed)
    assert status == 0 and "is finished" in out and "nothing to do" in out and err == ""
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in undisturbed.iterdir()} == before


def test_loss_that_is_not_finite_stops_the_run_and_is_never_saved(recipe, cli, tmp_path):
    words = ["--config", recipe, "--run-dir", tmp_path / "run", "--set", "run.checkpoint_minutes=0"]
    status, _, err = cli(script.main, *words, "optimizer.lr=1e4", "run.log_every=1000", "epochs=50")
    assert status == 1 and re.fullmatch(r"error: \S+: .+ is (nan|inf) at step \d+; stopped, .* intact\n", err)
    found = state(tmp_path / "run")
    assert found["step"] > 0 and all(v.isfinite().all() for v in found["model"].values())
    assert not (tmp_path / "run/result.json").exists()
    assert all(math.isfinite(v) for line in log(tmp_path / "run") for v in line.values() if isinstance(v, float))


# ----------------------------------------------------------------------------------------------------- bad input

BAD = [
    (["optimiser.lr=1"], "did you mean 'optimizer.lr'"),
    (["epochs=many"], "epochs: expected a whole number"),
    (["mask.ratio=2"], "mask.ratio: expected between 0 and 1"),
    (["method=mixmsk"], "did you mean 'mixmask'"),
    (["framework=simclr"], "no section 'simclr:'"),
    (["framework=mocoo"], "did you mean 'moco'"),
    (["dataset=squers"], "dataset: unknown data set 'squers'"),
    (["moco.queue=97"], "moco.queue: 97 keys, but the data set has only 96 images"),
    (["moco.temperature=0"], "moco.temperature: expected at least"),
    (["batch_size=97", "backbone.bn_groups=1"], "batch_size: 97 exceeds the 96 training images"),
    (["batch_size=15"], "backbone.bn_groups: 2 groups do not divide a batch of 15 images"),
    (["mix_groups=3"], "mix_groups: 3 groups do not divide a batch of 16 images"),
    (["mix_groups=16"], "mix_groups: a mixture needs at least two images in a group"),
    (["mask.ratio=[1, 1]"], "mask.ratio: [1.0, 1.0] mixes nothing"),
    (["method=mscn", "mscn.grid=4", "mscn.crops=0", "mscn.focal_side=0.02"], "mscn.focal_side: a window of 0.02 of 12"),
    (["augment.order=[crop, flip, crop]"], "augment.order: expected each operation once"),
    (["augment.jitter=[0.4, 0.4, 0.4, 0.6]"], "augment.jitter: expected a hue of at most 0.5"),
    (["batch_size=2"], "BatchNorm needs at least two images"),
    (["mask.grid=13"], "mask.grid: 13 cells do not fit into an image of 12x12 pixels"),
    (["knn.k=97"], "knn.k: 97 neighbours, but there are only 96"),
    (["augment.mean=[0.5]"], "augment.mean: expected three numbers"),
    (["dataset=cifar100", "run.download=false", "run.data_root=nowhere/at/all"], "data root 'nowhere/at/all'"),
    (["run.device=cuda:99"], "run.device"),
    (["run.device=meta"], "run.device"),
]


@pytest.mark.parametrize(("items", "words"), BAD, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_writes_nothing(recipe, cli, tmp_path, items, words):
    status, _, err = cli(script.main, "--config", recipe, "--set", *items, "--run-dir", tmp_path / "run")
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "run").exists() or [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]


def test_refused_setting_does_not_block_the_run_directory(recipe, cli, tmp_path):
    words = ["--config", recipe, "--run-dir", tmp_path / "run"]
    assert cli(script.main, *words, "--set", "moco.queue=97")[0] == 1
    assert cli(script.main, *words, "--set", "epochs=1")[0] == 0


def test_run_directory_of_another_config_stays_as_it_is(recipe, cli, undisturbed):
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    status, _, err = cli(script.main, "--config", recipe, "--set", "moco.dim=4", "--run-dir", undisturbed)
    assert status == 1 and "another config (moco.dim: 8 there, 4 now)" in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before


def test_cut_off_checkpoint_in_the_run_directory_is_refused_and_kept(tiny, recipe, cli, tmp_path):
    stop(start(tiny(), tmp_path / "run"), signal.SIGINT, tmp_path / "run", 3)
    path = tmp_path / "run/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in path.parent.iterdir()}
    status, _, err = cli(script.main, "--config", recipe, "--run-dir", path.parent)
    assert status == 1 and re.fullmatch(r"error: .*checkpoint\.pt is cut off .*\n", err)
    assert {path.name: path.read_bytes() for path in path.parent.iterdir()} == before


def test_set_may_be_given_more_than_once(recipe, cli, tmp_path):
    words = ["--set", "method=vanilla", "--set", "epochs=1", "knn.every=0"]
    assert cli(script.main, "--config", recipe, "--run-dir", tmp_path / "run", *words)[0] == 0
    found = state(tmp_path / "run")["config"]
    assert (found["method"], found["epochs"]) == ("vanilla", 1)


@pytest.mark.parametrize("directory", ["with space/and 'quote'", "./relative"])
def test_run_directory_may_have_any_name(recipe, cli, tmp_path, monkeypatch, directory):
    monkeypatch.chdir(tmp_path)
    status, out, _ = cli(script.main, "--config", recipe, "--run-dir", directory, "--set", "epochs=1", "knn.every=0")
    assert status == 0 and "is finished" in out and (tmp_path / directory / "result.json").exists()


# ------------------------------------------------------------------------------------------------------- for people


@pytest.mark.parametrize("module", [script, knn_script, linear_script], ids=lambda m: m.__name__)
def test_help_shows_an_example(cli, module):
    status, out, _ = cli(module.main, "--help")
    assert status == 0 and "Example:\n    python " in out and "--set" in out


def test_bar_on_a_terminal_and_plain_lines_in_a_file(tiny, tmp_path, capfd):
    os.waitpid(start(tiny("epochs=1"), tmp_path / "file"), 0)
    plain = "".join(capfd.readouterr())
    assert "\r" not in plain and plain.count("epoch 1/1  loss") == 1
    pid, terminal = pty.fork()
    if not pid:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os._exit(not train(tiny("epochs=1"), tmp_path / "terminal"))
    output = b""
    try:
        while chunk := os.read(terminal, 4096):
            output += chunk
    except OSError:  # Linux's way of saying that the other end is closed
        os.waitpid(pid, 0)
    assert b"epoch 1/1:   0%|" in output and output.count(b"epoch 1/1  loss") == 1


def test_script_starts_from_the_root_and_names_a_misspelt_key(recipe):
    command = [sys.executable, "pretrain/train.py", "--config", str(recipe), "--set", "metod=mixmask"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: unknown key 'metod'; did you mean 'method'? (in {recipe})\n"


def test_nothing_but_a_user_error_is_turned_into_a_line():
    """A bug must show where it is."""
    with pytest.raises(ZeroDivisionError):
        configs.main_guard(lambda: 1 / 0)
    assert issubclass(checkpoint.CheckpointError, UserError)
