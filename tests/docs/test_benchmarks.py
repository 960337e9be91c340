"""The benchmarks: the plain reference computes what the project computes, and every case yields its numbers."""

import contextlib
import copy
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import against, launcher, measure, neighbours, pipelines, plain, profiling, run, steps, tables
from mixmask.frameworks import build_framework
from mixmask.methods import METHODS
from mixmask.objective import objective
from mixmask.paths import as_on_a_gpu
from mixmask.randomness import numpy_generator
from pretrain import train
from tests.reference import recipe

CPU = torch.device("cpu")
SMALL = {"backbone.width": 8, "batch_size": 16, "moco.queue": 32}


# ------------------------------------------------------------------------------------------- the plain reference


def pair(config, seed=0):
    """Our MoCo and the plain one in float64, with equal weights and queues."""
    torch.manual_seed(seed)
    ours, usual = build_framework(config).double().train(), plain.MoCo(config).double().train()
    for part in ("encoder", "key_encoder"):
        state = {k.removeprefix("backbone."): v for k, v in getattr(ours, part).state_dict().items()}
        state = {k.replace("head.", "fc."): v for k, v in state.items()}
        getattr(usual, {"encoder": "encoder_q", "key_encoder": "encoder_k"}[part]).load_state_dict(state)
    usual.queue.copy_(ours.queue.T)
    return ours, usual


def interleaved(n, groups):
    """Row i of what the plain SplitBatchNorm is given is row `interleaved[i]` of ours: its groups are n % groups."""
    return torch.arange(n).reshape(groups, -1).T.flatten()


def usual_mixtures(config, anchors, x1):
    """The plain reference's mixtures of the masks and partners that `anchors` were made with."""
    found = []
    for anchor in anchors:
        if not anchor.clean and anchor.order is None:
            switch = next(other for other in anchors if other.images is anchor.images and other.order is not None)
            found.append(plain.Mixture(anchor.images, float(anchor.weight[0]), switch.order))
    return found


@pytest.mark.parametrize(
    ("method", "symmetric", "groups"),
    [("vanilla", True, 4), ("unmix", True, 4), ("mixmask", True, 4), ("both", False, 1)],
)
def test_the_plain_reference_computes_the_same_loss_gradient_and_queue(method, symmetric, groups):
    config = recipe(
        method=method, moco__symmetric=symmetric, moco__queue=32, moco__shuffle_bn=False, backbone__bn_groups=groups
    )
    ours, usual = pair(config)
    x1, x2 = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    anchors = METHODS[method](config, x1, [numpy_generator("test", method)])
    loss, _, targets = objective(ours, x1, x2, anchors)
    loss.backward()
    ours.after_step(targets, 0, 1)

    rows = interleaved(8, groups)
    place = torch.argsort(rows)
    mixtures = [
        plain.Mixture(m.images[rows], m.lam, place[m.inverse[rows]]) for m in usual_mixtures(config, anchors, x1)
    ]
    expected = usual(x1[rows], x2[rows], mixtures)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = [p.grad for p in usual.encoder_q.parameters()]
    for ours_p, grad in zip(ours.encoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours_p.grad, grad, rtol=1e-7, atol=1e-9)
    keys = usual.queue.T[: usual.pointer].unflatten(0, (-1, 8))[:, place].flatten(0, 1)
    torch.testing.assert_close(ours.queue[: usual.pointer], keys, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["unmix", "mixmask", "both"])
def test_the_plain_reference_mixes_with_lambda_the_share_of_image_i(method):
    config = recipe(method=method)
    x = torch.zeros(6, 3, 16, 16)
    x[:] = torch.arange(6)[:, None, None, None]
    for mixture in plain.MIXTURES[method](x, config, np.random.Generator(np.random.PCG64(3))):
        own = mixture.lam * torch.arange(6) + (1 - mixture.lam) * torch.argsort(mixture.inverse)
        torch.testing.assert_close(mixture.images.mean(dim=(1, 2, 3)), own.float(), rtol=1e-5, atol=1e-5)


def test_the_plain_reference_encodes_a_mixture_once_for_each_direction():
    counts = {}
    for method in ("vanilla", "mixmask"):
        config = recipe(method=method, moco__queue=32)
        usual, x = plain.MoCo(config), torch.randn(2, 16, 3, 8, 8)
        forward, calls = usual.encoder_q.forward, []
        usual.encoder_q.forward = lambda images, forward=forward, calls=calls: calls.append(0) or forward(images)
        usual(*x, plain.MIXTURES[method](x[0], config, np.random.Generator(np.random.PCG64(0))))
        counts[method] = len(calls)
    assert counts == {"vanilla": 2, "mixmask": 4}


