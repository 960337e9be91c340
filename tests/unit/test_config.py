"""Recipes: wrong ones are refused with the key and the nearest valid one; the hash follows what decides a number."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mixmask import config as configs
from mixmask import registry
from mixmask.config import ConfigError, Detection, Linear, Pretrain
from mixmask.frameworks import build_framework

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "pretrain/configs").glob("*.yaml"))
CIFAR = ROOT / "pretrain/configs/cifar100_moco.yaml"
PROBES = sorted((ROOT / "eval/configs").glob("*linear*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_pretraining_recipe_loads(path):
    assert configs.load(path).recipe == path.stem


@pytest.mark.parametrize("path", PROBES, ids=lambda p: p.stem)
def test_every_linear_recipe_loads(path):
    assert configs.load(path, cls=Linear).recipe == path.stem


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("epoch=3", ["unknown key 'epoch'", "did you mean 'epochs'"]),
        ("optimiser.lr=1", ["unknown key 'optimiser.lr'", "did you mean 'optimizer.lr'"]),
        ("mask.gird=2", ["unknown key 'mask.gird'", "did you mean 'mask.grid'"]),
        ("moco.queu=2", ["unknown key 'moco.queu'", "did you mean 'moco.queue'"]),
        ("mask=3", ["unknown key 'mask'"]),
        ("epochs=many", ["epochs", "a whole number", "'many'"]),
        ("epochs=1.5", ["epochs", "a whole number", "1.5"]),
        ("epochs=true", ["epochs", "a whole number", "True"]),
        ("epochs=0", ["epochs", "at least 1", "found 0"]),
        ("epochs=2020-01-01", ["epochs", "a whole number"]),
        ("optimizer.lr=fast", ["optimizer.lr", "a number", "'fast'"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "a number", "nan"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "a number", "inf"]),
        ("mask.ratio=1.5", ["mask.ratio", "between 0 and 1", "1.5"]),
        ("mask.ratio=[0.7, 0.2]", ["mask.ratio", "smaller number first"]),
        ("mask.ratio=[0.2]", ["mask.ratio", "2 values", "found 1"]),
        ("mask.type=blok", ["mask.type", "block, discrete", "'blok'"]),
        ("mask.switch=1", ["mask.switch", "true or false"]),
        ("augment.order=[crop, crap]", ["augment.order[1]", "'crap'"]),
        ("augment.mean=0.5", ["augment.mean", "a list"]),
        ("dataset=0.5", ["dataset", "a text; quote", "0.5"]),
        ("framework=simclr", ["framework", "simclr"]),
        ("framework=[1]", ["framework", "[1]"]),
        ("epochs", ["--set epochs", "key=value"]),
        ("seed=[", ["--set seed=[", "YAML"]),
    ],
)
def test_wrong_override_is_named_with_what_was_expected(tiny, item, words):
    with pytest.raises(ConfigError) as error:
        tiny(item)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs:", "epoch:", ["unknown key 'epoch'", "did you mean 'epochs'"]),
        ("framework:", "framwork:", ["unknown key 'framwork'", "did you mean 'framework'"]),
        ("grid:", "gird:", ["unknown key 'mask.gird'", "did you mean 'mask.grid'"]),
        ("epochs: 2\n", "", ["missing key 'epochs'"]),
        ("framework: moco\n", "", ["missing key 'framework'"]),
        ("grid: 2, ", "", ["missing key 'mask.grid'"]),
        ("{prob: 0.5}", "0.5", ["unmix", "section", "0.5"]),
        ("{prob: 0.5}", "[0.5", ["cannot read", "line"]),
        ("epochs: 2", "epochs: 2020-01-01", ["epochs", "a whole number"]),
    ],
)
def test_wrong_recipe_is_refused_naming_key_and_file(recipe, old, new, words):
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        configs.load(recipe)
    assert all(word in str(error.value) for word in [*words, str(recipe)]), str(error.value)
    assert "\n" not in str(error.value)


def test_misspelt_key_of_the_framework_section_is_named(recipe):
    recipe.write_text(recipe.read_text().replace("queue:", "queu:"))
    with pytest.raises(ConfigError, match=r"unknown key 'moco\.queu'; did you mean 'moco\.queue'"):
        build_framework(configs.load(recipe))


@pytest.mark.parametrize("content", ["", "- 1\n", "word", "\0"])
def test_file_without_keys_and_values_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        configs.load(tmp_path / "x.yaml")


def test_missing_file_and_directory_are_refused_by_name(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            configs.load(path)


def test_scientific_notation_without_a_point_is_a_number(tiny):
    assert tiny("optimizer.lr=1e-4").optimizer.lr == 1e-4  # YAML 1.1 reads 1e-4 as a word


@pytest.mark.parametrize("written", ["1", "1.0", "1e0"])
def test_a_number_of_the_framework_section_is_one_number_however_written(recipe, tiny, written):
    recipe.write_text(recipe.read_text().replace("temperature: 0.1", f"temperature: {written}", 1))
    config = configs.load(recipe)
    assert build_framework(config).settings.temperature == 1
    assert configs.hash8(config) == configs.hash8(tiny("moco.temperature=1")) != configs.hash8(tiny())
    assert configs.load(recipe, {"moco.temperature": 0.1}) == tiny()


def test_config_survives_its_own_yaml(tiny):
    config = tiny("mask.ratio=[0.2, 0.8]", "optimizer.lr=1e-4", "knn.every=0", "run.workers=3")
    text = yaml.safe_dump(configs.to_dict(config))
    again = configs.resolve(yaml.safe_load(text), {}, Pretrain)
    assert again == config and configs.hash8(again) == configs.hash8(config)


@pytest.mark.parametrize("item", ["seed=5", "knn.every=7", "run.workers=3", "run.device=cuda", "run.data_root=x"])
def test_hash_ignores_what_changes_no_number(tiny, item):
    assert configs.hash8(tiny(item)) == configs.hash8(tiny())


OTHER = {
    "backbone.stem_init": "kaiming",
    "both.permutation": "reverse",
    "erase.fill": "noise",
    "optimizer.name": "adam",
    "schedule.kind": "step",
    "schedule.unit": "iteration",
    "schedule.milestones": [1],
    "augment.order": ["flip"],
    "augment.interpolation": "bicubic",
    "augment.crop_ratio": [1, 1],
    "augment.blur_sigma": [1, 2],
    "backbone.arch": "resnet50",
    "backbone.stem": "cifar",
    "mask.type": "discrete",
    "mask.block_impl": "literal",
    "mask.permutation": "random",
    "knn.features": "backbone",
    "knn.distance": "euclidean",
    "precision": "bf16",
}


def changed(key: str, value: object) -> object:
    """Another valid value for the key."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [v / 2 + 0.01 for v in value]
    return value + 1 if isinstance(value, int) else value / 2 + 0.01


