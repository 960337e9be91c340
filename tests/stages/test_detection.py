"""Detection transfer (Section 4.5, Table 7): silent mistakes are refused, runs resume, Detectron2 agrees.

What needs Detectron2 is reported as skipped where it is not installed (`make detectron2`).
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml

from detection import annotations, convert, datasets, photos, train, weights
from mixmask import checkpoint as checkpoints
from mixmask import config as configs
from mixmask import formats
from mixmask.backbones import build_backbone
from mixmask.config import Backbone, ConfigError, Detection, UserError
from mixmask.datasets import DataError
from mixmask.formats import Detectron2File, FormatError
from mixmask.runs import read_log

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {task: ROOT / "detection" / "configs" / f"{task}.yaml" for task in ("voc", "coco")}
SMALL = [
    "data=photos",
    "run.device=cpu",
    "run.workers=0",
    "run.log_every=1",
    "detectron2.SOLVER.MAX_ITER=2",
    "detectron2.SOLVER.STEPS=[1]",
    "detectron2.SOLVER.IMS_PER_BATCH=2",
    "detectron2.INPUT.MIN_SIZE_TRAIN=[64,80]",
    "detectron2.INPUT.MIN_SIZE_TEST=64",
    "detectron2.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=4",
    "detectron2.MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.0",
    "detectron2.MODEL.RPN.PRE_NMS_TOPK_TRAIN=50",
    "detectron2.MODEL.RPN.POST_NMS_TOPK_TRAIN=10",
    "detectron2.MODEL.RPN.PRE_NMS_TOPK_TEST=50",
    "detectron2.MODEL.RPN.POST_NMS_TOPK_TEST=4",
    "detectron2.TEST.PRECISE_BN.NUM_ITER=1",
    "detectron2.TEST.DETECTIONS_PER_IMAGE=4",
]


def needs_detectron2(test):
    absent = importlib.util.find_spec("detectron2") is None
    return pytest.mark.detectron2(pytest.mark.skipif(absent, reason="needs Detectron2 (make detectron2)")(test))


def recipe(task: str, *items: str) -> Detection:
    return configs.load(RECIPES[task], configs.parse_overrides(items), Detection)


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    """A ResNet-50 whose running statistics and affine parameters are not those of the start."""
    torch.manual_seed(0)
    model = build_backbone(Backbone("resnet50", "imagenet", 64, 1))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.8, 1.2)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(resnet, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "r50.pth"
    torch.save(resnet.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pkl(checkpoint) -> Path:
    """The ResNet-50 as detection/convert.py writes it."""
    path = checkpoint.with_suffix(".pkl")
    convert.convert(formats.read(checkpoint), checkpoint, path, "detectron2")
    return path


@pytest.fixture(scope="module")
def backbone(pkl) -> weights.Weights:
    return weights.read(pkl)


@pytest.fixture(scope="module")
def good(pkl) -> Detectron2File:
    return formats.read_detectron2(pkl)


# ------------------------------------------------------------------- the mistakes of which Detectron2 says nothing


def test_whole_file_sets_318_tensors_of_the_detector(backbone):
    names = backbone.tensors.keys()
    assert len(names) == 318 and sum(not name.endswith("num_batches_tracked") for name in names) == 265
    assert sum(name.startswith("roi_heads.res5.") for name in names) == 60
    assert backbone.note["mean"] == [0.485, 0.456, 0.406] and not backbone.dropped


def test_exactly_the_new_parts_of_a_detector_stay_at_random(backbone):
    """Each tensor of the backbone is placed; one that is missing, homeless or of another shape is refused."""
    new = {f"{part}x": torch.zeros(1) for part in weights.NEW}
    own = {**{name: torch.zeros_like(value) for name, value in backbone.tensors.items()}, **new}
    placed = weights.placed(own, backbone.tensors)
    assert placed.keys() == own.keys()
    assert all(placed[name] is value for name, value in backbone.tensors.items())
    assert all(placed[name] is value for name, value in new.items())
    for name in (
        "backbone.stem.conv1.weight",
        "backbone.res4.5.conv3.norm.running_var",
        "roi_heads.res5.0.conv1.weight",
    ):
        others = {key: value for key, value in backbone.tensors.items() if key != name}
        with pytest.raises(ConfigError, match=f"would keep at random 1 of a ResNet-50's tensors, first '{name}'"):
            weights.placed(own, others)
        with pytest.raises(ConfigError, match=f"has no 1 of a ResNet-50's tensors, first '{name}'"):
            weights.placed({key: value for key, value in own.items() if key != name}, backbone.tensors)
        with pytest.raises(ConfigError, match=f"has another shape for 1 of a ResNet-50's tensors, first '{name}'"):
            weights.placed({**own, name: torch.zeros(1, 2)}, backbone.tensors)
    with pytest.raises(ConfigError, match=r"would keep at random 1 .* 'backbone\.extra'"):
        weights.placed({**own, "backbone.extra": torch.zeros(1)}, backbone.tensors)


def renamed(change):
    return lambda file: file._replace(weights={change(name): value for name, value in file.weights.items()})


def without(*parts):
    keep = lambda file: {n: v for n, v in file.weights.items() if not any(part in n for part in parts)}  # noqa: E731
    return lambda file: file._replace(weights=keep(file))


TORCHVISION = {
    formats.detectron2_name(n): n for n in build_backbone(Backbone("resnet50", "imagenet", 64, 1)).state_dict()
}
MISTAKES = {
    "no matching_heuristics": (lambda file: file._replace(matching_heuristics=False), "matching_heuristics.*nothing"),
    "author Caffe2": (lambda file: file._replace(author="Caffe2"), "'Caffe2'.*running statistics"),
    "no author": (lambda file: file._replace(author=None), "__author__ is None.*running statistics"),
    "module. left": (renamed(lambda n: f"module.{n}"), r"'module\.'.*318 such keys"),
    "encoder_q. left": (renamed(lambda n: f"encoder_q.{n}"), "unknown prefix.*'encoder_q.res2"),
    "module.encoder. left": (renamed(lambda n: f"module.encoder.{n}"), r"'module\.'"),
    "torchvision's names": (renamed(TORCHVISION.get), "torchvision's names.*holds 0 of"),
    "stages off by one": (renamed(lambda n: f"res{int(n[3]) - 1}{n[4:]}" if n[:3] == "res" else n), "off by one"),
    "bnN left": (renamed(lambda n: n.replace("conv1.norm", "bn1") if n[:3] == "res" else n), "BatchNorms are called"),
    "downsample left": (renamed(lambda n: n.replace("shortcut", "downsample")), "'downsample'.*'shortcut'"),
    "stem.bn1": (renamed(lambda n: n.replace("stem.conv1.norm", "stem.bn1")), "'stem.bn1'.*5 such keys"),
    "empty": (lambda file: file._replace(weights={}), "empty"),
    "no stem conv": (without("stem.conv1.weight"), "the stem's convolution would stay at random; 1 missing"),
    "no stem BN": (without("stem.conv1.norm"), "the stem's BatchNorm would stay at random; 5 missing"),
    "no shortcuts": (without("shortcut"), "the shortcuts would stay at random; 24 missing"),
    "no statistics": (without("running_"), "running statistics would stay at random; 106 missing"),
    "another model": (
        lambda file: file._replace(weights={**file.weights, "res2.0.gate": torch.ones(1)}),
        "res2.0.gate",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_conversion_are_refused_by_name(mistake, good):
    change, message = MISTAKES[mistake]
    with pytest.raises(FormatError, match=message):
        weights.check_file(change(good), "w.pkl")


def test_values_that_no_backbone_has_are_refused(good):
    name = "res3.0.conv2.norm.running_var"
    for value, message in (
        (-good.weights[name], "not finite, or a variance is negative"),
        (torch.ones(3), "is \\(3,\\)"),
    ):
        with pytest.raises(FormatError, match=message):
            weights.check_file(good._replace(weights={**good.weights, name: value}), "w.pkl")


def test_head_left_in_the_file_is_dropped_by_name(good):
    head = {f"stem.fc.{n}.{p}": torch.ones(2) for n in (0, 2) for p in ("weight", "bias")}
    tensors, dropped = weights.check_file(good._replace(weights={**good.weights, **head}), "w.pkl")
    assert len(tensors) == 318 and dropped == {"head": 4}


def test_pth_given_directly_is_refused(checkpoint, tmp_path):
    (tmp_path / "disguised.pkl").symlink_to(checkpoint)
    for path in (checkpoint, tmp_path / "disguised.pkl"):
        with pytest.raises(FormatError, match=r"no Detectron2 \.pkl.*detection/convert\.py"):
            weights.read(path)


def test_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": Bomb()}}))
    with pytest.raises(FormatError, match="refused"):
        weights.read(path)
    assert not (tmp_path / "ran").exists()


def test_file_without_its_note_is_refused(pkl, tmp_path):
    (tmp_path / "w.pkl").symlink_to(pkl)
    with pytest.raises(FormatError, match=r"w\.pkl\.json.*normalised"):
        weights.read(tmp_path / "w.pkl")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("INPUT.FORMAT=BGR", "INPUT.FORMAT: expected RGB.*found BGR"),
        ("MODEL.RESNETS.STRIDE_IN_1X1=true", "STRIDE_IN_1X1: expected False.*3 x 3.*Detectron2's default"),
        ("MODEL.PIXEL_MEAN=[103.53,116.28,123.675]", r"PIXEL_MEAN: expected \[123.675.*BGR order"),
        ("MODEL.PIXEL_STD=[1.0,1.0,1.0]", r"PIXEL_STD: expected \[58.395.*Detectron2's default"),
        ("MODEL.RESNETS.NORM=FrozenBN", "NORM: expected SyncBN or naiveSyncBN or BN"),
        ("MODEL.RESNETS.DEPTH=101", "DEPTH: expected 50"),
    ],
)
def test_recipe_that_does_not_fit_the_weights_is_refused(item, message, backbone, tmp_path):
    config = recipe("voc", f"detectron2.{item}")
    with pytest.raises(ConfigError, match=message):
        train.train(config, backbone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "item", "message"),
    [
        ("voc", "task=coco", "NUM_CLASSES: expected 80 for task coco, found 20"),
        ("coco", "task=voc", "NUM_CLASSES: expected 20 for task voc, found 80"),
        ("voc", "detectron2.MODEL.ROI_HEADS.NUM_CLASSES=80", "NUM_CLASSES: expected 20 for task voc, found 80"),
        ("voc", "detectron2.MODEL.MASK_ON=true", "MASK_ON: expected False for task voc, found True"),
        ("coco", "detectron2.MODEL.MASK_ON=false", "MASK_ON: expected True for task coco, found False"),
    ],
)
def test_recipe_of_a_detector_for_the_other_task_is_refused(task, item, message, backbone, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train.train(recipe(task, item), backbone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_key_that_the_recipe_lacks_counts_as_detectron2s_default(backbone):
    note, config = backbone.note, recipe("voc")
    for section, key in (("INPUT", "FORMAT"), ("MODEL", "PIXEL_MEAN"), ("MODEL", "PIXEL_STD")):
        values = configs.to_dict(config)["detectron2"]
        del values[section][key]
        with pytest.raises(ConfigError, match=f"{section}.{key}.*(default|BGR)"):
            weights.check_recipe(values, note)


# -------------------------------------------------------------------------------------------------------- recipes


def test_recipes_hold_the_protocol_of_section_4_5():
    voc, coco = (configs.flatten(recipe(task).detectron2) for task in ("voc", "coco"))
    for found in (voc, coco):
        assert found["MODEL.ROI_HEADS.NAME"] == "Res5ROIHeadsExtraNorm" and found["MODEL.RESNETS.NORM"] == "SyncBN"
        assert (
            found["SOLVER.IMS_PER_BATCH"] == 16 and found["SOLVER.BASE_LR"] == 0.02 and found["INPUT.FORMAT"] == "RGB"
        )
        assert found["TEST.PRECISE_BN.ENABLED"] and found["MODEL.BACKBONE.FREEZE_AT"] == 0
    solver = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS")
    assert [voc[key] for key in solver] == [24_000, [18_000, 22_000], 100] and not voc["MODEL.MASK_ON"]
    assert [coco[key] for key in solver] == [90_000, [60_000, 80_000], 1000] and coco["MODEL.MASK_ON"]
    assert voc["INPUT.MIN_SIZE_TRAIN"] == list(range(480, 801, 32)) and voc["MODEL.ROI_HEADS.NUM_CLASSES"] == 20
    assert coco["INPUT.MIN_SIZE_TRAIN"] == list(range(640, 801, 32)) and coco["MODEL.ROI_HEADS.NUM_CLASSES"] == 80


def test_what_decides_a_number_is_hashed_and_what_does_not_is_not():
    same = [recipe("voc", item) for item in ("eval_every=100", "run.workers=1", "run.data_root=elsewhere")]
    other = [recipe("voc", item) for item in ("data=photos", "detectron2.SOLVER.MAX_ITER=3", "group=1")]
    assert {configs.hash8(config) for config in same} == {configs.hash8(recipe("voc"))}
    assert len({configs.hash8(config) for config in [recipe("voc"), *other]}) == 4


def test_keys_that_the_script_gives_are_refused_in_the_recipe():
    values = yaml.safe_load(RECIPES["voc"].read_text())
    values["detectron2"]["MODEL"]["DEVICE"] = "cpu"
    with pytest.raises(ConfigError, match=r"detectron2\.MODEL\.DEVICE: is set by run\.device"):
        configs.resolve(values, {}, Detection)
    with pytest.raises(ConfigError, match=r"detectron2\.MODEL\.WEIGHTS: is set by --weights"):
        recipe("voc", "detectron2.MODEL.WEIGHTS=/x")
    with pytest.raises(ConfigError, match=r"did you mean 'detectron2\.SOLVER\.MAX_ITER'"):
        recipe("voc", "detectron2.SOLVER.MAX_ITR=3")


def test_without_detectron2_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"make detectron2"):
        train.require_detectron2()


def test_sync_batchnorm_between_cpus_is_refused():
    with pytest.raises(ConfigError, match="naiveSyncBN"):
        train.check_norm("SyncBN", torch.device("cpu"), 2)
    train.check_norm("SyncBN", torch.device("cpu"), 1)


# ----------------------------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    photos.write(root, "voc")
    photos.write(root, "coco")
    return root


def test_photos_are_the_same_files_each_time(trees, tmp_path):
    photos.write(tmp_path, "voc")
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 * (2 * photos.IMAGES + 1) + 1
    assert all((tmp_path / file).read_bytes() == (trees / file).read_bytes() for file in files)


def test_photos_have_every_voc_class_in_each_split_and_both_orientations(trees):
    for folder, split in (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test")):
        texts = [path.read_text() for path in (trees / folder / "Annotations").glob(f"{split}_*.xml")]
        assert all(sum(f"<name>{name}</name>" in text for text in texts) for name in annotations.VOC_CLASSES)
        assert sum("<width>160" in text for text in texts) == sum("<width>128" in text for text in texts) == 4


def full(root: Path, task: str, *items: str) -> Detection:
    return recipe(task, f"run.data_root={root}", *items)


@pytest.mark.parametrize(("task", "count"), [("voc", "5,011"), ("coco", "118,287")])
def test_data_set_that_is_not_whole_is_refused_unless_asked_for(task, count, trees, tmp_path):
    with pytest.raises(DataError, match=f"8 images, expected {count}.*allow_partial_data"):
        datasets.prepare(full(trees, task), tmp_path)
    data = datasets.prepare(full(trees, task, "allow_partial_data=true"), tmp_path)
    assert len(data.notes) == len(data.training) + 1 and "not the paper's data" in data.notes[0]
    assert (data.test.path.name, data.test.name) == {"voc": ("VOC2007", "test"), "coco": ("coco", "val2017")}[task]


def test_missing_files_are_refused_even_of_a_part(trees, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", trees, copy], check=True)
    (copy / "coco" / "val2017" / "000000000003.jpg").unlink()
    (copy / "VOC2012" / "Annotations" / "trainval_000001.xml").write_text("")
    for task, name in (("coco", "000000000003.jpg"), ("voc", "trainval_000001.xml")):
        with pytest.raises(DataError, match=f"1 of 8 files are missing or empty, first: .*{name}"):
            datasets.prepare(full(copy, task, "allow_partial_data=true"), tmp_path)
    (copy / "coco" / "annotations" / "instances_train2017.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"instances_train2017\.json is cut off"):
        datasets.prepare(full(copy, "coco", "allow_partial_data=true"), tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    with pytest.raises(DataError, match=r"no VOC2007 in .*nowhere"):
        datasets.prepare(full(tmp_path / "nowhere", "voc"), tmp_path)


def test_devkit_folder_and_detectron2s_variable_are_found(trees, tmp_path, monkeypatch):
    (tmp_path / "VOCdevkit").symlink_to(trees)
    assert datasets.find_folder(tmp_path, "VOC2007") == tmp_path / "VOCdevkit" / "VOC2007"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(trees))
    assert datasets.find_folder(tmp_path / "nowhere", "coco") == trees / "coco"


def test_voc2007_without_voc2012_is_refused_even_as_a_part(trees, tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    (tmp_path / "VOC2007").symlink_to(trees / "VOC2007")
    with pytest.raises(DataError, match=r"no VOC2012 in .*run\.data_root"):
        datasets.prepare(full(tmp_path, "voc", "allow_partial_data=true"), tmp_path)


def test_batches_are_groups_of_one_orientation_and_epochs_permutations():
    wide = [n % 3 == 0 for n in range(50)]
    found = list(itertools.islice(datasets.batches(wide, 8, 2, 0, "train"), 100))
    for batch in found:
        assert len(batch) == 8
        assert all(wide[batch[i].image] == wide[batch[i + 1].image] for i in range(0, 8, 2))
    places = [position.place for batch in found for position in batch]
    assert len(set(places)) == len(places)  # no place of the stream is used twice: each draws its own view
    first = [p.image for batch in found for p in batch if p.place < 50]
    assert sorted(first) == list(range(50))
    assert found == list(itertools.islice(datasets.batches(wide, 8, 2, 0, "train"), 100))
    assert found != list(itertools.islice(datasets.batches(wide, 8, 2, 1, "train"), 100))


def test_batches_that_cannot_be_divided_are_refused():
    for group, processes in ((3, 1), (2, 5)):
        with pytest.raises(ConfigError, match="16 images cannot be divided"):
            datasets.check_batches(16, group, processes)
    datasets.check_batches(16, 2, 8)


# ------------------------------------------------------------------------------------------------ with Detectron2


@pytest.fixture(scope="module")
def detector(backbone):
    """VOC's detector with the weights in it, and its settings."""
    from detection import model

    config = recipe("voc", *SMALL)
    cfg = model.settings(config, torch.device("cpu"))
    return model.build(cfg, 0, backbone), cfg


