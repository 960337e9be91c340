"""Conversion: the same bits and the same features on the other side, an account of every key, and no silent mistake."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.models import resnet50

from detection import convert
from mixmask import checkpoint, formats
from mixmask import config as configs
from mixmask.backbones import ResNet
from mixmask.formats import read, read_detectron2
from mixmask.frameworks import build_framework
from mixmask.runs import file_sha256, read_result
from tests import foreign


@pytest.fixture(scope="module")
def weights():
    """Of the one ResNet-50 that Detectron2 takes: width 64."""
    return foreign.backbone(width=64)


@pytest.fixture(scope="module")
def moco(weights, tmp_path_factory):
    """MoCo's published kind of file, 94 MB."""
    return foreign.write("moco released", weights, tmp_path_factory.mktemp("moco") / "moco_v2_800ep.pth.tar")


@pytest.fixture(scope="module")
def converted(moco, tmp_path_factory):
    """The `.pkl` of it and its note."""
    output = tmp_path_factory.mktemp("pkl") / "moco.pkl"
    return output, convert.convert(read(moco), moco, output, "detectron2")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A ResNet-50 of width 4."""
    return foreign.write("torchvision", foreign.backbone(), tmp_path_factory.mktemp("small") / "small.pth")


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


# --------------------------------------------------------------------------------------------------- Detectron2


def test_detectron2_file_has_the_318_names_and_entries_that_make_detectron2_load_all_of_them(converted, weights):
    output, note = converted
    content = pickle.loads(output.read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["__author__"] == "mixmask" and content["matching_heuristics"] is True
    names = content["model"].keys()
    assert len(names) == note["tensors"] == 318 and all(type(v) is np.ndarray for v in content["model"].values())
    assert {name.split(".")[0] for name in names} == {"stem", "res2", "res3", "res4", "res5"}
    assert sum("num_batches_tracked" not in name for name in names) == 265
    assert not any(word in name for name in names for word in ("bn", "downsample", "layer", "module", "fc"))


def batch_norm(x, weights, name):
    mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def detectron2_res4(weights, x):
    """R50-C4's backbone as Detectron2 builds it with STRIDE_IN_1X1 False, read from its key names alone."""

    def conv(x, name, stride=1):
        kernel = weights[f"{name}.weight"]
        return batch_norm(F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2), weights, f"{name}.norm")

    x = F.max_pool2d(F.relu(conv(x, "stem.conv1", 2)), 3, stride=2, padding=1)
    for stage, blocks in (("res2", 3), ("res3", 4), ("res4", 6)):
        for i in range(blocks):
            block, stride = f"{stage}.{i}", 2 if i == 0 and stage != "res2" else 1
            out = F.relu(conv(F.relu(conv(x, f"{block}.conv1")), f"{block}.conv2", stride))
            shortcut = conv(x, f"{block}.shortcut", stride) if f"{block}.shortcut.weight" in weights else x
            x = F.relu(conv(out, f"{block}.conv3") + shortcut)
    return x


@torch.no_grad()
def torchvision_layer3(weights, x):
    model = resnet50()
    model.fc = torch.nn.Identity()
    model.load_state_dict(weights)
    model.eval()
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    return model.layer3(model.layer2(model.layer1(x)))


def test_same_image_gives_the_same_bits_at_res4(converted, weights):
    x = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    expected = torchvision_layer3(weights, x)
    assert expected.shape == (1, 1024, 6, 8) and 0 < expected.std() < float("inf")
    assert torch.equal(detectron2_res4(read_detectron2(converted[0]).weights, x), expected)


@pytest.mark.detectron2
@torch.no_grad()
def test_detectron2_itself_loads_318_tensors_and_gives_the_same_bits_at_res4(converted, weights):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    backbone = build_backbone(cfg).eval()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    DetectionCheckpointer(backbone).load(str(converted[0]))
    after = backbone.state_dict()
    assert len(after) == 318 and all(torch.equal(after[formats.detectron2_name(k)], v) for k, v in weights.items())
    assert not all(torch.equal(before[k], v) for k, v in after.items())
    x = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(backbone(x)["res4"], torchvision_layer3(weights, x))


def test_wrong_names_change_the_features_so_that_the_test_above_can_fail(converted, weights):
    found = dict(read_detectron2(converted[0]).weights)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for name in ("stem.conv1.norm.running_var", "res2.0.shortcut.weight", "res4.5.conv3.norm.bias"):
        changed = {**found, name: torch.ones_like(found[name])}
        assert not torch.equal(detectron2_res4(changed, x), torchvision_layer3(weights, x)), name


