"""Ranges in pyproject.toml, one version of everything in requirements.lock; environment.yml and the Makefile follow."""

import re
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"([a-z0-9-]+)==([0-9a-z.]+)( ; [a-zA-Z0-9_ =<>!'.()-]+)?")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


def requirements(but: str = "") -> list[Requirement]:
    """Of the library and of every extra but one, without the extras of its own that one names."""
    lines = [
        *project()["dependencies"],
        *(line for name, extra in project()["optional-dependencies"].items() if name != but for line in extra),
    ]
    return [found for found in map(Requirement, lines) if found.name != "mixmask"]


def locked() -> list[tuple[str, list[str]]]:
    """(requirement, its hash lines) of every entry of the lock."""
    entries = []
    for line in read("requirements.lock").splitlines():
        text = line.removesuffix(" \\")
        if line.startswith(" "):
            entries[-1][1].append(text)
        else:
            entries.append((text, []))
    return entries


def versions() -> dict[str, set[str]]:
    found = {}
    for requirement, _ in locked():
        name, version, _ = ENTRY.fullmatch(requirement).groups()
        found.setdefault(name, set()).add(version)
    return found


def test_every_requirement_is_a_range_with_an_oldest_version():
    for requirement in requirements():
        operators = {part.operator for part in requirement.specifier}
        assert ">=" in operators and not operators & {"==", "===", "~="}, str(requirement)


def test_the_lock_has_a_version_of_every_requirement_inside_its_range():
    found = versions()
    for requirement in requirements(
        but="examples"
    ):  # which run where their libraries are, in no checkout's environment
        assert all(version in requirement.specifier for version in found[requirement.name]), str(requirement)


def test_the_library_asks_for_what_it_imports_at_once_and_extras_for_what_it_imports_on_demand():
    """The stages that the wheel holds count as well."""
    files = [path for folder in ("mixmask", "pretrain", "eval") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image"}
    own = {*sys.stdlib_module_names, "mixmask"}
    at_once, on_demand = (
        {names.get(name, name) for name in set(re.findall(rf"^{margin}(?:import|from) (\w+)", text, re.M)) - own}
        for margin in ("", " +")
    )
    asked = {Requirement(line).name for line in project()["dependencies"]}
    assert at_once == asked
    extras = {
        Requirement(line).name
        for name, lines in project()["optional-dependencies"].items()
        if name not in ("dev", "docs", "test")
        for line in lines
    }
    assert on_demand <= asked | extras


def test_lock_holds_versions_and_hashes_only():
    for requirement, hashes in locked():
        assert ENTRY.fullmatch(requirement), requirement
        assert hashes, f"{requirement} has no hash"
        assert all(HASH.fullmatch(line) for line in hashes), requirement


def test_lock_has_no_url_and_no_path():
    assert not set("/@") & set(read("requirements.lock"))


def test_environment_yml_takes_the_lock_and_the_oldest_python():
    *conda, pip = yaml.safe_load(read("environment.yml"))["dependencies"]
    assert pip == {"pip": ["--requirement requirements.lock"]}
    assert conda == [f"python={project()['requires-python'].removeprefix('>=')}", "pip"]


def test_environment_yml_names_the_detectron2_lines_of_the_makefile():
    makefile, environment = read("Makefile"), read("environment.yml")
    source = re.search(r"^DETECTRON2 := (\S+)$", makefile, re.MULTILINE).group(1)
    assert f"MAX_JOBS=2 pip install --no-build-isolation '{source}'" in environment
    assert "install --quiet 'setuptools<82' wheel ninja" in makefile
    assert "pip install 'setuptools<82' wheel ninja" in environment


def test_the_wheel_names_every_package_of_the_library():
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mixmask").rglob("__init__.py")}
    assert set(settings["packages"]) == found | {"mixmask.pretrain", "mixmask.eval"}


def test_precommit_runs_the_locked_ruff():
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert versions()["ruff"] == {repo["rev"].removeprefix("v")}


def test_workflows_run_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([a-z0-9]+):.*## ", read("Makefile"), re.MULTILINE))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
        for command in (c for c in commands if not c.startswith("sudo apt-get ")):
            words = command.split()
            assert words[0] == "make" and {word for word in words[1:] if "=" not in word} <= targets, command
