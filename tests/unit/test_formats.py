"""Reading anybody's backbone: every public layout bit for bit, and every broken file refused with its reason."""

import argparse
import copy
import dataclasses
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmask import checkpoint
from mixmask import config as configs
from mixmask.backbones import ResNet, build_backbone
from mixmask.checkpoint import CheckpointError
from mixmask.formats import FormatError, detectron2_name, load_backbone, read, read_detectron2
from mixmask.frameworks import build_framework
from tests import foreign

ROOT = Path(__file__).resolve().parents[2]


def same(one, two) -> bool:
    """Equal names and equal bits."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


@pytest.fixture(scope="module")
def weights():
    return foreign.backbone()


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", sorted(foreign.TORCH.keys() - {"unmix"}))
def test_each_public_layout_is_recognised_bit_for_bit_and_what_it_drops_is_counted(name, weights, tmp_path):
    source = read(foreign.write(name, weights, tmp_path / "x.pth"))
    assert same(source.weights, weights)
    assert (source.format, source.dropped) == foreign.TORCH[name][1:]
    assert source.backbone == configs.Backbone("resnet50", "imagenet", 4, 1)
    assert (source.mean, source.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_unmix_cifar_numbers_are_the_stages_without_max_pooling(arch, tmp_path):
    weights = foreign.backbone(arch, "cifar")
    source = read(foreign.write("unmix", weights, tmp_path / "model_last.pth"))
    assert same(source.weights, weights) and source.format == "unmix"
    assert source.backbone == configs.Backbone(arch, "cifar", 4, 1)
    assert source.mean == (0.4914, 0.4822, 0.4465) and source.std == (0.2023, 0.1994, 0.2010)
    assert source.dropped["momentum encoder"] == len(weights) + 2


def test_every_key_is_used_or_dropped(weights, tmp_path):
    for name, (writer, *_) in foreign.TORCH.items():
        source = read(foreign.write(name, weights, tmp_path / "x.pth"))
        content = writer(weights)
        keys = content.get("state_dict", content.get("model", content))
        beside = sum(len(v) for k, v in content.items() if isinstance(v, dict) and v is not keys)
        assert len(source.weights) + sum(source.dropped.values()) == len(keys) + beside, name


@pytest.mark.parametrize("ddp", ["", "module."])
@pytest.mark.parametrize("prefix", ["encoder_q.", "encoder.", "backbone.", "online_encoder.", "base_encoder.", ""])
def test_prefixes_with_and_without_module(ddp, prefix, weights, tmp_path):
    torch.save({"state_dict": foreign.under(ddp + prefix, weights)}, tmp_path / "x.pth")
    assert same(read(tmp_path / "x.pth").weights, weights)


def test_older_file_format_of_torch_save(weights, tmp_path):
    torch.save(foreign.moco(weights), tmp_path / "x.pth.tar", _use_new_zipfile_serialization=False)
    assert same(read(tmp_path / "x.pth.tar").weights, weights)


def test_safetensors_of_timm(weights, tmp_path):
    source = read(foreign.write_timm(weights, tmp_path / "model.safetensors"))
    assert same(source.weights, weights) and source.dropped == {"classifier": 2}
    assert source.format == "torchvision" and source.backbone.arch == "resnet50"


def test_other_weights_in_the_file_are_named_and_counted(weights, tmp_path):
    beside = {"state_dict_ema": foreign.other(weights), "teacher": foreign.linear("fc"), "center": torch.rand(3)}
    state = {**foreign.moco_released(weights), **beside, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    source = read(saved(state, tmp_path / "x.pth.tar"))
    assert same(source.weights, weights)
    entries = {"entry state_dict_ema": 318, "entry teacher": 2, "entry center": 1, "entry optimizer": 2}
    assert source.dropped == {"head": 2, **entries}


def test_parameters_that_want_a_gradient_are_read_as_their_values(weights, tmp_path):
    trained = {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in weights.items()}
    source = read(saved(trained, tmp_path / "x.pth"))
    assert same(source.weights, weights) and not any(v.requires_grad for v in source.weights.values())


def test_file_from_before_the_counters_of_batches(weights, tmp_path):
    old = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "resnet50-19c8e357.pth")
    source = read(tmp_path / "resnet50-19c8e357.pth")
    assert source.added == 53 and len(source.weights) == 318
    assert all(torch.equal(source.weights[k], v) for k, v in old.items())


def test_channels_last_weights_are_the_same_values(weights, tmp_path):
    wide = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in weights.items()}
    torch.save(wide, tmp_path / "x.pth")
    source = read(tmp_path / "x.pth")
    assert same(source.weights, weights) and all(v.is_contiguous() for v in source.weights.values())


SETTINGS = {
    "moco": {},
    "simclr": {"dim": 8, "hidden": 8, "temperature": 0.5},
    "byol": {"dim": 8, "hidden": 8, "momentum": 0.9},
    "simsiam": {"dim": 8, "hidden": 8, "predictor_hidden": 4},
}


def run_state(config) -> dict:
    """A finished run's checkpoint."""
    state = {"run": "tiny-x-0a1b2c3d-s0", "config": configs.to_dict(config), "step": 3, "steps": 3}
    return {**state, "model": build_framework(config).state_dict()}


