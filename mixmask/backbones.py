"""ResNet-18 and ResNet-50 with the stems of small images, and BatchNorm over parts of the batch (`batchnorm.py`); any
third-party network (`networks.py`); each with a head on top.

Blocks, layout, names and initialisation are torchvision's (He et al. 2016): with width 64 and the ImageNet stem the
state dict is torchvision's, without `fc`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from mixmask.batchnorm import SplitBatchNorm2d, Together, move_running_statistics
from mixmask.config import Backbone, ConfigError
from mixmask.config.resnets import ARCHITECTURES
from mixmask.networks import build_network
from mixmask.paths import compiler


class ResNet(nn.Module):
    """Images (N, 3, H, W) -> pooled features (N, `features`)."""

    def __init__(self, arch: str, stem: str, width: int = 64, bn_groups: int = 1, stem_init: str = "default"):
        super().__init__()
        spec = ARCHITECTURES[arch]
        block, depths = (Bottleneck if spec.bottleneck else BasicBlock), spec.blocks
        norm = partial(SplitBatchNorm2d, groups=bn_groups)
        small = stem != "imagenet"
        self.conv1 = nn.Conv2d(3, width, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for i, depth in enumerate(depths):
            planes = width * 2**i
            layer = _layer(block, channels, planes, depth, stride=1 if i == 0 else 2, norm=norm)
            setattr(self, f"layer{i + 1}", layer)
            channels = planes * block.expansion
        self.features = channels
        _initialise(self, keep_stem=small and stem_init == "default")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> mean over the last feature map's pixels, (N, `features`)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


def views(network: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of `network` for each batch of images (N, 3, H, W), as if each had a forward pass of its own.

    Batches of one shape that follow each other share one pass, where every BatchNorm can keep them apart.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms or not all(isinstance(norm, SplitBatchNorm2d) for norm in norms):
        return [rows_of(network, images) for images in batches]
    outputs: list[Tensor] = []
    for _, run in itertools.groupby(batches, key=lambda images: images.shape):
        images, together = list(run), Together(norms)
        for norm in norms:
            norm.views, norm.together = len(images), together
        try:
            outputs += rows_of(network, torch.cat(images) if len(images) > 1 else images[0]).chunk(len(images))
            move_running_statistics(together.moves)
        finally:
            for norm in norms:
                norm.views, norm.together = 1, None
    return outputs


def rows_of(network: nn.Module, images: Tensor) -> Tensor:
    """The network's features (N, D) of images (N, C, H, W). Raises ConfigError if it returns anything else."""
    output = network(images)
    if not isinstance(output, Tensor) or output.shape[:-1] != images.shape[:1]:
        what = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ConfigError(f"the backbone, a {type(network).__name__}, returns {what}; expected features (N, D)")
    return output


def _layer(
    block: type[nn.Module], channels: int, planes: int, depth: int, stride: int, norm: Callable[[int], nn.Module]
) -> nn.Sequential:
    """`depth` residual blocks; the first changes resolution and channels. torchvision's blocks fix width at 64 * ..."""
    out = planes * block.expansion
    downsample = None
    if stride != 1 or channels != out:
        downsample = nn.Sequential(conv1x1(channels, out, stride), norm(out))
    first = block(channels, planes, stride, downsample, norm_layer=norm)
    return nn.Sequential(first, *(block(out, planes, norm_layer=norm) for _ in range(1, depth)))


def _initialise(model: ResNet, keep_stem: bool) -> None:
    """torchvision's initialisation. `keep_stem`: except for the small stem, which unmix_c100.py and
    htdt/self-supervised put in afterwards (PatrickHua/SimSiam initialises it with the rest)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not (keep_stem and module is model.conv1):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_backbone(backbone: Backbone, key: str = "backbone.bn_groups") -> nn.Module:
    """The backbone that a recipe describes; `key`: the recipe's key of the BatchNorm groups. Raises ConfigError."""
    if backbone.arch not in ARCHITECTURES:
        return build_network(backbone, key)
    return ResNet(backbone.arch, backbone.stem, backbone.width, backbone.bn_groups, backbone.stem_init)


def compile_encoders(network: nn.Module) -> None:
    """torch.compile of every backbone and head inside, in place: BatchNorm, ReLU and sums become one kernel each."""
    for module in network.modules():
        if isinstance(module, Encoder):
            module.backbone.compile(**compiler())
            module.heads = torch.compile(module.heads, **compiler())


class Encoder(nn.Module):
    """Backbone and head: images (N, 3, H, W) -> (N, dim). Features for evaluation come from `.backbone`."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> the head's outputs (N, dim)."""
        return self.head(self.backbone(images))

    def views(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The head's outputs (N, dim) for each batch of images (N, 3, H, W): function `views`, and the head on each."""
        return self.heads(views(self.backbone, batches))

    def heads(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The head's outputs (N, dim) for the features (N, D) of each batch: one batch at a time."""
        return [self.head(rows) for rows in features]
