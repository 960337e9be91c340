"""The same training written the usual way, as a yardstick: what public code for these experiments does.

Pillow and torchvision augment each image in DataLoader workers; fp32; NCHW; one forward pass for each view; a mixture
is encoded anew for each direction of the loss; the queue is cloned and the logits concatenated for each term; the key
encoder moves parameter by parameter; the loss is read after every step. It computes the loss that the project computes
(tests/docs/test_benchmarks.py), from the same recipe. After MoCo's CIFAR demo, Un-Mix's `unmix_c100.py` and
MoCo's ImageNet
code; written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet

from mixmask.config import Augment, Backbone, Pretrain
from mixmask.masks import sample_mask

# ---------------------------------------------------------------------------------------------------------- input


class Pairs(Dataset):
    """Two views of each image; images uint8 (N, H, W, 3) in memory."""

    def __init__(self, images: np.ndarray, transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.images[index])
        return self.transform(image), self.transform(image)


class TwoViews:
    """A transform that is applied twice (for ImageFolder)."""

    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]


class Blur:
    """Gaussian blur with a deviation from U(low, high) pixels, by Pillow."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(self.low, self.high)))


def transform(augment: Augment) -> transforms.Compose:
    """A recipe's augmentation in torchvision's transforms."""
    operations = {
        "crop": transforms.RandomResizedCrop(augment.size, augment.crop_scale, augment.crop_ratio),
        "flip": transforms.RandomHorizontalFlip(augment.flip_prob),
        "jitter": transforms.RandomApply([transforms.ColorJitter(*augment.jitter)], augment.jitter_prob),
        "grayscale": transforms.RandomGrayscale(augment.grayscale_prob),
        "blur": transforms.RandomApply([Blur(*augment.blur_sigma)], augment.blur_prob),
    }
    chosen = [operations[name] for name in augment.order]
    return transforms.Compose([*chosen, transforms.ToTensor(), transforms.Normalize(augment.mean, augment.std)])


