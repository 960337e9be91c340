"""Package a finished pre-training for an archive or a model hub: weights, model card, config, numbers.

examples:
  python paper/publish.py runs/pretrain/imagenet_moco-mixmask-e200-0a1b2c3d-s0 published/moco-mixmask
  python paper/publish.py RUN DIR --runs-dir runs results      where the encoder's evaluations are looked for

DIR, which must not exist, gets model.safetensors (torchvision's names, which are timm's), model.safetensors.json (whose
weights they are), config.json (for timm, where it can build the network), config.yaml (a recipe that repeats the run),
result.json and README.md, the model card, with lines that load it. Nothing is uploaded, and no licence is chosen.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detection.convert import convert
from mixmask import registry
from mixmask.config import UserError, main_guard, read_yaml
from mixmask.config.resnets import ARCHITECTURES
from mixmask.formats import Source, read
from mixmask.runs import read_result
from paper.keep import TEXTS

STAGES = ("linear", "finetune", "knn", "detection")  # whose results are numbers of the encoder
IN_PAPER = ("cifar100", "tiny_imagenet", "imagenet")  # the data sets of its numbers
NOT_IN_PAPER = "Its images are no data set of the paper: it replicates none of the numbers there."
_CIFAR = "CIFAR-100 is published without a licence; its authors ask to be cited (Krizhevsky 2009)."
LICENCES = {  # of the images, as their publishers state it
    "cifar100": _CIFAR,
    "cifar100_reduced": _CIFAR,
    "tiny_imagenet": "Tiny-ImageNet is taken from ImageNet: non-commercial research and education.",
    "imagenet": "ImageNet's terms of access: non-commercial research and education.",
    "photos": "The photographs of scikit-image's gallery, public domain or as its data folder says.",
    "folder": "The images are the publisher's own, or used with permission: state here the terms of their use.",
}
UNKNOWN = "State here the terms of use of the images."

CARD = """---
library_name: timm
tags: [self-supervised, mixmask, {framework}]
---
# {run}

{architecture}, pre-trained with {title} and {method} on {dataset} for {epochs}, seed {seed}, by the replication
of *MixMask: Revisiting Masking Strategy for Siamese ConvNets* (arXiv 2210.11456). A backbone without a classifier.

## Loading

Images are RGB in [0, 1], normalised with mean {mean} and standard deviation {std}; views of {size} pixels in training.

{loading}

## Numbers

{numbers}

Each metric's name is its protocol. One seed: the variance over seeds is not given here. {scale}

## How it was made

`config.yaml` holds every hyper-parameter; the code is at commit `{commit}`{modified}. The command was

```
{command}
```

## Terms

The code's licence is MIT. {licence} The licence of these weights is for their publisher to state.
"""

TIMM = """```python
import timm

model = timm.create_model("local-dir:DIR", pretrained=True)  # or "hf-hub:NAME"; its features are pooled
```
"""
TORCHVISION = """```python
import torch, torchvision
from safetensors.torch import load_file

model = torchvision.models.{arch}(num_classes=0)
{stem}model.load_state_dict(load_file("DIR/model.safetensors"), strict=False)  # no fc
model.fc = torch.nn.Identity()
```
"""
BY_NAME = """```python
import timm, torch
from safetensors.torch import load_file

model = timm.create_model("{name}", num_classes=0)
{stem}model.load_state_dict(load_file("DIR/model.safetensors"))
```
"""
SMALL_STEM = "model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)\n"
NO_POOLING = "model.maxpool = torch.nn.Identity()\n"
OURS = """torchvision and timm have no such network; the replication's library does:

