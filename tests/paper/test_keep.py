"""paper/keep.py: a kept run is read like any other, its checkpoint stays out, smoke and unfinished runs are refused."""

import gzip
import hashlib
import json

import pytest

from mixmask.runs import read_log, read_result
from paper import keep, make_tables
from paper.cells import tables
from paper.figures.curves import read
from paper.presets import budget
from paper.report.records import record
from tests.paper.test_tables import finish

LINE = {"kind": "epoch", "step": 4, "epoch": 1, "loss": 1.5}


def run(where, dataset="cifar100", finished=True, lines=1, **config):
    """The record that a run leaves behind."""
    where.mkdir(parents=True)
    values = {"recipe": "cifar100_moco", "dataset": dataset, **config}
    (where / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    (where / "command.txt").write_text("python pretrain/train.py\n")
    (where / "environment.json").write_text('{"commit": "abc"}')
    (where / "log.jsonl").write_text((json.dumps(LINE) + "\n") * lines)
    (where / "checkpoint.pt").write_bytes(b"weights")
    if finished:
        result = {"run": where.name, "metrics": {"knn_k200_t0.1_out128_last": 66.0}}
        (where / "result.json").write_text(json.dumps(result))
    return where


def test_a_kept_run_is_its_record_without_the_checkpoint(tmp_path, cli):
    source = run(tmp_path / "runs/pretrain/a-s0")
    status, out, _ = cli(keep.main, source, "--results", tmp_path / "results")
    kept = tmp_path / "results/pretrain/a-s0"
    names = ["command.txt", "config.yaml", "environment.json", "kept.json", "log.jsonl", "result.json"]
    assert status == 0 and sorted(path.name for path in kept.iterdir()) == names
    assert read_log(kept) == [LINE] and read_result(kept) == read_result(source)
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert json.loads((kept / "kept.json").read_text()) == {"checkpoint_sha256": sha256, "checkpoint_bytes": 7}
    assert f"{source} may be deleted, but its checkpoint ({sha256[:12]}...)" in out and source.exists()
    assert [path.name for path in kept.parent.iterdir()] == ["a-s0"]


def test_what_other_code_went_on_with_is_kept(tmp_path):
    source = run(tmp_path / "runs/pretrain/a-s0")
    line = '{"step": 4, "time": "", "changed": "commit abc -> def", "commit": "def"}\n'
    (source / "environments.jsonl").write_text(line)
    kept = keep.keep(source, tmp_path / "results")
    assert (kept / "environments.jsonl").read_text() == line
    assert "step 4: commit abc -&gt; def" in record("a-s0", kept)


def test_a_long_log_is_packed_the_same_way_each_time_and_read_like_any_other(tmp_path):
    source = run(tmp_path / "runs/pretrain/a-s0", lines=2000)
    first, second = (keep.keep(source, tmp_path / name) / "log.jsonl.gz" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes() and len(gzip.decompress(first.read_bytes())) > keep.LONG
    assert read_log(first.parent) == read_log(source) == [LINE] * 2000


def test_tables_and_figures_read_kept_runs(tmp_path):
    number = "table5/cifar100/moco/mixmask"
    name = finish(tmp_path / "runs", number, 66.0)
    (tmp_path / "runs/pretrain" / name / "result.json").unlink()
    (tmp_path / "runs/pretrain" / name).rmdir()
    keep.keep(run(tmp_path / "runs/pretrain" / name), tmp_path / "results")
    frame = make_tables.collect(tables()["table5"], [budget("paper")], [tmp_path / "results"])
    assert frame.set_index("cell").loc[number, "ours_mean"] == 66.0
    assert read(["figure7"], [budget("paper")], [tmp_path / "results"]).lines["loss"].tolist() == [1.5]


def test_an_evaluation_names_the_pretraining_that_is_not_kept_yet(tmp_path, cli):
    encoder = run(tmp_path / "runs/pretrain/a-s0")
    probe = run(tmp_path / "runs/linear/b-s0", checkpoint="a-s0")
    _, out, _ = cli(keep.main, probe, "--results", tmp_path / "results")
    assert f"its pre-training is not kept yet: {encoder}" in out


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"finished": False}, "is not finished: it has no result.json"),
        ({"dataset": "photos"}, "is a run of the embedded photographs"),
    ],
)
def test_unfinished_and_smoke_runs_are_refused_and_nothing_is_copied(tmp_path, cli, values, reason):
    good, bad = run(tmp_path / "runs/pretrain/a-s0"), run(tmp_path / "runs/pretrain/b-s0", **values)
    status, _, error = cli(keep.main, good, bad, "--results", tmp_path / "results")
    assert status == 1 and f"{bad} {reason}" in error and not (tmp_path / "results").exists()


def test_a_conversion_of_a_smoke_encoder_is_refused(tmp_path, cli):
    run(tmp_path / "runs/pretrain/a-s0", dataset="photos")
    conversion = run(tmp_path / "runs/convert/c-s0", dataset="", checkpoint="a-s0")
    status, _, error = cli(keep.main, conversion, "--results", tmp_path / "results")
    assert status == 1 and "embedded photographs" in error


def test_another_result_of_the_same_config_is_not_overwritten(tmp_path, cli):
    source = run(tmp_path / "runs/pretrain/a-s0")
    keep.keep(source, tmp_path / "results")
    assert keep.keep(source, tmp_path / "results").exists()
    (source / "result.json").write_text('{"run": "a-s0", "metrics": {"knn_k200_t0.1_out128_last": 67.0}}')
    status, _, error = cli(keep.main, source, "--results", tmp_path / "results")
    assert status == 1 and "holds another result of the same config" in error