def test_hash_follows_everything_else(tiny):
    config = tiny()
    flat = configs.flatten(configs.to_dict(config))
    apart = ("seed", "knn.every", "framework", "knn.vote")  # the vote: only together with the temperature
    decisive = {k: v for k, v in flat.items() if not k.startswith("run.") and k not in apart}
    assert len(decisive) > 50
    hashes = {
        key: configs.hash8(configs.resolve(flat_nested(flat, key, changed(key, v)), {}, Pretrain))
        for key, v in decisive.items()
    }
    assert len({configs.hash8(config), *hashes.values()}) == len(decisive) + 1


def test_hash_follows_the_vote(tiny):
    majority = [tiny("knn.vote=majority", "knn.temperature=0", f"knn.distance={d}") for d in ("cosine", "euclidean")]
    assert len({configs.hash8(c) for c in (tiny(), *majority)}) == 3


def flat_nested(flat: dict, key: str, value: object) -> dict:
    """Dotted keys as sections, one value replaced."""
    nested: dict = {}
    for name, old in flat.items():
        section, _, last = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value if name == key else old
    return nested


def test_field_at_its_default_leaves_the_hash_alone(tiny):
    recipe = yaml.safe_load(yaml.safe_dump(configs.to_dict(tiny())))
    del recipe["mask"]["switch"], recipe["schedule"]["gamma"]
    assert configs.hash8(configs.resolve(recipe, {}, Pretrain)) == configs.hash8(tiny())


def test_configs_are_frozen(tiny):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().epochs = 3


def test_config_and_runs_start_without_torch():
    code = "import sys, mixmask, mixmask.config, mixmask.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "text", ["010", "-010", "4:00", "24:00:00", "1:30.5", "0x1F", "0b11", "0o17", "1_000", "1_0.5"]
)
@pytest.mark.parametrize("key", ["seed", "epochs", "optimizer.lr", "moco.queue", "moco.temperature", "mask.ratio"])
def test_numbers_that_yaml_1_1_reads_otherwise_than_they_look_are_refused(key, text, tmp_path):
    """010 is 8 there, 4:00 is 240; in a recipe file as on the command line."""
    with pytest.raises(ConfigError, match=f"{key.split('.')[-1]}.*{re.escape(repr(text))}"):
        configs.load(CIFAR, configs.parse_overrides([f"{key}={text}"]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.sub(r"(?m)^seed: .*", f"seed: {text}", CIFAR.read_text()))
    with pytest.raises(ConfigError, match=r"seed: .*which is not a decimal number"):
        configs.load(recipe)


def test_numbers_of_a_section_in_another_program_s_words_are_decimal_too():
    recipe = ROOT / "detection" / "configs" / "voc.yaml"
    with pytest.raises(ConfigError, match=r"detectron2.SOLVER.MAX_ITER: '010' is not a decimal number"):
        configs.load(recipe, {"detectron2.SOLVER.MAX_ITER": "010"}, cls=Detection)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("10", 10), ("1e2", 100), ("1.0e+2", 100), (".5", 0.5), ("5e-1", 0.5)]
)
def test_decimal_numbers_are_read_as_they_look(text, value):
    assert configs.load(CIFAR, configs.parse_overrides([f"optimizer.lr={text}"])).optimizer.lr == value


