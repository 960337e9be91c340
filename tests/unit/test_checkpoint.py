"""Checkpoints: nothing lost, nothing executed, nothing damaged goes unnoticed."""

import os
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmask import checkpoint, formats
from mixmask import config as configs
from mixmask.checkpoint import CheckpointError
from mixmask.frameworks import build_framework
from mixmask.runs import Run, previous_checkpoint


class Code:
    """Creates a file when unpickled by a loader that runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def state(tiny) -> dict:
    """A checkpoint's content, with every type that occurs in one."""
    torch.manual_seed(0)
    config = tiny()
    return {
        "run": "r",
        "config": configs.to_dict(config),
        "step": 3,
        "steps": 3,
        "model": build_framework(config).state_dict(),
        "random": checkpoint.random_states(),
    }


@pytest.fixture
def saved(state, tmp_path) -> Path:
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    return tmp_path / "checkpoint.pt"


def test_round_trip(state, saved):
    found = checkpoint.load(saved)
    assert found["config"] == state["config"] and found["step"] == 3
    assert all(torch.equal(found["model"][k], v) for k, v in state["model"].items())
    assert set(saved.parent.iterdir()) == {saved, checkpoint.digest_file(saved)}


def test_torch_load_with_weights_only_reads_it(state, saved):
    assert torch.load(saved, weights_only=True).keys() == {"format", *state}


def test_random_states_come_back(saved):
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    np.random.standard_normal()  # leaves half a pair cached
    states = checkpoint.random_states()
    first = draw()
    draw()
    checkpoint.restore_random_states(states)
    assert draw() == first


@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.5, 0.9, 0.999])
def test_cut_off_checkpoint_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="cut off"):
        checkpoint.load(saved)


@pytest.mark.parametrize("content", [bytes(4096), random.Random(0).randbytes(4096), b"text\n"])
def test_file_that_is_no_checkpoint_is_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(saved)


def test_flipped_bit_in_a_weight_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    weight = torch.load(saved, weights_only=True)["model"]["queue"].numpy().tobytes()
    content[bytes(content).index(weight) + 5] ^= 1
    saved.write_bytes(content)
    assert torch.load(saved, weights_only=True)  # torch itself reads it as if nothing had happened
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.load(saved)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_never_run(state, saved, tmp_path, zipped):
    trap = tmp_path / "executed"
    torch.save({"format": 1, **state, "x": Code(trap)}, saved, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        checkpoint.load(saved)
    assert not trap.exists()
    torch.load(saved, weights_only=False)  # the trap works
    assert trap.exists()


def test_plain_pickle_is_refused_and_never_run(saved, tmp_path):
    trap = tmp_path / "executed"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        saved.write_bytes(pickle.dumps(Code(trap), protocol))
        with pytest.raises(CheckpointError):
            checkpoint.load(saved)
    assert not trap.exists()


def test_checkpoint_of_something_else_is_refused(tmp_path):
    for content in ([1], {"model": {}}, {"format": 1}, {"format": 99, "config": {}}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
            checkpoint.load(tmp_path / "x.pt")


def test_absent_file_and_directory_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"is a directory; .*checkpoint\.pt"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("item", "key"), [("backbone.width=4", r"encoder\.backbone"), ("moco.dim=4", "head"), ("moco.mlp=true", "head")]
)
def test_another_architecture_is_named_with_the_first_difference(tiny, state, item, key):
    with pytest.raises(CheckpointError, match=f"another architecture: .*first: '.*{key}.*expected .*, found"):
        checkpoint.load_weights(build_framework(tiny(item)), state["model"], "x.pt")


def test_encoder_of_an_unfinished_run_is_not_mistaken_for_the_finished_one(state, tmp_path):
    _, finished = checkpoint.pretraining(state, "x.pt")
    _, unfinished = checkpoint.pretraining({**state, "step": 2}, "x.pt")
    assert (finished, unfinished) == ("r", "r@2")


def test_checkpoint_of_another_stage_is_refused(tiny_linear, tmp_path):
    checkpoint.save(tmp_path / "x.pt", {"run": "r", "config": configs.to_dict(tiny_linear()), "epoch": 1})
    with pytest.raises(CheckpointError, match="not a pre-training checkpoint"):
        checkpoint.load_encoder(tmp_path / "x.pt")


def test_frozen_encoder_is_in_evaluation_mode_without_gradients(saved):
    encoder, recipe, _ = checkpoint.load_encoder(saved)
    assert recipe.recipe == "tiny" and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def failing_write(*_: object) -> None:
    raise OSError(28, os.strerror(28))


def failing_writer(*_: object) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize("failure", [failing_write, failing_writer])
def test_failed_save_leaves_the_checkpoint_before_intact(state, saved, monkeypatch, failure):
    before = saved.read_bytes()
    monkeypatch.setattr(torch, "save", failure)
    with pytest.raises(CheckpointError, match=r"cannot write .*(No space left|disk full).* intact"):
        checkpoint.save(saved, {**state, "step": 4})
    assert saved.read_bytes() == before and set(saved.parent.iterdir()) == {saved, checkpoint.digest_file(saved)}


def test_crash_during_a_save_leaves_the_checkpoint_before_intact(state, saved, monkeypatch):
    before = saved.read_bytes()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: os._exit(9) if saved in (a, b) else replace(a, b))
    pid = os.fork()
    if not pid:
        checkpoint.save(saved, {**state, "step": 4})
    os.waitpid(pid, 0)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    checkpoint.save(saved, {**state, "step": 5})  # what the crash left behind is overwritten
    assert checkpoint.load(saved)["step"] == 5 and checkpoint.load(previous_checkpoint(saved))["step"] == 3
    assert set(saved.parent.iterdir()) == {saved, previous_checkpoint(saved), checkpoint.digest_file(saved)}


