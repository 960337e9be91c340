"""Offline k-NN is the online one, on the checkpoint."""

import dataclasses
import json
import os
import signal

import pytest

from eval import knn as script
from mixmask import checkpoint, registry
from pretrain import train as pretrain_script
from pretrain.train import train

METRIC = "knn_k5_t0.1_out8"


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pretrained")
    train(tiny("augment.mean=[0.4, 0.5, 0.6]"), directory)
    return directory


def evaluate(cli, directory, runs, *items):
    """The metrics that the script prints for a pre-training run."""
    words = ["--checkpoint", directory / "checkpoint.pt", "--runs-dir", runs, *(["--set", *items] if items else [])]
    status, out, err = cli(script.main, *words)
    assert (status, err) == (0, "")
    return {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if line.startswith("knn_")}


MAJORITY = ["knn.temperature=0", "knn.features=backbone", "knn.distance=euclidean", "knn.vote=majority"]


@pytest.mark.parametrize(
    ("items", "metric"),
    [
        ([], METRIC),
        (["method=vanilla", "run.channels_last=false", "moco.mlp=true", "seed=4"], METRIC),
        (["precision=bf16"], METRIC),
        (["knn.features=backbone"], "knn_k5_t0.1_backbone64"),
        (MAJORITY, "knn_k5_euclidean_backbone64"),
        ([*MAJORITY, "run.channels_last=false"], "knn_k5_euclidean_backbone64"),
    ],
)
def test_offline_equals_online_exactly(tiny, cli, tmp_path, items, metric):
    """Without --config, the protocol is that of the pre-training."""
    result = train(tiny("epochs=1", "dataset=squares", *items), tmp_path / "run")
    evaluate(cli, tmp_path / "run", tmp_path)
    (path,) = (tmp_path / "knn").glob("*/result.json")
    found = json.loads(path.read_text())["metrics"]
    assert found == {f"{metric}_last": result["metrics"][f"{metric}_last"]}


def test_another_protocol_by_its_recipe(cli, pretrained, tmp_path):
    for name, k, metric in (("knn", 20, "knn_k20_t0.1_out8"), ("knn_euclidean", 5, "knn_k5_euclidean_backbone64")):
        words = ["--checkpoint", pretrained / "checkpoint.pt", "--config", f"eval/configs/{name}.yaml"]
        status, out, _ = cli(script.main, *words, "--runs-dir", tmp_path, "--set", f"knn.k={k}")
        assert status == 0 and out.startswith(f"{metric}_last ")


def test_partial_data_of_the_pretraining_is_accepted_again(tiny, cli, tmp_path, monkeypatch):
    squares = registry.DATASETS["squares"]

    def partial(split, expected, allow_partial):
        assert allow_partial
        return squares.code(split, expected)

    monkeypatch.setitem(registry.DATASETS, "squares", dataclasses.replace(squares, code=partial))
    result = train(tiny("allow_partial_data=true"), tmp_path / "run")
    assert evaluate(cli, tmp_path / "run", tmp_path)[f"{METRIC}_last"] == result["metrics"][f"{METRIC}_last"]


@pytest.mark.parametrize(
    ("lines", "items", "words"),
    [
        ("dataset: circles", [], "dataset: unknown data set 'circles'"),
        ("run: {device: meta}", [], "run.device"),
        ("run: 5", [], "run: expected"),
        ("features: cached", [], "unknown key 'features'"),
        ("", ["seed=7"], "--set seed: it is the checkpoint's own"),
        ("", ["checkpoint=x"], "--set checkpoint: it is the checkpoint's own"),
    ],
)
def test_what_a_protocol_says_counts_or_is_refused(cli, pretrained, tmp_path, lines, items, words):
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(f"recipe: mine\nknn: {{k: 5, temperature: 0.1, features: output, every: 0}}\n{lines}\n")
    given = ["--checkpoint", pretrained / "checkpoint.pt", "--config", protocol, "--runs-dir", tmp_path]
    status, _, err = cli(script.main, *given, *(["--set", *items] if items else []))
    assert status == 1 and words in err and err.count("\n") == 1
    assert ("protocol.yaml" in err) == ("unknown key" in words or "expected" in words)


def test_pooled_features_are_named_by_their_width(cli, pretrained, tmp_path):
    assert evaluate(cli, pretrained, tmp_path, "knn.features=backbone").keys() == {"knn_k5_t0.1_backbone64_last"}


def test_second_time_reads_the_result(cli, pretrained, tmp_path, monkeypatch):
    first = evaluate(cli, pretrained, tmp_path)
    monkeypatch.setattr(script.knn, "evaluate", None)
    assert evaluate(cli, pretrained, tmp_path) == first


def test_checkpoint_of_an_unfinished_run_has_a_result_of_its_own(tiny, cli, tmp_path, monkeypatch):
    """Evaluated in the middle and again at the end: the second number is not the first one's."""
    objective, done = pretrain_script.objective, []
    monkeypatch.setattr(
        pretrain_script,
        "objective",
        lambda *a: (done.append(1), len(done) == 3 and os.kill(os.getpid(), signal.SIGTERM), objective(*a))[-1],
    )
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run")
    monkeypatch.undo()
    evaluate(cli, tmp_path / "run", tmp_path)
    result = train(tiny(), tmp_path / "run")
    assert evaluate(cli, tmp_path / "run", tmp_path)[f"{METRIC}_last"] == result["metrics"][f"{METRIC}_last"]
    assert len(list((tmp_path / "knn").iterdir())) == 2


def test_more_neighbours_than_images_are_refused(cli, pretrained, tmp_path):
    words = ["--checkpoint", pretrained / "checkpoint.pt", "--run-dir", tmp_path / "run", "--set", "knn.k=97"]
    status, _, err = cli(script.main, *words)
    assert status == 1 and err == "error: knn.k: 97 neighbours, but there are only 96 training images\n"
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoint_is_one_line(cli, pretrained, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes((pretrained / "checkpoint.pt").read_bytes()[:5000])
    status, _, err = cli(script.main, "--checkpoint", path)
    assert status == 1 and err.startswith(f"error: {path} is cut off") and err.count("\n") == 1


def test_evaluation_leaves_the_checkpoint_alone(cli, pretrained, tmp_path):
    before = (pretrained / "checkpoint.pt").read_bytes()
    evaluate(cli, pretrained, tmp_path)
    assert (pretrained / "checkpoint.pt").read_bytes() == before and checkpoint.load(pretrained / "checkpoint.pt")
