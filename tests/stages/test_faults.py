"""Nothing lost, honest failure: each row of docs/faults.md."""

import ast
import ctypes
import dataclasses
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval import knn as knn_script
from eval.linear import probe
from mixmask import checkpoint, datasets, registry
from mixmask import config as configs
from mixmask.config import UserError
from mixmask.datasets import DataError, cifar100, loading
from mixmask.runs import Run, previous_checkpoint, read_log
from mixmask.training import loop, nonfinite
from pretrain import train as script
from pretrain.train import train
from tests.stages.test_train import assert_same_run, log, state

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """The tiny run from start to end: 2 epochs of 6 steps, a checkpoint after each."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train(tiny(), directory)
    return directory


@pytest.fixture(scope="module")
def probed(tiny_linear, undisturbed, tmp_path_factory) -> Path:
    """The probe of its encoder: 3 epochs."""
    directory = tmp_path_factory.mktemp("probed")
    probe(tiny_linear(), undisturbed / "checkpoint.pt", directory)
    return directory


def stopped(tiny: Callable, directory: Path, monkeypatch: pytest.MonkeyPatch, step: int = 9) -> None:
    """A run that stops after `step` steps by itself, with the checkpoints of step 6 and of this one."""
    finish, done = script.objective, []

    def counting(*arguments):
        done.append(1)
        if len(done) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "objective", counting)
        train(tiny(), directory)


def one_line(err: str, *words: str) -> bool:
    """Whether standard error is one line, `error: ...`, that has all the words."""
    return err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words)


# ------------------------------------------------------------------------------------------- damaged checkpoints

DAMAGE = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "a page of zeros": lambda content: content[:8192] + bytes(4096) + content[12288:],
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_the_one_before_is_used(tiny, tmp_path, undisturbed, monkeypatch, capsys, damage):
    stopped(tiny, tmp_path, monkeypatch)
    path = tmp_path / "checkpoint.pt"
    assert (state(tmp_path)["step"], checkpoint.load(previous_checkpoint(path))["step"]) == (9, 6)
    capsys.readouterr()
    change = DAMAGE[damage]
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    train(tiny(), tmp_path)
    assert "resuming from the previous one, checkpoint.previous.pt\n" in capsys.readouterr().out
    assert_same_run(tmp_path, undisturbed)
    assert not previous_checkpoint(path).exists()


def test_both_checkpoints_damaged_is_one_line_that_names_both(tiny, recipe, cli, tmp_path, monkeypatch):
    stopped(tiny, tmp_path / "run", monkeypatch)
    path = tmp_path / "run/checkpoint.pt"
    path.write_bytes(b"")
    previous_checkpoint(path).write_bytes(b"x")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    status, _, err = cli(script.main, "--config", recipe, "--run-dir", path.parent)
    assert status == 1 and one_line(err, str(path), str(previous_checkpoint(path)), "start it again")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("epochs", [0, 1])
def test_probe_goes_on_from_the_checkpoint_before(
    tiny_linear, undisturbed, probed, tmp_path, monkeypatch, capsys, epochs
):
    line = loop.epoch_line
    monkeypatch.setattr(loop, "epoch_line", lambda epoch, *a: line(epoch, *a) if epoch <= epochs else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe(tiny_linear(), undisturbed / "checkpoint.pt", tmp_path)
    monkeypatch.undo()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1])
    if epochs == 0:  # there is no other
        with pytest.raises(UserError, match="cut off"):
            probe(tiny_linear(), undisturbed / "checkpoint.pt", tmp_path)
        return
    probe(tiny_linear(), undisturbed / "checkpoint.pt", tmp_path)
    assert "resuming from the previous one" in capsys.readouterr().out
    assert_same_probe(tmp_path, probed)


def test_knn_killed_before_its_result_is_made_again(cli, undisturbed, tmp_path, monkeypatch):
    """It has no state of its own: what counts is that there is a whole result, or none."""
    words = ["--checkpoint", undisturbed / "checkpoint.pt", "--run-dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        patch.setattr(sys, "argv", ["knn.py", *map(str, words)])
        assert forked(knn_script.main) == -signal.SIGKILL
    assert not (tmp_path / "run/result.json").exists()
    assert cli(knn_script.main, *words)[0] == 0
    online = json.loads((undisturbed / "result.json").read_text())["metrics"]
    found = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    assert found == {name: online[name] for name in found} and found


def assert_same_probe(directory: Path, undisturbed: Path) -> None:
    a, b = (checkpoint.load(d / "checkpoint.pt") for d in (directory, undisturbed))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in ("weight", "bias"))
    assert log(directory) == log(undisturbed)


# --------------------------------------------------------------------------------------------- numbers not finite


@pytest.mark.parametrize(
    ("items", "saved"), [(["run.log_every=5"], 6), (["run.log_every=1000"], 6), (["run.checkpoint_minutes=0"], 8)]
)
def test_loss_not_finite_saves_step_indices_and_state(
    tiny, recipe, cli, tmp_path, undisturbed, monkeypatch, items, saved
):
    """Whenever it is noticed: step 8, the third of epoch 2, is named with its images and those of the step before."""
    real, calls = script.objective, []

    def broken(*arguments):
        loss, parts, targets = real(*arguments)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 9 else loss), parts, targets

    monkeypatch.setattr(script, "objective", broken)
    run = tmp_path / "run"
    status, _, err = cli(script.main, "--config", recipe, "--run-dir", run, "--set", *items)
    assert status == 1 and one_line(
        err, "loss is nan at step 8; stopped", str(run / "nonfinite.json"), "checkpoint is intact"
    )
    report = json.loads((run / "nonfinite.json").read_text())
    batches = datasets.batch_indices(96, 16, 0, 1)
    assert (report["step"], report["epoch"]) == (8, 2) and report["sums"]["loss"] == "nan"
    assert report["indices"] == {"7": batches[1].tolist(), "8": batches[2].tolist()}
    assert report["lr"] == pytest.approx(0.03) and report["gradient_norm"] == "nan"
    noticed = checkpoint.load(run / "nonfinite.pt")
    assert noticed["step"] >= 9 and not all(v.isfinite().all() for v in noticed["model"].values())
    assert state(run)["step"] == saved
    monkeypatch.undo()
    train(tiny(), run)
    assert_same_weights(run, undisturbed)


def assert_same_weights(directory: Path, undisturbed: Path) -> None:
    a, b = state(directory)["model"], state(undisturbed)["model"]
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_probe_not_finite_saves_step_indices_and_state(tiny_linear, undisturbed, tmp_path):
    line = r"loss is \w+ at step \d; stopped, .*nonfinite\.json .*, no checkpoint was written yet$"
    with pytest.raises(UserError, match=line):
        probe(tiny_linear("optimizer.lr=1e38"), undisturbed / "checkpoint.pt", tmp_path)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    step, batches = report["step"], datasets.batch_indices(96, 16, 0, 0)
    assert 0 < step < 6 and report["epoch"] == 1
    assert report["indices"] == {str(i): batches[i].tolist() for i in (step - 1, step)}
    assert checkpoint.load(tmp_path / "nonfinite.pt")["model"].keys() == {"weight", "bias"}


def test_probe_whose_last_update_breaks_the_weights_saves_no_checkpoint(tiny_linear, undisturbed, tmp_path):
    """One step an epoch: its loss is finite, the weights after it are not."""
    with pytest.raises(UserError, match="the norm of weights and buffers is inf at step 0"):
        probe(tiny_linear("optimizer.lr=1e38", "batch_size=96"), undisturbed / "checkpoint.pt", tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_not_finite_on_a_full_disk_still_says_what_happened(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "write_atomically", failing)
    line = r"is (nan|inf) at step \d+; stopped, cannot write x: no space, no checkpoint was written yet$"
    with pytest.raises(UserError, match=line):
        train(tiny("optimizer.lr=1e38", "epochs=20", "knn.every=0"), tmp_path)


def failing(*_: object) -> None:
    raise UserError("cannot write x: no space")


# ------------------------------------------------------------------------------------------------- disks that fail


def test_file_that_may_not_grow_is_one_line(tiny, tmp_path, undisturbed, monkeypatch, capfd):
    """A quota, as RLIMIT_FSIZE: the checkpoint needs more, the log less."""
    stopped(tiny, tmp_path, monkeypatch)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capfd.readouterr()
    assert forked(lambda: train(tiny(), tmp_path), lambda: limit_files(200_000)) == 1
    assert one_line(capfd.readouterr().err, "cannot write", "checkpoint.pt: File too large", "intact")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*.new"))
    train(tiny(), tmp_path)
    assert_same_run(tmp_path, undisturbed)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def forked(main: Callable[[], object], before: Callable[[], None] = lambda: None) -> int:
    """The exit status of `main` in a child process, as a script would run it."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            before()
            configs.main_guard(main)
            status = 0
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


