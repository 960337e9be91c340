"""The objective, once for every framework and every method.

    L = sum over anchors a of  weight_a * score(embedding of images_a [rows in order_a])          (Eq. 4 and 6)

A method says what the anchors are, a framework how an image is embedded and what its embedding is scored against. Where
the score is one of the whole batch, the framework says what the weights of its rows mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixmask.batchnorm import groups_of_parts
from mixmask.methods import Anchor


def objective(
    framework: Any,
    x1: Tensor,
    x2: Tensor,
    anchors: Sequence[Anchor],
    generator: torch.Generator | None = None,
    crops: Sequence[Tensor] = (),
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """The loss (a scalar), its parts by anchor (detached, weighted), and the targets for `framework.after_step`.

    x1, x2: the two views, (N, C, H, W); crops: those of `framework.crops`, (N, C, S, S) each. Each distinct batch of
    images is embedded once, all in one pass where they can: reading its rows in another order costs no second one.
    """
    targets = framework.targets(x1, x2, generator, *crops)
    batches = list({id(anchor.images): anchor.images for anchor in anchors}.values())
    embeddings = dict(zip(map(id, batches), framework.embed(batches, targets), strict=True))
    parts: dict[str, Tensor] = {}
    for anchor in anchors:
        embedding = tuple(anchor.rows(part) for part in embeddings[id(anchor.images)])
        parts[anchor.name] = framework.loss(embedding, targets, anchor.weight, clean=anchor.clean)
    loss = torch.stack(list(parts.values())).sum()
    return loss, {name: part.detach() for name, part in parts.items()}, targets


def in_parts(
    framework: Any,
    x1: Tensor,
    x2: Tensor,
    anchors: Sequence[Anchor],
    parts: int,
    generator: torch.Generator | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """`objective` and its gradient, accumulated over `parts` equal parts of the batch, in the memory of one.

    Equal to the whole up to the order of sums if each part holds whole BatchNorm groups: targets are those of the
    whole batch, running statistics move to the mean over the parts. For frameworks that define `part`.
    """
    with autocast():
        targets = framework.targets(x1, x2, generator)
    sums: dict[str, Tensor] = {}
    of_parts, size = [], len(x1) // parts
    with groups_of_parts(framework.encoder, parts) as next_part:
        for start in range(0, len(x1), size):
            next_part()
            with autocast():
                own, losses = _losses_of(framework, targets, anchors, slice(start, start + size))
            (torch.stack(list(losses.values())).sum() / parts).backward()
            sums = {name: sums.get(name, 0) + loss.detach() / parts for name, loss in losses.items()}
            of_parts.append(own)
    framework.joined(targets, of_parts)
    return torch.stack(list(sums.values())).sum(), sums, targets


def _losses_of(framework: Any, targets: Any, anchors: Sequence[Anchor], own: slice) -> tuple[Any, dict[str, Tensor]]:
    """The targets of the rows `own`, and the anchors' losses on these rows of their images."""
    of_own, losses = framework.part(targets, own), {}
    batches = {id(a.images): of_own.x1 if a.images is targets.x1 else a.images[own] for a in anchors}
    embeddings = dict(zip(batches, framework.embed(list(batches.values()), of_own), strict=True))
    for anchor in anchors:
        rows = own if anchor.order is None else torch.argsort(anchor.order)[own]  # those that read these images
        against = of_own if anchor.order is None else framework.part(targets, rows)
        weight = anchor.weight
        if isinstance(weight, Tensor) and weight.ndim:
            weight = weight[rows]
        losses[anchor.name] = framework.loss(embeddings[id(anchor.images)], against, weight, clean=anchor.clean)
    return of_own, losses
