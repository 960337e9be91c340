"""paper/make_tables.py: tables of numbers (1 to 7) and of settings (8 to 10)."""

import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mixmask.config import ConfigError, UserError
from paper import cells, make_tables, settings
from paper.cells import select
from paper.collect import collect
from paper.presets import budget, chains, directory, metric, steps

ROOT = Path(__file__).resolve().parents[2]
MIXMASK = "table4/imagenet/moco/mixmask/200"
VANILLA = "table4/imagenet/moco/vanilla/200"


def finish(runs_dir, cell_id, value, preset="paper", settings=(), seed=0):
    """A finished run of the cell's last stage."""
    cell = select([cell_id])[0]
    chain = steps(cell, seed, budget(preset, settings))
    where = directory(runs_dir, chain[-1])
    where.mkdir(parents=True)
    (where / "result.json").write_text(json.dumps({"metrics": {metric(cell, chain): value}}))
    return where.name


def make(tmp_path, *words, table="table4"):
    make_tables.main([table, "--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *words])
    texts = {kind: (tmp_path / "out" / f"{table}.{kind}").read_text() for kind in ("md", "tex", "csv")}
    return texts, pd.read_csv(io.StringIO(texts["csv"]), dtype=str, keep_default_na=False, index_col=0)


def test_table4_holds_the_published_values_as_the_paper_prints_them(tmp_path):
    _, frame = make(tmp_path)
    assert frame["published"].tolist() == ["67.5", "71.1", "68.2", "71.5", "69.2", "71.7"]
    assert frame["origin"].tolist() == ["cited", "cited", "unclear", "unclear", "own", "own"]


def test_without_runs_every_cell_says_so(tmp_path, capsys):
    texts, frame = make(tmp_path)
    assert texts["md"].count("no run yet") == texts["tex"].count("no run yet") == 6
    assert set(frame["ours_mean"]) == {""} and set(frame["n"]) == {"0"}
    assert texts["md"] in capsys.readouterr().out


def test_a_smoke_number_is_marked_and_never_compared(tmp_path, capsys):
    name = finish(tmp_path / "runs", MIXMASK, 57.34, "smoke")
    texts, frame = make(tmp_path)
    for text in (texts["md"], texts["tex"], capsys.readouterr().out):
        assert "57.3 (smoke, n = 1)" in text and "not comparable" in text and "Preset smoke" in text
    row = frame.loc[MIXMASK]
    assert (row["ours_mean"], row["preset"], row["difference"], row["epochs"]) == ("57.3", "smoke", "", "4")
    assert row["runs"] == name


def test_a_run_of_the_papers_budget_is_preferred_and_compared(tmp_path):
    finish(tmp_path / "runs", MIXMASK, 57.3, "smoke")
    finish(tmp_path / "runs", MIXMASK, 69.0)
    texts, frame = make(tmp_path)
    assert frame.loc[MIXMASK, ["ours_mean", "preset", "difference"]].tolist() == ["69.0", "paper", "-0.2"]
    assert "69.0 (paper, n = 1)" in texts["md"] and "-0.2 (undecided: one seed) [" in texts["tex"]


def test_a_smaller_budget_than_the_papers_is_named_and_not_compared(tmp_path):
    finish(tmp_path / "runs", MIXMASK, 66.0, settings=["epochs=100"])
    texts, frame = make(tmp_path, "--preset", "paper", "--set", "epochs=100")
    assert "66.0 (paper, epochs=100, n = 1)" in texts["md"]
    assert frame.loc[MIXMASK, "difference"] == ""
    assert "66.0" not in make(tmp_path)[0]["md"]


def test_mean_and_standard_deviation_over_seeds(tmp_path):
    for seed, value in enumerate((69.0, 70.0, 71.0)):
        finish(tmp_path / "runs", MIXMASK, value, seed=seed)
    texts, frame = make(tmp_path, "--set", "seed=[0,1,2]")
    assert frame.loc[MIXMASK, ["ours_mean", "ours_std", "n"]].tolist() == ["70.0", "1.00", "3"]
    assert "70.0 ± 1.0 (paper, n = 3)" in texts["md"] and r"70.0 $\pm$ 1.0" in texts["tex"]


MOCO = "table5/cifar100/moco/mixmask"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((68.3, 68.4, 68.3), "agrees, -0.4 to +0.2"),
        ((65.0, 65.1, 65.2), "differs, -3.8 to -2.8"),
        ((67.0, 68.0, 69.0), "undecided: 3 seeds could only see a difference of 6.5"),
        ((67.0,), "undecided: one seed"),
    ],
)
def test_a_published_value_is_judged_by_the_spread_of_our_seeds(tmp_path, values, verdict):
    for seed, value in enumerate(values):
        finish(tmp_path / "runs", MOCO, value, seed=seed)
    texts, frame = make(tmp_path, table="table5")
    row = frame.loc[MOCO]
    assert (row["verdict"], row["n"], row["against"]) == (verdict, str(len(values)), "published")
    assert f"({verdict})" in texts["md"]


