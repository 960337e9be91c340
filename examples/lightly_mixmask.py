"""MixMask with lightly's modules: its SimSiam heads and its loss, weighted by what a mixture shows.

    python examples/lightly_mixmask.py

Needs `pip install lightly`. The data are noise with a bright square, made on the spot: a minute on one core.
"""

from __future__ import annotations

import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from simsiam_mixmask import augment, squares
from torch import Tensor, nn

import mixmask

criterion = NegativeCosineSimilarity()
mix = mixmask.MixMask(grid=4)


class SimSiam(nn.Module):
    """As in lightly's own examples."""

    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc = nn.Identity()
        self.projection = SimSiamProjectionHead(512, 128, 64)
        self.prediction = SimSiamPredictionHead(64, 32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3, H, W) -> projection (N, 64) without its gradient, prediction (N, 64)."""
        z = self.projection(self.backbone(x))
        return z.detach(), self.prediction(z)


def train(steps: int = 40, batch: int = 32, seed: int = 0) -> list[float]:
    """The loss of the clean pairs in each step."""
    torch.manual_seed(seed)
    images, losses, model = squares(), [], SimSiam()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        x = images[torch.randint(len(images), (batch,))]
        x1, x2 = augment(x), augment(x)
        (z1, p1), (z2, p2) = model(x1), model(x2)
        clean = (criterion(z1, p2) + criterion(z2, p1)) / 2
        loss, anchors = clean, mix(x1)
        z, p = model(anchors[0].images)
        for anchor in anchors:  # lightly's loss is a mean over the batch, and so is lambda: one mask, one lambda
            pair = criterion(anchor.rows(p), z2) + criterion(p2, anchor.rows(z))
            loss = loss + anchor.weight.mean() * pair / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(clean.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        if step % 5 == 0:
            print(f"step {step:3}  loss of the clean pairs {loss:+.3f}")
