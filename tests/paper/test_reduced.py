"""Tables at a scale of their own: set against their first row, with noise, and against nothing that is published."""

import io
import itertools
import json
from pathlib import Path

import pandas as pd
import pytest

from paper import make_report, make_tables
from paper.cells import ROOT, select, tables
from paper.comparisons import words
from paper.figures import reduced, reduced_long, style
from paper.presets import budget
from slurm import graph, launch
from tests.docs.test_docs import script
from tests.paper.test_figures import curves, log
from tests.paper.test_tables import finish

KNN = "knn_k200_t0.1_out128_last"
VANILLA, MIXMASK, ERASE = (f"reduced/knn/{method}" for method in ("vanilla", "mixmask", "erase"))


@pytest.fixture
def runs(tmp_path):
    """Vanilla 10, 11, 12; MixMask 13, 14, 15; erase 11.5, one seed."""
    for seed in range(3):
        finish(tmp_path, VANILLA, 10.0 + seed, seed=seed)
        finish(tmp_path, MIXMASK, 13.0 + seed, seed=seed)
    finish(tmp_path, ERASE, 11.5)
    return tmp_path


def made(runs, name="reduced"):
    frame = make_tables.collect(tables()[name], [budget("paper"), budget("smoke")], [runs])
    return frame.set_index("cell")


def test_a_row_is_ahead_of_the_first_where_the_pairs_of_seeds_say_so(tmp_path):
    for seed, gain in enumerate((3.0, 3.1, 2.9)):
        finish(tmp_path, VANILLA, 10.0 + 2 * seed, seed=seed)
        finish(tmp_path, MIXMASK, 10.0 + 2 * seed + gain, seed=seed)
    finish(tmp_path, ERASE, 20.0)
    frame = made(tmp_path)
    assert words(frame.loc[MIXMASK]) == "+3.0 (ahead, +2.8 to +3.2)" and frame.loc[MIXMASK, "against"] == "Vanilla"
    assert words(frame.loc[ERASE]) == "+8.0 (undecided: one seed)"
    assert frame.loc[ERASE, "to_decide"] == "3 seeds would show the noise: 8 minutes of two CPU cores more"
    assert words(frame.loc[VANILLA]) == words(frame.loc["reduced/knn/both"]) == ""


def test_noise_that_hides_a_point_leaves_a_row_undecided_and_the_seeds_that_would_decide_are_named(tmp_path):
    for seed, gain in enumerate((0.6, 1.9, 0.6)):
        finish(tmp_path, VANILLA, 11.0, seed=seed)
        finish(tmp_path, MIXMASK, 11.0 + gain, seed=seed)
    row = made(tmp_path).loc[MIXMASK]
    assert words(row) == "+1.0 (undecided: 3 seeds could only see a difference of 2.4)"
    assert row["to_decide"].startswith("7 seeds would decide: ") and "minutes of two CPU cores more" in row["to_decide"]
    for cell, seed in itertools.product((VANILLA, MIXMASK), range(3, 7)):
        finish(tmp_path, cell, 11.0, seed=seed)
    row = made(tmp_path).loc[MIXMASK]
    assert row["n"] == 3 and row["to_decide"] == "7 seeds would decide: they are there, beyond those of this table"


def test_a_smoke_run_is_not_set_against_a_reduced_one(tmp_path):
    finish(tmp_path, VANILLA, 10.0)
    finish(tmp_path, MIXMASK, 40.0, "smoke")
    assert words(made(tmp_path).loc[MIXMASK]) == ""


def test_without_the_first_row_there_is_no_difference(tmp_path):
    finish(tmp_path, ERASE, 11.5)
    assert words(made(tmp_path).loc[ERASE]) == ""


