"""Third-party backbones: timm's and torchvision's by name, or what a function of yours returns.

They and the names of their tensors stay as they are, with three exceptions: the last linear layer (the classifier) is
removed; every BatchNorm keeps the groups of the batch apart; a ResNet may get a stem for small images.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Iterable
from importlib import import_module

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from mixmask.batchnorm import SplitBatchNorm2d
from mixmask.config import Backbone, ConfigError

SIZES = (224, 64, 32, 96, 28, 128, 384, 512)  # pixels: image sizes tried when none is given
IMAGES = 2  # in a batch that is tried


def build_network(backbone: Backbone, key: str = "backbone.bn_groups") -> nn.Module:
    """The network that `backbone.arch` names, with fresh weights: images (N, 3, H, W) -> features (N, D).

    `key`: the recipe's key of the BatchNorm groups. Raises ConfigError for an unknown name, a missing library, and a
    stem or groups that the network cannot have.
    """
    library, slash, name = backbone.arch.partition("/")
    make = {"timm": _timm, "torchvision": _torchvision}[library] if slash else _yours
    network = make(name if slash else backbone.arch)
    if backbone.stem != "imagenet":
        _small_stem(network, backbone)
    split_batch_norms(network, backbone.bn_groups)
    check_groups(network, backbone.bn_groups, key, backbone.arch)
    return network


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ConfigError(f"backbone.arch: timm/{name} needs timm, which is not installed; pip install timm") from None
    if "." in name:
        weights = f"timm/{name} names weights, which are not loaded here; expected timm/{name.partition('.')[0]}"
        raise ConfigError(f"backbone.arch: {weights}")
    _check_name("timm", name, timm.list_models())
    return timm.create_model(name, pretrained=False, num_classes=0)


def _torchvision(name: str) -> nn.Module:
    _check_name("torchvision", name, torchvision.models.list_models(module=torchvision.models))
    network = torchvision.models.get_model(name, weights=None)
    _drop_classifier(network, name)
    return network


def _check_name(library: str, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError for a name that the library does not have."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {library}/{close[0]}?" if close else f"{library}.{_LISTS[library]} lists all"
        raise ConfigError(f"backbone.arch: {library} has no network '{name}'; {hint}")


_LISTS = {"timm": "list_models()", "torchvision": "models.list_models()"}


def _yours(code: str) -> nn.Module:
    """The network that FUNCTION of MODULE returns; modules in the current directory are found, too."""
    module, _, name = code.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module imports itself
        raise ConfigError(f"backbone.arch: no module '{module}' in {os.getcwd()}, and none installed") from None
    if not callable(function):
        raise ConfigError(f"backbone.arch: module '{module}' has no function '{name}'")
    network = function()
    if not isinstance(network, nn.Module):
        raise ConfigError(f"backbone.arch: {code}() returns a {type(network).__name__}; expected a torch.nn.Module")
    return network


def _drop_classifier(network: nn.Module, name: str) -> None:
    """The last linear layer becomes an identity; dropout in the same sequence goes with it."""
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"backbone.arch: torchvision/{name} does not end in a linear layer: where are its features?")
    parent = network.get_submodule(linear[-1].rpartition(".")[0])
    dropout = [path for path, module in parent.named_children() if isinstance(module, nn.Dropout)]
    for path in [linear[-1].rpartition(".")[2], *(dropout if isinstance(parent, nn.Sequential) else [])]:
        setattr(parent, path, nn.Identity())


def _small_stem(network: nn.Module, backbone: Backbone) -> None:
    """A 3 x 3 convolution of stride 1 in place of a ResNet's 7 x 7; `cifar`: and no max pooling. Raises ConfigError."""
    conv = getattr(network, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7) or not hasattr(network, "maxpool"):
        raise ConfigError(
            f"backbone.stem: {backbone.arch} does not begin as a ResNet does, and keeps its own first layers; "
            f"expected imagenet, found {backbone.stem}"
        )
    network.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    if backbone.stem_init == "kaiming":
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if backbone.stem == "cifar":
        network.maxpool = nn.Identity()


# ---------------------------------------------------------------------------------------------------- BatchNorm


def split_batch_norms(network: nn.Module, groups: int) -> None:
    """Every BatchNorm2d keeps its weights and takes its statistics over each of `groups` parts of the batch."""
    new: dict[int, SplitBatchNorm2d] = {}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, SplitBatchNorm2d):
            module.groups = groups
        elif path and _splits(module):
            parent, _, name = path.rpartition(".")
            norm = new.setdefault(id(module), SplitBatchNorm2d.of(module, groups))
            setattr(network.get_submodule(parent), name, norm)


