"""Which training images are labelled: SimCLR's 1 % and 10 % of ImageNet, or a class-balanced share of any data set.

SimCLR's lists are files of names such as n04235860_14959.JPEG. They are read from imagenet_subsets/ under the data
root, fetched once where that is allowed, and refused unless their SHA-256 is that of the published files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import os
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixmask import datasets
from mixmask.config import ConfigError, Finetune
from mixmask.datasets import DataError, Files, Resident

FOLDER = "imagenet_subsets"  # its name in google-research/simclr, and under the data root
URL = f"https://raw.githubusercontent.com/google-research/simclr/383d4143fd8cf7879ae10f1046a9baeb753ff438/{FOLDER}"
SHA256 = {  # of the files at that commit: 12,811 and 128,116 names; the first are among the second
    "1percent.txt": "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    "10percent.txt": "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
}
TIMEOUT = 30  # seconds without an answer


def settle(config: Finetune) -> tuple[Finetune, str]:
    """The config with the list that can be had, and a note where that is not the one it names; else "".

    A list that is absent and cannot be fetched gives way to the balanced subset: `label_list` becomes "balanced", so
    that the run has another identity. Raises ConfigError for data and shares of which there is no list.
    """
    if config.label_list == "balanced":
        return config, ""
    path = list_path(config)
    problem = "" if path.exists() else fetch(path) if config.run.download else "run.download is false"
    if not problem:
        return config, ""
    note = (
        f"SimCLR's list {path} is absent ({problem}); a class-balanced subset takes its place. To have the list, put "
        f"{URL}/{path.name} there"
    )
    return dataclasses.replace(config, label_list="balanced"), note


def list_path(config: Finetune) -> Path:
    """Where the list of this config lies. Raises ConfigError where SimCLR has none."""
    name = f"{config.labels:g}percent.txt"
    if config.dataset != "imagenet" or name not in SHA256:
        raise ConfigError(
            f"label_list: SimCLR has lists of 1 and 10 percent of imagenet, found {config.labels:g} percent of "
            f"{config.dataset}; expected label_list=balanced"
        )
    return Path(config.run.data_root) / FOLDER / name


def fetch(path: Path) -> str:
    """Download the list, check it, and put it in place in one step; returns what went wrong, "" if nothing did."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with urllib.request.urlopen(f"{URL}/{path.name}", timeout=TIMEOUT) as answer:
            content = answer.read()
        if hashlib.sha256(content).hexdigest() != SHA256[path.name]:
            return f"the download is another file, of {len(content):,} bytes"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, page, right to write; cut off
        partial.unlink(missing_ok=True)
        return f"the download failed: {' '.join(str(error).split())}"
    return ""


def choose(dataset: Resident | Files, config: Finetune) -> tuple[Tensor, str]:
    """Sorted indices, int64 (M,), of the labelled training images, and in words which they are.

    Raises DataError for a list that is absent or altered, or names images that a complete data set lacks.
    """
    if config.labels == 100:
        return torch.arange(len(dataset)), f"all {len(dataset):,} labels"
    if config.label_list == "simclr":
        return _listed(dataset, list_path(config))
    indices = datasets.subset(dataset.labels, config.labels / 100, config.subset_seed)
    counts = torch.bincount(dataset.labels[indices], minlength=len(dataset.classes))
    low, high = int(counts.min()), int(counts.max())
    each = f"{low}" if low == high else f"{low} to {high}"
    which = "class-balanced subset, our own" + (f" (number {config.subset_seed})" if config.subset_seed else "")
    return indices, f"{which}: {len(indices):,} of {len(dataset):,} images, {each} in each class"


def _listed(dataset: Resident | Files, path: Path) -> tuple[Tensor, str]:
    names = read_list(path)
    index = {os.path.join(*Path(file).parts[-2:]): i for i, file in enumerate(dataset.paths)}  # <wnid>/<file>
    places = {name: index.get(os.path.join(name.split("_")[0], name)) for name in names}
    absent = [name for name, place in places.items() if place is None]
    if len(absent) == len(names) or (absent and not dataset.note):  # a note: the data set is known to be partial
        raise DataError(
            f"{path}: {len(absent):,} of its {len(names):,} images are not in the training set: {absent[0]}"
        )
    indices = torch.tensor([place for place in places.values() if place is not None]).sort().values
    return indices, f"SimCLR's {path.name}: {len(indices):,} of its {len(names):,} images"


def read_list(path: Path) -> Sequence[str]:
    """The names in one of SimCLR's lists. Raises DataError for a file that is absent or not the published one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read SimCLR's list {path}: {error.strerror}; expected {URL}/{path.name}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[path.name]:
        raise DataError(
            f"{path} is not SimCLR's list: {len(content.splitlines()):,} lines, SHA-256 {digest[:8]}..., expected "
            f"{SHA256[path.name][:8]}...; delete it, and it is fetched again"
        )
    return content.decode().split()
