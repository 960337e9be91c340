"""ResNet-18 and ResNet-50 with the stems of small images, and BatchNorm over parts of the batch.

Blocks, layout, names and initialisation are torchvision's (He et al. 2016): with width 64 and the ImageNet stem the
state dict is torchvision's, without `fc`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from mixmask.config import Backbone
from mixmask.paths import few_operations

ARCHITECTURES: dict[str, tuple[type[nn.Module], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics are those of `groups` equal, contiguous parts of the batch: `groups` GPUs in one.

    Running statistics move to the mean over the groups (as Un-Mix's and MoCo's CIFAR code have it). A batch may hold
    several `views`, each with its own groups, one behind the other (function `views`). In evaluation it is plain
    BatchNorm. Raises ValueError for a training batch that the groups do not divide, or that leaves a group one value
    of each channel.
    """

    def __init__(self, channels: int, groups: int = 1):
        super().__init__(channels)
        self.groups = groups
        self.views = 1
        self.moves: list[Move] | None = None  # a list takes the moves of the running statistics, which then wait

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), normalised in each group; same shape. Moves the running statistics while training."""
        if not self.training:
            return super().forward(x)
        parts = self.groups * self.views
        if len(x) % parts:
            raise ValueError(f"a batch of {len(x)} images cannot be split into {parts} BatchNorm groups")
        if x.numel() == parts * x.shape[1]:
            found = f"{tuple(x.shape)} in {parts} BatchNorm group(s)"
            raise ValueError(f"expected more than 1 value per channel when training, found {found}")
        if torch.compiler.is_compiling():
            normalise = split_batch_norm
        else:
            normalise = GroupsAsChannels.apply if few_operations(x) else SplitBatchNorm.apply
        y, mean, var = normalise(x, self.weight, self.bias, parts, self.eps)
        if self.moves is None or torch.compiler.is_compiling():
            move_running_statistics([(self, mean, var)])
        else:
            self.moves.append((self, mean, var))
        return y

    def rates(self) -> tuple[float, ...]:
        """How far the running statistics move to those of each view.

        A momentum of None, which `torch.optim.swa_utils.update_bn` sets, makes them the mean over all passes.
        """
        if self.momentum is not None:
            return (self.momentum,) * self.views
        return tuple(1 / (int(self.num_batches_tracked) + view) for view in range(1, self.views + 1))


Move = tuple[SplitBatchNorm2d, Tensor, Tensor]  # mean and unbiased variance of each group of each view, (parts, C)


@torch.no_grad()
def move_running_statistics(moves: Iterable[Move]) -> None:
    """Move the running statistics view by view, as separate passes would, of all layers in a few operations."""
    alike: dict[tuple, list[Move]] = {}
    for norm, *statistics in moves:
        alike.setdefault((norm.groups, norm.rates()), []).append((norm, *statistics))
    for (groups, rates), together in alike.items():
        running = [s for norm, _, _ in together for s in (norm.running_mean, norm.running_var)]
        batch = torch.cat([s for _, mean, var in together for s in (mean, var)], dim=1).to(running[0].dtype)
        of_views = batch.unflatten(0, (len(rates), groups)).mean(dim=1)  # (views, channels)
        for of_view, rate in zip(of_views, rates, strict=True):
            torch._foreach_lerp_(running, of_view.split([len(s) for s in running]), rate)
        torch._foreach_add_([norm.num_batches_tracked for norm, _, _ in together], len(rates))


def _layout(x: Tensor) -> torch.memory_format:
    """Of (N, C, H, W): channels last, or (whatever its strides) contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class SplitBatchNorm(torch.autograd.Function):
    """BatchNorm in training of `parts` equal, contiguous parts of x (N, C, H, W), written into one tensor.

    PyTorch's own kernel for each part; without the copies of taking the batch apart and putting it together.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised x, and the mean and the unbiased variance of each part, (parts, C)."""
        x = x.contiguous(memory_format=_layout(x))
        y = torch.empty_like(x)
        mean, var, saved_mean, saved_scale = x.new_zeros((4, parts, x.shape[1]), dtype=_wide(x))
        pieces = zip(x.chunk(parts), y.chunk(parts), mean, var, saved_mean, saved_scale, strict=True)
        for part, out, *statistics, m, s in pieces:  # momentum 1: the running statistics become the part's own
            torch.ops.aten.native_batch_norm.out(
                part, weight, bias, *statistics, True, 1.0, eps, out=out, save_mean=m, save_invstd=s
            )
        ctx.save_for_backward(x, weight, saved_mean, saved_scale)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, mean, scale = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
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


