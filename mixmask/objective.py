"""The objective, once for every framework and every method.

    L = sum over anchors a of  weight_a * score(embedding of images_a [rows in order_a])          (Eq. 4 and 6)

A method says what the anchors are, a framework how an image is embedded and what its embedding is scored against. Where
the score is one of the whole batch, the framework says what the weights of its rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixmask.methods import Anchor
from mixmask.training.distributed import gather_with_gradient


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
    images is embedded once, all in one pass where they can.
    """
    targets = framework.targets(x1, x2, generator, *crops)
    batches = list({id(anchor.images): anchor.images for anchor in anchors}.values())
    embeddings = dict(zip(map(id, batches), framework.embed(batches, targets), strict=True))
    parts: dict[str, Tensor] = {}
    for anchor in anchors:
        embedding = rows(embeddings[id(anchor.images)], anchor.order, anchor.everywhere)
        parts[anchor.name] = framework.loss(embedding, targets, anchor.weight, clean=anchor.clean)
    loss = torch.stack(list(parts.values())).sum()
    return loss, {name: part.detach() for name, part in parts.items()}, targets


def rows(embedding: tuple[Tensor, ...], order: Tensor | None, everywhere: bool = False) -> tuple[Tensor, ...]:
    """The rows of each tensor (N, ...) in the given order (N,); None leaves them as they are.

    `everywhere`: out of all processes' rows. The reverse order of a mixture costs an indexing, not a forward pass.
    """
    if order is None:
        return embedding
    return tuple((gather_with_gradient(part) if everywhere else part)[order] for part in embedding)