@pytest.mark.parametrize("name", ["run", "model", "step", "steps"])
def test_checkpoint_without_one_of_its_parts_is_named(state, tmp_path, name):
    checkpoint.save(tmp_path / "x.pt", {key: value for key, value in state.items() if key != name})
    with pytest.raises(checkpoint.CheckpointError, match=f"no '{name}'"):
        checkpoint.load_encoder(tmp_path / "x.pt")


# ------------------------------------------------------------------------------------------------- the two last ones


def small(step: int) -> dict:
    """A checkpoint of two kilobytes, whose values tell its step."""
    model = {name: torch.full((3, 5), float(step) + i) for i, name in enumerate("ab")}
    return {"run": "r", "config": {"recipe": "x"}, "step": step, "model": model}


@pytest.fixture
def two(tmp_path) -> Path:
    """Checkpoints of steps 1, 2 and 3 were saved: the last two are there."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "checkpoint.pt", small(step))
    return tmp_path / "checkpoint.pt"


def test_last_two_checkpoints_are_kept(two):
    assert {path.name for path in two.parent.iterdir()} == {
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "checkpoint.sha256",
    }
    assert (checkpoint.load(two)["step"], checkpoint.load(previous_checkpoint(two))["step"]) == (3, 2)


def test_flip_of_any_bit_is_noticed(two):
    """The CRCs of the zip archive's members miss some in its directory: the SHA-256 of the whole file does not."""
    whole = two.read_bytes()
    for bit in [*range(0, 8 * len(whole), 61), *range(8 * len(whole) - 200, 8 * len(whole), 3)]:
        two.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with pytest.raises(CheckpointError, match=r" is .*damaged"):
            checkpoint.load(two)


def test_cut_at_any_length_is_noticed(two):
    whole = two.read_bytes()
    for length in [*range(0, len(whole), 37), *range(len(whole) - 80, len(whole))]:
        two.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is cut off"):
            checkpoint.load(two)