def test_detectron2_file_comes_back_bit_for_bit_with_its_normalisation(converted, weights):
    source = read(converted[0])
    assert same(source.weights, weights) and source.format == "detectron2"
    assert source.backbone == configs.Backbone("resnet50", "imagenet", 64, 1)


# -------------------------------------------------------------------------------------------- every other target


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "tiny"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("target", "suffix"), [("torchvision", ".pth"), ("timm", ".safetensors")])
def test_round_trip_bit_for_bit_with_stem_normalisation_and_identity(target, suffix, arch, stem, tiny, cli, tmp_path):
    config = tiny(f"backbone.arch={arch}", f"backbone.stem={stem}", "backbone.width=4")
    framework = build_framework(config)
    state = {"run": "tiny-mixmask-e2-0a1b2c3d-s0", "config": configs.to_dict(config), "step": 3, "steps": 3}
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "model": framework.state_dict()})
    status, _, error = cli(convert.main, tmp_path / "checkpoint.pt", tmp_path / f"x{suffix}", "--to", target)
    assert (status, error) == (0, "")
    source = read(tmp_path / f"x{suffix}")
    assert same(source.weights, framework.encoder.backbone.state_dict())
    assert source.backbone == configs.Backbone(arch, stem, 4, 1) and source.identity == state["run"]
    assert (source.mean, source.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("name", sorted(foreign.TORCH))
def test_every_public_format_to_timm_and_back_with_its_account(name, cli, tmp_path):
    weights = foreign.backbone(stem="cifar" if name == "unmix" else "imagenet")
    foreign.write(name, weights, tmp_path / "in.pth.tar")
    status, out, error = cli(convert.main, tmp_path / "in.pth.tar", tmp_path / "x.safetensors", "--to", "timm")
    assert (status, error) == (0, "") and same(read(tmp_path / "x.safetensors").weights, weights)
    assert f"({foreign.TORCH[name][1]};" in out and "used     318 of" in out
    assert all(f"{what} {count}" in out for what, count in foreign.TORCH[name][2].items())


def test_output_does_not_depend_on_the_format_or_the_order_of_what_was_read(cli, tmp_path):
    weights, digests = foreign.backbone(), set()
    for name in ("moco", "byol wrapped", "swav", "barlow twins resnet50.pth"):
        foreign.write(name, weights, tmp_path / f"{name}.tar")
        cli(convert.main, tmp_path / f"{name}.tar", tmp_path / f"{name}.safetensors", "--to", "timm")
        digests.add(file_sha256(tmp_path / f"{name}.safetensors"))
    foreign.write_safetensors(weights, tmp_path / "reversed.safetensors")
    cli(convert.main, tmp_path / "reversed.safetensors", tmp_path / "x.safetensors", "--to", "timm")
    assert digests == {file_sha256(tmp_path / "x.safetensors")}


def test_torchvision_loads_what_is_written(weights, moco, cli, tmp_path):
    assert cli(convert.main, moco, tmp_path / "x.pth", "--to", "torchvision")[0] == 0
    found = resnet50().load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"] and found.unexpected_keys == []


def test_safetensors_header_is_aligned_and_has_the_format(small, cli, tmp_path):
    assert cli(convert.main, small, tmp_path / "x.safetensors", "--to", "timm")[0] == 0
    content = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"} and len(header) == 318
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - 8 - size


# ---------------------------------------------------------------------------------------------- note and account


def test_note_says_where_the_weights_are_from_and_how_pixels_were_normalised(converted, moco):
    output, note = converted
    assert json.loads(formats.sidecar(output).read_text()) == note
    assert note["source"]["format"] == "moco" and note["source"]["dropped"] == {"head": 2}
    assert note["source"]["sha256"] == read(moco).sha256 and note["identity"].startswith("moco_v2_800ep.pth@")
    assert note["target"] == "detectron2" and note["channels"] == "RGB" and "commit" in note
    assert note["mean"] == [0.485, 0.456, 0.406] and note["std"] == [0.229, 0.224, 0.225]


def test_file_that_changed_after_its_note_is_refused(small, cli, tmp_path):
    assert cli(convert.main, small, tmp_path / "x.pth", "--to", "torchvision")[0] == 0
    shutil.copy(foreign.write("swav", foreign.backbone(), tmp_path / "other.pth"), tmp_path / "x.pth")
    with pytest.raises(formats.FormatError, match="another SHA-256"):
        read(tmp_path / "x.pth")
    formats.sidecar(tmp_path / "x.pth").write_text("[1]")
    with pytest.raises(formats.FormatError, match="no note of a conversion"):
        read(tmp_path / "x.pth")


def test_other_weights_in_the_file_are_in_the_account_and_the_note(cli, tmp_path):
    state = {**foreign.moco_released(foreign.backbone()), "state_dict_ema": foreign.linear("fc")}
    torch.save(state, tmp_path / "in.pth")
    _, out, _ = cli(convert.main, tmp_path / "in.pth", tmp_path / "x.pth", "--to", "torchvision")
    assert "dropped  4: entry state_dict_ema 2, head 2" in out
    note = json.loads(formats.sidecar(tmp_path / "x.pth").read_text())
    assert note["source"]["dropped"] == {"head": 2, "entry state_dict_ema": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None, "stem": "banana"}, "stem: expected one of"),
        ({"mean": None}, "mean: expected a list, found None"),
        ({"std": [0.2, 0.2]}, "std: expected 3 values, found 2"),
        ({"std": [0.2, 0.2, 0]}, "std: expected numbers above 0"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean[1]: expected a number, found nan"),
        ({"identity": ["x"]}, "identity: "),
        ({"source": None}, "source: expected a section"),
        ({"stem": "cifar"}, "describes a resnet50 of width 4 with the cifar stem, but"),
        ({"width": 64}, "describes a resnet50 of width 64"),
    ],
)
def test_note_with_other_values_than_those_of_a_conversion_is_refused(change, message, small, cli, tmp_path):
    assert cli(convert.main, small, tmp_path / "x.pth", "--to", "torchvision")[0] == 0
    note = formats.sidecar(tmp_path / "x.pth")
    note.write_text(json.dumps(json.loads(note.read_text()) | change))
    error = fails(cli, tmp_path / "x.pth", tmp_path / "y.pth", "--to", "torchvision")
    assert message in error and str(note) in error


