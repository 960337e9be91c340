"""How many processes can share a run. No torch here."""

from __future__ import annotations

from typing import Any

from mixmask import registry
from mixmask.config import ConfigError, Detection, Pretrain


def fitting_processes(config: Any) -> tuple[int, ...]:
    """Numbers of processes that compute what one process computes, the smallest first.

    Of a framework whose head and loss stay within groups (MoCo), or exchange what spans them (Barlow Twins, SwAV,
    VICReg): those that split no mix group and hold whole BatchNorm groups, or equally many of them a group; of
    detection, those that split no `group` of images (docs/detection.md says what is not equal there). The other
    frameworks normalise in their heads, or compare rows, over the whole batch, and the other stages are small: one
    process.
    """
    groups, norms = 1, 1
    if isinstance(config, Pretrain) and _framework(config).grouped:
        groups, norms = config.mix_groups, config.backbone.bn_groups
    elif isinstance(config, Detection):
        groups = config.detectron2["SOLVER"]["IMS_PER_BATCH"] // config.group
    return tuple(n for n in range(1, groups + 1) if groups % n == 0 and (norms % n == 0 or n % norms == 0))


def check_processes(config: Any, processes: int) -> None:
    """Raises ConfigError for a number of processes that does not fit, naming those that do."""
    fitting = fitting_processes(config)
    if processes in fitting:
        return
    shared = [spec.title for spec in registry.FRAMEWORKS.values() if spec.grouped]
    reason = f"only pre-training with {', '.join(shared)} can be shared"
    if isinstance(config, Pretrain) and _framework(config).grouped:
        groups = f"backbone.bn_groups={config.backbone.bn_groups} and mix_groups={config.mix_groups}"
        reason = f"{groups} must be multiples, or bn_groups a divisor"
    elif isinstance(config, Pretrain):
        reason = f"the head or the loss of {config.framework} spans the whole batch"
    raise ConfigError(f"{processes} processes do not fit ({reason}); numbers that do: {', '.join(map(str, fitting))}")


def _framework(config: Pretrain) -> registry.Framework:
    return registry.find(registry.FRAMEWORKS, config.framework, "framework")