NO_NAMESPACE = 77


def mount(path: Path, size: str) -> None:
    """In a child process: a file system in memory at `path`, seen by this process alone; no privilege is needed."""
    libc, (uid, gid) = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        os._exit(NO_NAMESPACE)
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    except OSError:
        os._exit(NO_NAMESPACE)
    libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: nothing of this is seen outside
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(NO_NAMESPACE)


def remount_read_only(path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 32 | 1, None):  # MS_REMOUNT | MS_RDONLY
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def skip_without_namespace(status: int) -> int:
    if status == NO_NAMESPACE:
        pytest.skip("this machine allows no mount namespaces")
    return status


def test_full_disk_is_one_line_and_the_last_checkpoint_is_whole(tiny, tmp_path, capfd):
    """A disk of 1.8 MB, checkpoints of 1.0 MB: there is room for the first, not for the second."""

    def fill() -> None:
        mount(tmp_path, "1800k")
        try:
            train(tiny(), tmp_path / "run")
        finally:
            print("left:", state(tmp_path / "run")["step"], os.listdir(tmp_path / "run"), flush=True)

    assert skip_without_namespace(forked(fill)) == 1
    out, err = capfd.readouterr()
    assert one_line(err, "cannot write", "checkpoint.pt: No space left on device; ", "intact")
    assert re.search(r"left: 6 .*'checkpoint\.pt'", out) and ".new" not in out


