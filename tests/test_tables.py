"""paper/make_tables.py and the cells of Table 4."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mixmask.config import UserError
from paper import make_tables
from paper.cells import select, tables
from paper.presets import budget, directory, steps

ROOT = Path(__file__).resolve().parents[1]
MIXMASK = "table4/imagenet/moco/mixmask/200"


def finish(runs_dir, cell_id, value, preset="paper", settings=(), seed=0):
    """A finished probe of the cell."""
    cell = select([cell_id])[0]
    where = directory(runs_dir, steps(cell, seed, budget(preset, settings))[-1])
    where.mkdir(parents=True)
    (where / "result.json").write_text(json.dumps({"metrics": {cell.metric: value}}))
    return where.name


def make(tmp_path, *words):
    make_tables.main(["table4", "--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *words])
    texts = {kind: (tmp_path / "out" / f"table4.{kind}").read_text() for kind in ("md", "tex", "csv")}
    frame = pd.read_csv(io.StringIO(texts["csv"]), dtype=str, keep_default_na=False).set_index("cell")
    return texts, frame


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
    assert "69.0 (paper, n = 1)" in texts["md"] and "-0.2" in texts["tex"]


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


def test_the_mscn_row_says_that_ours_is_a_reconstruction(tmp_path, capsys):
    texts, frame = make(tmp_path)
    for text in (texts["md"], texts["tex"], frame.loc["table4/imagenet/moco/mscn/200", "row"], capsys.readouterr().out):
        assert "MSCN (our reconstruction)" in text


def test_the_latex_table_has_as_many_columns_as_it_declares(tmp_path):
    lines = make(tmp_path)[0]["tex"].splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 3 and all(line.count("&") == 6 and line.endswith(r"\\") for line in body)
    assert r"\begin{tabular}{lrllrll}" in lines


def test_a_result_without_the_metric_is_named(tmp_path):
    name = finish(tmp_path / "runs", MIXMASK, 1.0)
    (tmp_path / "runs" / "linear" / name / "result.json").write_text('{"metrics": {}}')
    with pytest.raises(UserError, match=f"{name}/result.json: no metric 'linear_sgd_last'"):
        make(tmp_path)


def test_cell_ids_are_unique_and_every_cell_resolves_under_every_preset():
    cells = [cell for table in tables().values() for cell in table.cells]
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in cells:
        for preset in ("paper", "smoke"):
            assert steps(cell, 0, budget(preset))[-1].config.dataset


def test_make_tables_never_imports_torch(tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.')\nfrom paper import make_tables\n"
        f"make_tables.main(['--out', {str(tmp_path)!r}])\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)