@needs_detectron2
def test_features_at_res4_are_torchvisions_bit_for_bit(detector, resnet):
    theirs = torchvision.models.resnet50()
    theirs.load_state_dict({**theirs.state_dict(), **resnet.state_dict()})
    stages = torch.nn.Sequential(*list(theirs.eval().children())[:-3])  # to layer3
    image = torch.rand(1, 3, 64, 96)
    backbone = detector[0].backbone.eval()
    with torch.no_grad():
        assert torch.equal(stages(image), backbone(image)["res4"])
    backbone.train()


@needs_detectron2
def test_318_of_333_tensors_are_set_and_only_the_new_parts_are_not(detector, resnet):
    own = detector[0].state_dict()
    source = {formats.detectron2_name(name): value for name, value in resnet.state_dict().items()}
    left = [name for name in own if name.split(".", 1)[1] not in source]
    assert len(own) == 333 and len(left) == 15 and all(name.startswith(weights.NEW) for name in left)
    assert all(torch.equal(own[weights.detector_name(name)], value) for name, value in source.items())


@needs_detectron2
def test_detectron2s_own_checkpointer_loads_the_same(detector, pkl):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    torch.manual_seed(1)
    other = build_model(detector[1])
    DetectionCheckpointer(other).load(str(pkl))
    own = detector[0].state_dict()
    assert all(torch.equal(v, own[n]) for n, v in other.state_dict().items() if not n.startswith(weights.NEW))


