"""Fine-tuning: Table 10's rates, the labelled images, and a killed run that ends as if nothing had happened."""

import dataclasses
import hashlib
import json
import math
import os
import signal
import time

import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from eval import finetune as script
from eval.finetune import build_groups, build_model, finetune, learning_rates
from mixmask import checkpoint, config, datasets, formats, labels, registry
from mixmask.augment import test_view
from mixmask.batchnorm import SplitBatchNorm2d
from mixmask.config import ConfigError, Finetune, UserError
from mixmask.datasets import DataError
from mixmask.datasets.views import train_batches
from mixmask.runs import read_log, run_directory
from mixmask.schedules import learning_rate
from mixmask.training.loop import Loop
from mixmask.training.supervised import set_rates
from pretrain.train import train

RECIPE = """
recipe: tiny_finetune
dataset: squares
labels: 50
epochs: 3
batch_size: 16
seed: 0
backbone_lr: 0.01
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0}
schedule: {kind: step, milestones: [2], gamma: 0.2}
augment: {order: [crop, flip], size: 12, crop_scale: [0.2, 1.0], flip_prob: 0.5}
test_resize: 0
run: {workers: 0, device: cpu}
"""


def recipe(*items: str) -> Finetune:
    return config.resolve(yaml.safe_load(RECIPE), config.parse_overrides(items), Finetune)


def published(name: str) -> Finetune:
    return config.load(f"eval/configs/{name}.yaml", cls=Finetune)


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    """The checkpoint of a short pre-training with constants of its own for normalisation."""
    directory = tmp_path_factory.mktemp("pretrained")
    train(tiny("epochs=2", "knn.every=0", "augment.mean=[0.4, 0.5, 0.6]", "augment.std=[0.2, 0.3, 0.4]"), directory)
    return directory / "checkpoint.pt"


@pytest.fixture(scope="module")
def source(pretrained):
    return formats.read(pretrained)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    finetune(recipe(), source, directory)
    return directory


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny_finetune.yaml"
    path.write_text(RECIPE)
    return path


def log(directory):
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_log(directory)]


def assert_same_run(directory, other):
    a, b = (checkpoint.load(d / "checkpoint.pt") for d in (directory, other))
    assert a["step"] == b["step"] == 9 and all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])
    momenta = [[s["momentum_buffer"] for s in state["optimizer"]["state"].values()] for state in (a, b)]
    assert len(momenta[0]) == len(list(b["optimizer"]["state"])) and all(map(torch.equal, *momenta))
    assert log(directory) == log(other)
    results = [json.loads((d / "result.json").read_text())["metrics"] for d in (directory, other)]
    assert results[0] == results[1]


# ---------------------------------------------------------------------------------------------- Table 10, Section 4.4


@pytest.mark.parametrize(
    ("name", "stem", "classifier"),
    [
        ("imagenet_finetune_1percent", 0.002, 0.5),
        ("imagenet_finetune_10percent", 0.002, 0.5),
        ("imagenet_finetune_100percent", 0.001, 0.05),
        ("imagenet_finetune_10percent_text", 0.001, 0.5),  # Section 4.4
        ("imagenet_finetune_100percent_text", 0.001, 0.5),
    ],
)
def test_rates_of_backbone_and_classifier_step_as_in_table10(name, stem, classifier, source):
    """Both rates fall by one factor at epochs 12 and 16; the backbone's group holds all that the checkpoint does."""
    recipe = published(name)
    model = build_model(recipe, source, classes=10)
    optimizer = build_groups(recipe, model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.backbone.parameters())), 2]
    for epoch, factor in [(0, 1), (11, 1), (12, 0.2), (15, 0.2), (16, 0.04), (19, 0.04)]:
        for step in (50 * epoch, 50 * epoch + 49):
            set_rates(optimizer, learning_rates(recipe, 50, step))
            found = [group["lr"] for group in optimizer.param_groups]
            assert found == pytest.approx([stem * factor, classifier * factor])
    assert {(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.9, 0)}
    assert (recipe.epochs, recipe.batch_size, recipe.bn_groups) == (20, 256, 4)


