"""A run's directory: one config, one process, a log that resumes without a gap or a repeat, a result written last."""

import json
import os
import signal
import subprocess

import pytest
import torch

from mixmask import config as configs
from mixmask import runs
from mixmask.config import UserError
from mixmask.runs import Run, read_log, read_result, run_id


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_run_of_another_config_is_refused_naming_the_key(tiny, tmp_path):
    with Run(tmp_path, tiny()) as run:
        run.describe()
    before = contents(tmp_path)
    noted = {"seed=1": "seed", "moco.queue=32": r"moco\.queue", "mask.grid=4": r"mask\.grid"}
    noted |= {
        "mask.switch=false": r"mask\.switch",
        "augment.solarize_prob=0.2": r"augment\.solarize_prob",
    }  # by default
    for item, key in noted.items():
        with pytest.raises(UserError, match=f"another config .{key}: .* there, .* now"):
            Run(tmp_path, tiny(item))
    assert contents(tmp_path) == before
    Run(tmp_path, tiny("run.workers=2")).close()  # what changes no number is no other config


def test_refused_config_does_not_block_the_directory(tiny, tmp_path):
    with Run(tmp_path, tiny()):
        pass  # config refused before describe()
    with Run(tmp_path, tiny("seed=1")) as run:
        run.describe()


def test_second_process_on_the_same_directory_is_refused(tiny, tmp_path):
    with Run(tmp_path, tiny()), pytest.raises(UserError, match="another process is working"):
        Run(tmp_path, tiny())
    Run(tmp_path, tiny()).close()


def test_killed_process_leaves_no_lock(tiny, tmp_path):
    pid = os.fork()
    if not pid:
        run = Run(tmp_path, tiny())  # noqa: F841 - held while the signal comes
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    Run(tmp_path, tiny()).close()


def test_config_yaml_is_the_recipe_of_the_same_run(tiny, tmp_path):
    config = tiny("mask.grid=4", "seed=3")
    with Run(tmp_path, config) as run:
        run.describe()
    assert run_id(configs.load(tmp_path / "config.yaml")) == run_id(config) == run.id


def test_command_can_be_pasted_into_a_shell(tiny, tmp_path):
    words = ["train.py", "--set", "a=[1, 2]", "it's", 'say "x"', "~/data", "#1"]
    with Run(tmp_path, tiny()) as run:
        run.describe(words)
    pasted = (tmp_path / "command.txt").read_text().replace("python ", "printf '%s\\n' ", 1)
    assert subprocess.run(["bash", "-c", pasted], capture_output=True, text=True).stdout.splitlines() == words


def test_equal_directory_names_are_not_equal_runs(tiny, tmp_path):
    first, second = Run(tmp_path / "a/x", tiny()), Run(tmp_path / "b/x", tiny("epochs=3"))
    assert first.id != second.id


def test_rewind_drops_the_step_that_comes_next_and_all_after(tiny, tmp_path):
    with Run(tmp_path, tiny()) as run:
        run.log("epoch", -1, epoch=0)
        for step in range(5):
            run.log("step", step, loss=step / 3)
    with Run(tmp_path, tiny()) as run:
        run.rewind(3)
        assert [line["step"] for line in read_log(tmp_path)] == [-1, 0, 1, 2]
        run.log("step", 3, loss=1.0)
        assert [line["step"] for line in read_log(tmp_path)] == [-1, 0, 1, 2, 3]
    with Run(tmp_path, tiny()) as run:
        run.rewind(-1)
    assert read_log(tmp_path) == []


def test_half_written_last_line_is_dropped(tiny, tmp_path):
    with Run(tmp_path, tiny()) as run:
        run.log("step", 0, loss=1.0)
        whole = (tmp_path / "log.jsonl").read_text()
        for cut in (1, 10, len(whole) - 1):
            (tmp_path / "log.jsonl").write_text(whole + whole[:cut])
            assert read_log(tmp_path) == [{"kind": "step", "step": 0, "loss": 1.0}]
            run.rewind(10)
            assert (tmp_path / "log.jsonl").read_text() == whole


def test_damaged_line_inside_the_log_is_named(tiny, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2"):
        read_log(tmp_path)


def test_result_is_there_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    with Run(tmp_path, tiny()) as run:
        monkeypatch.setattr(os, "fsync", lambda fd: os.kill(os.getpid(), signal.SIGKILL))
        pid = os.fork()
        if not pid:
            run.finish({"metrics": {}})
        os.waitpid(pid, 0)
        assert run.result is None
        monkeypatch.undo()
        run.finish({"metrics": {"x": 1.0}})
        about = {"run": run.id, "stage": "pretrain"}
        assert run.result == read_result(tmp_path) == {**about, "metrics": {"x": 1.0}}


def test_damaged_result_is_named(tmp_path):
    (tmp_path / "result.json").write_text('{"met')
    with pytest.raises(UserError, match=r"result\.json is not valid JSON"):
        read_result(tmp_path)


def test_full_disk_is_one_line_that_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    run = Run.__new__(Run)
    run.directory, run._log, run._lock = tmp_path, None, open(os.devnull)  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: No space left"), run:
        run.log("step", 0, loss=1.0)


def test_directory_that_cannot_be_made_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write the run directory"):
            Run(path, tiny())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory_is_one_line(tiny, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write the run directory"):
        Run(tmp_path / "run", tiny())


def test_environment_names_versions_and_commit():
    found = runs.environment()
    assert found["torch"] and found["python"] and {"commit", "modified"} <= found.keys()
    json.dumps(found)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"metrics": {}}', '{"metrics": {"loss": NaN}}', '{"metrics": {"a": "b"}}']
)
def test_result_without_finite_metrics_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match="move it away"):
        read_result(tmp_path)


