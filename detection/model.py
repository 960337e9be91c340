"""The detector in Detectron2: Faster or Mask R-CNN, R50-C4, the pre-trained backbone in it. Needs Detectron2."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from importlib import metadata

import torch
from torch import nn

with warnings.catch_warnings():  # about pkg_resources, which it still uses
    warnings.simplefilter("ignore")
    from detectron2.config import CfgNode, get_cfg
    from detectron2.layers import get_norm
    from detectron2.modeling import build_model
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
    from detectron2.solver import build_lr_scheduler, build_optimizer

from detection import weights
from mixmask.config import ConfigError, Detection
from mixmask.randomness import seed_globals

warnings.filterwarnings("ignore", "torch.meshgrid")  # Detectron2's anchors; PyTorch means to change its default
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # about a function that Detectron2 calls


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """Res5ROIHeads with a normalisation after res5 (MoCo, appendix; `detection/train_net.py` there)."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        stage, channels = super()._build_res5_block(cfg)
        stage.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return stage, channels


def settings(config: Detection, device: torch.device) -> CfgNode:
    """The recipe over Detectron2's defaults. Raises ConfigError for keys and values that Detectron2 does not know."""
    cfg = get_cfg()
    try:
        cfg.merge_from_other_cfg(CfgNode(copy.deepcopy(dict(config.detectron2))))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"detectron2: {' '.join(str(error).split())}") from None
    for key in ("MAX_ITER", "IMS_PER_BATCH"):
        if cfg.SOLVER[key] < 1:
            raise ConfigError(f"detectron2.SOLVER.{key}: expected at least 1, found {cfg.SOLVER[key]}")
    if list(cfg.SOLVER.STEPS) != sorted(cfg.SOLVER.STEPS):
        raise ConfigError(f"detectron2.SOLVER.STEPS: expected the smaller first, found {list(cfg.SOLVER.STEPS)}")
    cfg.MODEL.DEVICE = str(device)
    cfg.DATALOADER.NUM_WORKERS = config.run.workers
    cfg.freeze()
    return cfg


def build(cfg: CfgNode, seed: int, backbone: weights.Weights | None = None) -> nn.Module:
    """The detector: its backbone from the file, if one is given, the rest initialised from the seed.

    Raises ConfigError where they do not fit.
    """
    seed_globals(seed, "detection", "init")
    model = build_model(cfg)
    if backbone:
        model.load_state_dict(weights.placed(model.state_dict(), backbone.tensors))
    return model.train()


def optimisation(cfg: CfgNode, model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD, and its rate: linear warm-up, then steps."""
    optimizer = build_optimizer(cfg, model)
    return optimizer, build_lr_scheduler(cfg, optimizer)


def version() -> dict[str, str | None]:
    """Detectron2's version, and the commit that it was installed from (None where pip did not note it)."""
    package = metadata.distribution("detectron2")
    source = json.loads(package.read_text("direct_url.json") or "{}")
    return {"version": package.version, "commit": source.get("vcs_info", {}).get("commit_id")}


def norm_used(cfg: CfgNode, processes: int) -> str:
    """What BatchNorm's statistics are really taken over."""
    name = cfg.MODEL.RESNETS.NORM
    each = cfg.SOLVER.IMS_PER_BATCH // processes
    if processes == 1:
        return f"BN ({name} in one process: the whole batch of {each})"
    return f"{name} ({processes} processes" + (f", each its own {each} images)" if name == "BN" else ")")
