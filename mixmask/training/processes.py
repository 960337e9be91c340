"""How many processes can share a run. No torch here."""

from __future__ import annotations

from typing import Any

from mixmask import registry
from mixmask.config import ConfigError, Detection, Pretrain


def fitting_processes(config: Any) -> tuple[int, ...]:
    """Numbers of processes that compute what one process computes, smallest first.

    Pre-training: those that divide its batch, with two images or more each, and hold whole BatchNorm groups, or share
    each group equally; whatever else spans processes (a mask, pairs, the rows of a loss) is exchanged. Gradient
    accumulation (`run.accumulate`) of mixtures needs whole mix groups. Detection: those that split no `group` of images
    (docs/detection.md says what is not equal there). The other stages are small: one.
    """
    if isinstance(config, Detection):
        groups = config.detectron2["SOLVER"]["IMS_PER_BATCH"] // config.group
        return tuple(n for n in range(1, groups + 1) if groups % n == 0)
    if not isinstance(config, Pretrain):
        return (1,)
    batch, norms = config.batch_size, config.backbone.bn_groups
    fits = (n for n in range(2, batch // 2 + 1) if batch % n == 0 and (norms % n == 0 or n % norms == 0))
    return (1, *(n for n in fits if not _splits_parts(config, n)))


def _splits_parts(config: Pretrain, processes: int) -> bool:
    """Whether gradient accumulation would need the mixtures of other processes: a part has only its own."""
    mixes = registry.find(registry.METHODS, config.method, "method").mixes
    return mixes and config.run.accumulate > 1 and config.mix_groups % processes > 0


def check_processes(config: Any, processes: int) -> None:
    """Raises ConfigError for a number of processes that does not fit, naming those that do."""
    fitting = fitting_processes(config)
    if processes in fitting:
        return
    reason = "only pre-training and detection can be shared"
    if isinstance(config, Detection):
        reason = f"group={config.group} images stay together"
    elif isinstance(config, Pretrain) and config.batch_size % processes:
        reason = f"batch_size={config.batch_size} is no multiple"
    elif isinstance(config, Pretrain) and _splits_parts(config, processes):
        reason = f"with run.accumulate={config.run.accumulate}, mix_groups={config.mix_groups} must be a multiple; "
        reason += "or run.accumulate=1"
    elif isinstance(config, Pretrain):
        reason = f"batch_size={config.batch_size}: each needs two images; backbone.bn_groups="
        reason += f"{config.backbone.bn_groups}: a multiple or a divisor"
    raise ConfigError(f"{processes} processes do not fit ({reason}); numbers that do: {', '.join(map(str, fitting))}")
