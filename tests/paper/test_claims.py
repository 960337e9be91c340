"""paper/claims.py: the paper's claims, decided by its own printed numbers and by our runs."""

import pandas as pd
import pytest

from mixmask.config import ConfigError
from paper import claims, make_tables
from paper.cells import select
from paper.presets import budget
from tests.paper.test_tables import finish

PAPER = budget("paper")


def claim(name):
    return next(each for each in claims.claims() if each.id == name)


def outcome(name, runs):
    return claims.outcome(claim(name), claims.values(PAPER, [runs]), PAPER, [runs])


def seeds(runs, cell, *values):
    for seed, value in enumerate(values):
        finish(runs, cell, value, seed=seed)


def test_what_the_papers_own_numbers_contradict_is_found_in_its_tables():
    contradicted = {each.id for each in claims.claims() if each.as_printed.startswith("contradicted")}
    assert contradicted == {
        *("surpasses-swav", "detection-mscn", "detection-all", "improves-baselines"),
        *("blocked", "grid-extremes", "permutations"),
    }
    assert claim("improves-baselines").as_printed == (
        "contradicted: holds in 6 of 7; not Tiny-INet: BYOL: MixMask 50.8, Vanilla 51.4"
    )
    assert claim("detection-mscn").as_printed.endswith(
        "not VOC detection: AP50: MixMask 83.0, MSCN (our reconstruction) 83.0"
    )
    assert claim("both-branches").as_printed == "holds in 21 of 21"
    assert claim("budgets").as_printed == "prints no numbers" and len(claim("budgets").comparisons) == 15


def test_every_comparison_names_two_cells_and_every_claim_says_where_it_stands():
    for each in claims.claims():
        assert each.where and (each.comparisons or each.note)
        assert all(pair.one is not pair.other for pair in each.comparisons)


def test_without_runs_every_claim_with_cells_is_not_run_and_its_launch_is_priced(tmp_path):
    frame = claims.collected(PAPER, [tmp_path])
    assert set(frame["ours"]) == {"not run", "no number decides it"}
    row = frame.set_index("id").loc["global-mixture"]
    cells = "table3/imagenet/moco/both/p0.5 table3/imagenet/moco/both/p0"
    assert row["first_command"] == f"python slurm/launch.py {cells} --set seed=[0,1,2]"
    assert row["first_cost"].endswith("GPU hours") and row["first_command"] != row["whole_command"]
    assert "checkpoints.swav=PATH" in frame.set_index("id").loc["surpasses-swav", "first_command"]
    assert all(select(command.split(" --set")[0].split()[2:]) for command in frame["whole_command"] if command)


def test_a_claim_is_supported_where_every_comparison_is_ahead_and_undecided_before(tmp_path):
    for place in ("tiny_imagenet", "imagenet"):
        assert outcome("blocked-larger", tmp_path).state == ("not run" if place == "tiny_imagenet" else "undecided")
        seeds(tmp_path, f"table1/{place}/strategy/blocked", *([47.0, 47.1, 47.2] if place != "imagenet" else [69.0]))
        seeds(tmp_path, f"table1/{place}/strategy/discrete", *([46.0, 46.1, 46.3] if place != "imagenet" else [68.0]))
    found = outcome("blocked-larger", tmp_path)  # ImageNet's cells have one seed
    assert found.state == "undecided" and "imagenet" in found.first.command and "tiny" not in found.whole.command
    assert found.tally == "1 ahead, 1 undecided of 2" and found.first.hours > 0
    given = budget("paper", ["seed=[0,1,2]"])
    for seed in (1, 2):
        finish(tmp_path, "table1/imagenet/strategy/blocked", 69.0 + seed / 10, seed=seed)
        finish(tmp_path, "table1/imagenet/strategy/discrete", 68.0 + seed / 11, seed=seed)
    ours = claims.values(given, [tmp_path])
    assert claims.outcome(claim("blocked-larger"), ours, given, [tmp_path]).state == "supported"


def test_a_claim_is_contradicted_where_one_comparison_is_turned_round_by_holms_correction_too(tmp_path):
    seeds(tmp_path, "table1/cifar100/switch/yes", 67.0, 67.1, 67.2)
    seeds(tmp_path, "table1/cifar100/switch/no", 68.0, 68.11, 68.2)
    found = outcome("switch", tmp_path)
    assert found.state == "contradicted" and "CIFAR-100: -1.0 (behind" in found.detail and found.first is None


def test_a_claim_of_no_difference_is_supported_where_one_point_would_have_been_seen(tmp_path):
    seeds(tmp_path, "table1/cifar100/strategy/blocked", 68.0, 68.3, 68.6)
    seeds(tmp_path, "table1/cifar100/strategy/discrete", 68.1, 68.3, 68.5)
    assert outcome("blocked-cifar", tmp_path).state == "supported"
    found = outcome("blocked", tmp_path)  # level on CIFAR-100, the others not run
    assert (found.state, found.tally) == ("undecided", "1 level of 3") and found.first.hours > 0


def test_a_smoke_run_decides_nothing(tmp_path):
    for cell in ("table1/cifar100/switch/yes", "table1/cifar100/switch/no"):
        finish(tmp_path, cell, 50.0, "smoke")
    assert outcome("switch", tmp_path).state == "not run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("table5/*/mixmask = table5/*/vanilla", "expected 'A > B' or 'A ~ B'"),
        ("table5/*/mixmask > table5/vanilla", "the same stars on both sides"),
        ("table5/*/mixmusk > table5/*/vanilla", "no cell fits 'table5/*/mixmusk'"),
        ("table4/imagenet/moco/mixmask/* > table4/imagenet/moco/erase/*", "no cell 'table4/imagenet/moco/erase/200'"),
    ],
)
def test_a_wrong_comparison_is_named_with_its_claim(text, message):
    with pytest.raises(ConfigError) as error:
        claims._comparisons(text, "x")
    assert "claim x" in str(error.value) and message in str(error.value)


def test_make_tables_writes_the_claims(tmp_path, capsys):
    make_tables.main(["claims", "--runs-dir", str(tmp_path), "--out", str(tmp_path)])
    text = (tmp_path / "claims.md").read_text()
    assert text in capsys.readouterr().out and "29 claims; the paper's own tables contradict 7." in text
    assert len(pd.read_csv(tmp_path / "claims.csv")) == 29
    assert r"p{\dimexpr 0.27\linewidth" in (tmp_path / "claims.tex").read_text()
