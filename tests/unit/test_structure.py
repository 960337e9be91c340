"""Backbones that are found by structure, one of several by name, and good files of unusual kinds."""

import collections
import itertools
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixmask.backbones import ResNet
from mixmask.config.resnets import ARCHITECTURES
from mixmask.formats import FormatError, detectron2_name, read
from tests import foreign
from tests.unit.test_formats import refused, same, saved


@pytest.fixture(scope="module")
def weights():
    return foreign.backbone()


# ---------------------------------------------------------------------------------------------- exactly one backbone

WORDS = ("model.", "student.", "teacher.", "_orig_mod.", "module.module.", "encoder.module.", "network.")


@pytest.mark.parametrize("words", [*WORDS, *map("".join, itertools.permutations(WORDS[:6], 2))])
def test_backbone_under_any_prefix_and_product_of_prefixes(words, weights, tmp_path):
    path = saved({"state_dict": foreign.under(words, {**weights, **foreign.linear("fc")})}, tmp_path / "x.pth")
    source = read(path)
    assert same(source.weights, weights) and source.dropped == {"classifier": 2}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", foreign.ONE)
def test_file_with_one_backbone_is_read_whatever_stands_around_it(name, arch, tmp_path):
    weights = foreign.backbone(arch)
    source = read(saved(foreign.ONE[name](weights), tmp_path / "x.ckpt"))
    assert same(source.weights, weights) and source.backbone.arch == arch and source.taken == ""


def test_what_is_dropped_is_named_and_counted(weights, tmp_path):
    source = read(saved(foreign.sololearn(weights), tmp_path / "x.ckpt"))
    assert source.dropped == {"projector": 5, "classifier": 2, "entry hyper_parameters": 1}
    assert source.format == "unlisted" and source.identity == f"x@{source.sha256[:8]}"