def test_an_undecided_cell_says_how_many_seeds_would_decide_it_and_what_they_cost(tmp_path):
    finish(tmp_path / "runs", MOCO, 67.0)
    row = make(tmp_path, table="table5")[1].loc[MOCO]
    assert re.fullmatch(r"3 seeds would show the noise: [\d.]+ GPU hours more", row["to_decide"])
    finish(tmp_path / "runs", MOCO, 67.4, seed=1)
    texts, frame = make(tmp_path, table="table5")
    assert re.fullmatch(r"\d+ seeds would decide: [\d.]+ GPU hours more", frame.loc[MOCO, "to_decide"])
    assert (
        f"] {frame.loc[MOCO, 'to_decide']}" in texts["md"] and "To decide is to see a difference of 1.0" in texts["md"]
    )
    finish(tmp_path / "runs", MOCO, 69.4, seed=2)
    row = make(tmp_path, table="table5")[1].loc[MOCO]
    assert row["to_decide"].startswith("no number of seeds would decide: the published value is one run")


def test_the_spread_is_pooled_over_the_distinct_runs_of_one_data_set_and_metric_where_the_table_says_so(tmp_path):
    """Table 1's default stands in four rows and is one run; ImageNet's cells are not CIFAR-100's."""
    for seed, value in enumerate((68.0, 68.2, 68.4)):
        finish(tmp_path / "runs", "table1/cifar100/grid/2", value, seed=seed)
        finish(tmp_path / "runs", "table1/cifar100/grid/4", value - 0.5, seed=seed)
    _, frame = make(tmp_path, table="table1")
    four = frame.loc["table1/cifar100/grid/4"]
    width = 2.776 * 0.2 * (1 / 3 + 1 / 3) ** 0.5  # two runs of three seeds: 4 degrees of freedom; published: mean of 3
    assert float(four["high"]) - float(four["low"]) == pytest.approx(2 * width, abs=0.15)
    assert "pooled over the cells of one data set and metric" in (tmp_path / "out/table1.md").read_text()


def test_below_a_table_stands_what_chance_would_do_and_what_survives_holms_correction(tmp_path):
    for cell, start in ((MOCO, 68.3), ("table5/cifar100/simsiam/mixmask", 60.0)):
        for seed in range(3):
            finish(tmp_path / "runs", cell, start + seed / 10, seed=seed)
    text = make(tmp_path, table="table5")[0]["md"]
    assert "2 comparisons rest on two seeds or more; of as many perfect replications 0.1 would differ by chance" in text
    assert "1 differs, 1 also by Holm's correction (table5/cifar100/simsiam/mixmask)." in text


