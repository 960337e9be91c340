"""What a run costs, estimated: counted FLOPs over a sustained rate, measured or assumed. No torch here.

The forward pass is counted convolution by convolution (2 FLOP per multiply-add; ResNet-18 at 32x32: 1.11 GFLOP,
ResNet-50 at 224x224: 8.2 GFLOP); a pass with gradient costs three forward passes. The rates are those of published
training on one A100 in mixed precision: ResNet-50 at 224, 2,025 images/s supervised (bandwidth-bound), 49 TFLOP/s;
ResNet-18 at 32, 77 TFLOP/s. For fp32 recipes half of them is assumed, and 0.05 TFLOP/s for two CPU cores. Detection
is taken from Detectron2's model zoo: R50-C4 needs 0.55 to 0.58 s an iteration of 16 images on 8 V100, and an A100 is
taken as two of them. A GPU that is named (`--gpu h200`) has a kept report, benchmarks/results/NAME.json of
`benchmarks/gpu.py`: its rates of MoCo with MixMask take the place of the assumed ones.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

from mixmask import registry
from mixmask.config import Backbone, Config, ConfigError, Convert, Detection, Finetune, Linear, Pretrain
from mixmask.config.resnets import ARCHITECTURES

DETECTION = 0.57 * 8 / 16 / 2 / 3600  # hours an image of a training iteration, on one A100
CONVERSION = 0.01  # hours, anywhere

TERAFLOPS = {"resnet50": 49.0, "resnet18": 77.0}  # any other network: as ResNet-50
ASSUMPTION = (
    f"estimate: counted FLOPs on one A100 at an assumed {TERAFLOPS['resnet50']:g} (ResNet-50, others) or "
    f"{TERAFLOPS['resnet18']:g} (ResNet-18) TFLOP/s in bf16, half of it in fp32; data loading not counted"
)
CPU_TERAFLOPS = 0.05
REPORTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MEASURED = {"resnet18": "steps/moco/mixmask", "resnet50": "steps/imagenet/moco/mixmask"}  # rows of a report

RESNET50 = Backbone("resnet50", "imagenet", 64, 1)  # public checkpoints


@functools.cache
def measured(gpu: str) -> dict[str, dict[str, float]]:
    """TFLOP/s by architecture and precision in the kept report of a GPU. Raises ConfigError where there is none."""
    path, rates = REPORTS / f"{gpu}.json", {}
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, row in report.get("results", {}).items():
        case, _, precision = name.partition(", ")
        for arch in (arch for arch, known in MEASURED.items() if case == known and precision in ("fp32", "bf16")):
            rates.setdefault(arch, {})[precision] = row["tflop_per_second"]
    if not rates:
        raise ConfigError(f"--gpu: no report of '{gpu}' in benchmarks/results; benchmarks/gpu.py makes one")
    return rates


def teraflops(arch: str, precision: str, gpu: str = "") -> float:
    """The rate of a GPU, measured if it is named and its report has it; otherwise an A100's, assumed."""
    known = measured(gpu).get(arch, {}) if gpu else {}
    return known.get(precision) or TERAFLOPS.get(arch, TERAFLOPS["resnet50"]) / (1 if precision == "bf16" else 2)


def basis(gpu: str = "") -> str:
    """What the hours rest on, for a line below them."""
    if not gpu:
        return ASSUMPTION
    rates = [arch + ",".join(f" {p} {rate:.0f}" for p, rate in known.items()) for arch, known in measured(gpu).items()]
    return f"measured on {gpu} (benchmarks/results/{gpu}.json), TFLOP/s: {', '.join(rates)}; the rest: {ASSUMPTION}"


@functools.cache
def forward_gflop(backbone: Backbone, size: int) -> float:
    """GFLOP of one forward pass of one image of `size` x `size` pixels (convolutions only; of a third-party backbone as
    PyTorch counts it, with ConfigError if PyTorch is missing)."""
    if backbone.arch not in ARCHITECTURES:
        return registry.of_network("forward_gflop", backbone, size)
    arch, width = ARCHITECTURES[backbone.arch], backbone.width
    bottleneck = arch.bottleneck
    side = size // 2 if backbone.stem == "imagenet" else size
    macs = 3 * width * side**2 * (49 if backbone.stem == "imagenet" else 9)
    side = side if backbone.stem == "cifar" else side // 2  # max-pooling
    channels = width
    for stage, blocks in enumerate(arch.blocks):
        inner = width * 2**stage
        out = 4 * inner if bottleneck else inner
        for block in range(blocks):
            before, side = side, side // (2 if stage and not block else 1)
            if bottleneck:
                macs += channels * inner * before**2 + 9 * inner**2 * side**2 + inner * out * side**2
            else:
                macs += 9 * (channels * inner + inner**2) * side**2
            macs += channels * out * side**2 if channels != out else 0  # projection on the shortcut
            channels = out
    return 2 * macs / 1e9


