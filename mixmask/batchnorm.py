"""BatchNorm over parts of the batch: several GPUs, and several views, in one.

The same numbers in three ways: a kernel call for each part (a CPU), one for all parts (a GPU), and a formula for a
compiler, which fuses it with the operations around it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mixmask.paths import few_operations
from mixmask.training.distributed import shared_statistics


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics are those of `groups` equal, contiguous parts of the batch: `groups` GPUs in one.

    Running statistics move to the mean over the groups (as in Un-Mix's and MoCo's CIFAR code). A batch may hold
    several concatenated views, each with its own groups (`backbones.views`). With `span` above 1 a group spans that
    many processes, each of which holds a part. In evaluation it is plain BatchNorm. Raises ValueError for a training
    batch that the groups do not divide, or that leaves a group a single value per channel.
    """

    def __init__(self, channels: int, groups: int = 1):
        super().__init__(channels)
        self.groups = groups
        self.views = 1
        self.span = 1
        self.together: Together | None = None  # shared with the other BatchNorms of a pass, if there is one
        self.drop: nn.Module | None = None  # in timm's networks drop and act are part of the BatchNorm layer
        self.act: nn.Module | None = None

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, groups: int) -> SplitBatchNorm2d:
        """`norm` with groups: its own weights, statistics, eps and momentum; timm's with its activation."""
        split = cls(norm.num_features, groups)
        split.eps, split.momentum, split.training = norm.eps, norm.momentum, norm.training
        split.weight, split.bias = norm.weight, norm.bias
        split.running_mean, split.running_var = norm.running_mean, norm.running_var
        split.num_batches_tracked = norm.num_batches_tracked
        if hasattr(norm, "act"):
            split.drop, split.act = norm.drop, norm.act
        return split

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), normalised in each group; same shape. Moves the running statistics while training."""
        y = self.normalised(x) if self.training else super().forward(x)
        return y if self.act is None else self.act(self.drop(y))

    def normalised(self, x: Tensor) -> Tensor:
        """`forward` in training, without the activation."""
        parts = self.groups * self.views
        if len(x) % parts:
            raise ValueError(f"a batch of {len(x)} images cannot be split into {parts} BatchNorm groups")
        if x.numel() == parts * x.shape[1]:
            found = f"{tuple(x.shape)} in {parts} BatchNorm group(s)"
            raise ValueError(f"expected more than 1 value per channel when training, found {found}")
        if torch.compiler.is_compiling() or self.span > 1:
            y, mean, var = split_batch_norm(x, self.weight, self.bias, parts, self.eps, self.span)
        elif few_operations(x):
            together = self.together or Together([self])
            y, mean, var = GroupsAsChannels.apply(x, *together.tiles(self), parts, self.eps)
        else:
            y, mean, var = SplitBatchNorm.apply(x, self.weight, self.bias, parts, self.eps)
        if torch.compiler.is_compiling() or self.together is None:
            move_running_statistics([(self, mean, var)])
        else:
            self.together.moves.append((self, mean, var))
        return y

    def rates(self) -> tuple[float, ...]:
        """How far the running statistics move to those of each view.

        A momentum of None, which `torch.optim.swa_utils.update_bn` sets, makes them the mean over all passes.
        """
        if self.momentum is not None:
            return (self.momentum,) * self.views
        return tuple(1 / (int(self.num_batches_tracked) + view) for view in range(1, self.views + 1))


def span_processes(network: nn.Module, processes: int) -> None:
    """Let every SplitBatchNorm2d inside share its groups with that many neighbouring processes, in place."""
    for norm in network.modules():
        if isinstance(norm, SplitBatchNorm2d):
            norm.span = processes


@contextlib.contextmanager
def groups_of_parts(network: nn.Module, parts: int) -> Iterator[Callable[[], None]]:
    """Context in which each pass is over one of `parts` equal parts of a batch, with its share of the groups.

    Call the yielded function before each part: all start from the same running statistics, which end as their mean.
    """
    norms = [norm for norm in network.modules() if isinstance(norm, SplitBatchNorm2d)]
    running = [s for norm in norms for s in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    before, ends = [s.clone() for s in running], []

    def next_part() -> None:
        ends.append([s.clone() for s in running])
        for statistic, start in zip(running, before, strict=True):
            statistic.copy_(start)

    for norm in norms:
        norm.groups //= parts
    try:
        yield next_part
        next_part()
        for statistic, *of_parts in zip(running, *ends[1:], strict=True):
            statistic.copy_(torch.stack(of_parts).sum(0) / parts)
    finally:
        for norm in norms:
            norm.groups *= parts


# --------------------------------------------------------------------------------------- what layers share in a pass

Move = tuple[SplitBatchNorm2d, Tensor, Tensor]  # mean and unbiased variance of each group of each view, (parts, C)


class Together:
    """The BatchNorms of one pass: together they take as few operations as one of them would alone."""

    def __init__(self, norms: Sequence[SplitBatchNorm2d]):
        self.norms = norms
        self.moves: list[Move] = []
        self._tiles: dict[SplitBatchNorm2d, tuple[Tensor, ...]] = {}

    def tiles(self, norm: SplitBatchNorm2d) -> tuple[Tensor, ...]:
        """A layer's weight and bias, once for each part, and room for the parts' means and variances: (parts * C,)."""
        if norm not in self._tiles:
            parts = norm.groups * norm.views
            alike = [other for other in self.norms if other.groups * other.views == parts]
            weights = Tile.apply(parts, *(vector for other in alike for vector in (other.weight, other.bias)))
            wide = _wide(norm.running_mean)
            room = norm.running_mean.new_zeros(sum(map(len, weights)), dtype=wide).split([len(w) for w in weights])
            pairs = zip(weights[::2], weights[1::2], room[::2], room[1::2], strict=True)
            self._tiles.update(zip(alike, pairs, strict=True))
        return self._tiles[norm]


class Tile(torch.autograd.Function):
    """Vectors (C,) of any lengths, each repeated `parts` times: (parts * C,)."""

    @staticmethod
    def forward(ctx, parts: int, *vectors: Tensor) -> tuple[Tensor, ...]:
        """All of them by one look-up."""
        ctx.parts, ctx.lengths = parts, tuple(map(len, vectors))
        order = _tiling(parts, ctx.lengths, vectors[0].device)
        return torch.cat(vectors).index_select(0, order).split([parts * length for length in ctx.lengths])

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The sum over the parts."""
        by_part = torch.cat([gradient.view(ctx.parts, -1) for gradient in gradients], dim=1)
        return None, *by_part.sum(0).split(ctx.lengths)


