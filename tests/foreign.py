"""Files as other code writes them: the key names of each public format around a backbone's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mixmask.backbones import ResNet

Weights = dict[str, Tensor]


def backbone(arch: str = "resnet50", stem: str = "imagenet", width: int = 4) -> Weights:
    """A ResNet's state dict, no two tensors alike, with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    weights = ResNet(arch, stem, width).state_dict()
    for name, value in weights.items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif value.ndim == 1:
            value.add_(torch.rand_like(value) * 0.1)
    return weights


def under(prefix: str, tensors: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def linear(name: str, features: int = 3) -> Weights:
    return {f"{name}.weight": torch.rand(2, features), f"{name}.bias": torch.rand(2)}


def norm(name: str) -> Weights:
    return {
        f"{name}.running_mean": torch.rand(2),
        f"{name}.running_var": torch.rand(2),
        f"{name}.num_batches_tracked": torch.tensor(1),
    }


def other(tensors: Weights) -> Weights:
    """A network of the same names and other values: the momentum encoder, the target network."""
    return {name: value + 1 for name, value in tensors.items()}


def numbered(weights: Weights) -> Weights:
    """The names inside Un-Mix's nn.Sequential (unmix_c100.py): conv1, bn1, ReLU, four stages; no max pooling."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}
    return {f"{numbers[k.split('.')[0]]}.{k.partition('.')[2]}": v for k, v in weights.items()}


def moco(weights: Weights) -> dict:
    """MoCo V1/V2 and MixMask: facebookresearch/moco, kirill-vish/MixMask."""
    encoder = {**weights, **linear("fc.0"), **linear("fc.2")}
    keys = {**under("encoder_q.", encoder), **under("encoder_k.", other(encoder)), "queue": torch.rand(2, 4)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": under("module.", {**keys, "queue_ptr": torch.zeros(1)})}


def moco_released(weights: Weights) -> dict:
    """The files that MoCo's authors published: the query encoder alone."""
    return {"epoch": 200, "arch": "resnet50", "state_dict": under("module.encoder_q.", {**weights, **linear("fc")})}


def moco_v3(weights: Weights) -> dict:
    encoder = {**weights, **linear("fc.0"), **norm("fc.1")}
    keys = {**under("base_encoder.", encoder), **under("momentum_encoder.", other(encoder)), **linear("predictor.0")}
    return {"state_dict": under("module.", keys)}


def unmix(weights: Weights) -> dict:
    """szq0214/Un-Mix, unmix_c10.py and unmix_c100.py."""
    net = under("net.", {**numbered(weights), **linear("9")})
    keys = {**under("encoder_q.", net), **under("encoder_k.", other(net)), "queue": torch.rand(2, 4)}
    return {"epoch": 1000, "state_dict": {**keys, "queue_ptr": torch.zeros(1)}, "optimizer": {"state": {}}}


def simsiam(weights: Weights) -> dict:
    """facebookresearch/simsiam."""
    encoder = {**weights, **linear("fc.0"), **norm("fc.1"), **linear("fc.6")}
    return {"state_dict": under("module.", {**under("encoder.", encoder), **linear("predictor.0")})}


def simsiam_sequence(weights: Weights) -> dict:
    """PatrickHua/SimSiam: backbone and projector once more, as a sequence."""
    copy = {**under("encoder.0.", weights), **linear("encoder.1.layer1.0")}
    return {
        "state_dict": {**under("backbone.", weights), **linear("projector.layer1.0"), **copy, **linear("predictor.0")}
    }


def byol(weights: Weights) -> dict:
    encoder = {**weights, **linear("fc.0")}
    keys = {**under("online_encoder.", encoder), **under("target_encoder.", other(encoder)), **linear("predictor.0")}
    return {"state_dict": keys}


def byol_wrapped(weights: Weights) -> dict:
    """lucidrains/byol-pytorch."""
    online = {**under("net.", {**weights, **linear("fc")}), **linear("projector.0")}
    keys = {
        **under("online_encoder.", online),
        **under("target_encoder.", other(online)),
        **linear("online_predictor.0"),
    }
    return {**under("net.", {**weights, **linear("fc")}), **keys}


def byol_sequence(weights: Weights) -> dict:
    """PatrickHua/SimSiam's BYOL."""
    copy = {**under("0.", weights), **linear("1.layer1.0")}
    keys = {
        **under("online_encoder.", copy),
        **under("target_encoder.", other(copy)),
        **linear("online_predictor.layer2"),
    }
    return {"state_dict": {**under("backbone.", weights), **linear("projector.layer1.0"), **keys}}


def swav(weights: Weights) -> dict:
    """The published files of facebookresearch/swav: one flat dictionary."""
    head = {**linear("projection_head.0"), **norm("projection_head.1"), "prototypes.weight": torch.rand(5, 2)}
    return under("module.", {**weights, **head})


def swav_training(weights: Weights) -> dict:
    """Its training checkpoints."""
    return {"epoch": 400, "state_dict": swav(weights), "optimizer": {"state": {}}, "amp": {"scale": 1.0}}


def barlowtwins(weights: Weights) -> dict:
    """The full checkpoint of facebookresearch/barlowtwins."""
    keys = {**under("backbone.", weights), **linear("projector.0"), **norm("bn")}
    return {"epoch": 1000, "model": under("module.", keys), "optimizer": {"state": {}}}


def plain(weights: Weights) -> dict:
    """Barlow Twins' and VICReg's resnet50.pth."""
    return dict(weights)


def torchvision(weights: Weights) -> dict:
    return {**weights, **linear("fc")}


def in_sequence(weights: Weights, first_stage: int) -> Weights:
    """The names inside nn.Sequential(*resnet.children()), where stage 1 is child 4, or 3 without max pooling."""
    numbers = {"conv1": 0, "bn1": 1, **{f"layer{i + 1}": first_stage + i for i in range(4)}}
    return {f"{numbers[k.split('.')[0]]}.{k.partition('.')[2]}": v for k, v in weights.items()}


def sololearn(weights: Weights) -> dict:
    """vturrisi/solo-learn's SimCLR, a Lightning checkpoint with the classifier that is trained beside it."""
    keys = {**under("backbone.", weights), **linear("projector.0"), **norm("projector.1"), **linear("classifier")}
    return {"state_dict": keys, "epoch": 3, "pytorch-lightning_version": "2.0.2", "hyper_parameters": {"lr": 0.1}}


def sololearn_momentum(weights: Weights) -> dict:
    """Its BYOL and MoCo V2+."""
    momentum = {**under("momentum_backbone.", other(weights)), **linear("momentum_projector.0")}
    return {"state_dict": {**sololearn(weights)["state_dict"], **linear("predictor.0"), **momentum}}


def dino(weights: Weights) -> dict:
    """facebookresearch/dino's full checkpoint of a ResNet-50, without its `args`."""
    teacher = {**under("backbone.", other(weights)), **linear("head.mlp.0")}
    student = under("module.", {**under("backbone.", weights), **linear("head.mlp.0")})
    optimizer = {"state": {0: {"exp_avg": torch.rand(4, 3, 7, 7)}}, "param_groups": []}
    loss = {"center": torch.rand(1, 4)}
    return {"student": student, "teacher": teacher, "optimizer": optimizer, "epoch": 5, "dino_loss": loss}


def densecl(weights: Weights) -> dict:
    """WXinlong/DenseCL, on OpenSelfSup: the query encoder's network once more, as `backbone`."""
    encoder = {**under("0.", weights), **linear("1.mlp.0"), **linear("1.mlp2.0")}
    keys = {**under("encoder_q.", encoder), **under("encoder_k.", other(encoder)), **under("backbone.", weights)}
    return {"meta": {"epoch": 200}, "state_dict": {**keys, "queue": torch.rand(2, 4), "queue2": torch.rand(2, 4)}}


def mmselfsup(weights: Weights) -> dict:
    """open-mmlab/mmselfsup's SimCLR."""
    keys = {
        **under("backbone.", weights),
        **linear("neck.fc0"),
        **linear("head.fc"),
        "data_preprocessor.mean": torch.rand(3),
    }
    return {"meta": {"epoch": 200}, "state_dict": keys, "message_hub": {"log_scalars": {}}}


def mmselfsup_byol(weights: Weights) -> dict:
    target = {**under("module.0.", other(weights)), **linear("module.1.fc0"), "steps": torch.tensor(3)}
    return {"state_dict": {**under("backbone.", weights), **linear("neck.fc0"), **under("target_net.", target)}}


def bolts(weights: Weights) -> dict:
    """Lightning Bolts' SimCLR."""
    return {"state_dict": {**under("encoder.", {**weights, **linear("fc")}), **linear("projection.model.0")}}


def lightly(weights: Weights) -> dict:
    return {"state_dict": {**under("backbone.", in_sequence(weights, 4)), **linear("projection_head.layers.0")}}


def vissl(weights: Weights) -> dict:
    model = {"trunk": under("_feature_blocks.", weights), "heads": linear("0.clf.0")}
    return {"iteration": 3, "classy_state_dict": {"base_model": {"model": model, "meta": {}}, "hooks": {}}}


def supcon(weights: Weights) -> dict:
    """HobbitLong/SupContrast: kuangliu's ResNet, whose shortcuts have another name."""
    keys = {k.replace(".downsample.", ".shortcut."): v for k, v in weights.items()}
    return {"opt": {}, "model": {**under("encoder.module.", keys), **linear("head.0")}, "epoch": 1000}


def deepspeed(weights: Weights) -> dict:
    return {"module": under("module.", weights), "optimizer": None, "lr_scheduler": {"step": 1}}


def by_hand(weights: Weights) -> dict:
    return {"model_state_dict": weights, "optimizer_state_dict": {"state": {}}, "epoch": 3, "loss": torch.tensor(1.0)}


def averaged(weights: Weights) -> dict:
    """torch.optim.swa_utils.AveragedModel."""
    return {"n_averaged": torch.tensor(3), **under("module.", weights)}


ONE: dict[str, Callable[[Weights], dict]] = {  # files with one backbone, which no layout lists
    "solo-learn": sololearn,
    "mmselfsup": mmselfsup,
    "Lightning Bolts": bolts,
    "lightly": lightly,
    "VISSL": vissl,
    "SupContrast": supcon,
    "DeepSpeed": deepspeed,
    "by hand": by_hand,
    "averaged": averaged,
}
SEVERAL: dict[str, tuple[Callable[[Weights], dict], str, str]] = {  # with two: the first's name, and the other's
    "solo-learn": (sololearn_momentum, "backbone", "momentum_backbone"),
    "DINO": (dino, "student", "teacher"),
    "DenseCL": (densecl, "encoder_q.0", "encoder_k"),
    "mmselfsup": (mmselfsup_byol, "backbone", "target_net"),
    "EMA": (lambda w: {**under("online_model.", w), **under("ema_model.", other(w))}, "online_model", "ema_model"),
    "two state dicts": (lambda w: {"state_dict": w, "model": other(w)}, "state_dict", "model"),
    "EMA by hand": (lambda w: {"model_state_dict": w, "ema": other(w)}, "model_state_dict", "ema"),
}

TORCH: dict[str, tuple[Callable[[Weights], dict], str, dict[str, int]]] = {  # writer, format, what is dropped
    "moco": (moco, "moco", {"head": 4, "momentum encoder": 322, "queue": 2}),
    "moco released": (moco_released, "moco", {"head": 2}),
    "moco v3": (moco_v3, "moco-v3", {"head": 5, "momentum encoder": 323, "predictor": 2}),
    "simsiam": (simsiam, "simsiam", {"head": 7, "predictor": 2}),
    "simsiam sequence": (simsiam_sequence, "simsiam", {"head": 2, "copy of backbone and head": 320, "predictor": 2}),
    "byol": (byol, "byol", {"head": 2, "target network": 320, "predictor": 2}),
    "byol wrapped": (
        byol_wrapped,
        "byol",
        {"classifier": 2, "head": 2, "target network": 322, "predictor": 2, "copy of the backbone": 320},
    ),
    "byol sequence": (
        byol_sequence,
        "byol",
        {"head": 2, "target network": 320, "predictor": 2, "copy of backbone and head": 320},
    ),
    "swav": (swav, "swav", {"head": 5, "prototypes": 1}),
    "swav training": (swav_training, "swav", {"head": 5, "prototypes": 1, "entry optimizer": 1, "entry amp": 1}),
    "barlow twins": (
        barlowtwins,
        "barlowtwins",
        {"head": 2, "normalisation of the loss": 3, "entry optimizer": 1},
    ),
    "barlow twins resnet50.pth": (plain, "torchvision", {}),
    "torchvision": (torchvision, "torchvision", {"classifier": 2}),
    "unmix": (unmix, "unmix", {"head": 2, "momentum encoder": 320, "queue": 2, "entry optimizer": 1}),
}


def write(name: str, weights: Weights, path: Path) -> Path:
    """The file of the format TORCH[name]."""
    torch.save(TORCH[name][0](weights), path)
    return path


def write_safetensors(tensors: Weights, path: Path) -> Path:
    """Written independently of the project's writer: numpy's bytes, the names in reverse order."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, value in reversed(tensors.items()):
        raw = value.numpy().tobytes()
        dtype = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}[value.dtype]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)
    return path


def write_timm(weights: Weights, path: Path) -> Path:
    """timm's model.safetensors: torchvision's names, with the classifier."""
    return write_safetensors({**weights, **linear("fc")}, path)
