"""Small VOC and COCO trees out of the embedded photographs: the same files in the same form, for smoke runs and tests.

A picture is a darkened patch of one photograph with patches of others pasted in as ellipses: the photograph is the
object's class. No pixel of a training picture's photographs is in a test picture. The same call writes the same trees.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from detection.annotations import COCO_CLASSES, VOC_CLASSES
from mixmask import datasets
from mixmask.randomness import numpy_generator
from mixmask.runs import write_atomically

IMAGES = 8  # a split
OBJECTS = 5  # a picture: 40 in a split, so each of VOC's 20 classes twice (its AP is the mean over all of them)
SIZE = (160, 128)  # width, height; every other picture is upright


@dataclass(frozen=True)
class Thing:
    """An object in a picture."""

    label: int
    outline: list[tuple[int, int]]  # corners (x, y) of a polygon, pixels, both ends counted

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1, pixels, both ends counted."""
        xs, ys = zip(*self.outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def write(root: Path, task: str) -> None:
    """The trees of `task` ("voc" or "coco") below `root`, unless they are there. `IMAGES` pictures in every split."""
    mark = root / f"{task}.txt"  # written last
    if mark.exists():
        return
    if task == "voc":
        for year, split, patches in (("VOC2007", "trainval", "train"), ("VOC2012", "trainval", "train")):
            write_voc(root / year, split, patches)
        write_voc(root / "VOC2007", "test", "test")
    else:
        write_coco(root / "coco", "train2017", "train")
        write_coco(root / "coco", "val2017", "test")
    write_atomically(mark, f"{IMAGES} pictures a split, made of photographs of scikit-image\n")


def pictures(name: str, patches: str, classes: int) -> Iterator[tuple[Image.Image, list[Thing]]]:
    """`IMAGES` pictures and their objects, of the patches "train" or "test" of the photographs."""
    images, labels = _patches(patches)
    rng = numpy_generator("detection photos", name)
    order = rng.permutation(IMAGES * OBJECTS) % classes

    def patch(label: int, size: tuple[int, int]) -> Image.Image:
        """A patch of a photograph; labels beyond the last photograph's are theirs again, upside down."""
        image = Image.fromarray(images[rng.choice(np.flatnonzero(labels == label % (labels.max() + 1)))])
        image = image.resize(size, Image.Resampling.BILINEAR)
        return image if label <= labels.max() else image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)

    for number in range(IMAGES):
        size = SIZE[:: 1 if number % 2 else -1]
        picture = patch(int(rng.integers(classes)), size).point(lambda value: value // 3)
        things = []
        for place in range(OBJECTS):
            label, outline = int(order[number * OBJECTS + place]), _outline(rng, size, place)
            things.append(Thing(label, outline))
            mask = Image.new("1", size)
            ImageDraw.Draw(mask).polygon(outline, fill=1)
            picture.paste(patch(label, size), mask=mask)
        yield picture, things


@functools.cache
def _patches(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Patches (N, 32, 32, 3) of the photographs, and which photograph each is of (N,)."""
    photographs = datasets.load("photos", "", split)
    return photographs.images.permute(0, 2, 3, 1).numpy(), photographs.labels.numpy()


def _outline(rng: np.random.Generator, size: tuple[int, int], place: int) -> list[tuple[int, int]]:
    """An ellipse of 16 corners in its own part of the picture: objects of one picture do not overlap."""
    longer, shorter = max(size), min(size)
    column, row = place % 3, place // 3  # 3 parts along the longer side, 2 along the other
    centre = np.array([(column + 0.5) * longer / 3, (row + 0.5) * shorter / 2])
    radius = rng.uniform(14, longer / 6 - 3, 2)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)[:, None]
    corners = np.rint(centre + radius * np.hstack([np.cos(angles), np.sin(angles)])).astype(int)
    return [(x, y) if size[0] == longer else (y, x) for x, y in corners.tolist()]


def write_voc(folder: Path, split: str, patches: str) -> None:
    """A split of a VOC devkit's year."""
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = []
    for number, (picture, things) in enumerate(pictures(f"{folder.name} {split}", patches, len(VOC_CLASSES))):
        names.append(f"{split}_{number:06}")
        picture.save(folder / "JPEGImages" / f"{names[-1]}.jpg", quality=95)
        (folder / "Annotations" / f"{names[-1]}.xml").write_bytes(_voc_xml(names[-1], picture.size, things))
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")


def _voc_xml(name: str, size: tuple[int, int], things: list[Thing]) -> bytes:
    """VOC's annotation: boxes in pixels counted from 1, both ends in them."""
    tree = ElementTree.Element("annotation")
    _fill(tree, {"filename": f"{name}.jpg", "size": {"width": size[0], "height": size[1], "depth": 3}})
    for thing in things:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (value + 1 for value in thing.box), strict=True)
        kind = {"name": VOC_CLASSES[thing.label], "pose": "Unspecified", "truncated": 0, "difficult": 0}
        _fill(tree, {"object": {**kind, "bndbox": dict(corners)}})
    return ElementTree.tostring(tree)


def _fill(parent: ElementTree.Element, values: dict) -> None:
    for key, value in values.items():
        child = ElementTree.SubElement(parent, key)
        if isinstance(value, dict):
            _fill(child, value)
        else:
            child.text = str(value)


def write_coco(folder: Path, split: str, patches: str) -> None:
    """A split of COCO 2017, with polygons; its images lie beside the other split's."""
    for part in ("annotations", split):
        (folder / part).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, (picture, things) in enumerate(pictures(f"{folder.name} {split}", patches, COCO_CLASSES), 1):
        name = f"{number:012}.jpg"
        picture.save(folder / split / name, quality=95)
        images.append({"id": number, "file_name": name, "width": picture.width, "height": picture.height})
        annotations += [_coco_annotation(number * 100 + place, number, thing) for place, thing in enumerate(things)]
    categories = [{"id": label + 1, "name": f"class {label + 1}"} for label in range(COCO_CLASSES)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    write_atomically(folder / "annotations" / f"instances_{split}.json", json.dumps(content))


def _coco_annotation(number: int, image: int, thing: Thing) -> dict:
    x0, y0, x1, y1 = thing.box
    width, height = x1 - x0, y1 - y0
    return {
        "id": number,
        "image_id": image,
        "category_id": thing.label + 1,
        "bbox": [x0, y0, width, height],
        "segmentation": [[value for corner in thing.outline for value in corner]],
        "area": width * height * np.pi / 4,
        "iscrowd": 0,
    }