@functools.cache
def _tiling(parts: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The index of each number of the repeated vectors in the concatenated vectors."""
    places = torch.arange(sum(lengths)).split(lengths)
    return torch.cat([place.repeat(parts) for place in places]).to(device)


@torch.no_grad()
def move_running_statistics(moves: Iterable[Move]) -> None:
    """Move the running statistics view by view, as separate passes would, of all layers in a few operations."""
    alike: dict[tuple, list[Move]] = {}
    for norm, mean, var in moves:
        alike.setdefault((norm.groups, norm.rates()), []).append((norm, mean, var))
    for (groups, rates), together in alike.items():
        running = [s for norm, _, _ in together for s in (norm.running_mean, norm.running_var)]
        batch = torch.cat([s for _, mean, var in together for s in (mean, var)], dim=1).to(running[0].dtype)
        for of_view, rate in zip(batch.split(groups), rates, strict=True):  # (groups, channels)
            torch._foreach_lerp_(running, of_view.mean(dim=0).split([len(s) for s in running]), rate)
        torch._foreach_add_([norm.num_batches_tracked for norm, _, _ in together], len(rates))


# ------------------------------------------------------------------------------------------------ three ways to them


class SplitBatchNorm(torch.autograd.Function):
    """BatchNorm in training of `parts` equal, contiguous parts of x (N, C, H, W), written into one tensor.

    PyTorch's own kernel for each part; without the copies of splitting the batch and concatenating it.
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
    """What SplitBatchNorm computes, in one call of PyTorch's kernel, which sees each part's channels as its own.

    The images are rearranged for it and back, in whole rows of channels (channels last) or of pixels.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, parts: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised x, and the mean and the unbiased variance of each part, (parts, C).

        weight, bias: (parts * C,); mean, var: zeros (parts * C,), which take the statistics.
        """
        x = groups_to_channels(x.contiguous(memory_format=_layout(x)), parts)
        y, *saved = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)  # momentum 1: as above
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
        return channels_to_groups(of_x, ctx.parts) if wanted[0] else None, *of_affine, *[None] * 4


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


def split_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, parts: int, eps: float, span: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """What SplitBatchNorm computes, as a formula that a compiler fuses with the operations around it.

    `span` processes hold each part together.
    """
    grouped = x.unflatten(0, (parts, -1))  # (parts, N / parts, C, H, W)
    wide = grouped.to(_wide(x))
    var, mean = torch.var_mean(wide, dim=(1, 3, 4), correction=0)  # (parts, C)
    if span > 1:
        mean, var = shared_statistics(mean, var, span)
    scale = weight * torch.rsqrt(var + eps)
    shift = bias - mean * scale
    y = wide * scale[:, None, :, None, None] + shift[:, None, :, None, None]
    pixels = span * x.numel() // (parts * x.shape[1])
    return y.to(x.dtype).flatten(0, 1), mean.detach(), var.detach() * (pixels / (pixels - 1))


def _empty_like(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of (N, C, H, W): channels last, or contiguous for any other strides."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the statistics: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