@needs_detectron2
def test_pixels_are_normalised_as_in_the_pretraining(detector):
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    found = detector[0].preprocess_image([{"image": image}]).tensor[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in formats.IMAGENET)
    torch.testing.assert_close(found, (image / 255 - mean) / std, atol=1e-5, rtol=1e-5)


@needs_detectron2
def test_recipe_with_a_key_or_type_that_detectron2_does_not_know_is_refused(detector):
    from detection import model

    values = configs.to_dict(recipe("voc"))
    for section, key, value in (
        ("SOLVER", "MAX_ITERATIONS", 3),
        ("SOLVER", "MAX_ITER", "many"),
        ("SOLVER", "MAX_ITER", 0),
        ("SOLVER", "STEPS", [2, 1]),
    ):
        changed = {**values["detectron2"], section: {**values["detectron2"][section], key: value}}
        with pytest.raises(ConfigError, match="detectron2"):
            model.settings(dataclasses.replace(recipe("voc"), detectron2=changed), torch.device("cpu"))


@needs_detectron2
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_one_line(workers, trees, tmp_path, detector):
    """Damaged after all images were opened: in training and in the test."""
    from detection import loading

    subprocess.run(["cp", "-r", trees / "VOC2007", trees / "VOC2012", tmp_path], check=True)
    items = [item for item in SMALL if not item.startswith(("data=", "run.workers"))]
    config = full(tmp_path, "voc", *items, "allow_partial_data=true", f"run.workers={workers}")
    job = loading.task(config, detector[1], datasets.prepare(config, tmp_path))
    for path in (tmp_path / "VOC2007" / "JPEGImages").iterdir():
        path.write_bytes(path.read_bytes()[:800])
    with (
        pytest.raises(DataError, match=r"trainval_00000\d\.jpg cannot be used"),
        loading.training_batches(job, "train") as batches,
    ):
        list(itertools.islice(batches, 8))
    with pytest.raises(DataError, match=r"test_000000\.jpg cannot be used"), loading.test_batches(job) as batches:
        list(batches)
    assert not multiprocessing.active_children()