def test_exchanged_tensors_are_noticed(two):
    """Two entries of the zip directory exchanged by hand: every CRC is right, and torch reads the wrong weights."""
    whole = bytearray(two.read_bytes())
    names = [b"/data/0", b"/data/1"]
    for first, second in zip(*([m.start() for m in re.finditer(n, bytes(whole))] for n in names), strict=True):
        whole[first : first + 7], whole[second : second + 7] = names[1], names[0]
    two.write_bytes(whole)
    assert torch.load(two, weights_only=True)["model"]["a"][0, 0] == 4  # 3 in the whole file
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoint.load(two)


@pytest.mark.parametrize("damage", [lambda c: c[:-100], lambda c: b"", lambda c: c[:400] + b"!" + c[401:]])
def test_damaged_checkpoint_gives_way_to_the_one_before(two, capsys, damage):
    two.write_bytes(damage(two.read_bytes()))
    assert checkpoint.load_last(two)["step"] == 2
    out = capsys.readouterr().out
    assert out.startswith(f"{two} is ") and out.endswith("resuming from the previous one, checkpoint.previous.pt\n")
    assert out.count("\n") == 1


def test_damaged_checkpoint_never_replaces_the_one_before(two):
    two.write_bytes(b"")
    checkpoint.save(two, small(4))
    assert (checkpoint.load(two)["step"], checkpoint.load(previous_checkpoint(two))["step"]) == (4, 2)


def test_two_damaged_checkpoints_are_both_named(two):
    previous_checkpoint(two).write_bytes(b"")
    two.write_bytes(two.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_last(two)
    assert all(f"{path} is " in str(caught.value) for path in (two, previous_checkpoint(two)))
    assert "start it again" in str(caught.value)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.load_last(tmp_path / "checkpoint.pt") is None


@pytest.mark.parametrize("moment", range(5))
def test_at_every_instant_of_a_save_a_whole_checkpoint_is_there(two, monkeypatch, moment):
    """Killed before each thing that a save does to the disk."""
    calls = []

    def dying(real):
        return lambda *a, **k: os._exit(9) if len(calls) == moment else (calls.append(1), real(*a, **k))[1]

    pid = os.fork()
    if not pid:
        for name, module in (("save", torch), ("write_atomically", checkpoint), ("fsync", os), ("replace", os)):
            monkeypatch.setattr(module, name, dying(getattr(module, name)))
        checkpoint.save(two, small(4))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert checkpoint.load_last(two)["step"] == 3


def test_finished_run_keeps_the_last_checkpoint_alone(tiny, tmp_path):
    with Run(tmp_path, tiny()) as run:
        for step in (1, 2):
            checkpoint.save(run.checkpoint, small(step))
        run.finish({"metrics": {"x": 1.0}})
    assert checkpoint.load(run.checkpoint)["step"] == 2 and not previous_checkpoint(run.checkpoint).exists()


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_checkpoint_of_a_finished_run_that_is_damaged_or_gone_is_named_with_what_to_do(two, damage):
    damage(two)
    with pytest.raises(CheckpointError) as unfinished:
        checkpoint.load(two)
    two.with_name("result.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"; its run is finished: .* move it and result\.json away") as finished:
        checkpoint.load(two)
    assert str(finished.value).startswith(str(unfinished.value)) and "made anew" not in str(unfinished.value)


def test_failed_first_save_does_not_speak_of_a_checkpoint_before(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", failing_write)
    with pytest.raises(CheckpointError, match=r"No space left on device; no checkpoint was written yet$"):
        checkpoint.save(tmp_path / "checkpoint.pt", small(1))


def test_conversion_and_fine_tuning_notice_what_the_archives_own_checksums_miss(state, tmp_path):
    """A finished run's checkpoint: a flipped bit in the archive's directory, and the file cut off."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state)
    path.with_name("result.json").write_text("{}")
    assert formats.read(path).identity == "r"
    whole = path.read_bytes()
    time = whole.rindex(b"PK\1\2") + 12  # of the last member's last change: no CRC covers it
    for damaged in (whole[:time] + bytes([whole[time] ^ 1]) + whole[time + 1 :], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged.*; its run is finished: restore an intact copy"):
            formats.read(path)
