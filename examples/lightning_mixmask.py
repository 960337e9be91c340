"""MixMask in Lightning: the library's MoCo as a LightningModule, its objective as the training step.

    python examples/lightning_mixmask.py

Needs `pip install lightning`. The data are noise with a bright square, made on the spot: a minute on one core.
"""

from __future__ import annotations

import lightning
import torch
import torchvision
from simsiam_mixmask import augment, squares
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mixmask


class MoCo(lightning.LightningModule):
    """Any module that maps images to (N, features) will do as a backbone."""

    def __init__(self, steps: int):
        super().__init__()
        backbone = torchvision.models.resnet18()
        backbone.fc = nn.Identity()
        settings = mixmask.MoCo.Settings(dim=32, queue=256, momentum=0.99, temperature=0.1)
        self.framework, self.steps = mixmask.MoCo(backbone, settings), steps
        self.mix = mixmask.MixMask(grid=4)

    def training_step(self, x: Tensor, _: int) -> Tensor:
        """x (N, 3, H, W): two views of it, their clean pair and its mixtures (Eq. 4 and 6)."""
        x1, x2 = augment(x), augment(x)
        anchors = mixmask.vanilla(x1) + self.mix(x1)  # drawn from torch's generator, which seed_everything sets
        loss, parts, self.targets = mixmask.objective(self.framework, x1, x2, anchors)
        self.log_dict({f"loss_{name}": part for name, part in parts.items()})
        return loss

    def optimizer_step(self, *arguments, **options) -> None:
        """After the optimiser's step the keys enter the queue."""
        super().optimizer_step(*arguments, **options)
        self.framework.after_step(self.targets, self.global_step, self.steps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The key encoder takes no gradient."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.03, momentum=0.9)


def train(steps: int = 40, batch: int = 32) -> dict[str, Tensor]:
    """The parts of the loss in the last step."""
    lightning.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(MoCo(steps), DataLoader(squares(), batch, shuffle=True, drop_last=True))
    return dict(trainer.callback_metrics)


if __name__ == "__main__":
    for name, value in train().items():
        print(f"{name} {value:.3f}")