@pytest.mark.parametrize(
    "text",
    [
        "/x/set #1",
        "~/data",
        "no",
        "Yes",
        "null",
        "~",
        "010",
        "4:00",
        "2024-01-01",
        "1_000",
        "0x1F",
        "*x",
        "&x",
        "!!int 3",
        "a: b",
        "- a",
        "@here",
        "%x",
        "7",
        "true",
        "TRUE",
        "False",
        "",
        "a, b",
        "x=y",
    ],
)
def test_a_text_arrives_as_it_stands(tiny, text):
    """YAML 1.1 takes each of these for something else, or for nothing."""
    assert tiny(f"run.data_root={text}").run.data_root == os.path.expanduser(text)


@pytest.mark.parametrize("text", ["+5", "-0", "1e3", "0.50"])
def test_a_text_that_looks_like_another_spelling_of_a_number_is_to_be_quoted(tiny, text):
    with pytest.raises(ConfigError, match=r"run.data_root: expected a text; quote what looks like a number"):
        tiny(f"run.data_root={text}")
    assert tiny(f"run.data_root='{text}'").run.data_root == text


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_python_s_truth_values_are_understood(tiny, text):
    assert tiny(f"run.channels_last={text}").run.channels_last is True


@pytest.mark.parametrize("text", ["010", "4:00", "1_000", "0x1F", "1e3", "no", "null", "2024-01-01", "0o7", ""])
def test_a_whole_number_is_written_in_digits(tiny, text, tmp_path):
    """On the command line and in a file."""
    for make in (lambda: tiny(f"seed={text}"), lambda: tiny_from_file(tmp_path, f"seed: {text}")):
        with pytest.raises(ConfigError, match="seed: expected a whole number"):
            make()


@pytest.mark.parametrize(("line", "key"), [("seed: 1\nseed: 2", "seed"), ("knn: {k: 3, k: 5}\nseed: 0", "k")])
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, line, key):
    with pytest.raises(ConfigError, match=rf"^cannot read .*tiny.yaml: key '{key}' appears twice .*tiny.yaml|line \d+"):
        tiny_from_file(tmp_path, line)


def tiny_from_file(folder: Path, line: str) -> configs.Pretrain:
    """The tiny recipe of a file that has this line in place of its seed."""
    from tests.conftest import TINY

    path = folder / "tiny.yaml"
    path.write_text(TINY.replace("seed: 0", line))
    return configs.load(path)


def test_help_of_a_stage_lists_the_keys_of_its_recipe():
    done = subprocess.run([sys.executable, "pretrain/train.py", "--keys"], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}
    recipe = configs.flatten(configs.read_yaml("pretrain/configs/cifar100_moco.yaml"))
    assert {key for key in recipe if not key.startswith("moco.")} <= lines.keys()
    assert lines["mask.ratio"] == "a number from 0 to 1 or 2 values, each: a number from 0 to 1"
    assert lines["optimizer.lr"] == "a number, at least 0" and lines["run.eval_batch"].endswith("(default: 500)")


def test_an_optional_setting_of_a_framework_is_hashed_only_away_from_its_default():
    plain, default, other = (
        configs.load(CIFAR, each) for each in ({}, {"moco.own_view": True}, {"moco.own_view": False})
    )
    assert configs.hash8(plain) == configs.hash8(default) != configs.hash8(other)
    assert plain == default and other.settings["own_view"] is False
    for key, value in configs.schema.OPTIONAL_SETTINGS.items():
        framework, name = key.split(".")
        assert getattr(registry.load(registry.FRAMEWORKS[framework].code).Settings, name) == value
    with pytest.raises(ConfigError, match=r"unknown key 'moco.own_view'"):
        configs.load(CIFAR.with_name("cifar100_simclr.yaml"), {"moco.own_view": False})
    with pytest.raises(ConfigError, match=r"moco.own_view: expected true or false"):
        configs.load(CIFAR, {"moco.own_view": 3})
