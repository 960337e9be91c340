"""The paper's ResNets by name: what the schema, the builder and the cost model know of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A ResNet: blocks in each of its four stages; a bottleneck's output is four times as wide as its inside."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool

    def features(self, width: int) -> int:
        """Channels of the pooled features, where the first stage has `width`."""
        return width * (32 if self.bottleneck else 8)


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
}