@pytest.mark.parametrize("inside", ["layer1.", "layer1.0.", "layer3.2.conv2."])
@pytest.mark.parametrize("word", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._fpw_module."])
def test_wrappers_inside_the_network(word, inside, weights, tmp_path):
    keys = {k.replace(inside, f"{inside}{word}"): v for k, v in weights.items()}
    assert same(read(saved(keys, tmp_path / "x.pth")).weights, weights)


def test_children_of_a_sequence_with_and_without_max_pooling(weights, tmp_path):
    small = foreign.backbone(stem="cifar")
    source = read(
        saved({**foreign.under("f.", foreign.in_sequence(small, 3)), **foreign.linear("g.0")}, tmp_path / "x")
    )
    assert same(source.weights, small) and source.backbone.stem == "cifar" and source.dropped == {"g": 2}
    path = saved(foreign.under("f.", foreign.in_sequence(weights, 3)), tmp_path / "y.pth")
    refused(path, "no max pooling after its 7 x 7 stem")


@pytest.mark.parametrize(
    "nested", [["state_dict", "state_dict"], ["state_dict", "model"], ["checkpoint", "net", "weights"]]
)
def test_state_dict_inside_others(nested, weights, tmp_path):
    content = dict(weights)
    for name in reversed(nested):
        content = {name: content, "epoch": 3}
    assert same(read(saved(content, tmp_path / "x.pth")).weights, weights)


def test_plain_values_among_the_tensors(weights, tmp_path):
    source = read(saved({**weights, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "x.pth"))
    assert same(source.weights, weights) and source.dropped == {"entry optimizer": 1}


@pytest.mark.parametrize(
    "extra", ["attention.weight", "conv2.weight", "attnpool.q_proj.weight", "maxpool.1.filt", "mask"]
)
@pytest.mark.parametrize("prefix", ["", "visual."])
def test_what_may_belong_to_the_network_is_not_dropped_in_silence(prefix, extra, weights, tmp_path):
    content = foreign.under(prefix, {**weights, extra: torch.rand(2)}) | foreign.linear("text.0")
    name = prefix.removesuffix(".") or "."
    if not prefix:
        content = {k: v for k, v in content.items() if not k.startswith("text")}
    path = saved(content, tmp_path / "x.pth")
    refused(path, f"'{prefix}{extra}'", f"to leave them out: --take {name}")
    assert same(read(path, take=name).weights, weights)


# --------------------------------------------------------------------------------------------------- one of several


@pytest.mark.parametrize("name", foreign.SEVERAL)
def test_one_of_several_backbones_is_taken_by_name_and_never_guessed(name, weights, tmp_path):
    writer, first, second = foreign.SEVERAL[name]
    path = saved(writer(weights), tmp_path / "x.pth")
    refused(path, "--take NAME")
    one, two = read(path, take=first), read(path, take=f"{second}.")
    assert same(one.weights, weights) and same(two.weights, foreign.other(weights))
    assert one.taken.startswith(first) and two.taken.startswith(second)
    assert len({one.identity, two.identity}) == 2 and one.sha256 == two.sha256
    refused(path, "--take nobody is none of" if name != "two state dicts" else "--take NAME", take="nobody")


def test_listing_names_all_and_copies_together(weights, tmp_path):
    path = saved(foreign.densecl(weights), tmp_path / "x.pth")
    refused(path, "holds 2 backbones: 'encoder_q.0' = 'backbone', 'encoder_k.0'; choose one with --take NAME")
    assert same(read(path, take="backbone").weights, weights)


def test_incomplete_student_does_not_make_the_teacher_the_one(weights, tmp_path):
    student = {k: v for k, v in weights.items() if k != "conv1.weight"}
    path = saved({**foreign.under("student.", student), **foreign.under("teacher.", weights)}, tmp_path / "x.pth")
    refused(path, "'teacher', 'student' (317 of 318 keys of a resnet50)")
    assert same(read(path, take="teacher").weights, weights)


def test_other_encoder_of_a_known_layout_and_what_stands_beside_the_network(weights, tmp_path):
    path = saved({**foreign.moco(weights), "state_dict_ema": foreign.other(weights)}, tmp_path / "x.pth")
    assert read(path, take="encoder_q").dropped == read(path).dropped
    assert read(path, take="encoder_q").format == "moco" and read(path, take="encoder_k").format == "unlisted"
    for name in ("encoder_k", "module.encoder_k", "state_dict_ema"):
        assert same(read(path, take=name).weights, foreign.other(weights)), name
    path = saved({"state_dict": foreign.linear("fc"), "ema": weights}, tmp_path / "y.pth")
    refused(path, "no backbone that we know", "beside it is 'ema', which --take NAME reads")


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_is_cast_where_asked_for_and_counted(dtype, weights, tmp_path):
    path = saved({k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "x.pth")
    refused(path, "--dtype float32 casts")
    source = read(path, dtype="float32")
    assert same(source.weights, {k: v.to(dtype).to(v.dtype) for k, v in weights.items()})
    assert source.cast == {str(dtype).removeprefix("torch."): 265}


def test_counters_of_another_type_are_cast_where_they_are_whole(weights, tmp_path):
    for dtype in (torch.float32, torch.int32):
        path = saved(
            {k: v.to(dtype) if not v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "x.pth"
        )
        refused(path, "--dtype float32 casts")
        assert same(read(path, dtype="float32").weights, weights)
    refused(saved({**weights, "bn1.num_batches_tracked": torch.tensor(1.5)}, path), "of float32", dtype="float32")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_types_that_are_no_weights_are_refused(dtype, weights, tmp_path):
    path = saved({**weights, "conv1.weight": weights["conv1.weight"].to(dtype)}, tmp_path / "x.pth")
    assert "--dtype" not in refused(path, "'conv1.weight' is (4, 3, 7, 7) of", dtype="float32")


def test_value_that_float32_does_not_hold(weights, tmp_path):
    path = saved({**weights, "bn1.bias": torch.full((4,), 1e300, dtype=torch.float64)}, tmp_path / "x.pth")
    refused(path, "'bn1.bias' are not finite", dtype="float32")


# -------------------------------------------------------------------------------------------- statistics of BatchNorm


def caffe(weights, layers="", variance=1.0):
    """BatchNorm's statistics folded into weight and bias."""
    mean = {k: torch.zeros_like(v) for k, v in weights.items() if k.endswith("running_mean") and layers in k}
    var = {k: torch.full_like(v, variance) for k, v in weights.items() if k.endswith("running_var") and layers in k}
    return {**weights, **mean, **var}


@pytest.mark.parametrize(("layers", "variance", "count"), [("", 1, 53), ("", 1 - 1e-5, 53), ("layer1.", 1, 10)])
def test_caffes_form_is_refused_unless_somebody_knows_better(layers, variance, count, weights, tmp_path):
    content = caffe(weights, layers, variance)
    path = saved({"state_dict": content}, tmp_path / "x.pth")
    refused(path, f"{count} of 53 BatchNorms", "Caffe's form", "--allow-unit-statistics")
    assert same(read(path, allow_unit_statistics=True).weights, content)
    (tmp_path / "x.pkl").write_bytes(
        pickle.dumps({"model": {detectron2_name(k): v.numpy() for k, v in content.items()}})
    )
    refused(tmp_path / "x.pkl", f"{count} of 53 BatchNorms", "--allow-unit-statistics")


def test_network_before_training_is_refused(tmp_path):
    refused(saved(ResNet("resnet18", "cifar", 4).state_dict(), tmp_path / "x.pth"), "20 of 20", "never trained")


@pytest.mark.parametrize("nested", [False, True])
def test_caffe2s_own_pickle_is_named(nested, tmp_path):
    blobs = {"conv1_w": np.ones((4, 3, 7, 7)), "res2_0_branch2a_w": np.ones(4), "res2_0_branch2a_bn_s": np.ones(4)}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": blobs} if nested else blobs, protocol=2))
    refused(tmp_path / "R-50.pkl", "in Caffe2's form", "BGR")


# -------------------------------------------------------------------------------------------------------- kinds of file


def test_pkl_of_mocos_script_has_its_head_dropped_by_name(weights, tmp_path):
    model = {detectron2_name(k): v.numpy() for k, v in weights.items()}
    head = {f"stem.{k}": v.numpy() for k, v in {**foreign.linear("fc.0"), **foreign.linear("fc.2")}.items()}
    content = {"model": {**model, **head}, "__author__": "MOCO", "matching_heuristics": True}
    for name in ("moco.pkl", "moco.pth"):  # whatever it is called
        (tmp_path / name).write_bytes(pickle.dumps(content))
        source = read(tmp_path / name)
        assert same(source.weights, weights) and source.dropped == {"head": 4} and source.format == "detectron2"


def test_detectron2s_own_checkpoint_and_arrays_of_another_byte_order(weights, tmp_path):
    names = {detectron2_name(k): v for k, v in weights.items()}
    content = {"model": {**foreign.under("backbone.bottom_up.", names), **foreign.linear("proposal_generator.conv")}}
    assert same(read(saved(content, tmp_path / "model_final.pth")).weights, weights)
    swapped = {k: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for k, v in names.items()}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": swapped}))
    assert same(read(tmp_path / "x.pkl").weights, weights)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_later_protocols_of_pickle(protocol, zipped, weights, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": weights}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    if protocol > 3:
        refused(path, f"pickle's protocol {protocol}", "--trust-pickle")
    assert same(read(path, trust_pickle=protocol > 3).weights, weights)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_named_and_read_when_trusted(weights, tmp_path):
    model = ResNet("resnet50", "imagenet", 4).eval()
    model.load_state_dict(weights)
    torch.jit.trace(model, torch.rand(1, 3, 32, 32)).save(tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "TorchScript archive", "--trust-pickle")
    assert same(read(tmp_path / "x.pt", trust_pickle=True).weights, weights)


def test_safetensors_with_tensors_of_other_types_and_any_name(weights, tmp_path):
    head = {"fc.mask": torch.zeros(3, dtype=torch.bool), "fc.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}
    for name in ("x.safetensors", "x.pth", "x.pkl", "x"):
        save_file({**weights, **head}, tmp_path / name)
        source = read(tmp_path / name)
        assert same(source.weights, weights) and source.dropped == {"classifier": 2}


@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.safetensors", "x.ckpt", "x"])
@pytest.mark.parametrize("zipped", [True, False])
def test_file_of_torch_save_by_any_name(zipped, name, weights, tmp_path):
    torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(read(tmp_path / name).weights, weights)


def test_arrays_in_place_of_tensors_and_tensors_in_a_plain_pickle(weights, tmp_path):
    arrays = {k: v.numpy() for k, v in weights.items()}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"state_dict": arrays}))
    assert same(read(tmp_path / "x.pkl").weights, weights)
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(collections.OrderedDict(weights)))
    for path in (saved(arrays, tmp_path / "x.pth"), tmp_path / "y.pkl"):
        refused(path, "--trust-pickle")
        assert same(read(path, trust_pickle=True).weights, weights)


class Elsewhere:
    """Stands for a class of a package that is not installed here."""

    def __init__(self):
        self.settings = {"lr": 0.1}


def test_trusted_file_is_read_without_the_packages_of_its_settings(weights, tmp_path, monkeypatch):
    path = saved({**foreign.sololearn(weights), "hyper_parameters": [Elsewhere(), Elsewhere]}, tmp_path / "x.ckpt")
    monkeypatch.delattr(f"{__name__}.Elsewhere")
    refused(path, "Elsewhere", "--trust-pickle")
    assert same(read(path, trust_pickle=True).weights, weights)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Too many requests</html>", "download"),
        (b"\x1f\x8b\x08" + bytes(100), "unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "Keras"),
        (b"PK\x05\x06" + bytes(18), "zip archive without a checkpoint"),
    ],
)
def test_file_that_people_take_for_a_checkpoint(content, word, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", word)


def test_zip_archive_of_something_else(tmp_path):
    with open(tmp_path / "x.pth", "wb") as file:
        np.savez(file, a=np.zeros(3))
    refused(tmp_path / "x.pth", "zip archive without a checkpoint of PyTorch")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.pkl"])
def test_large_file_is_refused_by_its_beginning(name, tmp_path, monkeypatch):
    """4 GB that are not on the disk: reading them whole takes seconds, and that much memory."""
    with open(tmp_path / name, "wb") as file:
        file.write((100).to_bytes(8, "little") + b"{" + b" " * 99)
        file.truncate(4 << 30)
    refused(tmp_path / name, "cut off or damaged")


def test_file_that_cannot_be_opened(weights, tmp_path, monkeypatch):
    refused(tmp_path / f"{'x' * 300}.pth", "File name too long")
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth", "a device or a pipe")
    path = saved(weights, tmp_path / "x.pth")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads all
        monkeypatch.setattr("builtins.open", denied)
    refused(path, "cannot read", "Permission denied")


def denied(*_: object, **__: object):
    raise PermissionError(13, "Permission denied")


def test_tensors_that_share_memory_come_with_memory_of_their_own(weights, tmp_path):
    buffer = torch.cat([v.flatten().float() for v in weights.values()])
    views = dict(zip(weights, buffer.split([v.numel() for v in weights.values()]), strict=True))
    shared = {k: views[k].view(v.shape) if v.is_floating_point() else v for k, v in weights.items()}
    source = read(saved(shared, tmp_path / "x.pth"))
    assert same(source.weights, weights)
    assert all(v.untyped_storage().nbytes() == v.numel() * v.itemsize for v in source.weights.values())


def test_backbone_error_is_a_format_error():
    with pytest.raises(FormatError, match="no such file"):
        read("nobody.pth")