def test_the_table_says_its_scale_beside_each_number_and_prints_nothing_as_published(runs, tmp_path):
    make_tables.main(["reduced", "--runs-dir", str(runs), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/reduced.md").read_text()
    assert "14.0 ± 1.0 (reduced, n = 3)" in text and "11.5 (reduced, n = 1)" in text
    assert "from Vanilla" in text and "Reduced: ResNet-18 of width 16" in text and "not the paper's scale" in text
    assert "published  |" not in text and "(paper" not in text and "Preset paper" not in text
    csv = pd.read_csv(io.StringIO((tmp_path / "out/reduced.csv").read_text()), index_col=0)
    assert csv.loc[MIXMASK, ["preset", "against", "difference"]].tolist() == ["reduced", "Vanilla", 3.0]
    assert csv["published"].isna().all() and (csv["against"] != "published").all()


def test_a_row_may_lack_cells_which_get_a_dash(tmp_path):
    for row, accuracy in (("vanilla", 5.0), ("mscn/adapted", 8.0)):
        finish(tmp_path, f"reduced_frameworks/byol/{row}", accuracy)
    make_tables.main(["reduced_frameworks", "--runs-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out/reduced_frameworks.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    first = next(n for n, row in enumerate(cells) if row[:1] == ["MSCN, adapted"])
    assert cells[first][1:] == ["ours", "no run yet", "–", "8.0 (reduced, n = 1)", *["–"] * 4]
    assert cells[first + 1] == ["", "from Vanilla", "", "", "+3.0 (undecided: one seed) [1]", *[""] * 4]


def test_the_launcher_says_the_scale_in_place_of_the_published_budget(tmp_path, cli):
    _, out, _ = cli(launch.main, "reduced", "table3", "--dry-run", "--runs-dir", tmp_path)
    assert "preset  reduced: ResNet-18 of width 16" in out and "preset  paper: the published budget" in out
    assert "the published budget" not in cli(launch.main, "reduced", "--dry-run", "--runs-dir", tmp_path)[1]


def test_a_smoke_run_of_a_reduced_cell_is_marked_as_smoke(tmp_path):
    finish(tmp_path, MIXMASK, 40.0, "smoke")
    frame = make_tables.collect(tables()["reduced"], [budget("paper"), budget("smoke")], [tmp_path])
    assert frame.set_index("cell").loc[MIXMASK, "preset"] == "smoke"


def test_the_reports_counts_are_of_the_papers_numbers_and_its_reduced_numbers_say_so(runs, monkeypatch):
    monkeypatch.setattr(make_report, "_drawn", lambda *_: b"<svg/>")
    some = {name: tables()[name] for name in ("table4", "reduced", "reduced_masks")}
    monkeypatch.setattr(make_report, "tables", lambda: some)
    monkeypatch.setattr(make_report, "FIGURES", ("reduced",))
    monkeypatch.setattr(make_report, "_whole", lambda *_: ())
    budgets = [budget("paper")]
    frames = {name: make_report.collect(table, budgets, [runs]) for name, table in some.items()}
    page = make_report.page(frames, budgets, [runs])
    assert "<p>The paper prints 6 numbers, in Tables 1 to 7:</p>" in page
    assert "reduced: +3.0 (undecided: 3 seeds, all alike, show no noise) from Vanilla" in page
    assert page.count('id="reduced"') == page.count('id="reduced_masks"') == 1


def test_the_figure_draws_every_method_that_has_a_run_and_is_no_replication(tmp_path):
    style.use()
    epochs = [{"epoch": n, "loss": 9.0 - n, "knn_k200_t0.1_out128": 5.0 + n} for n in (1, 2)]
    for seed in (0, 1):
        log(tmp_path, VANILLA, epochs, seed=seed)
    figure = reduced.draw([budget("paper"), budget("smoke")], [tmp_path])
    loss, knn = figure.axes
    assert curves(loss) == {"vanilla": [[1, 8], [2, 7]]} and curves(knn) == {"vanilla": [[1, 6], [2, 7]]}
    assert figure.legends[0].get_title().get_text() == "reduced: not a replication"
    notes = figure.get_supxlabel()
    assert "scale reduced; n = 2" in notes and "published" not in notes and "no run yet: Erase" in notes


def test_the_figure_of_thirty_epochs_takes_its_own_runs_and_tells_the_variants_of_a_method_apart(tmp_path):
    for place, cell in enumerate((MIXMASK, "reduced_long/knn/literal", "reduced_long/knn/again_own")):
        log(tmp_path, cell, [{"epoch": n, "loss": 9.0 - n, "knn_k200_t0.1_out128": 5.0 * place + n} for n in (1, 2)])
    methods, masks = map(curves, reduced_long.draw([budget("paper")], [tmp_path]).axes)
    assert not methods  # six epochs are another table's
    assert masks == {"the released generator": [[1, 6], [2, 7]], "x1 again, both keys": [[1, 11], [2, 12]]}
    for seed in range(2):
        lines = [{"epoch": 1, "loss": 8.0, "knn_k200_t0.1_out128": 7.0 + 2 * seed}]
        log(tmp_path, "reduced_long/knn/mixmask", lines, seed=seed)
    figure = reduced_long.draw([budget("paper")], [tmp_path])
    methods, masks = map(curves, figure.axes)
    assert methods == {"MixMask": [[1, 8]]} and masks["MixMask"] == [[1, 8]]
    assert "n = 1 to 2" in figure.get_supxlabel()  # the variants' one seed is not MixMask's two


def test_every_kept_reduced_run_is_one_that_a_cell_asks_for_and_was_made_by_unmodified_code():
    """A recipe that is changed would leave its results behind, in no table."""
    wanted = {job.id for job in graph.jobs(select(["reduced*"]), budget("paper"), ROOT / "runs")}
    kept = [path.parent for path in ROOT.glob("results/*/cifar100_reduced_*/result.json")]
    assert kept and {path.parent.name for path in ROOT.glob("results/*/*/result.json")} <= wanted
    for path in kept:
        first, *resumed = environments(path)
        for environment in (first, *resumed):  # a run that was resumed by a later commit says so (docs/replication.md)
            assert environment["commit"] and environment["modified"] is False
            assert all(environment[name] == first[name] for name in ("torch", "torchvision", "numpy", "pillow"))


def environments(run: Path) -> list[dict]:
    """Where a run was begun, and where it was resumed if that was elsewhere."""
    later = run / "environments.jsonl"
    lines = later.read_text().splitlines() if later.exists() else []
    return [json.loads((run / "environment.json").read_text()), *map(json.loads, lines)]


def test_the_documents_blocks_of_reduced_runs_hold_what_the_kept_runs_logged():
    generate = script(ROOT / "docs" / "generate.py")
    (run,) = ROOT.glob("results/pretrain/cifar100_reduced_moco-mixmask-e6-3726b66f-s0")
    loss, accuracy = (json.loads((run / "result.json").read_text())["metrics"][key] for key in ("loss", KNN))
    (line,) = [line for line in generate.runs("reduced/*").splitlines() if f"`{run.name}`" in line]
    assert line.startswith("| MixMask | 0 | cpu | ") and f" | {loss:.2f} | {accuracy:.1f} | " in line
    (line,) = [line for line in generate.curves("reduced/knn/mixmask").splitlines() if line.startswith("| MixMask")]
    assert f"{loss:.2f} | " in line and line.endswith(f", {accuracy:.1f} |")