def test_read_only_directory_is_one_line(tiny, tmp_path, capfd):
    def forbid() -> None:
        mount(tmp_path, "4m")
        remount_read_only(tmp_path)
        train(tiny(), tmp_path / "run")

    assert skip_without_namespace(forked(forbid)) == 1
    assert one_line(capfd.readouterr().err, f"cannot write the run directory {tmp_path / 'run'}: Read-only file system")


def test_directory_that_becomes_read_only_is_one_line(tiny, tmp_path, monkeypatch, capfd):
    """As file systems do after an error of the disk."""

    def forbid() -> None:
        mount(tmp_path, "20m")
        stopped(tiny, tmp_path / "run", monkeypatch)
        remount_read_only(tmp_path)
        Run.__init__ = lambda self, directory, config: vars(self).update(
            directory=directory, config=config, _lock=io.StringIO(), _log=None
        )  # opened before it happened
        train(tiny(), tmp_path / "run")

    assert skip_without_namespace(forked(forbid)) == 1
    assert one_line(capfd.readouterr().err, "cannot write", "log.jsonl: Read-only file system")


# --------------------------------------------------------------------------------------------------- data that goes


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The data set `files`: 96 and 40 image files, decoded by workers."""
    folder = tmp_path / "images"
    folder.mkdir()

    def load(split):
        images = datasets.load("squares", "", split)
        paths = [folder / f"{split}{i}.png" for i in range(len(images))]
        for path, pixels in zip(paths, images.images, strict=True):
            if not folder.exists():
                raise DataError(f"{folder} does not exist")
            if not path.exists():
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
        return datasets.Files([str(path) for path in paths], images.labels, images.classes, "files")

    monkeypatch.setitem(registry.DATASETS, "files", registry.Dataset(4, 96, 40, 12, "files", load))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_data_set_that_vanishes_is_one_line(tiny, recipe, cli, tmp_path, files, monkeypatch, workers):
    """Removed in step 3: what was read before is still trained on; a checkpoint after every step."""
    words = ["dataset=files", f"run.workers={workers}", "run.checkpoint_minutes=0", "knn.every=0"]
    config = tiny(*words)
    train(config, tmp_path / "undisturbed")
    real, calls = script.objective, []
    monkeypatch.setattr(
        script, "objective", lambda *a: (calls.append(len(calls) == 3 and shutil.rmtree(files)), real(*a))[1]
    )
    status, _, err = cli(script.main, "--config", recipe, "--run-dir", tmp_path / "run", "--set", *words)
    assert status == 1 and one_line(err, "image file", str(files), "missing")
    assert state(tmp_path / "run")["step"] >= 4
    assert cli(script.main, "--config", recipe, "--run-dir", tmp_path / "run", "--set", *words)[0] == 1  # still gone
    monkeypatch.setattr(script, "objective", real)
    files.mkdir()
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_worker_that_dies_is_one_line(tiny, tmp_path, files, monkeypatch, capfd):
    """As for want of memory: SIGKILL, in epoch 2."""
    read = loading.RandomCrops.__getitem__

    def dying(self, index):
        if self.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(loading.RandomCrops, "__getitem__", dying)
    config = tiny("dataset=files", "run.workers=1", "knn.every=0")
    assert forked(lambda: train(config, tmp_path / "run")) == 1
    assert one_line(capfd.readouterr().err, "DataLoader worker", "run.workers", "The last checkpoint is intact")
    assert state(tmp_path / "run")["step"] == 6
    monkeypatch.undo()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_every_process_of_the_job_saves_and_resumes(tiny, tmp_path, files, capfd, monkeypatch, number):
    """SLURM and a terminal signal the workers, too: they outlive it until the checkpoint is written."""
    config = tiny("dataset=files", "run.workers=2", "knn.every=0")
    train(config, tmp_path / "undisturbed")
    step, calls = script.set_learning_rate, []

    def slow(*arguments) -> None:
        calls.append(len(calls) == 8 and os.killpg(0, number))
        time.sleep(0.02)
        step(*arguments)

    monkeypatch.setattr(script, "set_learning_rate", slow)
    assert forked(lambda: train(config, tmp_path / "run"), os.setsid) == 130
    monkeypatch.setattr(script, "set_learning_rate", step)
    assert "interrupted: all up to the last checkpoint is kept" in capfd.readouterr().err
    assert state(tmp_path / "run")["step"] == 9
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


# ----------------------------------------------------------------------------------------------- nothing is executed


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("folder", ["mixmask", "pretrain", "eval", "detection", "slurm", "paper"])
def test_no_code_unpickles_or_evaluates_what_it_reads(folder):
    """The one way to read pickled objects is `--trust-pickle`, for the checkpoints of others."""
    forbidden = (
        r"(eval|exec|compile|__import__|(c?[pP]ickle|marshal|shelve|dill|joblib)\.(load|loads|open)|yaml\.\w*load"
    )
    forbidden += r"(_all)?|os\.(system|popen))"
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name, node in calls(ast.parse(path.read_text(encoding="utf-8"))):
            assert not re.fullmatch(forbidden, name) or name == "yaml.safe_load", f"{path}:{node.lineno}: {name}"
            keys = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load":
                assert keys.get("weights_only") in ("True", "not trust_pickle"), f"{path}:{node.lineno}"
            assert "allow_pickle" not in keys and keys.get("shell") != "True", f"{path}:{node.lineno}"


def test_python_object_in_a_recipe_is_refused_and_never_made(recipe, cli, tmp_path):
    trap = tmp_path / "executed"
    tag = f"!!python/object/apply:os.mkdir ['{trap}']"
    recipe.write_text(recipe.read_text() + f"x: {tag}\n")
    status, _, err = cli(script.main, "--config", recipe)
    assert status == 1 and one_line(err, str(recipe), "python/object") and not trap.exists()
    status, _, err = cli(script.main, "--config", recipe, "--set", f"seed={tag}")
    assert status == 1 and one_line(err) and not trap.exists()


def test_python_object_in_a_run_directory_is_refused_and_never_made(tiny, tmp_path):
    trap = tmp_path / "executed"
    (tmp_path / "config.yaml").write_text(f"x: !!python/object/apply:os.mkdir ['{trap}']\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        Run(tmp_path, tiny())
    assert not trap.exists()


MEMBERS = {
    "../outside": "leaves the folder",
    "inside/../../outside": "leaves the folder",
    "/tmp/outside": "leaves the folder",
    "symlink": "is a link",
    "hardlink": "is a link",
    "device": "is a link or a device",
}


def archive(path: Path, name: str = "cifar-100-python/test") -> Path:
    """A tar archive with a good file, and the member that `name` stands for."""
    kinds = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    with tarfile.open(path, "w:gz") as tar:
        for member in ("cifar-100-python/train", name):
            entry = tarfile.TarInfo(member)
            entry.type, entry.linkname = kinds.get(member, tarfile.REGTYPE), "/etc/passwd" if member in kinds else ""
            entry.size = 0 if member in kinds else 4
            tar.addfile(entry, io.BytesIO(b"text"))
    return path


@pytest.mark.parametrize("name", MEMBERS)
def test_archive_member_that_leaves_its_folder_is_refused(tmp_path, name):
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(DataError, match=f"nothing is unpacked: its member '{re.escape(name)}' {MEMBERS[name]}"):
        cifar100.unpack(archive(tmp_path / "x.tar.gz", name), target)
    assert not list(target.iterdir()) and {p.name for p in tmp_path.iterdir()} == {"target", "x.tar.gz"}


def test_good_archive_is_unpacked_and_a_cut_one_refused(tmp_path):
    path = archive(tmp_path / "x.tar.gz")
    cifar100.unpack(path, tmp_path / "target")
    assert (tmp_path / "target/cifar-100-python/test").read_bytes() == b"text"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="truncated"):
        cifar100.unpack(path, tmp_path / "again")


# ------------------------------------------------------------------------------------------------- logs and locales


@pytest.mark.parametrize("line", [b'{"st\n', b"[]\n", b'{"kind": "step"}\n', b"\xff\xfe\x00\n", bytes(20) + b"\n"])
def test_damaged_log_line_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 0}\n' + line)
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: .*delete the line"):
        read_log(tmp_path)


def test_file_system_without_locks_is_one_line(tiny, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"cannot lock .*No locks available.*--run-dir"):
        Run(tmp_path, tiny())


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", [ASCII, {"PYTHONIOENCODING": "ascii"}], ids=["C", "ascii"])
def test_say_prints_in_any_locale(locale):
    code = r"from mixmask.training.progress import say; say('67.5 \xb1 0.1')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **locale}, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"67.5 ? 0.1\n", b"")


# --------------------------------------------------------------------------------------------------- twenty SIGKILLs


def kill_again_and_again(main: Callable[[], object], directory: Path, lines: int, rng: random.Random) -> list[int]:
    """Run `main` in child processes; ten are killed at random moments, the last is left alone.

    A moment is so many lines of the log, up to nine tenths of its `lines`, and a fraction of a second: as random on a
    busy machine as on a quick one. Returns the step or epoch of the checkpoint that each killed process left.
    """
    left = []
    for moment in sorted(rng.sample(range(lines * 9 // 10), 10)):
        pid = os.fork()
        if not pid:
            main()
            os._exit(0)
        while len(read_log(directory)) < moment and not os.waitpid(pid, os.WNOHANG)[0]:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        saved = checkpoint.load_last(directory / "checkpoint.pt") or {}
        left.append(saved.get("step", saved.get("epoch", 0)))
    assert forked(main) == 0
    return left


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_random_sigkills_change_no_bit(tiny, tiny_linear, tmp_path):
    """Ten over a pre-training on photographs of 16 classes, ten over the linear probe of its encoder."""
    rng = random.Random(6)
    config = tiny("dataset=photos", "batch_size=32", "epochs=4", "knn.every=2", "run.checkpoint_minutes=0.01")
    run, encoder = lambda name: train(config, tmp_path / name), tmp_path / "whole/checkpoint.pt"
    began = time.perf_counter()
    run("whole")
    middle = time.perf_counter()
    left = kill_again_and_again(lambda: run("killed"), tmp_path / "killed", len(log(tmp_path / "whole")), rng)
    seconds = f"{middle - began:.0f} s undisturbed, {time.perf_counter() - middle:.0f} s with ten kills"
    print(f"pre-training, {4 * 62} steps: {seconds}; they left the checkpoints of steps {left}")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert [line["step"] for line in log(tmp_path / "killed") if line["kind"] == "step"] == list(range(0, 4 * 62, 2))
    assert len(set(left)) >= 5

    probing = tiny_linear("dataset=photos", "batch_size=64", "epochs=40", "schedule.milestones=[30]")
    probing = dataclasses.replace(probing, checkpoint="x-0-s0")
    began = time.perf_counter()
    probe(probing, encoder, tmp_path / "probe")
    middle = time.perf_counter()
    left = kill_again_and_again(lambda: probe(probing, encoder, tmp_path / "twice"), tmp_path / "twice", 40, rng)
    seconds = f"{middle - began:.0f} s undisturbed, {time.perf_counter() - middle:.0f} s with ten kills"
    print(f"linear probe, 40 epochs: {seconds}; they left the checkpoints of epochs {left}")
    assert_same_probe(tmp_path / "twice", tmp_path / "probe")
    assert [line["step"] for line in log(tmp_path / "twice")] == list(range(40))
    assert len(set(left)) >= 5
