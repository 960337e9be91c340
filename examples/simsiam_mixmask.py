"""MixMask in somebody else's loop: a plain PyTorch SimSiam, with and without it.

    python examples/simsiam_mixmask.py                 with MixMask
    python examples/simsiam_mixmask.py --plain         without

What MixMask adds is between the two rulers of `train`, and its two settings. Nothing else here knows of this library.
The data are noise with a bright square, made on the spot: 12 seconds on one core.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mixmask

mix = mixmask.MixMask(grid=4)  # cells along a side


class SimSiam(nn.Module):
    """Encoder with projector, and predictor (Chen and He 2021)."""

    def __init__(self, features: int = 64):
        super().__init__()
        layers = []
        for inside, outside in ((3, 16), (16, 32), (32, features)):
            layers += [nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
        projector = [nn.Linear(features, features), nn.BatchNorm1d(features)]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *projector)
        self.predictor = nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3, H, W) -> prediction (N, D), and projection (N, D) without its gradient."""
        z = self.encoder(x)
        return self.predictor(z), z.detach()


def similarity_loss(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """-(cos(p1, z2) + cos(p2, z1)) / 2 for each row, (N,), in [-1, 1]."""
    (p1, z1), (p2, z2) = first, second
    return -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)) / 2


def train(images: Tensor, steps: int = 150, batch: int = 64, with_mixmask: bool = True, seed: int = 0) -> list[float]:
    """SimSiam on images (N, 3, H, W); the loss of the clean pairs at each step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SimSiam()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = images[torch.randint(len(images), (batch,))]
        x1, x2 = augment(x), augment(x)
        out1, out2 = model(x1), model(x2)
        loss = clean = similarity_loss(out1, out2).mean()

        if with_mixmask:  # ------------------------------------------------------------------------- from here
            anchors = mix(x1, generator)  # one batch of mixtures, read in two orders
            prediction, projection = model(anchors[0].images)
            for anchor in anchors:
                scores = similarity_loss((anchor.rows(prediction), anchor.rows(projection)), out2)
                loss = loss + (anchor.weight * scores).mean()  # lambda, and 1 - lambda: Eq. 6
        # ----------------------------------------------------------------------------------------------- to here

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(clean.item())
    return losses


def augment(x: Tensor) -> Tensor:
    """Mirrored or not, another contrast, a little noise: each image its own."""
    mirrored = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    return mirrored * (0.6 + 0.8 * torch.rand(len(x), 1, 1, 1)) + 0.1 * torch.randn_like(x)


def squares(number: int = 512, size: int = 16, seed: int = 0) -> Tensor:
    """Noise with a bright square somewhere: (number, 3, size, size), about zero mean."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, size, size, generator=generator) * 0.3
    corners = torch.randint(size // 2, (number, 2), generator=generator)
    for image, (row, column) in zip(images, corners.tolist(), strict=True):
        image[:, row : row + size // 2, column : column + size // 2] += 1.5
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plain", action="store_true", help="without MixMask")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    losses = train(squares(), options.steps, with_mixmask=not options.plain)
    for step in range(0, len(losses), max(1, len(losses) // 10)):
        print(f"step {step:4}  loss of the clean pairs {losses[step]:+.3f}")
    print(f"step {len(losses) - 1:4}  loss of the clean pairs {losses[-1]:+.3f}")


if __name__ == "__main__":
    main()