```python
import mixmask

model = mixmask.load_backbone("DIR/model.safetensors")
```
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all of DIR or nothing. Raises UserError for a run that is not finished or whose weights are not there."""
    options = _parse(arguments)
    run, target = Path(options.run), Path(options.target)
    check(run, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".publish-") as temporary:
            part = Path(temporary) / "part"
            part.mkdir()
            publish(run, part, [Path(folder) for folder in options.runs_dir or [run.parents[1]]])
            part.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    print(f"written: {', '.join(sorted(path.name for path in target.iterdir()))} in {target}")
    print("before publishing: state the licence of the weights, at the end of README.md")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python paper/publish.py",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a finished pre-training, runs/pretrain/<run>")
    parser.add_argument("target", metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument(
        "--runs-dir", nargs="+", metavar="DIR", help="where evaluations are looked for (default: that of RUN)"
    )
    return parser.parse_args(arguments)


def check(run: Path, target: Path) -> None:
    """Raises UserError for what is no finished, whole pre-training, and where something would be overwritten."""
    if target.exists():
        raise UserError(f"{target} exists; give another name, or move it away")
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    if read_result(run) is None:
        raise UserError(f"{run} is not finished: it has no result.json; launch it again to continue it")
    missing = [name for name in (*TEXTS, "checkpoint.pt") if not (run / name).exists()]
    if missing:
        raise UserError(f"{run}: {missing[0]} is missing, expected {', '.join((*TEXTS, 'checkpoint.pt'))}")


def publish(run: Path, target: Path, folders: Sequence[Path]) -> None:
    """Fill the directory `target` with what is published of `run`; its evaluations lie in `folders`."""
    source = read(run / "checkpoint.pt")  # refuses what is not a pre-training of ours
    convert(source, run / "checkpoint.pt", target / "model.safetensors", "timm")
    shutil.copyfile(run / "result.json", target / "result.json")
    recipe = re.sub(r"^( *data_root:).*$", r"\1 data", (run / "config.yaml").read_text(encoding="utf-8"), flags=re.M)
    (target / "config.yaml").write_text(recipe, encoding="utf-8")
    if _is_public(source):
        (target / "config.json").write_text(json.dumps(_timm_config(source), indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(card(run, source, folders), encoding="utf-8")


def card(run: Path, source: Source, folders: Sequence[Path]) -> str:
    """The model card, from the run's own record."""
    config, backbone = source.recipe, source.backbone
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    dataset = registry.DATASETS[config.dataset]
    rows = list(numbers(run, folders))
    table = [f"| {stage} | `{name}` | {value:.2f} |" for stage, name, value in rows]
    return CARD.format(
        run=source.identity,
        framework=config.framework,
        title=registry.FRAMEWORKS[config.framework].title,
        method=registry.METHODS[config.method].title,
        architecture=f"{backbone.arch} of width {backbone.width} with the {backbone.stem} stem",
        dataset=dataset.title or config.dataset,
        epochs=f"{config.epochs} epoch{'s' * (config.epochs != 1)}",
        seed=config.seed,
        mean=", ".join(f"{value:g}" for value in source.mean),
        std=", ".join(f"{value:g}" for value in source.std),
        size=config.augment.size,
        loading=loading(source),
        numbers="\n".join(["| stage | metric | % |", "|---|---|---:|", *table]),
        scale="" if config.dataset in IN_PAPER else NOT_IN_PAPER,
        commit=environment.get("commit") or "unknown",
        modified=", with changes that were not committed" if environment.get("modified") else "",
        command=_command((run / "command.txt").read_text(encoding="utf-8")),
        licence=LICENCES.get(config.dataset, UNKNOWN),
    )


def _command(text: str) -> str:
    """The run's command without the places of the machine: where the data are, where the run is."""
    words = shlex.split(text)
    for option in ("--run-dir", "--runs-dir"):
        while option in words:
            at = words.index(option)
            del words[at : at + 2]
    words = [word for word in words if not word.startswith("run.data_root=")]
    return shlex.join(words[:-1] if words[-1] == "--set" else words)


def numbers(run: Path, folders: Sequence[Path]) -> Iterator[tuple[str, str, float]]:
    """(stage, metric with its protocol, value) of the last epoch: k-NN of the run itself, then its evaluations'."""
    result = read_result(run)
    places = sorted(place for folder in folders for stage in STAGES for place in folder.glob(f"{stage}/*"))
    evaluations = [place for place in places if _encoder(place) == result["run"] and read_result(place)]
    for place in [run, *evaluations]:
        for name, value in read_result(place)["metrics"].items():
            if (place != run or name.startswith("knn_")) and not name.endswith(("_best", "_init")):
                yield place.resolve().parent.name, name, value


def _encoder(place: Path) -> str | None:
    """The run whose encoder an evaluation took."""
    return read_yaml(place / "config.yaml").get("checkpoint") if (place / "config.yaml").exists() else None


def loading(source: Source) -> str:
    """Python that loads the weights with the libraries that have such a network."""
    if source.backbone.width != 64:
        return OURS
    small = source.backbone.stem != "imagenet"
    stem = (SMALL_STEM if small else "") + (NO_POOLING if source.backbone.stem == "cifar" else "")
    if source.backbone.arch not in ARCHITECTURES:  # timm's: no other is written for it
        return BY_NAME.format(name=source.backbone.arch.removeprefix("timm/"), stem=stem)
    torchvision = TORCHVISION.format(arch=source.backbone.arch, stem=stem)
    return torchvision if small else f"{TIMM}\n{torchvision}"


def _is_public(source: Source) -> bool:
    """Whether torchvision and timm build this network by its name alone."""
    known = source.backbone.arch in ARCHITECTURES
    return known and source.backbone.width == 64 and source.backbone.stem == "imagenet"


def _timm_config(source: Source) -> dict[str, Any]:
    """What timm reads beside model.safetensors."""
    size = source.recipe.augment.size
    return {
        "architecture": source.backbone.arch,
        "num_classes": 0,
        "num_features": ARCHITECTURES[source.backbone.arch].features(source.backbone.width),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": list(source.mean),
            "std": list(source.std),
            "num_classes": 0,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }


if __name__ == "__main__":
    main_guard(main)
