"""k-NN accuracy of a pre-trained encoder: the code that pre-training runs online, on a checkpoint.

Example:
    python eval/knn.py --checkpoint runs/pretrain/RUN/checkpoint.pt
    python eval/knn.py --checkpoint runs/pretrain/RUN/checkpoint.pt --config eval/configs/knn_euclidean.yaml
    python eval/knn.py --checkpoint moco_v2_800ep_pretrain.pth.tar --config eval/configs/knn.yaml \\
        --set dataset=imagenet run.data_root=DIR knn.features=backbone

Without --config the protocol is that of the pre-training's own recipe: the number that it logged.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmask import config as configs
from mixmask import datasets, formats, knn
from mixmask.config import Augment, ConfigError, KNNEval, Pretrain
from mixmask.datasets.settle import of_evaluations, settle
from mixmask.formats import Source, frozen_encoder
from mixmask.runs import Run, run_directory
from mixmask.training.optim import pick_device
from mixmask.training.progress import say


def evaluate(
    config: KNNEval,
    path: Path,
    augment: Augment,
    foreign: Source | None = None,
    directory: Path | None = None,
    runs_dir: Path = Path("runs"),
) -> dict[str, Any]:
    """k-NN of the checkpoint at `path`, on the data set of `config`; returns what result.json holds.

    augment: of it the size and the normalisation of images. foreign: as for `frozen_encoder`. directory: the run's own;
    by default below `runs_dir`, named after the config and its data.
    """
    config, device = settle(config), pick_device(config.run.device)
    with Run(directory or run_directory(runs_dir, config), config) as run:
        if run.result is None:
            encoder, *_ = frozen_encoder(path, foreign, device)
            train, test = (datasets.load_split(config, split) for split in ("train", "test"))
            values = knn.evaluate(
                encoder, train, test, augment, config.knn, device, config.run.workers, config.run.eval_batch
            )
            run.describe()
            run.finish({"run": run.id, "metrics": {f"{name}_last": value for name, value in values.items()}})
        for name, value in run.result["metrics"].items():
            say(f"{name} {value:.2f} %  ({run.directory / 'result.json'})")
        return run.result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[formats.reading_options(), configs.run_options(KNNEval)],
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint.pt of ours or in a public format")
    parser.add_argument("--config", help="another protocol, such as eval/configs/knn.yaml")
    args = parser.parse_args()
    source = formats.read(args.checkpoint, **formats.reading(args))
    recipe = source.recipe
    config = _config(args.config, args.set, recipe) if recipe else _public(args.config, args.set, args.checkpoint)
    seed = recipe.seed if recipe else config.seed
    config = dataclasses.replace(config, checkpoint=source.identity, seed=seed)
    foreign = None if recipe else source
    evaluate(config, args.checkpoint, source.augment(config.size), foreign, args.run_dir, args.runs_dir)


def _config(path: str | None, items: Sequence[str], recipe: Pretrain) -> KNNEval:
    """The protocol at `path`, or the pre-training's own; what it leaves open is the pre-training's, too."""
    overrides = configs.parse_overrides(items)
    for key in ("checkpoint", "seed"):
        if key in overrides:
            raise ConfigError(f"--set {key}: it is the checkpoint's own, and cannot be chosen")
    pretraining = configs.to_dict(recipe)
    inherited = {key: pretraining[key] for key in ("dataset", "allow_partial_data", "folder", "run", "seed")}
    inherited["run"] = of_evaluations(inherited["run"])
    if not path:
        return configs.resolve({"recipe": "knn", "knn": pretraining["knn"], **inherited}, overrides, KNNEval)
    protocol = {key: value for key, value in configs.read_yaml(path).items() if value != ""}
    try:
        if isinstance(protocol.get("run"), Mapping):
            protocol["run"] = {**inherited["run"], **protocol["run"]}
        return configs.resolve({**inherited, **protocol}, overrides, KNNEval)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from None


def _public(path: str | None, items: Sequence[str], checkpoint: Path) -> KNNEval:
    """The protocol at `path`, for a checkpoint that has no head and no recipe. Raises ConfigError for what it needs."""
    if not path:
        raise ConfigError(f"{checkpoint} names no protocol; expected --config, such as eval/configs/knn.yaml")
    config = configs.load(path, configs.parse_overrides(items), KNNEval)
    if config.knn.features == "output":
        raise ConfigError(f"knn.features: {checkpoint} has no head whose output could be compared; expected backbone")
    return config


if __name__ == "__main__":
    configs.main_guard(main)