class GroupsAsChannels(torch.autograd.Function):
    """What SplitBatchNorm computes in a single call of PyTorch's kernel: to a GPU each part's channels are channels.

    The images move for it and back again, in whole rows of channels (channels last) or of pixels.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised x, and the mean and the unbiased variance of each part, (parts, C)."""
        x = groups_to_channels(x.contiguous(memory_format=_layout(x)), parts)
        mean, var = x.new_zeros((2, x.shape[1]), dtype=_wide(x))
        weight, bias = torch.cat([weight] * parts + [bias] * parts).chunk(2)
        y, *saved = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)
        ctx.save_for_backward(x, weight, *saved)
        ctx.eps, ctx.parts = eps, parts
        mean, var = mean.view(parts, -1), var.view(parts, -1)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return channels_to_groups(y, parts), mean, var

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, mean, scale = ctx.saved_tensors
        gradient = groups_to_channels(gradient.contiguous(memory_format=_layout(x)), ctx.parts)
        wanted = list(ctx.needs_input_grad[:3])
        of_x, *of_affine = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, ctx.eps, wanted
        )
        total = [of.view(ctx.parts, -1).sum(0) if of is not None else None for of in of_affine]
        return channels_to_groups(of_x, ctx.parts) if wanted[0] else None, *total, None, None


def groups_to_channels(x: Tensor, parts: int) -> Tensor:
    """(parts * n, C, H, W) -> (n, parts * C, H, W), in the same layout."""
    if parts == 1:
        return x
    images, channels, *sides = x.shape
    moved = _empty_like(x, images // parts, parts * channels, *sides)
    moved.unflatten(1, (parts, -1)).copy_(x.unflatten(0, (parts, -1)).transpose(0, 1))
    return moved


def channels_to_groups(x: Tensor, parts: int) -> Tensor:
    """(n, parts * C, H, W) -> (parts * n, C, H, W), in the same layout."""
    if parts == 1:
        return x
    images, channels, *sides = x.shape
    moved = _empty_like(x, parts * images, channels // parts, *sides)
    moved.unflatten(0, (parts, -1)).copy_(x.unflatten(1, (parts, -1)).transpose(0, 1))
    return moved


def _empty_like(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _wide(x: Tensor) -> torch.dtype:
    """That of statistics: float32, or float64."""
    return torch.promote_types(x.dtype, torch.float32)


def split_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What SplitBatchNorm computes, as a formula that a compiler fuses with what stands around it."""
    grouped = x.unflatten(0, (parts, -1))  # (parts, N / parts, C, H, W)
    wide = grouped.to(_wide(x))
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
        together, moves = list(run), []
        for norm in norms:
            norm.views, norm.moves = len(together), moves
        try:
            outputs += network(torch.cat(together) if len(together) > 1 else together[0]).chunk(len(together))
            move_running_statistics(moves)
        finally:
            for norm in norms:
                norm.views, norm.moves = 1, None
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


def compile_backbones(network: nn.Module, backend: str | Callable = "inductor") -> None:
    """torch.compile of every ResNet inside, in place: BatchNorm, ReLU and sums become one kernel each."""
    for module in network.modules():
        if isinstance(module, ResNet):
            module.compile(backend=backend)


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