def batches(dataset: Dataset, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views, each (N, 3, S, S), epoch after epoch."""
    pin = torch.cuda.is_available()
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, pin_memory=pin, drop_last=True)
    while True:
        yield from loader


# ------------------------------------------------------------------------------------------------------- networks


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm over parts of the batch: rows n, n + splits, n + 2 splits, ... are one. Needs NCHW."""

    def __init__(self, channels: int, splits: int):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if not self.training:
            return super().forward(x)
        mean, var = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        weight, bias = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
        folded = x.view(-1, c * self.splits, h, w)
        out = F.batch_norm(folded, mean, var, weight, bias, True, self.momentum, self.eps).view(n, c, h, w)
        self.running_mean.copy_(mean.view(self.splits, c).mean(dim=0))
        self.running_var.copy_(var.view(self.splits, c).mean(dim=0))
        return out


def encoder(backbone: Backbone, dim: int, mlp: bool) -> nn.Module:
    """torchvision's ResNet (its width is 64) with the stem of small images or of ImageNet, and MoCo's head."""
    norm = partial(SplitBatchNorm, splits=backbone.bn_groups) if backbone.bn_groups > 1 else nn.BatchNorm2d
    net = getattr(resnet, backbone.arch)(num_classes=dim, norm_layer=norm)
    if backbone.stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    if backbone.stem == "cifar":
        net.maxpool = nn.Identity()
    if mlp:
        net.fc = nn.Sequential(nn.Linear(net.fc.in_features, net.fc.in_features), nn.ReLU(), net.fc)
    return net


# ----------------------------------------------------------------------------------------------------------- MoCo


@dataclass
class Mixture:
    """Mixed images (N, 3, H, W); lambda; `inverse` (N,): the row in which image i is the filling."""

    images: Tensor
    lam: float
    inverse: Tensor


class MoCo(nn.Module):
    """Two encoders and a queue (dim, K) of keys; the loss with mixtures, in one direction or both."""

    def __init__(self, recipe: Pretrain):
        super().__init__()
        s = recipe.settings
        self.m, self.T, self.K, self.symmetric = s["momentum"], s["temperature"], s["queue"], s["symmetric"]
        self.shuffle = s["shuffle_bn"] and recipe.backbone.bn_groups > 1
        self.encoder_q = encoder(recipe.backbone, s["dim"], s["mlp"])
        self.encoder_k = encoder(recipe.backbone, s["dim"], s["mlp"])
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data.copy_(param_q.data)
            param_k.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(s["dim"], s["queue"]), dim=0))
        self.pointer = 0

    def forward(self, x1: Tensor, x2: Tensor, mixtures: list[Mixture]) -> Tensor:
        """The loss of one iteration, a scalar; moves the key encoder before it, and the queue after it."""
        self.move_key_encoder()
        loss, k2 = self.direction(x1, x2, mixtures)
        keys = k2
        if self.symmetric:
            loss_back, k1 = self.direction(x2, x1, mixtures)
            loss, keys = loss + loss_back, torch.cat([k1, k2])
        self.enqueue(keys)
        return loss

    def direction(self, x_q: Tensor, x_k: Tensor, mixtures: list[Mixture]) -> tuple[Tensor, Tensor]:
        """Queries of x_q, and mixtures, against keys of x_k: the loss, and the keys (N, dim)."""
        q = F.normalize(self.encoder_q(x_q), dim=1)
        k = self.keys(x_k)
        loss = self.infonce(q, k)
        for mixture in mixtures:
            q_mixed = F.normalize(self.encoder_q(mixture.images), dim=1)
            loss = loss + mixture.lam * self.infonce(q_mixed, k)
            loss = loss + (1 - mixture.lam) * self.infonce(q_mixed[mixture.inverse], k)
        return loss, k

    def infonce(self, q: Tensor, k: Tensor) -> Tensor:
        """Cross-entropy of the positive among itself and the queue, a scalar."""
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)  # (N, 1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())  # (N, K)
        logits = torch.cat([positive, negative], dim=1) / self.T
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Keys (N, dim); with several BatchNorm groups the rows are shuffled, and put back."""
        if not self.shuffle:
            return F.normalize(self.encoder_k(x), dim=1)
        order = torch.randperm(len(x), device=x.device)
        return F.normalize(self.encoder_k(x[order]), dim=1)[torch.argsort(order)]

    @torch.no_grad()
    def move_key_encoder(self) -> None:
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data = param_k.data * self.m + param_q.data * (1 - self.m)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        if self.K % len(keys):
            raise ValueError(f"a queue of {self.K} is no multiple of {len(keys)} keys")
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.T
        self.pointer = (self.pointer + len(keys)) % self.K


def mixed(x: Tensor, mask: Tensor, partner: Tensor) -> Mixture:
    """mask (1, 1, H, W) in [0, 1]: 1 shows image i, 0 its partner."""
    mask = mask.to(x)
    return Mixture(mask * x + (1 - mask) * x[partner], float(mask.mean()), torch.argsort(partner))


def unmix(x: Tensor, recipe: Pretrain, rng: np.random.Generator) -> Mixture:
    """Mixup, or CutMix with a box of random place, with the reversed batch."""
    height, width = x.shape[-2:]
    lam, reverse = rng.beta(1.0, 1.0), torch.arange(len(x) - 1, -1, -1, device=x.device)
    if rng.random() < recipe.unmix.prob:
        return mixed(x, torch.full((1, 1, height, width), lam), reverse)
    h, w = int(height * np.sqrt(1 - lam)), int(width * np.sqrt(1 - lam))
    y, x0 = rng.integers(height), rng.integers(width)
    top, bottom, left, right = np.clip(
        [y - h // 2, y + h // 2, x0 - w // 2, x0 + w // 2], 0, [height] * 2 + [width] * 2
    )
    mask = torch.ones(1, 1, height, width)
    mask[..., top:bottom, left:right] = 0
    return mixed(x, mask, reverse)


def mixmask(x: Tensor, recipe: Pretrain, rng: np.random.Generator, permutation: str = "reverse") -> Mixture:
    """One mask for the batch; partners in reverse order or at random."""
    partner = (
        torch.arange(len(x) - 1, -1, -1) if permutation == "reverse" else torch.from_numpy(rng.permutation(len(x)))
    )
    return mixed(x, sample_mask(recipe.mask, *x.shape[-2:], rng), partner.to(x.device))


MIXTURES: dict[str, Callable[[Tensor, Pretrain, np.random.Generator], list[Mixture]]] = {
    "vanilla": lambda x, recipe, rng: [],
    "unmix": lambda x, recipe, rng: [unmix(x, recipe, rng)],
    "mixmask": lambda x, recipe, rng: [mixmask(x, recipe, rng, recipe.mask.permutation)],
    "both": lambda x, recipe, rng: [unmix(x, recipe, rng), mixmask(x, recipe, rng, recipe.both.permutation)],
}


def step(
    model: MoCo, optimizer: torch.optim.Optimizer, x1: Tensor, x2: Tensor, recipe: Pretrain, rng: np.random.Generator
) -> float:
    """One iteration on two views (N, 3, H, W); returns the loss."""
    loss = model(x1, x2, MIXTURES[recipe.method](x1, recipe, rng))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


# ----------------------------------------------------------------------------------------------------------- k-NN


def knn_predict(features: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Classes of features (N, D) of unit length by votes of a bank (D, M): one-hot rows, weighted and summed. (N,)"""
    similarity, index = torch.mm(features, bank).topk(k, dim=-1)
    near = torch.gather(labels.expand(len(features), -1), dim=-1, index=index)  # (N, k)
    weight = (similarity / temperature).exp()
    one_hot = torch.zeros(len(features) * k, classes, device=features.device)
    one_hot = one_hot.scatter(dim=-1, index=near.view(-1, 1), value=1.0)
    scores = (one_hot.view(len(features), -1, classes) * weight.unsqueeze(-1)).sum(dim=1)
    return scores.argsort(dim=-1, descending=True)[:, 0]
