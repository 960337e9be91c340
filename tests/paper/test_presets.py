"""paper/presets.py: which value wins where several are laid over a recipe, and what makes a number another budget's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mixmask.config import ConfigError, flatten, read_yaml, to_dict
from paper.cells import ROOT, Cell, select
from paper.presets import STAGES, Budget, Epochs, Preset, budget, chains, presets, steps


def preset(values: dict[str, dict[str, Any]], **others: Any) -> Preset:
    return dataclasses.replace(presets()["smoke"], epochs={"*": Epochs(10, 2)}, values=values, **others)


def cell(**overrides: Any) -> Cell:
    """A cell of table 4 of which only the recipe and its chain are kept: ImageNet, MoCo, a linear probe."""
    (found,) = select(["table4/imagenet/moco/mixmask/200"])
    return dataclasses.replace(found, overrides=overrides)


# ------------------------------------------------------------------------------------------------------ precedence


def test_over_the_recipe_lies_the_cell_over_it_the_preset_over_it_the_user():
    keys = ("mask.ratio", "moco.temperature", "optimizer.lr", "optimizer.momentum")
    recipe = flatten(read_yaml(ROOT / "pretrain/configs/imagenet_moco.yaml"))
    by_preset = preset({"pretrain/imagenet_moco": dict.fromkeys(keys[2:], 0.22)})
    user = {"pretrain": dict.fromkeys(keys[3:], 0.33)}
    config = flatten(to_dict(steps(cell(**dict.fromkeys(keys[1:], 0.11)), 0, Budget(by_preset, user))[0].config))
    assert [config[key] for key in keys] == [recipe["mask.ratio"], 0.11, 0.22, 0.33]


def test_epochs_are_the_recipe_s_or_the_cell_s_shortened_unless_preset_or_user_say_how_many():
    def epochs(cell: Cell, values: dict[str, Any] | None = None, **user: int) -> int:
        by_preset = preset({"pretrain/*": values or {}})
        return steps(cell, 0, Budget(by_preset, {"pretrain": user}))[0].config.epochs

    recipe = read_yaml(ROOT / "pretrain/configs/imagenet_moco.yaml")["epochs"]
    assert epochs(cell()) == recipe // 10 and epochs(cell(epochs=70)) == 7 and epochs(cell(epochs=3)) == 2
    assert epochs(cell(epochs=70), {"epochs": 5}) == 5 and epochs(cell(epochs=70), {"epochs": 5}, epochs=4) == 4


def test_an_evaluation_has_the_user_s_value_over_the_preset_s_and_neither_is_the_pretraining_s():
    keys = ("epochs", "batch_size")
    by_preset = preset({"linear/*": dict.fromkeys(keys, 11), "pretrain/*": {"batch_size": 64}})
    pretrain, linear = steps(cell(), 0, Budget(by_preset, {"linear": {"epochs": 12}}))
    assert (linear.config.epochs, linear.config.batch_size) == (12, 11)
    assert pretrain.config.batch_size == 64 and pretrain.config.epochs not in (11, 12)


def test_the_later_of_a_preset_s_patterns_wins_and_one_for_other_targets_says_nothing():
    values = {
        "pretrain/*": {"optimizer.lr": 0.1, "batch_size": 64},
        "table4:pretrain/imagenet_*": {"optimizer.lr": 0.2},
        "table5:pretrain/imagenet_*": {"optimizer.lr": 0.3},
        "finetune/*": {"optimizer.lr": 0.4},
    }
    config = steps(cell(), 0, Budget(preset(values)))[0].config
    assert (config.optimizer.lr, config.batch_size) == (0.2, 64)


def test_the_first_of_a_preset_s_rules_for_epochs_that_fits_counts():
    rules = {"table4:imagenet_*": Epochs(20, 1), "imagenet_*": Epochs(40, 1), "*": Epochs(1, 1)}
    by_preset = dataclasses.replace(presets()["smoke"], epochs=rules, values={})
    assert steps(cell(epochs=80), 0, Budget(by_preset))[0].config.epochs == 4
    other = dataclasses.replace(cell(epochs=80), id="table5/imagenet/moco/mixmask")
    assert steps(other, 0, Budget(by_preset))[0].config.epochs == 2


def test_seeds_are_the_cell_s_within_the_preset_s_unless_the_user_chooses():
    (found,) = select(["table5/cifar100/moco/mixmask"])
    assert found.seeds == 3
    cases = [(5, {}, [0, 1, 2]), (2, {}, [0, 1]), (1, {"seed": [4, 7]}, [4, 7]), (5, {"seed": 6}, [6])]
    for most, user, expected in cases:
        given = Budget(dataclasses.replace(presets()["paper"], seeds=most), {"pretrain": user})
        assert given.seeds(found) == expected
        assert [chain[0].config.seed for chain in chains(found, given)] == expected


@pytest.mark.parametrize("value", ["010", "yes", "null", "", "true", "1.5", "[0, 010]", "[[0]]", "{a: 1}"])
def test_a_seed_that_is_no_decimal_number_is_refused_in_one_line(value):
    with pytest.raises(ConfigError, match="--set seed: expected a whole number, or a list of them, found"):
        budget("paper", [f"seed={value}"]).seeds(select(["table4"])[0])


# ----------------------------------------------------------------------------------------------------------- labels

# Of the sections of a recipe's `run:` and of the launch alone: no number changes with them.
QUIET = [
    *("run.workers=1", "run.device=cpu", "run.log_every=7", "run.data_root=/data", "seed=4", "seed=[1,2]"),
    *("linear.run.workers=1", "finetune.run.device=cpu", "detection.run.workers=0", "convert.run.device=cpu"),
    *("cluster.partition=p", "cluster.hours=1", "linear.cluster.gpus=1", "knn.every=50"),
]
LOUD = [
    *("epochs=3", "batch_size=64", "optimizer.lr=0.1", "knn.k=5", "knn.temperature=0.2", "knn.features=backbone"),
    *("linear.epochs=3", "linear.optimizer.lr=1", "linear.batch_size=8", "finetune.labels=5", "finetune.bn_groups=2"),
    *("detection.group=4", "detection.detectron2.SOLVER.MAX_ITER=5", "dataset=photos", "allow_partial_data=true"),
]


@pytest.mark.parametrize("item", QUIET)
def test_what_only_says_where_and_how_to_run_is_no_other_budget(item: str):
    given = budget("paper", [item])
    assert given.replicates and given.label == "paper"


@pytest.mark.parametrize("item", LOUD)
def test_what_changes_a_number_is_printed_beside_it(item: str):
    given = budget("paper", [item, "run.workers=1"])
    key, _, value = item.partition("=")
    assert not given.replicates and given.label == f"paper, {key}={'True' if value == 'true' else value}"
    assert budget("smoke", [item]).label == f"smoke, {key}={'True' if value == 'true' else value}"


FOLDERS = sorted({stage.recipes for stage in STAGES.values() if stage.recipes})
RECIPES = [p for folder in FOLDERS for p in sorted((ROOT / folder).glob("*.yaml")) if not p.stem.startswith("knn")]


def stage_of(path: Path) -> str:
    folder = path.parent.parent.name
    return folder if folder in STAGES else "finetune" if "finetune" in path.stem else "linear"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_printed_but_run_the_seed_and_how_often_knn_is_measured(path: Path):
    stage = stage_of(path)
    for key in flatten(read_yaml(path)):
        label = Budget(presets()["paper"], {stage: {key: 1}}).label
        name = key if stage == "pretrain" else f"{stage}.{key}"
        quiet = key.startswith("run.") or (stage == "pretrain" and key in ("seed", "knn.every"))
        assert label == ("paper" if quiet else f"paper, {name}=1"), key