def test_the_same_command_writes_the_same_bytes_and_anything_else_is_kept(small, cli, tmp_path):
    output = tmp_path / "x.pth"
    assert cli(convert.main, small, output, "--to", "torchvision")[0] == 0
    first = output.read_bytes()
    assert cli(convert.main, small, output, "--to", "torchvision")[0] == 0
    assert output.read_bytes() == first and sorted(p.name for p in tmp_path.iterdir()) == ["x.pth", "x.pth.json"]
    other = foreign.write("swav", foreign.backbone(), tmp_path / "other.pth")
    status, _, error = cli(convert.main, other, output, "--to", "torchvision")
    assert status == 1 and "exists and holds something else" in error and output.read_bytes() == first
    status, _, error = cli(convert.main, small, other, "--to", "torchvision")
    assert status == 1 and "exists and holds something else" in error


def test_what_is_printed_accounts_for_every_key(tiny, cli, tmp_path):
    config = tiny("backbone.arch=resnet50", "backbone.stem=imagenet", "backbone.width=4")
    state = {"run": "tiny-x-0a1b2c3d-s0", "config": configs.to_dict(config), "step": 2, "steps": 3}
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "model": build_framework(config).state_dict()})
    _, out, _ = cli(convert.main, tmp_path / "checkpoint.pt", tmp_path / "x.pth", "--to", "torchvision")
    assert "(mixmask; tiny-x-0a1b2c3d-s0@2; sha256" in out
    assert "a resnet50 of width 4 with the imagenet stem; RGB pixels in [0, 1], mean 0.5 0.5 0.5" in out
    assert "used     318 of 642 keys" in out
    assert "dropped  324: encoder.head 2, key_encoder 320, pointer 1, queue 1" in out
    assert "x.pth (torchvision; 318 tensors, " in out and "and x.pth.json" in out


def test_counters_that_were_added_are_mentioned(cli, tmp_path):
    old = {k: v for k, v in foreign.backbone().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "in.pth")
    _, out, _ = cli(convert.main, tmp_path / "in.pth", tmp_path / "x.pth", "--to", "torchvision")
    assert "used     265 of 265 keys" in out and "added    53 counters" in out