class Oracle(torch.nn.Module):
    """Detects exactly what is annotated."""

    def __init__(self, images: list[dict]):
        super().__init__()
        self.truth = {image["image_id"]: image for image in images}

    def forward(self, inputs: list[dict]) -> list[dict]:
        from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, polygons_to_bitmask

        outputs = []
        for item in inputs:
            truth = self.truth[item["image_id"]]
            size, things = (truth["height"], truth["width"]), truth["annotations"]
            found = Instances(size)
            boxes = [BoxMode.convert(t["bbox"], t["bbox_mode"], BoxMode.XYXY_ABS) for t in things]
            found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
            found.scores = torch.ones(len(things))
            found.pred_classes = torch.tensor([t["category_id"] for t in things], dtype=torch.int64)
            if any("segmentation" in thing for thing in things):
                polygons = [[np.array(p, dtype=np.float64) for p in t["segmentation"]] for t in things]
                found.pred_masks = BitMasks(
                    torch.tensor(np.array([polygons_to_bitmask(p, *size) for p in polygons]))
                ).tensor
            outputs.append({"instances": found})
        return outputs


@needs_detectron2
@pytest.mark.parametrize("task", ["voc", "coco"])
def test_evaluators_give_100_for_perfect_detections_and_0_for_none(task, trees, tmp_path):
    from detection import evaluation

    job = task_on(trees, task, tmp_path)
    metrics = evaluation.evaluate(Oracle(images_of_test(job)), job, tmp_path)
    assert metrics.pop("detections") == photos.IMAGES * photos.OBJECTS
    assert metrics == pytest.approx(dict.fromkeys(metrics, 100.0))
    sizes = {f"{kind}_AP{size}" for kind in ("box", "mask") for size in "sm"} if task == "coco" else set()
    names = {f"{kind}_AP{at}" for kind in ("box", "mask") for at in ("", 50, 75) if (task, kind) != ("voc", "mask")}
    assert metrics.keys() == names | sizes  # no object of the photographs is large
    assert set(evaluation.table7({"detections": 0}, task).values()) == {0.0}