def test_recipe_name_stays_inside_the_runs_directory(tiny):
    with pytest.raises(UserError, match="recipe"):
        runs.run_directory("runs", tiny("recipe=../../elsewhere"))


def test_probe_is_named_after_its_encoder(tiny_linear):
    assert run_id(tiny_linear("checkpoint=cifar100_moco-mixmask-e4-0123abcd-s1")).startswith(
        "tiny_linear-cifar100_moco-mixmask-e4-"
    )


HERE = {"python": "3.11", "torch": "2.10", "threads": 1, "commit": "a" * 40, "modified": False}
OTHERS = [
    ({"commit": "b" * 40}, "note: continued by other code: commit aaaaaaaaaaaa -> bbbbbbbbbbbb\n"),
    ({"modified": True}, "note: continued by other code: modified False -> True\n"),
    ({"snapshot": "a-1"}, "note: continued by other code: snapshot None -> a-1\n"),
    ({"torch": "2.11"}, "note: continued in another environment: torch 2.10 -> 2.11\n"),
    (
        {"threads": 2},
        "note: continued in another environment: threads 1 -> 2; sums are made in another order: "
        "equal to an undisturbed run up to rounding alone\n",
    ),
]


def reopen(config, directory, monkeypatch, **differing):
    """Open the run as code with this environment does; log one step."""
    monkeypatch.setattr(runs.directory, "environment", lambda: {**HERE, **differing})
    with Run(directory, config) as run:
        run.describe()
        run.log("step", len(read_log(directory)), loss=1.0)


@pytest.mark.parametrize(("differing", "line"), OTHERS)
def test_continuation_by_other_code_or_environment_is_recorded_and_said_once(
    tiny, tmp_path, monkeypatch, capsys, differing, line
):
    for change in ({}, {}, differing, differing, {}):
        reopen(tiny(), tmp_path, monkeypatch, **change)
    said = capsys.readouterr().out
    assert said.startswith(line) and said.count("\n") == 2
    first, second, third = runs.read_environments(tmp_path)
    assert first == HERE == json.loads((tmp_path / "environment.json").read_text())
    assert second.items() >= {**HERE, **differing, "step": 1}.items() and second["time"]
    assert (third["step"], third["commit"], third["torch"]) == (3, HERE["commit"], "2.10")


def test_threads_and_processes_belong_to_the_environment():
    here = runs.environment()
    assert here["threads"] == torch.get_num_threads() and here["processes"] == 1
    torch.set_num_threads(2)
    try:
        assert runs.environment()["threads"] == 2
    finally:
        torch.set_num_threads(1)


def test_same_code_goes_on_without_a_record(tiny, tmp_path, monkeypatch, capsys):
    for _ in range(3):
        reopen(tiny(), tmp_path, monkeypatch)
    assert capsys.readouterr().out == "" and not (tmp_path / "environments.jsonl").exists()


def test_two_edits_that_are_not_committed_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "mixmask").mkdir()
    code = tmp_path / "mixmask/runs.py"
    code.write_text("1\n")
    words = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"]
    for line in (["init", "-q"], ["add", "."], words):
        subprocess.run(["git", "-C", str(tmp_path), *line], check=True)
    monkeypatch.setattr(runs.provenance, "ROOT", tmp_path)
    found = [runs.commit()]
    for edit in ("2\n", "3\n", "3\n"):
        code.write_text(edit)
        found.append(runs.commit())
    assert [entry["modified"] for entry in found] == [False, True, True, True] and "changes" not in found[0]
    assert found[1]["changes"] != found[2]["changes"] == found[3]["changes"]


def test_damaged_record_of_environments_is_named(tmp_path):
    (tmp_path / "environments.jsonl").write_text('{"st')
    with pytest.raises(UserError, match=r"environments\.jsonl is not valid JSON"):
        runs.read_environments(tmp_path)


def test_what_is_left_of_a_run_is_said_as_it_is(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert runs.what_is_left(path) == "no checkpoint was written yet"
    runs.previous_checkpoint(path).touch()
    assert runs.what_is_left(path) == "the last checkpoint is intact"


def test_a_result_that_is_no_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(runs.ResultError, match=r"result\.json is not a file"):
        runs.read_result(tmp_path)