@pytest.mark.parametrize("script", ["detection/convert.py", "eval/finetune.py"])
def test_script_runs_from_another_folder_without_an_installed_package(script, tmp_path):
    """As in an environment of Detectron2's own, without PYTHONPATH."""
    path = Path(__file__).resolve().parents[2] / script
    done = subprocess.run([sys.executable, "-E", path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_output_does_not_depend_on_how_the_input_keeps_its_tensors(cli, tmp_path):
    """Views of one buffer, tensors that share one, channels last, parameters, the momentum encoder beside."""
    weights = foreign.backbone()
    one = torch.cat([v.flatten() for v in weights.values() if v.is_floating_point()] * 2)
    counter, views, start = torch.tensor(7), {}, 0
    for name, value in weights.items():
        views[name] = one[start : start + value.numel()].view(value.shape) if value.is_floating_point() else counter
        start += value.numel() * value.is_floating_point()
    wide = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in weights.items()}
    trained = {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in weights.items()}
    inputs = {"plain": weights, "views": views, "wide": wide, "trained": trained, "momentum": foreign.moco(weights)}
    for target, suffix in (("torchvision", ".pth"), ("timm", ".safetensors")):
        digests = set()
        for name, content in inputs.items():
            torch.save(content, tmp_path / f"{name}.pt")
            assert cli(convert.main, tmp_path / f"{name}.pt", tmp_path / f"{name}{suffix}", "--to", target)[0] == 0
            digests.add(file_sha256(tmp_path / f"{name}{suffix}"))
        assert len(digests) == 1, target
        assert (tmp_path / f"views{suffix}").stat().st_size < 1.5 * sum(v.nbytes for v in weights.values())


def test_one_of_several_backbones_by_name_in_account_note_and_identity(cli, tmp_path):
    torch.save(foreign.dino(foreign.backbone()), tmp_path / "dino.pth")
    words = ("--to", "torchvision", "--take")
    error = fails(cli, tmp_path / "dino.pth", tmp_path / "x.pth", *words[:2])
    assert "'student.backbone', 'teacher.backbone'; choose one with --take NAME" in error
    _, out, _ = cli(convert.main, tmp_path / "dino.pth", tmp_path / "x.pth", *words, "teacher")
    assert "dino.pth: teacher.backbone (unlisted; dino.teacher.backbone@" in out and "student 320" in out
    note = json.loads(formats.sidecar(tmp_path / "x.pth").read_text())
    assert note["source"]["taken"] == "teacher.backbone" and note["identity"].startswith("dino.teacher.backbone@")
    before = (tmp_path / "x.pth").read_bytes()
    _, _, error = cli(convert.main, tmp_path / "dino.pth", tmp_path / "x.pth", *words, "student")
    assert "exists and holds something else" in error and (tmp_path / "x.pth").read_bytes() == before
    assert cli(convert.main, tmp_path / "dino.pth", tmp_path / "x.pth", *words, "teacher")[0] == 0


def test_cast_is_in_the_account_and_the_note(cli, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in foreign.backbone().items()}
    torch.save(half, tmp_path / "in.pth")
    assert "--dtype float32" in fails(cli, tmp_path / "in.pth", tmp_path / "x.pth", "--to", "torchvision")
    words = (tmp_path / "in.pth", tmp_path / "x.pth", "--to", "torchvision", "--dtype", "float32")
    _, out, _ = cli(convert.main, *words)
    assert "cast     265 of float16, to float32" in out
    assert json.loads(formats.sidecar(tmp_path / "x.pth").read_text())["source"]["cast"] == {"float16": 265}
    assert same(read(tmp_path / "x.pth").weights, {k: v.float() if v.ndim else v for k, v in half.items()})


def test_converted_file_in_caffes_form_is_read_again_without_the_option(cli, tmp_path):
    torch.save(ResNet("resnet18", "imagenet", 4).state_dict(), tmp_path / "in.pth")
    words = (tmp_path / "in.pth", tmp_path / "x.pth", "--to", "torchvision")
    assert "--allow-unit-statistics" in fails(cli, *words)
    assert cli(convert.main, *words, "--allow-unit-statistics")[0] == 0
    assert read(tmp_path / "x.pth").backbone.arch == "resnet18"


# -------------------------------------------------------------------------------------------------- as a stage


def test_run_directory_has_the_result_and_a_finished_one_does_nothing(small, cli, tmp_path):
    words = (small, tmp_path / "x.pth", "--to", "torchvision", "--run-dir", tmp_path / "run")
    assert cli(convert.main, *words)[0] == 0
    result = read_result(tmp_path / "run")
    assert result["metrics"] == {"tensors": 318, "dropped": 2} and result["format"] == "torchvision"
    assert result["checkpoint"].startswith("small@")
    assert {"config.yaml", "command.txt", "environment.json"} <= {p.name for p in (tmp_path / "run").iterdir()}
    before = (tmp_path / "x.pth").stat().st_mtime_ns
    status, out, _ = cli(convert.main, *words)
    assert status == 0 and "nothing to do" in out and (tmp_path / "x.pth").stat().st_mtime_ns == before
    (tmp_path / "x.pth").unlink()
    assert cli(convert.main, *words)[0] == 0 and (tmp_path / "x.pth").exists()


def test_run_directory_of_another_source_is_refused(small, cli, tmp_path):
    cli(convert.main, small, tmp_path / "x.pth", "--to", "torchvision", "--run-dir", tmp_path / "run")
    other = foreign.write("swav", foreign.backbone(), tmp_path / "other.pth")
    words = (other, tmp_path / "y.pth", "--to", "torchvision", "--run-dir", tmp_path / "run")
    status, _, error = cli(convert.main, *words)
    assert status == 1 and "another config (checkpoint: small@" in error and not (tmp_path / "y.pth").exists()


# --------------------------------------------------------------------------------------------- what is refused


def fails(cli, *words) -> str:
    """The one line on stderr; no output and no run directory are left behind."""
    status, _, error = cli(convert.main, *words)
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("arch", "stem", "width"),
    [("resnet50", "cifar", 64), ("resnet18", "imagenet", 64), ("resnet50", "imagenet", 4), ("resnet18", "cifar", 4)],
)
def test_only_resnet50_of_width_64_with_the_imagenet_stem_goes_to_detectron2(arch, stem, width, cli, tmp_path):
    torch.save(foreign.backbone(arch, stem, width), tmp_path / "in.pth")
    error = fails(cli, tmp_path / "in.pth", tmp_path / "x.pkl", "--run-dir", tmp_path / "run")
    assert f"{arch} of width {width} with the {stem} stem; Detectron2's R50-C4 takes a resnet50 of width 64" in error
    assert [p.name for p in tmp_path.iterdir()] == ["in.pth"]


