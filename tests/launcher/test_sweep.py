"""slurm/launch.py --config: every combination of the values that --set lists, each with an evaluation."""

import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmask import config as configs
from mixmask.config import ConfigError, UserError
from slurm import launch, shell, sweep

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "pretrain" / "configs" / "cifar100_moco.yaml"
PROBE = ROOT / "eval" / "configs" / "cifar100_linear_adam.yaml"
FLAT = configs.read_yaml(RECIPE)


def planned(runs_dir, *settings, then=()):
    return sweep.plan([RECIPE, *then], sweep.own_budget(list(settings)), runs_dir, "")


def test_lists_make_every_combination_and_each_is_named_by_its_overrides(tmp_path):
    cells, jobs = planned(tmp_path, "optimizer.lr=[0.03,0.06,0.1]", "seed=[0,1]", "epochs=2")
    assert [(job.config.optimizer.lr, job.config.seed) for job in jobs] == [
        *itertools.product((0.03, 0.06, 0.1), (0, 1))
    ]
    assert {job.config.epochs for job in jobs} == {2} and len({job.directory for job in jobs}) == 6
    assert cells[3].id == "cifar100_moco/optimizer.lr=0.06,seed=1,epochs=2"
    for job in jobs:  # the command says the whole config
        words = shlex.split(job.shell)
        overrides = words[words.index("--set") + 1 : words.index("--run-dir")]
        assert configs.load(RECIPE, configs.parse_overrides(overrides)) == job.config
        assert configs.load(RECIPE, configs.parse_overrides(overrides)).seed == job.config.seed


@pytest.mark.parametrize(
    ("item", "values"),
    [
        ("seed=3", [3]),
        ("seed=[3]", [3]),
        ("method=[vanilla,mixmask]", ["vanilla", "mixmask"]),
        ("moco.queue=[512,1024]", [512, 1024]),
        ("augment.order=[crop,flip]", [["crop", "flip"]]),
        ("augment.order=[[crop,flip],[crop]]", [["crop", "flip"], ["crop"]]),
        ("schedule.milestones=[60,80]", [[60, 80]]),
        ("mask.ratio=[0.2,0.5]", [[0.2, 0.5]]),  # an interval
        ("mask.ratio=[0.2,0.5,0.6]", [0.2, 0.5, 0.6]),
        ("mask.ratio=[[0.2,0.5],0.6]", [[0.2, 0.5], 0.6]),
        ("run.trackers=[]", [[]]),
    ],
)
def test_a_list_is_several_values_unless_the_key_takes_it_as_it_stands(item, values):
    ((key, value),) = configs.parse_overrides([item]).items()
    assert sweep.several(FLAT, key, value, RECIPE) == values


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("seed=[]", r"--set seed=\[\]: expected at least one value"),
        ("lr=[0.1,0.2]", "unknown key 'lr'; did you mean 'optimizer.lr'"),
        ("optimizer.lr=[0.1,fast]", "optimizer.lr: expected a number, found 'fast'"),
        ("augment.order=[crop,turn]", r"augment.order: expected a list, such as \[crop\]; found 'crop'"),
    ],
)
def test_what_no_run_can_take_is_refused_before_any_is_launched(tmp_path, item, message):
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, item)


def test_equal_values_and_what_changes_no_number_are_one_run(tmp_path):
    cells, jobs = planned(tmp_path, "seed=[1,1]", "run.workers=[0,2]")
    assert len(cells) == len(jobs) == 1


def test_then_evaluates_each_with_its_seed_and_its_own_settings(tmp_path):
    _, jobs = planned(tmp_path, "seed=[0,1]", "linear.epochs=3", then=[PROBE])
    assert [job.stage for job in jobs] == ["pretrain", "linear"] * 2
    for pretraining, probe in zip(jobs[::2], jobs[1::2], strict=True):
        assert probe.parents == (pretraining.directory,) and f"{pretraining.directory}/checkpoint.pt" in probe.command
        assert (probe.config.checkpoint, probe.config.seed) == (pretraining.id, pretraining.config.seed)
        assert probe.config.epochs == 3


def test_then_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a recipe of a linear probe or of a fine-tuning"):
        planned(tmp_path, then=[RECIPE])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table4", "--config", "cifar100_moco"], "found the target table4"),
        (["--config", "cifar100_moco", "--preset", "smoke"], "found --preset smoke"),
        (["table4", "--then", "cifar100_linear_adam"], "--then: of --config alone"),
        (["--config", "nowhere.yaml"], "no such config file"),
        (["--config", "folder_smal_moco"], "smal_moco; did you mean the bundled recipe folder_small_moco?"),
        (["stauts"], "unknown target 'stauts'; did you mean 'status'?"),
        (["cancle", "table4"], "did you mean 'cancel'?"),
    ],
)
def test_words_that_do_not_go_together(tmp_path, words, message):
    with pytest.raises(UserError) as error:
        launch.main([*words, "--runs-dir", str(tmp_path), "--dry-run"])
    assert message in str(error.value)


def own_folder(root):
    """Sixty images of two classes, in folders with a space and an umlaut."""
    rng = np.random.default_rng(0)
    for number, name in itertools.product(range(30), ("Bär", "der Hund")):
        (root / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + 100 * (name == "Bär")
        Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")


def test_a_sweep_of_own_images_runs_here_is_skipped_when_finished_and_seen_by_status(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(shell, "available", lambda: False)
    own_folder(tmp_path / "Meine Bilder")
    recipe, probe = tmp_path / "mine.yaml", tmp_path / "probe.yaml"
    recipe.write_text((ROOT / "pretrain" / "configs" / "folder_small_moco.yaml").read_text())
    probe.write_text((ROOT / "eval" / "configs" / "folder_linear.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    words = ["--config", "mine.yaml", "--then", "probe.yaml", "--runs-dir", "runs", "--set", "optimizer.lr=[0.03,0.1]"]
    words += ["run.data_root=Meine Bilder", "epochs=1", "backbone.width=4", "augment.size=16", "linear.epochs=1"]
    words += ["backbone.bn_groups=1", "mix_groups=1", "run.workers=0"]
    launch.main(words)
    text = capfd.readouterr().out
    assert "4 distinct (2 pretrain, 2 linear): 4 new" in text and "cifar" not in text
    assert "note: pretrain: batch_size: 256 becomes" in text and "note: linear: batch_size: 256 becomes" in text
    monkeypatch.chdir(tmp_path)
    launch.main(["status", *words])
    text = capfd.readouterr().out
    assert "4 finished; 2 of 2 cells are complete" in text and "optimizer.lr=0.03,epochs=1" in text
    monkeypatch.chdir(tmp_path)
    launch.main(words)
    text = capfd.readouterr().out
    assert "4 of 4 runs are finished already" in text
    (comparing,) = [line for line in text.splitlines() if line.startswith("python paper/compare.py")]
    done = subprocess.run(
        [sys.executable, *shlex.split(comparing)[1:], "--out", str(tmp_path / "c.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert "pretrain.optimizer.lr" in done.stdout, done.stderr