@pytest.mark.parametrize("dataset", ["imagenet", "cifar100", "tiny_imagenet"])
@pytest.mark.parametrize("percent", [1, 10, 100])
def test_recipes_are_complete_and_named_after_their_file(dataset, percent):
    recipe = published(f"{dataset}_finetune_{percent}percent")
    assert (recipe.recipe, recipe.dataset) == (f"{dataset}_finetune_{percent}percent", dataset)
    assert recipe.labels == percent and (recipe.epochs, recipe.schedule.milestones) == (20, (12, 16))
    assert (recipe.label_list == "simclr") == (dataset == "imagenet" and percent < 100)


# ------------------------------------------------------------------------------------------------------ the training


def test_two_steps_are_those_of_a_plain_loop(source, tmp_path, monkeypatch):
    """SGD with momentum and no decay, written out: the backbone and the classifier each at its rate."""
    monkeypatch.setattr(Loop, "save", lambda loop: saved.append(loop.state.model.state_dict()))
    saved = []
    config = recipe("epochs=1", "batch_size=24", "optimizer.weight_decay=0.01")
    finetune(config, source, tmp_path)

    augment = dataclasses.replace(config.augment, mean=source.mean, std=source.std)
    dataset = datasets.load("squares", "", "train")
    dataset = dataset.take(datasets.subset(dataset.labels, 0.5, seed=0))
    model = build_model(config, source, classes=4)
    velocity = {name: 0 for name, _ in model.named_parameters()}
    for (images,), index in train_batches(dataset, augment, 24, 0, 0, 1, torch.device("cpu")):
        model.zero_grad()
        F.cross_entropy(model(images), dataset.labels[index]).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                velocity[name] = 0.9 * velocity[name] + p.grad + 0.01 * p
                p -= (0.01 if name.startswith("backbone.") else 0.1) * velocity[name]
    assert len(saved) == 1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[0][name], value, atol=2e-5, rtol=2e-4)


def test_backbone_starts_from_the_checkpoint_bit_by_bit_and_the_classifier_at_nothing(source):
    model = build_model(recipe("bn_groups=4"), source, classes=1000)
    assert all(torch.equal(value, source.weights[key]) for key, value in model.backbone.state_dict().items())
    assert isinstance(model.backbone.bn1, SplitBatchNorm2d) and model.backbone.bn1.groups == 4 and model.training
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.02) and not model.head.bias.any()
    again, other = (build_model(recipe(f"seed={seed}"), source, 1000).head.weight for seed in (0, 1))
    assert torch.equal(model.head.weight, again) and not torch.equal(model.head.weight, other)


def test_everything_learns_running_statistics_too(undisturbed, source):
    model = checkpoint.load(undisturbed / "checkpoint.pt")["model"]
    still = [key for key, value in source.weights.items() if torch.equal(model[f"backbone.{key}"], value)]
    assert still == []
    assert log(undisturbed)[-1]["loss"] < math.log(4)  # better than guessing one of four classes


