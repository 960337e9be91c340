"""paper/make_figures.py: Figures 1 to 8 are written with and without runs, and hold what the training code says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmask import registry
from paper import make_figures
from paper.cells import select
from paper.figures import figure4, figure5, figure6, figure7, replication, style
from paper.figures.photographs import GRID, batch, masked_pair, photograph, recipe
from paper.presets import budget, directory, presets, steps
from tests.paper.test_tables import finish

ROOT = Path(__file__).resolve().parents[2]
ALL = [budget(name) for name in presets()]


@pytest.fixture(autouse=True)
def _look():
    from matplotlib import pyplot as plt

    style.use()
    yield
    plt.close("all")


def log(runs_dir, cell_id, lines, preset="paper", seed=0, stage=0, finished=True):
    """Logged epochs of the stage that comes `stage`-th for the cell; the last line's epoch is the run's last."""
    cell = select([cell_id])[0]
    step = steps(cell, seed, budget(preset))[stage]
    where = directory(runs_dir, step)
    where.mkdir(parents=True)
    text = "".join(json.dumps({"kind": "epoch", "step": line["epoch"], **line}) + "\n" for line in lines)
    (where / "log.jsonl").write_text('{"kind": "step", "step": 0, "loss": 99}\n' + text)
    if finished:
        (where / "result.json").write_text('{"metrics": {"loss": 0.0}}')


def curves(axes):
    """Label -> the points drawn."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def notes(figure):
    return figure.get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize("name", make_figures.FIGURES)
def test_each_figure_is_written_as_png_and_pdf_without_any_run(tmp_path, cli, name):
    status, out, _ = cli(make_figures.main, name, "--runs-dir", tmp_path / "none", "--out", tmp_path)
    assert status == 0 and out.count("written: ") == 2
    assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert Image.open(tmp_path / f"{name}.png").width > 900


def test_a_small_png_has_256_colours_and_keeps_its_white(tmp_path):
    make_figures.main(["figure7", "--small", "--runs-dir", str(tmp_path), "--out", str(tmp_path)])
    image = Image.open(tmp_path / "figure7.png")
    assert image.mode == "P" and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["discrete", "block"])
