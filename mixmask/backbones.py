"""ResNet-18 and ResNet-50 with the stems of small images, and BatchNorm over parts of the batch.

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

from mixmask.config import Backbone

ARCHITECTURES: dict[str, tuple[type[nn.Module], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics are those of `groups` equal, contiguous parts of the batch: `groups` GPUs in one.

    Running statistics move to the mean over the groups (as Un-Mix's and MoCo's CIFAR code have it). A batch may hold
    several `views`, each with its own groups, one behind the other (function `views`). In evaluation it is plain
    BatchNorm. Raises ValueError for a training batch that the groups do not divide.
    """

    def __init__(self, channels: int, groups: int = 1):
        super().__init__(channels)
        self.groups = groups
        self.views = 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), normalised in each group; same shape. Moves the running statistics while training."""
        if not self.training:
            return super().forward(x)
        parts = self.groups * self.views
        if len(x) % parts:
            raise ValueError(f"a batch of {len(x)} images cannot be split into {parts} BatchNorm groups")
        normalise = split_batch_norm if torch.compiler.is_compiling() else SplitBatchNorm.apply
        y, mean, var = normalise(x, self.weight, self.bias, parts, self.eps)
        self._move(mean, var)
        return y

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor) -> None:
        """Statistics (groups * views, C) into the running ones, view by view, as separate passes would.

        A momentum of None, which `torch.optim.swa_utils.update_bn` sets, makes them the mean over all passes.
        """
        for number, statistics in enumerate(zip(mean.chunk(self.views), var.chunk(self.views), strict=True), 1):
            rate = 1 / (int(self.num_batches_tracked) + number) if self.momentum is None else self.momentum
            for running, of_view in zip((self.running_mean, self.running_var), statistics, strict=True):
                running.lerp_(of_view.mean(0).to(running), rate)
        self.num_batches_tracked.add_(self.views)


class SplitBatchNorm(torch.autograd.Function):
    """BatchNorm in training of `parts` equal, contiguous parts of x (N, C, H, W), written into one tensor.

    PyTorch's own kernel for each part; without the copies of taking the batch apart and putting it together.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised x, and the mean and the unbiased variance of each part, (parts, C)."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        y = torch.empty_like(x)
        wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        mean, var, saved_mean, saved_scale = x.new_zeros((4, parts, x.shape[1]), dtype=wide)
        pieces = zip(x.chunk(parts), y.chunk(parts), mean, var, saved_mean, saved_scale, strict=True)
        for part, out, *statistics, m, s in pieces:  # momentum 1: the running statistics become the part's own
            torch.ops.aten.native_batch_norm.out(
                part, weight, bias, *statistics, True, 1.0, eps, out=out, save_mean=m, save_invstd=s
            )
        ctx.save_for_backward(x, weight, saved_mean, saved_scale)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, mean, scale = ctx.saved_tensors
        last = x.is_contiguous(memory_format=torch.channels_last)
        gradient = gradient.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        pieces = zip(gradient.chunk(len(mean)), x.chunk(len(mean)), mean, scale, strict=True)
        wanted = list(ctx.needs_input_grad[:3])
        grads = [
            torch.ops.aten.native_batch_norm_backward(g, part, weight, None, None, m, s, True, ctx.eps, wanted)
            for g, part, m, s in pieces
        ]
        of_x, of_weight, of_bias = zip(*grads, strict=True)
        together = of_x[0] if len(of_x) == 1 else torch.cat(of_x) if wanted[0] else None
        total = [torch.stack(parts).sum(0) if parts[0] is not None else None for parts in (of_weight, of_bias)]
        return together, *total, None, None


def split_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What SplitBatchNorm computes, as a formula that a compiler fuses with what stands around it."""
    grouped = x.unflatten(0, (parts, -1))  # (parts, N / parts, C, H, W)
    wide = grouped.float() if x.dtype in (torch.bfloat16, torch.float16) else grouped
    var, mean = torch.var_mean(wide, dim=(1, 3, 4), correction=0)  # (parts, C)
    scale = weight * torch.rsqrt(var + eps)
    shift = bias - mean * scale
    y = wide * scale[:, None, :, None, None] + shift[:, None, :, None, None]
    pixels = x.numel() // (parts * x.shape[1])
    return y.to(x.dtype).flatten(0, 1), mean.detach(), var.detach() * (pixels / (pixels - 1))


class ResNet(nn.Module):
    """Images (N, 3, H, W) -> pooled features (N, `features`)."""

    def __init__(self, arch: str, stem: str, width: int = 64, bn_groups: int = 1):
        super().__init__()
        block, depths = ARCHITECTURES[arch]
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
        _initialise(self, keep_stem=small)

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
    if not all(isinstance(norm, SplitBatchNorm2d) for norm in norms):
        return [network(images) for images in batches]
    outputs: list[Tensor] = []
    for _, run in itertools.groupby(batches, key=lambda images: images.shape):
        together = list(run)
        for norm in norms:
            norm.views = len(together)
        outputs += network(torch.cat(together) if len(together) > 1 else together[0]).chunk(len(together))
    for norm in norms:
        norm.views = 1
    return outputs


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
    """torchvision's initialisation; the small stem keeps PyTorch's default, since it replaces conv1 after the fact
    in the published CIFAR code (unmix_c100.py, htdt/self-supervised)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not (keep_stem and module is model.conv1):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_backbone(backbone: Backbone) -> ResNet:
    """The backbone that a recipe describes."""
    return ResNet(backbone.arch, backbone.stem, backbone.width, backbone.bn_groups)


def compile_backbones(network: nn.Module) -> None:
    """torch.compile of every ResNet inside, in place: BatchNorm, ReLU and sums become one kernel each."""
    for module in network.modules():
        if isinstance(module, ResNet):
            module.compile()


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
        return [self.head(features) for features in views(self.backbone, batches)]