def test_result_is_the_last_epoch_and_tests_with_running_statistics(undisturbed, source):
    result = json.loads((undisturbed / "result.json").read_text())
    accuracies = [line["test_top1"] for line in log(undisturbed)]
    assert len(accuracies) == 3
    assert result["metrics"] == {"finetune_last": accuracies[-1], "finetune_best": max(accuracies)}
    model = build_model(recipe(), source, classes=4)
    model.load_state_dict(checkpoint.load(undisturbed / "checkpoint.pt")["model"])
    test_set = datasets.load("squares", "", "test")
    scores = model.eval()(test_view(test_set.images, 12, None, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    assert accuracies[-1] == pytest.approx((scores.argmax(1) == test_set.labels).float().mean().item() * 100, abs=2.6)


def test_log_has_both_rates_and_the_result_its_origin(undisturbed, source):
    lines = log(undisturbed)
    assert [(line["lr"], line["backbone_lr"]) for line in lines] == [
        pytest.approx(rates) for rates in [(0.1, 0.01), (0.1, 0.01), (0.02, 0.002)]
    ]
    assert lines[0].keys() == {"kind", "step", "epoch", "loss", "test_top1", "lr", "backbone_lr"}
    result = json.loads((undisturbed / "result.json").read_text())
    assert result["format"] == "mixmask" and result["init"] == "checkpoint"
    assert result["labels"] == "class-balanced subset, our own: 48 of 96 images, 12 in each class"


def test_random_init_is_another_run_with_another_metric(source, tmp_path):
    random = recipe("init=random", "epochs=1")
    model = build_model(random, source, classes=4)
    assert not torch.equal(model.backbone.conv1.weight, source.weights["conv1.weight"])
    assert torch.equal(model.backbone.conv1.weight, build_model(random, source, 4).backbone.conv1.weight)
    other = build_model(recipe("init=random", "seed=1"), source, 4)
    assert not torch.equal(model.backbone.conv1.weight, other.backbone.conv1.weight)
    assert torch.equal(model.head.weight, build_model(recipe(), source, 4).head.weight)
    assert config.hash8(random) != config.hash8(recipe("epochs=1"))
    result = finetune(random, source, tmp_path)
    assert result["metrics"].keys() == {"scratch_last", "scratch_best"} and result["init"] == "random"


# ----------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize(("lines", "delay"), [(0, 0.1), (1, 0.0), (1, 0.08), (2, 0.05)])
def test_sigkill_at_any_point_changes_nothing(source, tmp_path, undisturbed, lines, delay):
    """A checkpoint after every iteration: killed within an epoch, between its log line and its checkpoint, or after."""
    config = recipe("run.checkpoint_minutes=0")
    pid = os.fork()
    if not pid:
        fit = script.fit
        script.fit = lambda *a: (time.sleep(0.03), fit(*a))[1]  # so that the signal finds it at work
        try:
            finetune(config, source, tmp_path)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    begun = tmp_path / "config.yaml"
    while not (begun.exists() and len(read_log(tmp_path)) >= lines) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    finetune(config, source, tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("step", [0, 1, 2, 4, 8])
def test_sigterm_saves_within_the_epoch_and_the_rest_follows(source, tmp_path, undisturbed, monkeypatch, step):
    fit = script.fit

    def interrupted(state, *rest):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return fit(state, *rest)

    monkeypatch.setattr(script, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe(), source, tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == step + 1
    monkeypatch.undo()
    finetune(recipe(), source, tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(("items", "step"), [(["backbone_lr=1e38"], 1), (["backbone_lr=1e38", "batch_size=48"], 0)])
def test_what_is_not_finite_stops_the_run_and_names_the_iteration(source, tmp_path, items, step):
    """A loss, or with one iteration an epoch the weights that it leaves; the images are named."""
    with pytest.raises(
        UserError, match=rf"(loss|the norm of weights and buffers) is (nan|inf) at step {step}; stopped, batch"
    ):
        finetune(recipe("optimizer.lr=1e38", *items), source, tmp_path)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "checkpoint.pt").exists()
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    config = recipe(*items)
    batches = datasets.batch_indices(48, config.batch_size, 0, 0)
    labelled, _ = labels.choose(datasets.load("squares", "", "train"), config)  # half of the images
    assert report["indices"] == {str(i): labelled[batches[i]].tolist() for i in range(step + 1)}
    assert (report["step"], report["epoch"]) == (step, 1)
    assert report["lr"] == 1e38 and report["backbone_lr"] == 1e38
    noticed = checkpoint.load(tmp_path / "nonfinite.pt")
    values = [value for value in noticed["model"].values() if value.is_floating_point()]
    assert noticed["step"] == len(batches) and not torch.nn.utils.get_total_norm(values).isfinite()


def test_finished_run_says_so_and_changes_nothing(pretrained, recipe_file, cli, tmp_path):
    words = ["--checkpoint", pretrained, "--config", recipe_file, "--runs-dir", tmp_path, "--set", "epochs=1"]
    assert cli(script.main, *words)[0] == 0
    (directory,) = (tmp_path / "finetune").iterdir()
    before = {path: path.read_bytes() for path in directory.iterdir()}
    status, out, _ = cli(script.main, *words)
    assert status == 0 and "nothing to do" in out
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["lables=1"], "did you mean 'labels'"),
        (["labels=0"], "labels: expected a percentage above 0"),
        (["labels=101"], "labels: expected between 0 and 100, found 101"),
        (["labels=10"], "batch_size: 16 exceeds the 8 labelled training images"),
        (["dataset=squers"], "unknown data set 'squers'"),
        (["backbone_lr=-1"], "backbone_lr: expected at least 0"),
        (["bn_groups=3"], "bn_groups: 3 groups do not divide a batch of 16"),
        (["bn_groups=16"], "bn_groups: BatchNorm needs at least two images"),
        (["augment.order=[]", "augment.size=8"], "augment.size: 8, but no crop resizes the images of 12x12 pixels"),
        (["augment.mean=[0.5]"], "augment.mean: expected three numbers"),
        (["label_list=simclr"], "label_list: SimCLR has lists of 1 and 10 percent of imagenet, found 50 percent of sq"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(pretrained, recipe_file, cli, tmp_path, items, words):
    run = tmp_path / "run"
    command = ["--checkpoint", pretrained, "--config", recipe_file, "--run-dir", run]
    status, _, err = cli(script.main, *command, "--set", *items)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not run.exists()


def test_checkpoint_of_a_fine_tuning_is_refused(undisturbed, recipe_file, cli, tmp_path):
    command = ["--checkpoint", undisturbed / "checkpoint.pt", "--config", recipe_file, "--run-dir", tmp_path / "run"]
    status, _, err = cli(script.main, *command)
    assert status == 1 and "is not a pre-training checkpoint" in err and err.count("\n") == 1


def test_public_checkpoint_is_fine_tuned(source, recipe_file, cli, tmp_path):
    """MoCo's format, and ImageNet's constants, since the file names none."""
    state = {f"module.encoder_q.{key}": value for key, value in source.weights.items()}
    torch.save({"state_dict": {**state, "module.queue": torch.zeros(8, 4)}}, tmp_path / "moco.pth.tar")
    command = ["--checkpoint", tmp_path / "moco.pth.tar", "--config", recipe_file, "--run-dir", tmp_path / "run"]
    status, out, err = cli(script.main, *command, "--set", "epochs=1")
    assert (status, err) == (0, "") and "(moco; resnet10" in out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["checkpoint"].startswith("moco.pth@")


# -------------------------------------------------------------------------------------------------------- the labels


def test_balanced_subset_is_deterministic_nested_and_the_same_for_every_seed():
    """1 % of CIFAR-100's 50,000 images: five a class, all of them among the 10 %."""
    dataset = datasets.Resident(torch.empty(5000, 3, 1, 1), torch.arange(5000) % 10, tuple("abcdefghij"), "squares")
    one, text = labels.choose(dataset, recipe("labels=1"))
    ten, _ = labels.choose(dataset, recipe("labels=10", "seed=7"))
    assert torch.bincount(dataset.labels[one]).tolist() == [5] * 10 and len(ten) == 500
    assert set(one.tolist()) < set(ten.tolist())
    assert torch.equal(one, labels.choose(dataset, recipe("labels=1", "seed=7"))[0])
    assert not torch.equal(one, labels.choose(dataset, recipe("labels=1", "subset_seed=1"))[0])
    assert text == "class-balanced subset, our own: 50 of 5,000 images, 5 in each class"
    assert labels.choose(dataset, recipe("labels=100"))[1] == "all 5,000 labels"


def test_part_keeps_images_and_labels_together():
    dataset = datasets.load("squares", "", "train")
    indices = torch.tensor([3, 9, 50])
    part = dataset.take(indices)
    assert torch.equal(part.images, dataset.images[indices]) and torch.equal(part.labels, dataset.labels[indices])
    files = datasets.Files(list("abcd"), torch.arange(4), tuple("wxyz"), "imagenet")
    part = files.take(torch.tensor([1, 3]))
    assert part.paths == ["b", "d"] and part.labels.tolist() == [1, 3] and part.classes == files.classes


NAMES = ("n03_1.JPEG", "n01_0.JPEG", "n02_1.JPEG")


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """An ImageNet of 3 classes with 2 training images each, and a list of one of each in SimCLR's place."""
    for wnid in ("n01", "n02", "n03"):
        for split, count in (("train", 2), ("val", 1)):
            folder = tmp_path / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (16, 16), (80 * k, 40, 90)).save(folder / f"{wnid}_{k}.JPEG", "JPEG")
    monkeypatch.setitem(
        registry.DATASETS, "imagenet", dataclasses.replace(registry.DATASETS["imagenet"], classes=3, train=6, test=3)
    )
    text = "".join(f"{name}\n" for name in NAMES).encode()
    monkeypatch.setitem(labels.SHA256, "1percent.txt", hashlib.sha256(text).hexdigest())
    return tmp_path, text


def listed(root, *items):
    return recipe("dataset=imagenet", "labels=1", "label_list=simclr", f"run.data_root={root}", *items)


def put(root, text):
    path = root / "imagenet_subsets" / "1percent.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text)
    return path


def test_simclrs_list_names_the_labelled_images(imagenet):
    root, text = imagenet
    put(root, text)
    config, note = labels.settle(listed(root))
    assert (config.label_list, note) == ("simclr", "")
    train_set = datasets.load("imagenet", root, "train")
    indices, text = labels.choose(train_set, config)
    assert sorted(os.path.basename(train_set.paths[i]) for i in indices) == sorted(NAMES)
    assert text == "SimCLR's 1percent.txt: 3 of its 3 images"


def test_altered_list_is_refused(imagenet):
    root, text = imagenet
    path = put(root, text[:-11])
    with pytest.raises(DataError, match=r"1percent.txt is not SimCLR's list: 2 lines, SHA-256"):
        labels.choose(datasets.load("imagenet", root, "train"), listed(root))
    assert path.exists()  # it is the user's


def test_list_of_images_that_are_not_there_is_refused(imagenet, monkeypatch):
    root, _ = imagenet
    text = b"n01_0.JPEG\nn01_9.JPEG\n"
    monkeypatch.setitem(labels.SHA256, "1percent.txt", hashlib.sha256(text).hexdigest())
    put(root, text)
    train_set = datasets.load("imagenet", root, "train")
    with pytest.raises(DataError, match=r"1 of its 2 images are not in the training set: n01_9.JPEG"):
        labels.choose(train_set, listed(root))
    partial = dataclasses.replace(train_set, note="partial")  # known to lack images
    assert labels.choose(partial, listed(root))[1] == "SimCLR's 1percent.txt: 1 of its 2 images"


def test_list_is_fetched_once_and_checked(imagenet, monkeypatch):
    root, text = imagenet
    served = root / "served"
    served.mkdir()
    monkeypatch.setattr(labels, "URL", served.as_uri())
    (served / "1percent.txt").write_bytes(b"a proxy's page")
    config, note = labels.settle(listed(root))
    assert config.label_list == "balanced" and "another file, of 14 bytes" in note
    assert not (root / "imagenet_subsets").exists()
    (served / "1percent.txt").write_bytes(text)
    assert labels.settle(listed(root)) == (listed(root), "")
    (served / "1percent.txt").unlink()
    assert labels.settle(listed(root)) == (listed(root), "")
    assert os.listdir(root / "imagenet_subsets") == ["1percent.txt"]


def test_absent_list_gives_way_to_a_subset_that_is_marked_and_another_run(imagenet, monkeypatch):
    root, _ = imagenet
    monkeypatch.setattr(labels, "fetch", lambda path: pytest.fail("run.download is false"))
    config, note = labels.settle(listed(root, "run.download=false"))
    assert config.label_list == "balanced" and "a class-balanced subset takes its place" in note
    assert labels.choose(datasets.load("imagenet", root, "train"), config)[1].startswith(
        "class-balanced subset, our own"
    )
    assert run_directory("runs", config) != run_directory("runs", listed(root))
    with pytest.raises(DataError, match="cannot read SimCLR's list"):
        labels.choose(datasets.load("imagenet", root, "train"), listed(root))


def test_run_with_one_list_is_not_resumed_with_the_other(imagenet, pretrained, recipe_file, cli, monkeypatch):
    root, text = imagenet
    items = ["dataset=imagenet", "labels=1", "label_list=simclr", f"run.data_root={root}", "run.download=false"]
    items += ["batch_size=3", "epochs=1"]
    command = ["--checkpoint", pretrained, "--config", recipe_file, "--run-dir", root / "run", "--set", *items]
    status, out, _ = cli(script.main, *command)
    assert status == 0 and "class-balanced subset takes its place" in out
    put(root, text)
    status, _, err = cli(script.main, *command)
    assert status == 1 and "label_list: None there, simclr now" in err


def test_hash_of_a_run_tells_lists_subsets_and_groups_apart():
    items = ["labels=10", "label_list=simclr", "subset_seed=1", "bn_groups=2", "backbone_lr=0.1", "init=random"]
    assert len({config.hash8(recipe(item)) for item in [*items, "labels=50"]}) == 7


def test_schedule_with_the_other_factor_is_an_option(source):
    other = config.resolve(
        config.read_yaml("eval/configs/imagenet_finetune_1percent.yaml"), {"schedule.gamma": 0.1}, Finetune
    )
    assert learning_rate(other.schedule, 0.5, 16 * 50, 50, 20) == pytest.approx(0.005)
    with pytest.raises(ConfigError, match="labels: expected a number"):
        recipe("labels=some")