def test_five_detection_trainings_of_one_pretraining_are_one_seed(tmp_path):
    cell = select(["table7/moco/mixmask/voc/box_AP"])[0]
    for chain, value in zip(chains(cell, budget("paper")), (57.5, 57.9, 58.1, 57.7, 58.0), strict=True):
        where = directory(tmp_path / "runs", chain[-1])
        where.mkdir(parents=True)
        metrics = {f"box_{name}": value for name in ("AP", "AP50", "AP75")}
        (where / "result.json").write_text(json.dumps({"metrics": metrics}))
    texts, frame = make(tmp_path, table="table7")
    row = frame.loc[cell.id]
    assert (row["n"], row["ours_mean"], row["verdict"]) == ("5", "57.8", "undecided: one seed")
    assert "Several trainings from one pre-training count as one seed." in texts["md"]


def test_several_trainings_of_each_pretraining_are_runs_of_their_own_and_one_value_a_seed(tmp_path):
    cell = select(["table7/moco/mixmask/voc/box_AP"])[0]
    two = budget("paper", ["seed=[0,1]"])
    seeds = [(chain[0].config.seed, chain[-1].config.seed) for chain in chains(cell, two)]
    assert seeds == [(0, k) for k in range(5)] + [(1, k) for k in range(5, 10)]
    for chain, value in zip(
        chains(cell, two), (57.5, 57.9, 58.1, 57.7, 58.0, 60.0, 60.1, 60.2, 60.3, 60.4), strict=True
    ):
        where = directory(tmp_path / "runs", chain[-1])
        where.mkdir(parents=True)
        (where / "result.json").write_text(json.dumps({"metrics": {"box_AP": value}}))
    table = dataclasses.replace(cells.tables()["table7"], cells=(cell,))
    found = collect(table, [two], [tmp_path / "runs"]).iloc[0]
    assert found["by_seed"] == {0: pytest.approx(57.84), 1: pytest.approx(60.2)} and found["n"] == 10


def test_a_knn_number_of_the_smoke_preset_is_found_and_named_after_its_own_k(tmp_path):
    finish(tmp_path / "runs", "table1/cifar100/grid/2", 33.0, "smoke")
    texts, frame = make(tmp_path, table="table1")
    assert frame.loc["table1/cifar100/grid/2", ["ours_mean", "metric"]].tolist() == ["33.0", "knn_k20_t0.1_out128_last"]
    assert "knn_k20_t0.1_out128_last" in texts["md"]


def test_one_run_stands_in_every_place_of_the_paper_that_needs_it(tmp_path):
    finish(tmp_path / "runs", MIXMASK, 69.1)
    for table, cell in (("table1", "imagenet/grid/8"), ("table5", "imagenet/moco/mixmask")):
        assert make(tmp_path, table=table)[1].loc[f"{table}/{cell}", "ours_mean"] == "69.1"


def test_the_mscn_row_says_that_ours_is_a_reconstruction(tmp_path, capsys):
    texts, frame = make(tmp_path)
    for text in (texts["md"], texts["tex"], frame.loc["table4/imagenet/moco/mscn/200", "row"], capsys.readouterr().out):
        assert "MSCN (our reconstruction)" in text


def test_the_latex_table_has_as_many_columns_as_it_declares(tmp_path):
    lines = make(tmp_path)[0]["tex"].splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 6 and all(line.count("&") == 3 and line.endswith(r"\\") for line in body)
    assert r"\begin{tabular}{llll}" in lines


def test_no_line_of_the_latex_table_is_taken_for_an_argument_of_the_line_break_before_it(tmp_path):
    lines = make(tmp_path)[0]["tex"].splitlines()
    assert any(line.startswith("[1]") for line in lines)
    assert not any(line.endswith(r"\\") and after.startswith("[") for line, after in itertools.pairwise(lines))


def test_table1_is_laid_out_as_the_papers(tmp_path):
    texts, _ = make(tmp_path, table="table1")
    rows = [line.split(" | ")[0].strip("| ") for line in texts["md"].splitlines() if line.startswith("| ")]
    assert [row for row in rows if row] == [
        *("**Grid Size**", "2×2", "4×4", "8×8", "16×16", "32×32", "48×48"),
        *("**Masking Strategy**", "blocked", "discrete"),
        *("**Masking Ratio**", r"0.25\|0.75 [1]", "0.5", "uniform(0, 1)", "uniform(0.25, 0.75)"),
        *("**Switch Mixture**", "Yes", "No"),
    ]
    assert r"2$\times$2 & published & 68.1 & 46.4 & 68.4 \\" in texts["tex"]
    assert r"48$\times$48 & published & -- & -- & 68.8 \\" in texts["tex"]


