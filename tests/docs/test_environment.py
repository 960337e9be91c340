"""One set of versions: pyproject.toml, environment.yml, requirements.lock and the Makefile agree."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"([a-z0-9-]+)==([0-9.]+)")
ENTRY = re.compile(r"[a-z0-9-]+==[0-9.]+( ; [a-z_]+ (<|>=|==) '[a-z0-9.]+')?")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def pins(requirements: list[str]) -> dict[str, str]:
    """Name -> version; an entry that is not an exact pin fails."""
    return dict(PIN.fullmatch(line).groups() for line in requirements)


def pyproject_pins() -> dict[str, str]:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    return pins(project["dependencies"] + project["optional-dependencies"]["dev"])


def lock_entries() -> list[tuple[str, list[str]]]:
    """(requirement, its hash lines) of every entry of the lock."""
    entries = []
    for line in read("requirements.lock").splitlines():
        text = line.removesuffix(" \\")
        if line.startswith(" "):
            entries[-1][1].append(text)
        else:
            entries.append((text, []))
    return entries


def test_environment_yml_and_pyproject_hold_the_same_versions():
    *conda, pip = yaml.safe_load(read("environment.yml"))["dependencies"]
    assert pins([line for line in pip["pip"] if line != "--editable ."]) == pyproject_pins()
    assert conda == ["python=3.11", "pip"]  # the oldest Python that pyproject.toml allows
    assert tomllib.loads(read("pyproject.toml"))["project"]["requires-python"] == ">=3.11"


def test_lock_pins_exactly_the_versions_of_pyproject():
    locked = {}
    for requirement, _ in lock_entries():
        name, version = PIN.match(requirement).groups()
        locked.setdefault(name, set()).add(version)
    assert {name: locked.get(name) for name in pyproject_pins()} == {n: {v} for n, v in pyproject_pins().items()}


def test_lock_holds_versions_and_hashes_only():
    for requirement, hashes in lock_entries():
        assert ENTRY.fullmatch(requirement), requirement
        assert hashes, f"{requirement} has no hash"
        assert all(HASH.fullmatch(line) for line in hashes), requirement


def test_lock_has_no_url_and_no_path():
    assert not set("/@") & set(read("requirements.lock"))


def test_environment_yml_names_the_detectron2_lines_of_the_makefile():
    makefile, environment = read("Makefile"), read("environment.yml")
    source = re.search(r"^DETECTRON2 := (\S+)$", makefile, re.MULTILINE).group(1)
    assert f"MAX_JOBS=2 pip install --no-build-isolation '{source}'" in environment
    assert "install --quiet 'setuptools<82' wheel ninja" in makefile
    assert "pip install 'setuptools<82' wheel ninja" in environment
