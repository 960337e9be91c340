"""slurm/snapshot.py where the runs lie inside the repository: what they have written is no code (the rest:
tests/launcher/test_submit.py)."""

import subprocess

import pytest

from slurm import snapshot


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


@pytest.fixture(params=["git", "no git"])
def code(request, tmp_path):
    root = tmp_path / "code"
    (root / "slurm").mkdir(parents=True)
    (root / "slurm" / "a.py").write_text("1\n")
    if request.param == "git":
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
            git(root, *words)
    return root


def names(copy):
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    return found - {"COMMIT.json", "changes.diff"}


def write_run(directory):
    directory.mkdir(parents=True)
    for name in ("command.txt", "config.yaml"):
        (directory / name).write_text("x\n")


@pytest.mark.parametrize("runs_dir", ["out", "deep/out", "."])
def test_launches_into_a_directory_of_the_repository_copy_equal_code_once(code, runs_dir):
    copies = code / runs_dir / "slurm" / "snapshots"
    first = snapshot.take(code, copies)
    write_run(code / runs_dir / "pretrain" / "a-s0")
    assert [snapshot.take(code, copies) for _ in range(3)] == [first] * 3
    assert names(first) == {"slurm/a.py"} and len(list(copies.iterdir())) == 1


def test_runs_elsewhere_in_the_repository_do_not_change_the_copy_and_new_code_does(code):
    copies = code / "out" / "slurm" / "snapshots"
    first = snapshot.take(code, copies)
    write_run(code / "by_hand" / "b-s0")
    snapshot.take(code, code / "other" / "slurm" / "snapshots")
    assert snapshot.take(code, copies) == first
    (code / "new.py").write_text("2\n")
    second = snapshot.take(code, copies)
    assert second != first and names(second) == {"slurm/a.py", "new.py"}


def test_what_a_launch_that_was_killed_left_behind_is_not_copied(code):
    copies = code / "slurm" / "snapshots"
    (copies / ".new-x" / "code").mkdir(parents=True)
    (copies / ".new-x" / "code" / "a.py").write_text("1\n")
    assert names(snapshot.take(code, copies)) == {"slurm/a.py"}