def test_stem_of_tiny_imagenet_is_refused_for_detectron2(tiny, cli, tmp_path):
    config = tiny()
    state = {"run": "r", "config": configs.to_dict(config), "step": 3, "steps": 3}
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "model": build_framework(config).state_dict()})
    assert "with the tiny stem" in fails(cli, tmp_path / "checkpoint.pt", tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("output", "words", "message"),
    [
        ("x.pth", (), "ends in .pkl for detectron2 (or --to torchvision)"),
        ("x.safetensors", (), "ends in .pkl for detectron2 (or --to timm)"),
        ("x", (), "ends in .pkl for detectron2, found"),
        ("x.pkl", ("--to", "timm"), "ends in .safetensors for timm (or --to detectron2)"),
        ("x.pth.tar", ("--to", "torchvision"), "ends in .pth for torchvision"),
        ("none/x.pth", ("--to", "torchvision"), "no such directory"),
        ("folder.pth", ("--to", "torchvision"), "is a directory"),
    ],
)
def test_output_that_cannot_be(output, words, message, small, cli, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    assert message in fails(cli, small, tmp_path / output, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.pth"]


@pytest.mark.parametrize("text", ["[1]", "my own notes", '{"lr": 0.1}', ""])
def test_users_own_json_beside_the_output_is_kept(text, small, cli, tmp_path):
    (tmp_path / "x.pth.json").write_text(text)
    error = fails(cli, small, tmp_path / "x.pth", "--to", "torchvision")
    assert "x.pth.json would be overwritten" in error and "move it away" in error
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x.pth.json": text}


def test_note_of_another_conversion_is_kept_and_the_same_one_may_be_repeated(small, cli, tmp_path):
    output, other = tmp_path / "x.pth", foreign.write("swav", foreign.backbone(), tmp_path / "other.pt")
    assert cli(convert.main, small, output, "--to", "torchvision")[0] == 0
    note = formats.sidecar(output).read_bytes()
    output.rename(tmp_path / "moved.pth")
    assert "describes another conversion" in fails(cli, other, output, "--to", "torchvision")
    assert formats.sidecar(output).read_bytes() == note
    assert cli(convert.main, small, output, "--to", "torchvision")[0] == 0
    assert output.read_bytes() == (tmp_path / "moved.pth").read_bytes()


@pytest.mark.parametrize("length", [252, 300])  # the note's name is five letters longer
def test_name_that_is_too_long(length, small, cli, tmp_path):
    name = "x" * (length - 4) + ".pth"
    assert "File name too long" in fails(cli, small, tmp_path / name, "--to", "torchvision")
    assert list(tmp_path.iterdir()) == []


def test_longest_name_that_is_possible(small, cli, tmp_path):
    assert cli(convert.main, small, tmp_path / ("x" * 246 + ".pth"), "--to", "torchvision")[0] == 0


def test_folder_without_permission_and_read_only_disk_before_anything_is_read(small, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "read", None)
    for number, message in ((13, "Permission denied"), (30, "Read-only file system")):
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", refusing(number, message))
            assert f"cannot write {tmp_path / 'x.pth'}: {message}" in fails(
                cli, small, tmp_path / "x.pth", "--to", "torchvision"
            )
    assert list(tmp_path.iterdir()) == []


def refusing(number: int, message: str):
    """An `open` that nothing can be written with."""
    real = open

    def refuse(path, mode="r", *rest, **options):
        if "w" in mode:
            raise OSError(number, message)
        return real(path, mode, *rest, **options)

    return refuse


def test_output_that_is_the_input_is_refused(cli, tmp_path):
    path = foreign.write("torchvision", foreign.backbone(), tmp_path / "x.pth")
    before = path.read_bytes()
    assert "is the input itself" in fails(cli, path, tmp_path / "." / "x.pth", "--to", "torchvision")
    assert path.read_bytes() == before


def test_disk_that_is_full_leaves_no_part_of_a_file(small, cli, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.os, "fsync", full)
    assert "No space left on device" in fails(cli, small, tmp_path / "x.pth", "--to", "torchvision")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["encoder_q.", "module.encoder.", "module."])
def test_prefixes_that_the_usual_script_turns_into_an_empty_pickle_are_read(prefix, cli, tmp_path):
    torch.save({"state_dict": foreign.under(prefix, foreign.backbone())}, tmp_path / "in.pth")
    _, out, _ = cli(convert.main, tmp_path / "in.pth", tmp_path / "x.pth", "--to", "torchvision")
    assert "used     318 of 318 keys" in out


def broken(change: str) -> dict:
    """MoCo's content with one thing wrong."""
    state = foreign.moco_released(foreign.backbone())
    keys, stem = state["state_dict"], "module.encoder_q."
    if change == "two backbones":
        keys |= {k.replace("encoder_q", "network.trunk"): v + 1 for k, v in keys.items()}
    elif change == "shortcut missing":
        del keys[f"{stem}layer2.0.downsample.0.weight"]
    elif change == "stem missing":
        del keys[f"{stem}conv1.weight"]
    elif change == "NaN":
        keys[f"{stem}layer1.0.bn1.bias"][0] = float("nan")
    elif change == "negative variance":
        keys[f"{stem}layer1.0.bn1.running_var"][0] = -1
    elif change == "sparse":
        keys[f"{stem}conv1.weight"] = keys[f"{stem}conv1.weight"].to_sparse()
    elif change == "quantized":
        keys[f"{stem}conv1.weight"] = torch.quantize_per_tensor(keys[f"{stem}conv1.weight"], 0.1, 0, torch.qint8)
    elif change == "zeros":
        keys[f"{stem}conv1.weight"].zero_()
    elif change == "code":
        state["x"] = print
    elif change == "nothing":
        state["state_dict"] = {}
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("two backbones", "it holds 2 backbones: 'encoder_q', 'network.trunk'; choose one with --take NAME"),
        ("shortcut missing", "317 of 318 keys; missing 1 ('layer2.0.downsample.0.weight')"),
        ("stem missing", "317 of 318 keys; missing 1 ('conv1.weight')"),
        ("NaN", "1 of the 4 values of 'layer1.0.bn1.bias' are not finite"),
        ("negative variance", "'layer1.0.bn1.running_var' has a negative value (-1)"),
        ("code", "holds pickled objects besides tensors and plain types (print); refused, and nothing in it was run"),
        ("nothing", "no state dict"),
        ("sparse", "'module.encoder_q.conv1.weight' is sparse_coo"),
        ("quantized", "'module.encoder_q.conv1.weight' is quantized"),
        ("zeros", "weights of the convolution 'conv1.weight' are zero"),
    ],
)
def test_broken_input_writes_nothing(change, message, cli, tmp_path):
    torch.save(broken(change), tmp_path / "in.pth.tar")
    error = fails(cli, tmp_path / "in.pth.tar", tmp_path / "x.pth", "--to", "torchvision")
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["in.pth.tar"]