def test_the_usual_classifier_agrees_with_ours():
    found = neighbours.predict(CPU, 1, bank=400, queries=100)
    assert found["predict"]["agreement"] > 0.98 and found["predict"]["seconds"] > 0


# ---------------------------------------------------------------------------------------------------- the numbers


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setitem(steps.IMAGES, "cifar100", (64, 32))
    steps.images.cache_clear()
    yield
    steps.images.cache_clear()


@pytest.mark.parametrize("framework", steps.FRAMEWORKS)
def test_every_framework_and_mixture_yields_its_numbers(framework, few_images):
    small = {key: value for key, value in SMALL.items() if framework == "moco" or not key.startswith("moco")}
    found = {}
    for method in steps.MIXTURES:
        config = steps.recipe("cifar100", framework, method, CPU, small)
        build = partial(steps.Ours, config, CPU)
        found[method] = steps.numbers(build, CPU, steps.Plan(1, 1, 1), peak=0.1)
    work = {method: row["gflop_per_step"] for method, row in found.items()}
    assert work["vanilla"] < work["unmix"] == work["mixmask"] < work["both"]
    for row in found.values():
        assert row["images_per_second"] == pytest.approx(16 / row["ms_per_step"] * 1000)
        assert 0 < row["data_wait"] < 1 and row["share_of_peak"] > 0 and row["peak_memory_gib"] > 0.01


def test_counted_work_is_that_of_the_passes():
    """Vanilla MoCo in both directions: two passes with gradient, two without (docs/performance.md)."""
    config = steps.recipe("cifar100", "moco", "vanilla", CPU, {**SMALL, "batch_size": 16})
    training = steps.Ours(config, CPU)
    counted = measure.counted_flop(training.step)
    with torch.no_grad():
        forward = measure.counted_flop(lambda: training.state.model.encoder(torch.zeros(16, 3, 32, 32)))
    assert 7.5 * forward < counted < 8.5 * forward  # 2 * 3 + 2, no gradient of the images; and the queue


def test_the_counter_counts_a_multiply_add_as_two():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert measure.counted_flop(lambda: a @ b) == 2 * 3 * 5 * 7


PEAK = """
import torch
from benchmarks import measure
cpu = torch.device("cpu")
torch.zeros(2**26).fill_(1.0)  # 256 MiB, gone at once
measure.forget_peak(cpu)
before = measure.peak_memory(cpu)
kept = torch.zeros(2**26).fill_(1.0)
print(measure.peak_memory(cpu) - before)
"""


def test_peak_memory_forgets_what_was_freed():
    # A process of its own: here freed memory may be kept (optim.keep_freed_memory), and then it is no new memory.
    command = [sys.executable, "-c", PEAK]
    child = subprocess.run(command, cwd=launcher.ROOT, capture_output=True, text=True, check=True)
    assert float(child.stdout) == pytest.approx(0.25, abs=0.03)


def test_the_plain_step_and_its_input_yield_their_numbers(few_images):
    config = steps.recipe("cifar100", "moco", "mixmask", CPU, {"batch_size": 16, "augment.size": 8})
    build = partial(steps.Plain, config, CPU, workers=0)
    assert steps.numbers(build, CPU, steps.Plan(1, 1, 1), peak=0.1)["images_per_second"] > 0
    assert pipelines.cifar_plain(64, workers=0)["per_second"] > 0


def test_files_are_read_by_both_pipelines():
    with pipelines.jpeg_files(None, 4) as root:
        assert all(image.stat().st_size > 10_000 for image in root.glob("*/*.JPEG"))
        found = pipelines.jpeg(root, 4, 1)
    assert set(found) == {"workers", "whole", "plain"} and all(row["per_second"] > 0 for row in found.values())


def test_a_profile_accounts_for_the_whole_step(few_images):
    config = steps.recipe("cifar100", "moco", "mixmask", CPU, SMALL)
    found = profiling.numbers(profiling.Marked(config, CPU), 1)
    assert {"convolution", "BatchNorm", "matmul", "optimiser", "elementwise", "augmentation"} <= set(found)
    assert math.isclose(sum(row["share"] for row in found.values()), 1)


# -------------------------------------------------------------------------------------------------- launches

LAUNCHES = {  # at most, of one step of the published CIFAR-100 recipe: vanilla, Un-Mix, MixMask, both
    "moco": (711, 847, 848, 984),
    "simclr": (563, 709, 710, 856),
    "byol": (752, 936, 937, 1121),
    "simsiam": (605, 781, 782, 958),
}