@needs_detectron2
def test_voc_is_read_as_detectron2_reads_it(trees):
    from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances

    from detection import loading

    assert CLASS_NAMES == annotations.VOC_CLASSES
    own = loading.voc_images(datasets.Split(trees / "VOC2007", "test"))
    assert {thing.pop("difficult") for image in own for thing in image["annotations"]} == {False}
    assert own == load_voc_instances(str(trees / "VOC2007"), "test", CLASS_NAMES)


@needs_detectron2
def test_class_without_test_objects_is_left_out_of_vocs_mean(trees, tmp_path):
    from detection import evaluation

    shutil.copytree(trees, tmp_path / "data")
    for path in (tmp_path / "data" / "VOC2007" / "Annotations").glob("test_*.xml"):
        path.write_text(path.read_text().replace("<name>dog<", "<name>cat<"))
    job = task_on(tmp_path / "data", "voc", tmp_path)
    metrics = evaluation.evaluate(Oracle(images_of_test(job)), job, tmp_path)
    assert job.absent == ["dog"] and metrics["box_AP"] == pytest.approx(100.0)  # Detectron2's mean is 95


@needs_detectron2
@pytest.mark.parametrize("task", ["voc", "coco"])
def test_predictions_are_on_disk_as_cocos_results(task, trees, tmp_path):
    from detection import evaluation

    job = task_on(trees, task, tmp_path)
    evaluation.evaluate(Oracle(images_of_test(job)), job, tmp_path)
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert len(found) == photos.IMAGES * photos.OBJECTS and not list(tmp_path.glob(".predictions*"))
    truth = {}
    for image in images_of_test(job):
        things = [(thing["category_id"] + 1, *thing["bbox"]) for thing in image["annotations"]]
        truth[image["image_id"]] = sorted(things)
    for image, things in truth.items():
        own = [(one["category_id"], *one["bbox"]) for one in found if one["image_id"] == image]
        if task == "voc":  # COCO's boxes are x, y, width, height
            things = [(label, x0, y0, x1 - x0, y1 - y0) for label, x0, y0, x1, y1 in things]
        assert sorted(own) == sorted(things)
    assert all(("segmentation" in one) == (task == "coco") and one["score"] == 1 for one in found)


