"""paper/compare.py: whether a run's curves are those of a reference, from which epoch on they are not, and why."""

import json
import re
from pathlib import Path

import pytest

from mixmask.config import UserError
from paper import compare


def epoch(number, loss, **values):
    return {"kind": "epoch", "step": 10 * number, "epoch": number, "loss": loss, "timing": {"seconds": loss}, **values}


def run(where, lines, **config):
    where.mkdir(parents=True, exist_ok=True)
    values = {"recipe": "r", "seed": 0, "mask": {"grid": 2}, "run": {"workers": len(str(where))}, **config}
    (where / "config.yaml").write_text(json.dumps(values))
    (where / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return where


@pytest.fixture
def compared(tmp_path, cli):
    """`compared(lines, reference lines, config of the run)` -> status, output, error."""

    def compare_(lines, reference, *words, **config):
        ours, theirs = run(tmp_path / "a", lines, **config), run(tmp_path / "reference", reference)
        return cli(compare.main, ours, theirs, "--out", tmp_path / "out" / "c.png", *words)

    return compare_


def test_equal_runs_are_equal_bit_by_bit_whatever_their_timings_and_workers(compared, tmp_path):
    lines = [epoch(1, 2.5, knn_k5=30.0), epoch(2, 2.25, knn_k5=31.0)]
    slower = [{**line, "timing": {"seconds": 99.0}} for line in lines]
    status, out, _ = compared(lines, slower)
    assert status == 0 and "config: the same" in out and "equal bit by bit over epochs 1 to 2" in out
    assert (tmp_path / "out" / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_that_differs_ends_the_equality_of_bits_and_nothing_else(compared):
    steps = [{"kind": "step", "step": 3, "epoch": 1, "loss": value} for value in (7.0, 7.5)]
    status, out, _ = compared([steps[0], epoch(1, 2.0)], [steps[1], epoch(1, 2.0)])
    assert status == 0 and "equal within 0 over epochs 1 to 1" in out


def test_the_first_epoch_at_which_any_curve_parts_is_named_with_both_values(compared):
    ours = [epoch(1, 10.0, knn_k5=30.0), epoch(2, 10.0, knn_k5=30.0), epoch(3, 10.0, knn_k5=60.0)]
    theirs = [epoch(1, 10.4, knn_k5=30.0), epoch(2, 10.4, knn_k5=33.0), epoch(3, 20.0, knn_k5=30.0)]
    status, out, _ = compared(ours, theirs)
    assert status == 1 and "part at epoch 2: knn_k5 is 30 against 33, 0.091 apart; tolerance 0.05, at most 0.5" in out


@pytest.mark.parametrize(("tolerance", "status"), [("0.03", 1), ("0.04", 0)])
def test_the_tolerance_is_relative_to_the_greater_value(compared, tolerance, status):
    assert compared([epoch(1, -96.0)], [epoch(1, -100.0)], "--tolerance", tolerance)[0] == status


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_parts_from_one_that_is_and_not_from_its_like(compared, value):
    for ours, theirs in ((value, 2.0), (2.0, value)):
        status, out, _ = compared([epoch(1, ours)], [epoch(1, theirs)])
        assert status == 1 and "part at epoch 1: loss is" in out
    assert compared([epoch(1, value)], [epoch(1, value)])[0] == 0


def test_a_run_that_is_still_going_is_compared_as_far_as_it_is(compared):
    status, out, _ = compared([epoch(1, 2.0)], [epoch(1, 2.0), epoch(2, 1.0)])
    assert status == 0 and "bit by bit over epochs 1 to 1 (the run has come to 1, the reference to 2)" in out


def test_each_setting_that_differs_is_named_and_agreeing_curves_are_still_the_same(compared):
    status, out, _ = compared([epoch(1, 2.0)], [epoch(1, 2.0)], seed=1, mask={"grid": 4}, extra=True)
    assert status == 0 and "config: 3 keys differ" in out
    for line in ("seed: 1 (reference: 0)", "mask.grid: 4 (reference: 2)", "extra: True (reference: absent)"):
        assert line in out


def test_runs_of_two_stages_have_nothing_to_compare(compared):
    probe = [{"kind": "epoch", "step": 0, "epoch": 1, "test_top1": 50.0}]
    status, _, error = compared([epoch(1, 2.0)], probe)
    assert status == 1 and "no curve in common" in error


def test_a_log_without_epochs_is_compared_by_iteration(compared):
    ours, theirs = (
        [{"kind": "step", "step": 20, "loss": 2.0}, {"kind": "test", "step": 40, "box_AP": v}] for v in (5.0, 9.0)
    )
    status, out, _ = compared(ours, theirs)
    assert status == 1 and "part at iteration 40: box_AP is 5 against 9" in out


def test_a_folder_that_is_no_run_is_named(tmp_path, cli):
    status, _, error = cli(compare.main, tmp_path, tmp_path)
    assert status == 1 and f"{tmp_path} is no run directory" in error


def test_a_pretraining_and_its_probe_are_no_pair(compared):
    status, _, error = compared([epoch(1, 2.0)], [epoch(1, 2.0)], checkpoint="encoder-s0")
    assert status == 1 and "some runs are pre-trainings, others evaluations" in error


def test_versions_that_differ_are_named_and_a_seed_is_called_noise(tmp_path, compared):
    for name, torch in (("a", "2.11"), ("reference", "2.9")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "environment.json").write_text(json.dumps({"torch": torch, "numpy": "2.4"}))
    _, out, _ = compared([epoch(1, 2.0)], [epoch(1, 9.0)], seed=1)
    assert "environment: torch 2.11 (reference: 2.9)\n" in out and "the noise between seeds" in out


def test_a_run_that_was_continued_in_another_environment_says_so(compared, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "environment.json").write_text(json.dumps({"threads": 1}))
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "environment.json").write_text(json.dumps({"threads": 1}))
    (tmp_path / "a" / "environments.jsonl").write_text(json.dumps({"step": 9, "changed": "threads 1 -> 2"}) + "\n")
    _, out, _ = compared([epoch(1, 2.0)], [epoch(1, 2.0)])
    assert "run was continued after step 9: threads 1 -> 2" in out and "environment:" not in out


# ---------------------------------------------------------------------------------------------------- any number


def run_of(folder, stage, name, config, accuracies):
    where = folder / stage / name
    where.mkdir(parents=True)
    (where / "config.yaml").write_text(json.dumps(config))
    lines = [
        {"kind": "epoch", "step": n, "epoch": n, "loss": 3.0 - n, "knn_k5": v} for n, v in enumerate(accuracies, 1)
    ]
    (where / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(where)


def sweep_of(folder):
    for rate in (0.03, 0.06):
        for seed in (0, 1):
            config = {
                "recipe": "mine",
                "optimizer": {"lr": rate, "name": "sgd"},
                "seed": seed,
                "run": {"log_every": seed},
            }
            yield run_of(folder, "pretrain", f"mine-{rate}-s{seed}", config, [40 + 100 * rate, 50 + seed])


def table_of(text):
    return [re.split("  +", line) for line in text.splitlines() if "written" not in line]


def test_runs_are_named_by_the_keys_in_which_they_differ_and_stand_in_a_table_and_a_picture(tmp_path, capsys):
    compare.main([*sweep_of(tmp_path), "--out", str(tmp_path / "c.png")])
    head, *rows = table_of(capsys.readouterr().out)
    assert head == ["run", "come to", "loss", "knn_k5"]
    assert rows == [
        ["optimizer.lr=0.03 seed=0", "epoch 2", "1", "50.00"],
        ["optimizer.lr=0.03 seed=1", "epoch 2", "1", "51.00"],
        ["optimizer.lr=0.06 seed=0", "epoch 2", "1", "50.00"],
        ["optimizer.lr=0.06 seed=1", "epoch 2", "1", "51.00"],
    ]
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_evaluations_are_named_by_the_keys_of_their_pretrainings(tmp_path, capsys):
    probes = [
        run_of(
            tmp_path,
            "linear",
            f"probe-{n}",
            {"recipe": "probe", "checkpoint": Path(path).name, "seed": n % 2},
            [60 + n, 50],
        )
        for n, path in enumerate(sweep_of(tmp_path))
    ]
    third = run_of(
        tmp_path, "pretrain", "third", {"recipe": "mine", "optimizer": {"lr": 0.1, "name": "sgd"}, "seed": 0}, [1.0]
    )
    probes.append(
        run_of(tmp_path, "linear", "p2", {"recipe": "probe", "checkpoint": Path(third).name, "seed": 0}, [62])
    )
    compare.main([*probes, "--out", str(tmp_path / "c.png")])
    _, *rows = table_of(capsys.readouterr().out)
    rates = [f"pretrain.optimizer.lr={rate}" for rate in ("0.03", "0.06")]  # the seed is both's, and said once
    assert [row[0] for row in rows][:4] == [f"seed={seed} {rate}" for rate in rates for seed in (0, 1)]
    assert rows[4][0] == "seed=0 pretrain.optimizer.lr=0.1"
    assert rows[1][1:] == ["epoch 2", "1", "50.00 (best 61.00)"]


def test_one_run_is_a_table_too_and_no_epoch_is_one_line(tmp_path, capsys):
    config = {"recipe": "mine", "seed": 0}
    compare.main([run_of(tmp_path, "pretrain", "one", config, [40.0]), "--out", str(tmp_path / "c.png")])
    assert table_of(capsys.readouterr().out)[1] == ["one", "epoch 1", "2", "40.00"]
    with pytest.raises(UserError, match="none of the runs has logged an epoch yet"):
        compare.main([run_of(tmp_path, "pretrain", "none", config, []), "--out", str(tmp_path / "c.png")])


def test_what_differs_with_the_recipe_alone_is_not_repeated(tmp_path, capsys):
    configs = [{"recipe": name, "framework": name, "seed": seed} for name in ("moco", "byol") for seed in (0, 1)]
    runs = [run_of(tmp_path, "pretrain", f"r{n}", config, [40.0]) for n, config in enumerate(configs)]
    compare.main([*runs, "--out", str(tmp_path / "c.png")])
    names = [row[0] for row in table_of(capsys.readouterr().out)[1:]]
    assert names == ["recipe=moco seed=0", "recipe=moco seed=1", "recipe=byol seed=0", "recipe=byol seed=1"]


def test_old_logs_without_measures_of_the_features_are_equal_bit_by_bit(compared):
    new = epoch(1, 2.0) | {"feature_std": 0.1, "effective_rank": 3.0, "alignment": 0.1, "uniformity": -1.0}
    status, text, _ = compared([new], [epoch(1, 2.0)])
    assert status == 0 and "equal bit by bit" in text