def test_figures_1_and_8_show_eq1_and_eq2_on_a_grid_of_8(kind):
    first, second = photograph("chelsea"), photograph("coffee")
    mask, mixed, switched, lam = masked_pair(first, second, recipe(kind), 3)
    m = mask[..., None]
    np.testing.assert_allclose(mixed, m * first + (1 - m) * second, atol=1e-5)
    np.testing.assert_allclose(switched, m * second + (1 - m) * first, atol=1e-5)
    assert lam == pytest.approx(mask.mean()) and 0 < lam < 1
    cells = mask.reshape(GRID, len(mask) // GRID, GRID, len(mask) // GRID)
    assert (cells.min(axis=(1, 3)) == cells.max(axis=(1, 3))).all()


def test_figure4_mixes_the_same_pairs_twice_in_a_and_none_twice_in_b():
    x = batch([photograph("coffee")] * 4)
    partners = {
        permutation: figure4.partner(figure4.mixmask(x, recipe(), [np.random.default_rng(seed)], permutation))
        for permutation, seed in figure4.MASK_SEEDS.items()
    }
    un = figure4.unmix(x, figure4.UnMix(prob=1.0), [np.random.default_rng(figure4.UNMIX_SEED)])
    assert figure4.partner(un) == partners["reverse"] == [3, 2, 1, 0]
    pairs = [{frozenset((i, j)) for i, j in enumerate(partners[name])} for name in ("reverse", "random")]
    assert not pairs[0] & pairs[1] and all(len(pair) == 2 for pair in pairs[1])


def test_figure5_draws_the_last_epoch_of_each_budget_as_the_mean_over_seeds(tmp_path):
    for seed, value in enumerate((60.0, 62.0, 64.0)):
        lines = [{"epoch": 199, "knn_k200": 1.0}, {"epoch": 200, "loss": 5.0, "knn_k200": value}]
        log(tmp_path, "figure5/cifar100/moco/mixmask/200", lines, seed=seed)
    log(tmp_path, "figure5/cifar100/moco/mixmask/400", [{"epoch": 400, "knn_k200": 66.0}])
    log(tmp_path, "figure5/cifar100/moco/mixmask/600", [{"epoch": 300, "knn_k200": 9.0}], finished=False)
    log(tmp_path, "figure5/cifar100/moco/mixmask/800", [{"epoch": 800, "knn_k200": 9.0}], finished=False)
    log(tmp_path, "figure5/cifar100/simclr/vanilla/1000", [{"epoch": 500, "test_top1": 67.5}], stage=1)
    figure = figure5.draw(ALL, [tmp_path])
    moco, simclr, simsiam = figure.axes
    assert curves(moco) == {"MixMask": [[200, 62], [400, 66]]}
    assert curves(simclr) == {"vanilla": [[1000, 67.5]]} and not curves(simsiam)
    assert moco.collections[0].get_datalim(moco.transData).intervaly.tolist() == [60, 66]  # 62 +- 2, 66
    assert "n = 1 to 3" in notes(figure) and "published budget" in notes(figure)
    for name in ("MoCo vanilla;", "MoCo MixMask (600, 800, 1000);", "SimCLR vanilla (200, 400, 600, 800);"):
        assert name in notes(figure)


def test_figure6_draws_the_loss_of_the_pretraining_and_top1_of_the_probe(tmp_path):
    cell = "figure6/imagenet/moco/mixmask"
    log(tmp_path, cell, [{"epoch": e, "loss": 20.0 - e} for e in range(1, 201)])
    log(tmp_path, cell, [{"epoch": e, "loss": 2.0, "test_top1": 60.0 + e} for e in (1, 2)], stage=1, finished=False)
    figure = figure6.draw(ALL, [tmp_path])
    assert curves(figure.axes[0])["MixMask"] == [[e, 20 - e] for e in range(1, 201)]
    assert curves(figure.axes[1]) == {"MixMask": [[1, 61], [2, 62]]}
    absent, unfinished = notes(figure).split("unfinished: ")
    assert "training loss of MSCN (our reconstruction)" in absent and "Top-1 accuracy of MSCN" in absent
    assert unfinished == "Top-1 accuracy of MixMask (epoch 2 of 100)"


def test_figure7_draws_loss_and_knn_of_every_framework_and_names_the_absent(tmp_path):
    lines = [{"epoch": 0, "knn_k5": 10.0}, {"epoch": 1, "loss": 3.0}, {"epoch": 1000, "loss": -1.0, "knn_k5": 50.0}]
    for framework in ("moco", "byol", "simsiam"):
        log(tmp_path, f"figure7/cifar100/{framework}/vanilla", lines)
        log(tmp_path, f"figure7/cifar100/{framework}/mixmask", lines)
    figure = figure7.draw(ALL, [tmp_path])
    grid = np.array(figure.axes).reshape(2, 4)
    assert [axes.get_title() for axes in grid[0]] == ["MoCo", "SimCLR", "BYOL", "SimSiam"]
    for column in (0, 2, 3):
        assert curves(grid[0, column]) == {"vanilla": [[1, 3], [1000, -1]], "MixMask": [[1, 3], [1000, -1]]}
        assert curves(grid[1, column]) == {"vanilla": [[0, 10], [1000, 50]], "MixMask": [[0, 10], [1000, 50]]}
    assert not curves(grid[0, 1]) and not curves(grid[1, 1])
    assert notes(figure).endswith("no run yet: SimCLR vanilla; SimCLR MixMask")


def test_curves_of_several_seeds_stop_where_the_first_seed_does(tmp_path):
    for seed, last in enumerate((3, 2)):
        lines = [{"epoch": e, "loss": e + 10.0 * seed} for e in range(1, last + 1)]
        log(tmp_path, "figure7/cifar100/moco/mixmask", lines, seed=seed, finished=False)
    assert curves(figure7.draw(ALL, [tmp_path]).axes[0]) == {"MixMask": [[1, 6], [2, 7]]}


def test_smoke_is_marked_and_gives_way_to_the_papers_budget(tmp_path):
    cell = "figure7/cifar100/moco/mixmask"
    log(tmp_path, cell, [{"epoch": 1, "loss": 7.0}], preset="smoke")
    figure = figure7.draw(ALL, [tmp_path])
    assert curves(figure.axes[0]) == {"MixMask": [[1, 7]]} and "preset smoke" in notes(figure)
    assert figure.legends[0].get_title().get_text() == "smoke: not a replication"
    log(tmp_path, "figure7/cifar100/simsiam/vanilla", [{"epoch": 1000, "loss": -0.9}])
    figure = figure7.draw(ALL, [tmp_path])
    assert not curves(figure.axes[0]) and curves(figure.axes[3]) == {"vanilla": [[1000, -0.9]]}
    assert "smoke" not in notes(figure) and not figure.legends[0].get_title().get_text()


def test_the_replication_has_a_mark_for_each_of_the_142_numbers_hollow_where_none_was_run(tmp_path):
    figure = replication.draw([budget("paper")], [tmp_path])
    marks = [line for axes in figure.axes for line in axes.get_lines()]
    assert len(marks) == 142 and all(line.get_markerfacecolor() == "white" for line in marks)
    assert all(line.get_xdata()[0] == 0 for line in marks)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["agrees: 0", "differs: 0", "undecided: 0", "not run: 142"]


def test_the_replication_draws_a_difference_with_its_interval_and_names_what_is_off_the_page(tmp_path):
    for seed in range(3):
        finish(tmp_path, "table5/cifar100/moco/mixmask", 67.5 + seed / 10, seed=seed)  # published: 68.4
        finish(tmp_path, "table5/cifar100/byol/mixmask", 40.0 + seed / 10, seed=seed)  # 71.9
    figure = replication.draw([budget("paper")], [tmp_path])
    axes = figure.axes[1]
    drawn = {round(line.get_xdata()[0], 1): line.get_marker() for line in axes.get_lines() if line.get_xdata()[0]}
    assert drawn == {-0.8: "D", -10: "D"} and "← -31.8" in [text.get_text() for text in axes.texts]
    (short,) = [lines for lines in axes.collections if abs(lines.get_segments()[0][0][0] + 0.8 + 0.497) < 0.01]
    assert short.get_segments()[0][1][0] == pytest.approx(-0.8 + 0.497, abs=0.01)  # 4.303 * 0.1 * sqrt(1 / 3 + 1)


def test_no_two_methods_share_a_colour_a_marker_or_both_grey_and_dash():
    lines = registry.METHODS.values()
    rgb = [tuple(int(line.color[i : i + 2], 16) for i in (1, 3, 5)) for line in lines]
    greys = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in rgb]
    assert len(set(rgb)) == len({line.marker for line in lines}) == len(rgb)
    compared = dict(zip(registry.METHODS, greys, strict=True))
    assert min(abs(compared["mixmask"] - compared[name]) for name in ("vanilla", "mscn", "erase")) > 20


def test_an_unknown_figure_is_refused_with_the_nearest_name(cli, tmp_path):
    status, _, error = cli(make_figures.main, "figure55", "--out", tmp_path)
    assert status == 1 and "unknown figure 'figure55'; did you mean 'figure5'?" in error


def test_figures_of_runs_never_import_torch(tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.')\nfrom paper import make_figures\n"
        f"make_figures.main(['figure[567]', '--runs-dir', {str(tmp_path)!r}, '--out', {str(tmp_path)!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)