def _splits(module: nn.Module) -> bool:
    """Whether it is PyTorch's BatchNorm2d, or timm's with an activation behind it, with weights and statistics."""
    plain = type(module) is nn.BatchNorm2d or type(module).__name__ == "BatchNormAct2d"
    return plain and module.affine and module.running_mean is not None


def whole_batch_norms(network: nn.Module) -> list[str]:
    """The BatchNorms that cannot keep groups apart: their names, with what they are."""
    norms = ((path, m) for path, m in network.named_modules() if isinstance(m, _BatchNorm))
    return [f"'{path}', a {type(m).__name__}" for path, m in norms if not isinstance(m, SplitBatchNorm2d)]


def check_groups(network: nn.Module, groups: int, key: str, arch: str) -> None:
    """Raises ConfigError where a network has no BatchNorm to keep groups apart, or one that cannot."""
    if groups == 1:
        return
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise ConfigError(f"{key}: {arch} has no BatchNorm, and so no groups; expected 1, found {groups}")
    if others := whole_batch_norms(network):
        raise ConfigError(f"{key}: {others[0]} of {arch}, takes the whole batch; expected 1, found {groups}")


# --------------------------------------------------------------------------------------- what a forward pass shows


def feature_width(network: nn.Module, size: int = 0) -> int:
    """How many features an image has: the network's own integer `features`, or what a forward pass shows.

    `size`: of the images, pixels; 0: unknown, and several are tried. Raises ConfigError where none passes through, and
    for a network that returns anything but (N, D).
    """
    declared = getattr(network, "features", None)
    if isinstance(declared, int) and not size:
        return declared
    failures = []
    for side in (size,) if size else SIZES:
        try:
            output = _output(network, side)
        except Exception as error:  # whatever somebody's network raises
            failures.append(f"{' '.join(str(error).split())[:160]} ({type(error).__name__})")
            continue
        return _width(output, network)
    where = f"augment.size: the backbone does not take images of {size} pixels" if size else _UNKNOWN
    raise ConfigError(f"{where}: {failures[0]}")


_UNKNOWN = "the backbone takes none of the image sizes that were tried; give it an integer attribute `features`"


def _width(output: object, network: nn.Module) -> int:
    what = type(network).__name__
    if not isinstance(output, Tensor):
        raise ConfigError(f"the backbone, a {what}, returns a {type(output).__name__}; expected a tensor (N, D)")
    if output.ndim != 2 or len(output) != IMAGES:
        shape = ", ".join(["N", *map(str, output.shape[1:])])
        pool = "; pool it: nn.Sequential(network, nn.AdaptiveAvgPool2d(1), nn.Flatten())" if output.ndim == 4 else ""
        raise ConfigError(f"the backbone, a {what}, returns ({shape}) for N images; expected features (N, D){pool}")
    return output.shape[1]


@torch.no_grad()
def _output(network: nn.Module, size: int) -> object:
    """The network's output for two images in evaluation mode, without computing it if the network allows that."""
    modes = [(module, module.training) for module in network.modules()]
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    like = next((t for t in tensors.values() if t.is_floating_point()), torch.zeros(()))
    network.eval()
    try:
        empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
        images = torch.empty(IMAGES, 3, size, size, dtype=like.dtype, device="meta")
        return functional_call(network, empty, (images,))
    except (RuntimeError, NotImplementedError):
        if like.is_meta:
            raise
        return network(torch.zeros(IMAGES, 3, size, size, dtype=like.dtype, device=like.device))
    finally:
        for module, training in modes:
            module.training = training


@functools.cache
def _on_paper(backbone: Backbone) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_network(backbone)


@functools.cache
def features(backbone: Backbone) -> int:
    """How many features an image has."""
    return feature_width(_on_paper(backbone))


@functools.cache
def forward_gflop(backbone: Backbone, size: int) -> float:
    """GFLOP of one forward pass of one image of `size` x `size` pixels: convolutions and matrix products."""
    network = _on_paper(backbone)
    feature_width(network, size)
    with FlopCounterMode(display=False) as counter:
        _output(network, size)
    return counter.get_total_flops() / IMAGES / 1e9


def described(backbone: Backbone, network: nn.Module) -> str:
    """For a log: what the network is."""
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    norms = sum(isinstance(module, SplitBatchNorm2d) for module in network.modules())
    of_norms = f"{norms} BatchNorms in {backbone.bn_groups} group(s)" if norms else "no BatchNorm of images"
    stem = f"{backbone.stem} stem" if backbone.stem != "imagenet" else "stem of its own"
    return f"{backbone.arch}, {stem}, {feature_width(network)} features, {weights:.1f} M weights, {of_norms}"