def test_table6_and_7_print_what_is_published_also_where_only_a_public_checkpoint_can_be_measured(tmp_path):
    texts, frame = make(tmp_path, table="table6")
    assert texts["md"].count("public checkpoint, no run yet") == 10
    assert texts["md"].count(" no run yet") == 10 + 7 + 6  # of ours, and of SwAV and Barlow Twins trained here
    assert frame.loc["table6/imagenet/swav/1percent", ["published", "origin"]].tolist() == ["53.9", "cited"]
    assert make(tmp_path, table="table7")[0]["md"].count("public checkpoint, no run yet") == 36


def test_runs_of_two_folders_stand_in_one_table_and_a_finished_one_comes_before_an_unfinished_one(tmp_path):
    name = finish(tmp_path / "kept", MIXMASK, 69.0)
    finish(tmp_path / "runs", VANILLA, 67.0)
    (tmp_path / "runs" / "linear" / name).mkdir()  # begun again, not finished
    _, frame = make(tmp_path, "--runs-dir", str(tmp_path / "runs"), str(tmp_path / "kept"))
    assert frame.loc[[VANILLA, MIXMASK], "ours_mean"].tolist() == ["67.0", "69.0"]


def test_a_table_can_be_printed_where_the_locale_knows_ascii_only(tmp_path):
    finish(tmp_path / "runs", MIXMASK, 69.0)
    words = ["paper/make_tables.py", "table4", "--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=locale, capture_output=True, timeout=60)
    assert not done.stderr and b"69.0 (paper, n = 1)" in done.stdout
    assert "±" in (tmp_path / "out" / "table4.md").read_text(encoding="utf-8")


def test_a_number_from_another_methods_public_checkpoint_is_refused(tmp_path):
    """SwAV's file given as MoCo V2's: the format that the stage recognised is not that of the row."""
    file = tmp_path / "swav.pth.tar"
    file.write_bytes(b"weights")
    cell, settings = "table6/imagenet/moco/vanilla/1percent", [f"checkpoints.moco_v2={file}"]
    name = finish(tmp_path / "runs", cell, 50.0, settings=settings)
    where = tmp_path / "runs" / "finetune" / name / "result.json"
    words = ["--preset", "paper", "--set", *settings]
    where.write_text(json.dumps({"metrics": {"finetune_last": 50.0}, "format": "swav"}))
    with pytest.raises(UserError, match="is of format swav, expected moco for MoCo V2"):
        make(tmp_path, *words, table="table6")
    where.write_text(json.dumps({"metrics": {"finetune_last": 50.0}, "format": "moco"}))
    texts, _ = make(tmp_path, *words, table="table6")
    assert "50.0 (paper, n = 1)" in texts["md"] and "not from a pre-training of ours" in texts["md"]


def test_which_images_were_labelled_stands_beside_a_fine_tuned_number(tmp_path):
    name = finish(tmp_path / "runs", "table6/imagenet/moco/mixmask/1percent", 50.0)
    where = tmp_path / "runs" / "finetune" / name / "result.json"
    where.write_text(json.dumps({"metrics": {"finetune_last": 50.0}, "labels": "balanced subset"}))
    texts, frame = make(tmp_path, table="table6")
    assert frame.loc["table6/imagenet/moco/mixmask/1percent", "remark"] == "balanced subset"
    assert "50.0 (paper, n = 1) [" in texts["md"] and "balanced subset" in texts["md"]


def test_a_cell_that_the_paper_does_not_print_is_a_dash_and_is_compared_with_nothing(tmp_path):
    path = tmp_path / "table5.yaml"
    path.write_text(
        "{title: 'Table 5: x', common: {seeds: 1, recipe: cifar100_moco, metric: m}, columns: [{id: a, name: A}], rows:"
        " [{id: r, name: R, overrides: {method: erase}}]}"
    )
    table = cells._read(path)
    chain = steps(table.cells[0], 0, budget("paper"))
    where = directory(tmp_path, chain[-1])
    where.mkdir(parents=True)
    (where / "result.json").write_text(json.dumps({"metrics": {metric(table.cells[0], chain): 50.0}}))
    frame = make_tables.collect(table, [budget("paper")], [tmp_path])
    assert make_tables.numbers(table, frame).body == [["R", "published", "–"], ["", "ours", "50.0 (paper, n = 1)"]]
    assert "table5/a/r,R,A,,50.0" in make_tables.numbers_csv(frame)


def test_a_figure_is_no_table(tmp_path):
    with pytest.raises(ConfigError, match="figure5 is no table: python paper/make_figures"):
        make(tmp_path, table="figure5")


@pytest.mark.parametrize(
    "content", ['{"metrics": {"loss": 1.0}}', "{not JSON", '{"metrics": {"linear_sgd_last": null}}']
)
def test_a_result_that_cannot_be_read_leaves_its_own_cell_empty_and_is_named_when_all_is_written(tmp_path, content):
    finish(tmp_path / "runs", VANILLA, 67.0)
    name = finish(tmp_path / "runs", MIXMASK, 1.0)
    (tmp_path / "runs" / "linear" / name / "result.json").write_text(content)
    with pytest.raises(UserError, match=f"{name}/result.json"):
        make(tmp_path)
    written = (tmp_path / "out" / "table4.md").read_text()
    assert written.count("unreadable result") == 1 and "67.0 (paper, n = 1)" in written


def test_make_tables_never_imports_torch(tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.')\nfrom paper import make_tables\n"
        f"make_tables.main(['--out', {str(tmp_path)!r}])\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


# --------------------------------------------------------------------------------------------- Tables 8, 9 and 10


def test_tables_8_and_9_depart_from_the_printed_settings_where_a_reason_is_named_and_nowhere_else():
    frames = [settings.collect(name).assign(table=name) for name in ("table8", "table9")]
    frame = pd.concat(frames)
    differing = frame[frame["ours"].str.lower() != frame["published"].str.lower()]
    assert differing[["column", "hparam", "published", "ours"]].values.tolist() == [
        ["SimCLR & BYOL", "weight decay", "0.0005", "1e-06"],
        ["SimSiam", "lr", "0.03", "0.06"],
        ["Pretraining", "epochs", "200/800", "200"],
        ["Pretraining", "weight decay", "0", "0.0001"],
    ]
    assert differing["note"].all() and len(frame) == 12 + 12 + 11 + 15 + 8


def test_table8_follows_the_recipes(monkeypatch):
    recipe = settings._recipe
    monkeypatch.setattr(settings, "_recipe", lambda path: {**recipe(path), "batch_size": 256})
    with pytest.raises(ConfigError, match="table8: MoCo: batch size: the recipe has 256, the paper 512"):
        settings.collect("table8")


def test_a_departure_that_is_none_is_refused(monkeypatch):
    recipe = settings._recipe
    monkeypatch.setattr(settings, "_recipe", lambda path: {**recipe(path), "optimizer.weight_decay": 0})
    with pytest.raises(ConfigError, match="table9: Pretraining: weight decay: a 'departure' is named, but"):
        settings.collect("table9")


def test_table8_prints_both_data_sets_values_with_a_slash(tmp_path):
    texts, _ = make(tmp_path, table="table8")
    assert "| 0.003/0.002 " in texts["md"] and "64/128" in texts["tex"]


def test_table10_is_what_its_three_recipes_have(tmp_path):
    texts, frame = make(tmp_path, table="table10")
    assert (frame["ours"].str.lower() == frame["published"].str.lower()).all() and len(frame) == 9
    assert "0.002/0.002/0.001" in texts["md"] and "0.5/0.5/0.05" in texts["md"]
