"""slurm/graph.py: what a launch takes for finished, and what it refuses to make again without being told."""

import json
from pathlib import Path

import pytest

from mixmask import config as configs
from mixmask.config import ConfigError, UserError
from paper import presets
from paper.cells import select
from paper.presets import STAGES, budget
from slurm import graph, launch


@pytest.fixture
def chain(tmp_path) -> list[graph.Job]:
    """Pre-training, conversion and detection of one cell."""
    jobs = graph.jobs(select(["table7/moco/mixmask/voc/box_AP"]), budget("paper"), tmp_path / "runs")
    return jobs[:3]


def finish(job, where=None, product=True):
    """The result, in `where` if it is given, and what the run's children read."""
    for directory in {job.directory, where or job.directory}:
        directory.mkdir(parents=True, exist_ok=True)
    if product:
        (job.directory / STAGES[job.stage].gives).touch()
    result = (where or job.directory) / "result.json"
    result.write_text(json.dumps({"metrics": {"loss": 1.0}}))
    return result


def kept(job, tmp_path):
    return tmp_path / "results" / job.stage / job.id


def test_finished_parents_with_their_products_are_built_upon(chain):
    finish(chain[0])
    finish(chain[1])
    graph.check_products(chain)
    assert graph.needed(chain) == {chain[2].directory}


def test_a_finished_run_whose_product_is_gone_is_refused_with_what_to_do(chain):
    result = finish(chain[0], product=False)
    with pytest.raises(UserError) as error:
        graph.check_products(chain)
    assert f"{chain[1].directory} needs {chain[0].directory / 'checkpoint.pt'}, which is gone" in str(error.value)
    assert f"move {result} away" in str(error.value) and "\n" not in str(error.value)
    result.unlink()
    graph.check_products(chain)
    assert chain[0].directory in graph.needed(chain)


def test_a_checkpoint_that_nobody_needs_any_more_may_be_deleted(chain):
    for job in chain:
        finish(job, product=False)
    graph.check_products(chain)


def test_a_run_kept_in_results_is_not_made_again(chain, tmp_path):
    for job in chain:
        finish(job, where=kept(job, tmp_path), product=False)
    assert [job.state for job in chain] == ["finished"] * 3 and graph.needed(chain) == set()


def test_a_kept_pretraining_without_its_checkpoint_is_no_parent(chain, tmp_path):
    result = finish(chain[0], where=kept(chain[0], tmp_path), product=False)
    with pytest.raises(UserError, match=f"{result}.*restore it, or move {result} away"):
        graph.check_products(chain)
    (chain[0].directory / "checkpoint.pt").touch()
    graph.check_products(chain)
    assert graph.needed(chain) == {chain[1].directory, chain[2].directory}


def test_the_launcher_refuses_before_anything_starts(chain, tmp_path):
    finish(chain[0], product=False)
    with pytest.raises(UserError, match="which is gone, though its run is finished"):
        launch.execute(chain, "local", tmp_path / "runs")
    assert not chain[1].directory.exists()


def test_runs_in_the_current_directory_have_states(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for runs_dir in (".", "runs"):
        job = graph.jobs(select(["table7/moco/mixmask/voc/box_AP"]), budget("paper"), Path(runs_dir))[0]
        assert job.state == "new"
    finish(job, where=Path("results") / job.stage / job.id, product=False)
    assert job.state == "finished"


def test_a_lost_conversion_is_made_again_since_it_takes_seconds(chain, capsys):
    pretrain, convert, detect = chain
    finish(pretrain)
    finish(convert, product=False)
    graph.check_products(chain)
    assert "backbone.pkl is gone: it is made again" in capsys.readouterr().out
    assert graph.needed(chain) == {convert.directory, detect.directory}
    (pretrain.directory / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="which is gone, though its run is finished"):
        graph.check_products(chain)


def test_a_package_that_is_missing_is_named_before_anything_is_made_for_it(chain, monkeypatch):
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"detection needs detectron2, .* make detectron2 \(docs/detection.md\)"):
        graph.check_packages(chain)
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: object())
    graph.check_packages(chain)


def test_a_conversion_asks_for_no_gpu(chain):
    assert [job.resources.gpus for job in chain] == [1, 0, 4]  # 4 images a GPU fit 40 GB, 16 do not


def test_configs_that_differ_in_the_seed_alone_are_validated_together(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "_CONFIGS", {})
    resolved = []
    resolve = configs.resolve
    monkeypatch.setattr(configs, "resolve", lambda *words: resolved.append(0) or resolve(*words))
    counts = []
    for seeds in ("seed=[0]", "seed=[0,1,2,3]"):
        found = graph.jobs(select(["table5"]), budget("paper", [seeds]), tmp_path)
        counts.append((len(found), len(resolved)))
    assert counts[1][0] == 4 * counts[0][0] and counts[1][1] == counts[0][1]
    assert len({job.id for job in found}) == len(found)
    with pytest.raises(ConfigError, match="seed: expected at least 0, found -1"):
        graph.jobs(select(["table5"]), budget("paper", ["seed=-1"]), tmp_path)