@pytest.mark.parametrize("framework", LAUNCHES)
def test_a_step_is_few_launches(framework):
    recipes = [steps.recipe("cifar100", framework, method, CPU, {}) for method in steps.MIXTURES]
    counted = [steps.launches(recipe, CPU) for recipe in recipes]
    assert all(300 < found <= most for found, most in zip(counted, LAUNCHES[framework], strict=True)), counted


COMPILED = {"moco": 99, "simclr": 94, "byol": 72, "simsiam": 74}  # the same, compiled, of both


@pytest.mark.parametrize(
    "framework", [pytest.param(f, marks=[pytest.mark.slow] * (f in ("simclr", "simsiam"))) for f in COMPILED]
)
def test_a_compiled_step_is_few_graphs_and_little_outside(framework):
    config = steps.recipe("cifar100", framework, "both", CPU, {})
    assert 20 < steps.launches(config, CPU, compiled=True) <= COMPILED[framework]


def test_launches_count_kernels_and_neither_views_nor_allocations():
    x = torch.ones(4, 6)
    with measure.Launches() as counter:
        x.view(2, 12).T[1:].unflatten(0, (1, -1))  # views
        torch.empty_like(x), x.new_empty(3), x.detach()
        (x + 1).mul_(2)
        torch._foreach_add_([x, x.clone()], 1)
    assert counter.operations == {"add": 1, "mul_": 1, "clone": 1, "_foreach_add_": 1} and counter.total == 4


def losses_and_state(framework, *context, dtype=torch.float64, **keys):
    """Three steps on given batches, weights and images of this type, inside the contexts; keys as `run__compile`."""
    own = {"moco.queue": 32, "moco.shuffle_bn": True} if framework == "moco" else {}
    small = {
        "backbone.arch": "resnet10",
        "batch_size": 16,
        "backbone.width": 4,
        **own,
        **{k.replace("__", "."): v for k, v in keys.items()},
    }
    config = steps.recipe("cifar100", framework, "both", CPU, small)
    with contextlib.ExitStack() as stack:
        for each in context:
            stack.enter_context(each)
        training = steps.Ours(config, CPU, number=64)
        training.state.model.to(dtype)
        batches = [[x.to(dtype) for x in next(training.batches)] for _ in range(3)]
        losses = [train.iterate(config, training.state, batch)[0]["loss"].item() for batch in batches]
    return losses, training.state.model.state_dict()