@pytest.mark.parametrize("framework", SETTINGS)
def test_our_checkpoints_of_every_framework(framework, tiny, tmp_path):
    config = dataclasses.replace(tiny(), framework=framework, settings=SETTINGS[framework] or tiny().settings)
    state = run_state(config)
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    source = read(tmp_path / "checkpoint.pt")
    assert source.format == "mixmask" and source.identity == state["run"] and source.recipe == config
    prefix = "encoder.backbone."
    assert same(source.weights, {k[len(prefix) :]: v for k, v in state["model"].items() if k.startswith(prefix)})
    assert source.backbone == configs.Backbone("resnet10", "tiny", 8, 1)
    assert (source.mean, source.std) == ((0.5,) * 3, (0.25,) * 3)
    assert len(source.weights) + sum(source.dropped.values()) == len(state["model"])


def test_load_backbone_gives_the_features_of_the_encoder_that_was_trained(tiny, tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", run_state(tiny("run.channels_last=false")))
    encoder, _, _ = checkpoint.load_encoder(tmp_path / "checkpoint.pt")
    model = load_backbone(tmp_path / "checkpoint.pt")
    images = torch.rand(2, 3, 12, 12)
    assert torch.equal(model(images), encoder.backbone(images)) and model.source.mean == (0.5, 0.5, 0.5)
    assert repr(model) == "resnet10, 64 features, of tiny-x-0a1b2c3d-s0 (mixmask)" and not model.training
    assert all(p.requires_grad for p in model.parameters()) and not model.source.weights
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert same(other.state_dict(), encoder.backbone.state_dict()) and torch.equal(other(images), model(images))
        assert repr(other) == repr(model) and other.source == model.source and isinstance(other, ResNet)


@pytest.mark.parametrize("arch", ["torchvision/mobilenet_v3_small", "timm/test_byobnet"])
def test_a_network_of_others_is_pickled_too(arch, tmp_path):
    pytest.importorskip("timm")
    network = build_backbone(configs.Backbone(arch, "imagenet", 64, 1))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    model = load_backbone(tmp_path / "x.pth", arch=arch, allow_unit_statistics=True)
    other = pickle.loads(pickle.dumps(model))
    assert same(other.state_dict(), network.state_dict()) and isinstance(other, type(network))
    assert repr(other) == repr(model) and not other.training


def test_identity_of_a_file_that_is_not_ours_is_its_name_and_checksum(weights, tmp_path):
    source = read(foreign.write("swav", weights, tmp_path / "swav 800ep.pth.tar"))
    assert source.identity == f"swav_800ep.pth@{source.sha256[:8]}" and len(source.sha256) == 64


# ---------------------------------------------------------------------------------------------- what is refused


def refused(path, *words, **options) -> str:
    """The message, one line, that names the file and has the words."""
    with pytest.raises(FormatError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message, message
    return message


def saved(content, path):
    torch.save(content, path)
    return path


def test_no_backbone_is_refused_with_the_prefixes_that_were_found(weights, tmp_path):
    stem = {k: v for k, v in weights.items() if k.startswith(("conv1", "bn1"))}
    keys = {**foreign.under("model.trunk.", stem), **foreign.linear("neck.0")}
    path = saved({"state_dict": keys}, tmp_path / "x.pth")
    refused(
        path,
        "no backbone that we know",
        "'model.trunk.' (6 keys)",
        "'neck' (2 keys)",
        "'encoder_q.' (moco)",
        "'backbone.' (barlowtwins/byol/simsiam), or one complete ResNet",
    )


def test_no_key_of_a_resnet(tmp_path):
    refused(saved(foreign.linear("fc"), tmp_path / "x.pth"), "no backbone that we know", "'fc' (2 keys)")
    refused(saved({"state_dict": {}}, tmp_path / "x.pth"), "no state dict", "nothing in it")


def test_key_that_no_layout_lists_is_refused_by_name(weights, tmp_path):
    state = foreign.moco(weights)
    state["state_dict"]["module.attention.weight"] = torch.rand(2)
    path = saved(state, tmp_path / "x.pth")
    refused(path, "looks like moco", "1 of its 647 keys", "first: 'attention.weight'")


@pytest.mark.parametrize(
    "lost", ["conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "layer4.2.bn3.num_batches_tracked"]
)
def test_partial_backbone_is_refused_and_names_what_is_missing(lost, weights, tmp_path):
    state = foreign.moco(weights)
    del state["state_dict"][f"module.encoder_q.{lost}"]
    path = saved(state, tmp_path / "x.pth.tar")
    refused(path, "no whole resnet50 under 'encoder_q.': 317 of 318 keys", f"missing 1 ('{lost}')")


def test_stage_that_is_missing_or_one_too_far(weights, tmp_path):
    def moved(name: str) -> str:
        return f"layer{int(name[5]) + 1}{name[6:]}" if name.startswith("layer") else name

    refused(saved({moved(k): v for k, v in weights.items()}, tmp_path / "x.pth"), "missing", "'layer1.0.bn1.bias'")
    short = {k: v for k, v in weights.items() if not k.startswith("layer4")}
    refused(saved(short, tmp_path / "x.pth"), "258 of 318 keys", "'layer4.0.bn1.bias'")


def test_other_depths_and_widths_are_refused(weights, tmp_path):
    deeper = {**weights, **{k.replace("layer3.5", "layer3.6"): v for k, v in weights.items()}}
    refused(saved(deeper, tmp_path / "x.pth"), "318 of 318 keys", "unexpected 18 ('layer3.6.bn1.bias'")
    wide = {**weights, "layer1.0.conv2.weight": torch.rand(8, 8, 3, 3)}
    refused(saved(wide, tmp_path / "x.pth"), "'layer1.0.conv2.weight' is (8, 8, 3, 3)", "expected (4, 4, 3, 3)")
    refused(saved({**weights, "conv1.weight": torch.rand(4, 3, 5, 5)}, tmp_path / "x.pth"), "(4, 3, 5, 5); expected")


def test_half_precision_is_refused(weights, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    refused(saved(half, tmp_path / "x.pth"), "of float16; expected", "--dtype float32 casts")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, weights, tmp_path):
    broken = {k: v.clone() for k, v in weights.items()}
    broken["layer2.0.conv1.weight"][0, 0] = value
    refused(saved(broken, tmp_path / "x.pth"), "1 of the", "'layer2.0.conv1.weight' are not finite")


def test_negative_variance_is_refused(weights, tmp_path):
    broken = {**weights, "bn1.running_var": torch.tensor([1.0, 1.0, -0.5, 1.0])}
    refused(saved(broken, tmp_path / "x.pth"), "'bn1.running_var' has a negative value (-0.5)")


def test_convolution_whose_weights_are_all_zero_is_refused(weights, tmp_path):
    key = "layer2.0.conv1.weight"
    broken = {**weights, key: torch.zeros_like(weights[key])}
    refused(saved(broken, tmp_path / "x.pth"), f"weights of the convolution '{key}' are zero")
    silent = {**weights, "layer2.0.bn3.weight": torch.zeros_like(weights["layer2.0.bn3.weight"])}
    assert same(read(saved(silent, tmp_path / "y.pth")).weights, silent)  # a residual branch may begin at zero


@pytest.mark.parametrize(
    ("change", "word"), [(torch.Tensor.to_sparse, "sparse_coo"), (lambda value: value.to("meta"), "on the meta device")]
)
def test_tensor_without_dense_values_is_refused_by_name(change, word, weights, tmp_path):
    broken = {**weights, "conv1.weight": change(weights["conv1.weight"])}
    refused(saved(broken, tmp_path / "x.pth"), f"'conv1.weight' is {word}; expected a dense tensor")


class Code:
    """Creates a file when unpickled by a loader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_unless_trusted_and_then_it_runs(zipped, weights, tmp_path):
    trap, path = tmp_path / "executed", tmp_path / "x.pth.tar"
    torch.save({**foreign.moco(weights), "x": Code(trap)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "nothing in it was run", "--trust-pickle")
    assert not trap.exists()
    assert same(read(path, trust_pickle=True).weights, weights) and trap.exists()


def test_old_checkpoint_with_a_namespace_is_read_when_trusted(weights, tmp_path):
    state = {**foreign.moco(weights), "args": argparse.Namespace(lr=0.03), "best": np.float64(0.5)}
    path = saved(state, tmp_path / "x.pth.tar")
    refused(path, "argparse.Namespace", "--trust-pickle")
    assert same(read(path, trust_pickle=True).weights, weights)


def test_whole_model_instead_of_its_state_dict(weights, tmp_path):
    path = saved(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    refused(path, "torch.nn.modules.linear.Linear", "--trust-pickle")
    refused(path, "no backbone that we know", "'weight' (1 keys)", trust_pickle=True)
    model = ResNet("resnet50", "imagenet", 4)
    model.load_state_dict(weights)
    assert same(read(saved(model, tmp_path / "y.pth"), trust_pickle=True).weights, weights)


def test_two_state_dicts_are_ambiguous(weights, tmp_path):
    refused(saved({"state_dict": weights, "model": weights}, tmp_path / "x.pth"), "both 'state_dict' and 'model'")


@pytest.mark.parametrize("content", [[1], 3, {"net": {"conv1.weight": 1}}, {"state_dict": {"conv1.weight": 1}}])
def test_no_state_dict(content, tmp_path):
    refused(saved(content, tmp_path / "x.pth"), "expected")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("content", [b"", bytes(4096), random.Random(0).randbytes(4096), b"text\n", b"root:x:0:0"])
def test_file_that_is_no_checkpoint(content, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    refused(path, "cut off or damaged")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "older", "safetensors", "pkl"])
def test_file_that_is_cut_off(kind, share, weights, tmp_path):
    path = tmp_path / {"safetensors": "x.safetensors", "pkl": "x.pkl"}.get(kind, "x.pth")
    if kind == "safetensors":
        foreign.write_safetensors(weights, path)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in weights.items()}}))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, "cut off or damaged")


def test_flipped_bit_is_noticed(weights, tmp_path):
    path = foreign.write("torchvision", weights, tmp_path / "x.pth")
    content = bytearray(path.read_bytes())
    content[bytes(content).index(weights["layer3.0.conv2.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    refused(path, "damaged: the checksum of")


def test_directory_and_absent_file(tmp_path):
    assert "checkpoint.pt" not in refused(tmp_path, "is a directory; expected a file")
    (tmp_path / "checkpoint.pt").touch()
    refused(tmp_path, "is a directory", f"{tmp_path / 'checkpoint.pt'}?")
    refused(tmp_path / "none.pth", "no such file")


def test_our_checkpoint_that_lacks_a_key_is_not_taken_for_whole(tiny, tmp_path):
    state = run_state(tiny())
    del state["model"]["queue"], state["model"]["encoder.backbone.bn1.bias"]
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    refused(tmp_path / "checkpoint.pt", "lacks 2 ('encoder.backbone.bn1.bias', 'queue') for a run of moco")


def test_checkpoint_of_another_stage_or_of_a_later_format(tiny, tiny_linear, tmp_path):
    checkpoint.save(tmp_path / "x.pt", {"run": "r", "config": configs.to_dict(tiny_linear()), "epoch": 1})
    with pytest.raises(CheckpointError, match="not a pre-training checkpoint"):
        read(tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "is a checkpoint of a linear run")
    detection = configs.load(ROOT / "detection" / "configs" / "voc.yaml", {}, configs.Detection)
    checkpoint.save(tmp_path / "y.pt", {"run": "r", "config": configs.to_dict(detection), "step": 1, "model": {}})
    refused(tmp_path / "y.pt", "is not a pre-training checkpoint: it is a checkpoint of a detection run")
    checkpoint.save(tmp_path / "y.pt", {"run": "r", "config": {"recipe": "nobody's"}})
    with pytest.raises(CheckpointError, match="not a pre-training checkpoint"):
        read(tmp_path / "y.pt")
    checkpoint.save(tmp_path / "x.pt", {**run_state(tiny()), "format": 99})
    refused(tmp_path / "x.pt", "format 99")


# -------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, b"12345"),  # bytes of no tensor
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}, b"12345678"),  # longer than its shape
        ({"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}, b"12345"),  # a gap
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, b"1234"),  # beyond the end
        ({"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}, b"1234"),
        ({"dtype": "F32", "shape": [1]}, b"1234"),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, b"1234"),
        ([], b""),
    ],
)
def test_safetensors_whose_tensors_do_not_fill_the_file(entry, data, tmp_path):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    refused(tmp_path / "x.safetensors", "cut off or damaged, or no safetensors file")


# --------------------------------------------------------------------------------------------------- Detectron2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer3.5.bn2.num_batches_tracked", "res4.5.conv2.norm.num_batches_tracked"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer2.0.downsample.1.running_var", "res3.0.shortcut.norm.running_var"),
    ],
)
def test_names_of_detectron2(name, expected):
    assert detectron2_name(name) == expected


def pkl(weights, path, **entries):
    content = {"model": {detectron2_name(k): v.numpy() for k, v in weights.items()}, **entries}
    path.write_bytes(pickle.dumps(content))
    return path


def test_detectron2_file_is_read_with_author_and_heuristics(weights, tmp_path):
    file = read_detectron2(pkl(weights, tmp_path / "x.pkl", __author__="MOCO", matching_heuristics=True))
    assert same(file.weights, {detectron2_name(k): v for k, v in weights.items()})
    assert (file.author, file.matching_heuristics) == ("MOCO", True)
    assert read_detectron2(pkl(weights, tmp_path / "y.pkl"))[1:] == (None, False)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_numpy_1_and_of_every_pickle_protocol(protocol, tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = pickle.dumps({"model": {"x": array}}, protocol)
    for core in (b"numpy._core", b"numpy.core"):
        if protocol < 4:  # the names stand there as text
            content = content.replace(b"numpy._core", core)
        (tmp_path / "x.pkl").write_bytes(content)
        assert torch.equal(read_detectron2(tmp_path / "x.pkl").weights["x"], torch.from_numpy(array))


def test_pickle_that_runs_code_is_refused_unrun(tmp_path):
    trap = tmp_path / "executed"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for content in (Code(trap), {"model": {"x": np.array([Code(trap)], dtype=object)}}):
            (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
            refused(tmp_path / "x.pkl", "pickled objects besides arrays", "open", "not run")
    assert not trap.exists()


def test_detectron2_files_with_the_classic_mistakes_are_refused(weights, tmp_path):
    """Each file loads in part or not at all, and Detectron2 trains on."""
    names = {k: detectron2_name(k) for k in weights}
    mistakes = {
        "raw torchvision names": {k: k for k in weights},
        "module. left": {k: f"module.{v}" for k, v in names.items()},
        "layer1 -> res1": {k: v.replace("res", "res1") for k, v in names.items()},
        "bnN left": {k: v.replace("conv1.norm", "bn1") for k, v in names.items()},
        "downsample left": {k: v.replace("shortcut.norm", "downsample.1") for k, v in names.items()},
        "stem.bn1": {k: v.replace("stem.conv1.norm", "stem.bn1") for k, v in names.items()},
        "another head left": {**names, "fc.0.weight": "head.0.weight"},
    }
    for mistake, renamed in mistakes.items():
        content = {"model": {new: weights.get(old, torch.ones(1)).numpy() for old, new in renamed.items()}}
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
        assert "no ResNet-50 of Detectron2" in refused(tmp_path / "x.pkl"), mistake
    del content["model"]["head.0.weight"], content["model"]["stem.conv1.weight"]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    refused(tmp_path / "x.pkl", "317 of 318 keys; missing 1 ('conv1.weight')")


@pytest.mark.parametrize(
    "content", [[1], {"model": {}}, {"weights": {}}, {"model": {"x": 1}}, {"model": {"x": np.array("a")}}]
)
def test_pickle_that_is_no_detectron2_file(content, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(FormatError, match=r"no Detectron2 file|no array of numbers"):
        read_detectron2(tmp_path / "x.pkl")


@pytest.mark.parametrize("stage", ["linear", "finetune", "detection", "convert", "knn"])
def test_recorded_stage_is_believed_before_what_the_config_looks_like(stage, tiny, tmp_path):
    checkpoint.save(tmp_path / "x.pt", {**run_state(tiny()), "stage": stage})
    refused(tmp_path / "x.pt", f"it is a checkpoint of a {stage} run")
    checkpoint.save(tmp_path / "y.pt", {**run_state(tiny()), "stage": "pretrain"})
    assert read(tmp_path / "y.pt").format == "mixmask"


def test_list_of_digests_that_somebody_else_wrote_is_not_taken_for_ours(weights, tmp_path):
    path = saved(weights, tmp_path / "x.pth")
    (tmp_path / "x.sha256").write_text(f"{'0' * 64}  another.safetensors\n")
    assert same(read(path).weights, weights)