def task_on(root: Path, task: str, directory: Path):
    """The small recipe on the data in `root`."""
    from detection import loading, model

    config = full(root, task, *[item for item in SMALL if "data=" not in item], "allow_partial_data=true")
    return loading.task(config, model.settings(config, torch.device("cpu")), datasets.prepare(config, directory))


def images_of_test(job) -> list[dict]:
    from detectron2.data import get_detection_dataset_dicts

    return get_detection_dataset_dicts([job.test], filter_empty=False)


def run(task: str, backbone: weights.Weights, directory: Path, *items: str) -> dict:
    config = dataclasses.replace(recipe(task, *SMALL, *items), checkpoint=backbone.note["identity"])
    return train.train(config, backbone, directory)


def lines(directory: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_log(directory)]


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory) -> Path:
    """An undisturbed run on VOC photographs."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run("voc", backbone, directory)
    return directory


@needs_detectron2
def test_run_logs_its_losses_and_its_result(whole):
    steps, result = lines(whole)[:-1], json.loads((whole / "result.json").read_text())
    assert [line["step"] for line in steps] == [0, 1]
    assert {"loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "lr"} <= steps[0].keys()
    assert steps[0]["lr"] == pytest.approx(0.02 * 0.001)  # warm-up begins at WARMUP_FACTOR
    assert result["metrics"].keys() == {"box_AP", "box_AP50", "box_AP75"} and result["detections"] > 0
    assert result["norm"] == "BN (SyncBN in one process: the whole batch of 2)" and result["checkpoint"].startswith(
        "r50@"
    )
    assert result["detectron2"]["version"] == "0.6"


@needs_detectron2
def test_eval_only_tests_the_last_checkpoint_again(whole, pkl, tmp_path, monkeypatch, capsys):
    result, predictions = json.loads((whole / "result.json").read_text()), (whole / "predictions.json").read_text()
    log = (whole / "log.jsonl").read_text()
    words = ["--weights", pkl, "--config", RECIPES["voc"], "--set", *SMALL]
    for more in ([], words):  # the run's directory is enough to name it
        monkeypatch.setattr(sys, "argv", ["train.py", "--eval-only", "--run-dir", str(whole), *map(str, more)])
        train.main()
        tested = json.loads((whole / "evaluation.json").read_text())
        assert tested["metrics"] == {**result["metrics"], "detections": result["detections"]} and tested["step"] == 2
        assert (whole / "predictions.json").read_text() == predictions
        assert f"box_AP {result['metrics']['box_AP']:.4g}" in capsys.readouterr().out
    assert (whole / "log.jsonl").read_text() == log
    monkeypatch.setattr(sys, "argv", ["train.py", "--eval-only", "--run-dir", str(tmp_path), *map(str, words)])
    with pytest.raises(UserError, match=r"checkpoint\.pt: no checkpoint to test"):
        train.main()


def test_eval_only_of_no_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--eval-only", "--run-dir", str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=r"nowhere/config\.yaml"):
        train.main()
    monkeypatch.setattr(sys, "argv", ["train.py", "--eval-only"])
    with pytest.raises(SystemExit):
        train.main()
    assert "with --eval-only, --run-dir is enough" in capsys.readouterr().err


@needs_detectron2
def test_killed_run_goes_on_to_the_same_numbers(whole, pkl, backbone, tmp_path, capsys):
    """Killed without warning after the checkpoint of the first iteration."""
    words = ["detection/train.py", "--config", RECIPES["voc"], "--weights", pkl, "--run-dir", tmp_path / "run"]
    words += ["--set", *SMALL, "run.checkpoint_minutes=0"]
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "result.json").exists()
    run("voc", backbone, tmp_path / "run")
    out = capsys.readouterr().out
    assert "(resumed after iteration " in out
    assert "roi_heads.res5.norm." in out and "mask_head" not in out  # VOC's detector has none
    assert lines(tmp_path / "run") == lines(whole)


@needs_detectron2
@pytest.mark.parametrize(
    ("items", "broken", "what", "step"),
    [
        (["detectron2.SOLVER.BASE_LR=1e38"], None, "loss is nan", 1),  # noticed by Detectron2 in its proposals
        (["detectron2.SOLVER.BASE_LR=1e38", "run.checkpoint_minutes=0"], None, "the norm of weights and .* is inf", 0),
        (["run.log_every=1000"], 1, "loss is nan", 1),  # noticed an iteration later
    ],
)
def test_what_is_not_finite_stops_the_run_and_names_its_images(
    backbone, tmp_path, monkeypatch, items, broken, what, step
):
    real, steps = train.forward, itertools.count()

    def forward(*arguments):
        losses = real(*arguments)
        return {name: loss * math.nan for name, loss in losses.items()} if next(steps) == broken else losses

    monkeypatch.setattr(train, "forward", forward)
    line = rf"{what} at step {step}; stopped, .*nonfinite\.json .*, no checkpoint was written yet$"
    with pytest.raises(UserError, match=line):
        run("voc", backbone, tmp_path, "detectron2.SOLVER.MAX_ITER=4", *items)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (
        report["step"] == step
        and report["lr"] > 0
        and report["noticed"].endswith(f"step {broken + 1 if broken else step}")
    )
    assert report["files"].keys() == {str(i) for i in range(step + 1)}
    assert all(len(names) == 2 and all(Path(name).is_file() for name in names) for names in report["files"].values())
    noticed = checkpoints.load(tmp_path / "nonfinite.pt")
    assert noticed["step"] == step + (broken is not None or step == 0) and noticed.keys() >= {"optimizer", "scheduler"}
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "checkpoint.pt").exists()


@needs_detectron2
def test_coco_run_has_boxes_and_masks(backbone, tmp_path):
    once = ("detectron2.SOLVER.MAX_ITER=1", "detectron2.SOLVER.STEPS=[]")
    result = run("coco", backbone, tmp_path / "run", *once)
    assert result["metrics"].keys() >= {f"{kind}_{ap}" for kind in ("box", "mask") for ap in ("AP", "AP50", "AP75")}
    assert "loss_mask" in lines(tmp_path / "run")[0]
    assert run("coco", backbone, tmp_path / "run", *once) == result  # finished: nothing is done again