@pytest.mark.parametrize("framework", steps.FRAMEWORKS)
def test_steps_of_few_launches_are_the_cpus(framework):
    (losses, state), (fewer, same) = losses_and_state(framework), losses_and_state(framework, as_on_a_gpu())
    assert fewer == pytest.approx(losses, rel=1e-12)
    for name, value in state.items():
        torch.testing.assert_close(same[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("framework", steps.FRAMEWORKS)
def test_compiled_steps_are_the_eager_ones(framework):
    """A graph sums in another order, which is 1e-16 of a number in float64; three steps through many layers make 3e-15
    of it in MoCo."""
    losses, state = losses_and_state(framework)
    fewer, same = losses_and_state(framework, as_on_a_gpu("aot_eager"), run__compile=True)
    assert fewer == pytest.approx(losses, rel=1e-10)
    for name, value in state.items():
        torch.testing.assert_close(same[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_the_layout_of_images_and_weights_changes_no_step():
    (losses, state), (same, other) = losses_and_state("moco"), losses_and_state("moco", run__channels_last=False)
    layouts = [each["encoder.backbone.layer1.0.conv1.weight"].stride() for each in (state, other)]
    assert layouts == [(36, 1, 12, 4), (36, 9, 3, 1)] and same == pytest.approx(losses, rel=1e-10)
    for name, value in state.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("framework", steps.FRAMEWORKS)
def test_steps_in_bf16_are_near_those_in_float64_and_keep_everything_in_float32(framework):
    """bf16 has 8 bits: 0.4 % of each number, of which a mean leaves less. SimSiam's losses are cosines near 0."""
    losses, _ = losses_and_state(framework)
    bf16 = {"dtype": torch.float32, "precision": "bf16"}
    for found, state in losses_and_state(framework, **bf16), losses_and_state(framework, as_on_a_gpu(), **bf16):
        assert found != losses and found == pytest.approx(losses, rel=1e-2, abs=1e-2)
        assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


# ------------------------------------------------------------------------------------- the launcher and the tables


def test_generated_runs_are_finished_for_the_launcher_and_the_tables(tmp_path, cli):
    from paper import make_tables
    from slurm import launch

    words, jobs = launcher.settings(1, ["table1"])
    launcher.finished_runs(tmp_path / "runs", jobs, words)
    given = ["--runs-dir", tmp_path / "runs", "--set", *words]
    status, shown, _ = cli(launch.main, "table1", "--dry-run", *given)
    assert (status == 0 and ": 37 finished" in shown.replace("23 pretrain", "")) or " finished\n" in shown
    status, shown, _ = cli(make_tables.main, "table1", *given, "--out", tmp_path / "out")
    assert status == 0 and "no run yet" not in shown


# -------------------------------------------------------------------------------------------------------- reports


def report(**results):
    machine = {
        "device": "a CPU",
        "type": "cpu",
        "processor": "a CPU",
        "threads": 2,
        "time": "2026-01-02T03",
        "code": "c0",
    }
    versions = {"python": "3", "torch": "2", "torchvision": "0", "numpy": "2", "pillow": "13", "modified": False}
    machine |= {"commit": "c1", **versions}
    return {"quick": False, "machine": machine, "peak": {"fp32": 0.3}, "results": results}


def test_a_ratio_stands_beside_a_number_with_a_partner():
    rows = {
        "steps/moco/unmix": {"images_per_second": 26.0, "steps": 3},
        "steps/moco/unmix/plain": {"images_per_second": 13.0},
        "steps/byol/unmix": {"images_per_second": 9.0},
        "knn/predict": {"seconds": 1.0, "bank": 5, "queries": 2},
        "knn/predict/plain": {"seconds": 3.0, "bank": 5, "queries": 2},
    }
    run.compare(rows)
    assert rows["steps/moco/unmix"]["ratio"] == 2 and rows["knn/predict"]["ratio"] == 3
    assert "ratio" not in rows["steps/byol/unmix"] and "ratio" not in rows["knn/predict/plain"]
    text = tables.markdown(report(**rows))
    assert "2.00x" in text and "3.00x" in text and "`c0`" in text and "torch 2" in text


def test_the_interval_of_a_median_is_two_of_the_ordered_values():
    """For 15 values the 4th and the 12th: as many as 3 of 15 fair coins show heads in 1.8 % of all throws."""
    assert against.interval([*range(15, 0, -1)]) == (4, 12) and against.interval([2.0, 1.0]) == (1, 2)


def test_an_unknown_commit_is_refused(cli):
    status, _, error = cli(run.main, "against/moco/vanilla", "--before", "nothing-like-this")
    assert status == 1 and error.splitlines()[-1].startswith("error: --before nothing-like-this: ")


@pytest.mark.slow
def test_steps_are_measured_beside_those_of_a_commit(cli):
    small = ["batch_size=16", "backbone.width=4", "moco.queue=32"]
    status, shown, _ = cli(run.main, "against/moco/mixmask", "--quick", "--device", "cpu", "--set", *small)
    row = next(line for line in shown.splitlines() if "moco/mixmask" in line).split("|")
    assert status == 0 and row[2].strip() == "HEAD" and 0.2 < float(row[7]) < 5


def test_numbers_of_other_code_are_not_mixed(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(report(**{"knn/predict": {"seconds": 1.0}})))
    new = report(**{"launcher/a": {"seconds": 2.0}})
    assert set(run.added(new, path)["results"]) == {"knn/predict", "launcher/a"}
    other = copy.deepcopy(new)
    other["machine"]["code"] = "c9"
    with pytest.raises(run.UserError, match="code is c0 there and c9 here"):
        run.added(other, path)


def test_an_unknown_target_is_refused(cli):
    status, _, error = cli(run.main, "stepz")
    assert status == 1 and error.startswith("error: unknown target 'stepz'; expected one of steps/moco/vanilla")


def test_the_command_writes_every_number(tmp_path, cli, few_images, monkeypatch):
    monkeypatch.setitem(measure.MATMUL, "cpu", 128)
    monkeypatch.setattr(steps, "launches", lambda config, device, compiled=False: 7 if compiled else 75)
    small = ["backbone.width=8", "batch_size=16"]
    status, shown, _ = cli(
        run.main, "steps/byol/vanilla", "--device", "cpu", "--json", tmp_path / "x.json", "--set", *small
    )
    written = json.loads((tmp_path / "x.json").read_text())
    assert status == 0 and "byol/vanilla" in shown and written["peak"]["fp32"] > 0
    numbers = written["results"]["steps/byol/vanilla"]
    assert numbers.keys() >= {"images_per_second", "gflop_per_step", "data_wait"}
    assert (numbers["launches"], numbers["launches_compiled"]) == (75, 7) and "| 75 |" in " ".join(shown.split())
    assert written["machine"]["torch"] == torch.__version__.split("+")[0]
