"""CONTRIBUTING.md's three recipes, followed to the letter in a scratch copy, and the tests that they concern."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"^ *<!-- apply: (\S+)(?: (before|after) ([^\n]+?))? -->\n( *)```\w+\n(.*?)^ *```", re.DOTALL | re.MULTILINE
)
UNIT = ("methods", "objective", "frameworks", "data", "config", "mscn")
TESTS = (*(f"tests/unit/test_{name}.py" for name in UNIT), "tests/paper/test_cells.py", "tests/paper/test_figures.py")
CONCERNED = "cutout or dcl or imagenette or named_to_be_launched or asks_for_extra_crops or share_a_colour"


def blocks() -> list[tuple[str, str, str, str]]:
    """(file or "shell", "before", "after" or "", the line that is meant, text), in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = []
    for file, side, mark, margin, block in BLOCK.findall(text):
        lines = [line.removeprefix(margin) for line in block.splitlines()]
        found.append((file, side, mark, "\n".join(lines) + "\n"))
    return found


def apply(root: Path, file: str, side: str, mark: str, text: str) -> None:
    if file == "shell":
        subprocess.run(["bash", "-ec", text], cwd=root, check=True)
        return
    path = root / file
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if not side:
        path.write_text(f"{old}\n\n{text}" if old else text, encoding="utf-8")
        return
    lines = old.splitlines(keepends=True)
    (place,) = [number for number, line in enumerate(lines) if line.startswith(mark)]
    if side == "before":
        gap = "\n\n" if not text.startswith(" ") else ""
        lines.insert(place, text + gap)
    else:
        lines.insert(place + 1, text)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A copy of the tracked files in which every block is applied."""
    root = tmp_path_factory.mktemp("scratch") / "mixmask"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((ROOT / name).read_bytes())
    for block in blocks():
        apply(root, *block)
    return root


def run(root: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_each_recipe_has_one_line_of_the_registry():
    lines = [text for file, _, _, text in blocks() if file == "mixmask/registry.py"]
    assert [textwrap.dedent(text).count("\n") for text in lines] == [1, 1, 1]


def test_code_that_follows_the_recipes_is_well_formed(scratch):
    folders = ("mixmask", "tests/unit")
    run(scratch, "-m", "ruff", "check", *folders)
    run(scratch, "-m", "ruff", "format", "--check", *folders)


def test_tests_concerned_pass_in_a_copy_that_follows_the_recipes(scratch):
    found = run(scratch, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", CONCERNED)
    assert int(re.search(r"(\d+) passed", found).group(1)) > 30


def test_a_new_method_on_a_new_framework_trains(scratch):
    command = (
        "pretrain/train.py --config pretrain/configs/cifar100_dcl.yaml --set dataset=photos epochs=1 method=cutout "
        "backbone.width=2 batch_size=500 knn.k=20 knn.every=0 run.device=cpu augment.size=16"
    )
    out = run(scratch, *command.split())
    assert "dcl, cutout" in out and (scratch / "runs").exists()