def pretrain_pflop(config: Pretrain) -> float:
    """PFLOP of a pre-training."""
    gradient, forward = registry.find(registry.FRAMEWORKS, config.framework, "framework").passes(config.settings)
    passes = 3 * (gradient + multi_crop(config) + added_passes(config)) + forward
    images = images_of(config).train * config.epochs
    return images * passes * forward_gflop(config.backbone, config.augment.size) / 1e6


def added_passes(config: Pretrain) -> float:
    """Passes with gradient that the method adds. MSCN's masked view takes the clean one's place; crops go by area."""
    method = registry.find(registry.METHODS, config.method, "method")
    if method.crops:
        return config.mscn.keep_clean + config.mscn.crops * (config.mscn.crop_size / config.augment.size) ** 2
    return method.added


def multi_crop(config: Pretrain) -> float:
    """Passes with gradient of a framework's own crops, by area (SwAV); MSCN's take their place."""
    framework = registry.find(registry.FRAMEWORKS, config.framework, "framework")
    if not framework.crop_size or registry.find(registry.METHODS, config.method, "method").crops:
        return 0.0
    settings = {"crops": 0, "crop_size": framework.crop_size, **config.settings}
    return settings["crops"] * (settings["crop_size"] / config.augment.size) ** 2


def images_of(config: Pretrain | Linear | Finetune) -> registry.Dataset:
    """How many images its data set has; the user's own are counted in `data`. Raises ConfigError for an unknown one."""
    spec = registry.find(registry.DATASETS, config.dataset, "dataset")
    counts = [int(number.replace(",", "")) for number in re.findall(r": ([\d,]+) images", config.data)]
    return dataclasses.replace(spec, train=counts[0], test=counts[1]) if len(counts) == 2 else spec


def linear_pflop(config: Linear, backbone: Backbone) -> float:
    """PFLOP of a linear probe: forward passes only, of all images; every epoch's views, or once where cached."""
    passes = 1 if config.features == "cached" else config.epochs
    dataset = images_of(config)
    return (dataset.train + dataset.test) * passes * forward_gflop(backbone, config.augment.size) / 1e6


def finetune_pflop(config: Finetune, backbone: Backbone) -> float:
    """PFLOP of a fine-tuning: the labelled images with gradient, the test images without, every epoch."""
    dataset = images_of(config)
    passes = config.epochs * (3 * dataset.train * config.labels / 100 + dataset.test)
    return passes * forward_gflop(backbone, config.augment.size) / 1e6


def hours(config: Config, origin: Config, gpus: int, gpu: str = "") -> float:
    """Expected hours on one GPU, an A100 unless another is named; on two CPU cores where `gpus` is 0.

    `origin`: the first run of its chain. Of your own images (`dataset: folder`), which nobody has counted: nan.
    """
    if isinstance(config, Convert):
        return CONVERSION
    if isinstance(config, Detection):
        return detection_hours(config)
    backbone = origin.backbone if isinstance(origin, Pretrain) else RESNET50
    if not images_of(config).train:
        return math.nan
    rate = teraflops(backbone.arch, origin.precision if isinstance(origin, Pretrain) else "fp32", gpu)
    return _pflop(config, backbone) * 1e3 / (rate if gpus else CPU_TERAFLOPS) / 3600


def detection_hours(config: Detection) -> float:
    """Expected hours on one A100; the small trials of the smoke preset take as long on the CPU."""
    solver = config.detectron2["SOLVER"]
    return solver["MAX_ITER"] * solver["IMS_PER_BATCH"] * DETECTION


def _pflop(config: Config, backbone: Backbone) -> float:
    if isinstance(config, Pretrain):
        return pretrain_pflop(config)
    return finetune_pflop(config, backbone) if isinstance(config, Finetune) else linear_pflop(config, backbone)
