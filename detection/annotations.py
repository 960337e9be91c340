"""VOC's and COCO's annotations, read before training: any fault is one line with its file and object.

Detectron2's own loaders and evaluators end in a traceback that names no file (in the last hour of training if the fault
is in the test split), or go on silently. No Detectron2 here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from mixmask.datasets import DataError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
COCO_CLASSES = 80


class Picture(NamedTuple):
    """An image of a split."""

    file: Path
    width: int
    height: int


class Annotations(NamedTuple):
    """What the annotations of a split hold."""

    pictures: list[Picture]
    counted: set[int]  # classes (VOC) or categories (COCO) with an object that counts: no crowd; in tests not difficult
    categories: dict[int, str]  # COCO's ids and names
    objects: int


class Fault(Exception):
    """What is wrong, without its place."""


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


# --------------------------------------------------------------------------------------------------------- VOC


def check_voc(folder: Path, split: str, testing: bool) -> Annotations:
    """All annotations of a split. Raises DataError. `testing`: VOC's evaluation reads more of an object."""
    pictures, counted, objects = [], set(), 0
    for image in read_voc(folder, split, testing):
        pictures.append(Picture(Path(image["file_name"]), image["width"], image["height"]))
        counted |= {thing["category_id"] for thing in image["annotations"] if not (testing and thing["difficult"])}
        objects += len(image["annotations"])
    if not counted:
        what = "object that is not difficult" if testing else "object"
        raise DataError(f"{folder}, {split}: no {what} in any of its {len(pictures):,} images")
    return Annotations(pictures, counted, {}, objects)


def read_voc(folder: Path, split: str, testing: bool = False) -> list[dict[str, Any]]:
    """The images of a split as Detectron2 has them, without `bbox_mode`. Raises DataError naming file and object.

    Boxes are x0, y0, x1, y1 in pixels; in the file they count from 1, both ends included.
    """
    return [_voc_image(folder, name, testing) for name in voc_names(folder, split)]


def voc_names(folder: Path, split: str) -> list[str]:
    """The images of a split, one a line of its list. Raises DataError; VOC's evaluation reads the file by itself."""
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    names = [line.strip() for line in read_text(path).removesuffix("\n").split("\n")]
    for number, name in enumerate(names, 1):
        if not name or len(name.split()) > 1 or name.startswith("\ufeff") or "/" in name:
            raise DataError(f"{path}, line {number}: expected the name of one image, found {name!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: {twice} is listed {names.count(twice)} times")
    return names


def _voc_image(folder: Path, name: str, testing: bool) -> dict[str, Any]:
    path = folder / "Annotations" / f"{name}.xml"
    root, where = _xml(path), str(path)
    try:
        width, height = (_voc_number(root, f"size/{side}", whole=True) for side in ("width", "height"))
        if width < 1 or height < 1:
            raise Fault(f"an image of {width:.0f} x {height:.0f} pixels")
        things = []
        for number, thing in enumerate(root.findall("object"), 1):
            where = f"{path}, object {number} ({_text(thing, 'name')!r})"
            things.append(_voc_object(thing, width, height, testing))
    except Fault as fault:
        raise DataError(f"{where}: {fault}") from None
    image = folder / "JPEGImages" / f"{name}.jpg"
    size = {"width": int(width), "height": int(height)}
    return {"file_name": str(image), "image_id": name, **size, "annotations": things}


def _xml(path: Path) -> Element:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _voc_object(thing: Element, width: float, height: float, testing: bool) -> dict[str, Any]:
    label = _text(thing, "name")
    if label not in VOC_CLASSES:
        raise Fault("unknown class; expected one of VOC's 20, such as " + ", ".join(VOC_CLASSES[:3]))
    keys = [f"bndbox/{corner}" for corner in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = (_voc_number(thing, key, whole=testing) for key in keys)
    if x0 > x1 or y0 > y1 or x0 > width or y0 > height or x1 < 1 or y1 < 1:
        raise Fault(f"box {x0:g} {y0:g} {x1:g} {y1:g} is empty, or outside of its image of {width:g} x {height:g}")
    if testing:  # VOC's evaluation in Detectron2 reads these
        _text(thing, "pose")
        _voc_number(thing, "truncated", whole=True)
    difficult = _voc_number(thing, "difficult", whole=True) if testing or thing.find("difficult") is not None else 0
    box = [x0 - 1, y0 - 1, x1, y1]
    return {"category_id": VOC_CLASSES.index(label), "bbox": box, "difficult": bool(difficult)}


def _text(parent: Element, key: str) -> str:
    element = parent.find(key)
    if element is None:
        raise Fault(f"no <{key.replace('/', '><')}>")
    return element.text or ""


def _voc_number(parent: Element, key: str, whole: bool) -> float:
    text = _text(parent, key)
    try:
        value = float(int(text) if whole else float(text))
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise Fault(f"{key}: expected a {'whole ' if whole else ''}number, found {text!r}")
    return value


# -------------------------------------------------------------------------------------------------------- COCO


def check_coco(folder: Path, split: str, testing: bool, polygons: bool = True) -> Annotations:
    """All annotations of a split. Raises DataError naming file and object.

    `testing`: COCO's evaluation reads more of an object. `polygons`: training wants them, not run-length masks.
    """
    path = folder / "annotations" / f"instances_{split}.json"
    content = _json(path)
    categories = _categories(content["categories"], path)
    pictures = _coco_pictures(content["images"], folder / split, path)
    ids: set[int] = set()
    counted: set[int] = set()
    for thing in content["annotations"]:
        try:
            _coco_object(thing, pictures, categories, testing, polygons)
            if thing["id"] in ids:
                raise Fault("another annotation has the same id")
        except Fault as fault:
            raise DataError(f"{path}, annotation {_named(thing, pictures)}: {fault}") from None
        ids.add(thing["id"])
        if not thing.get("iscrowd"):
            counted.add(thing["category_id"])
    if not counted:
        raise DataError(f"{path} holds no annotations, or of crowds alone")
    return Annotations(list(pictures.values()), counted, categories, len(ids))


def coco_files(folder: Path, split: str) -> list[Path]:
    """The image files that the annotations of a split name. Raises DataError."""
    path = folder / "annotations" / f"instances_{split}.json"
    return [picture.file for picture in _coco_pictures(_json(path)["images"], folder / split, path).values()]


def _json(path: Path) -> dict[str, list[dict]]:
    """The file's three lists of objects."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is cut off, or no JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        values = content.get(key) if isinstance(content, dict) else None
        if not isinstance(values, list):
            raise DataError(f"{path}: expected COCO's annotations, found no list '{key}'")
        for number, value in enumerate(values, 1):
            if not isinstance(value, dict):
                raise DataError(f"{path}, entry {number} of '{key}': expected an object, found {str(value)[:40]!r}")
    return content


def _categories(values: Iterable[dict], path: Path) -> dict[int, str]:
    """Id -> name. Raises DataError unless they are 80: Detectron2 takes label 80 for the background."""
    categories: dict[int, str] = {}
    for value in values:
        try:
            number = _get(value, "id", int)
            if number in categories:
                raise Fault("another category has the same id")
            categories[number] = _get(value, "name", str)
        except Fault as fault:
            raise DataError(f"{path}, category {value.get('id')}: {fault}") from None
    if len(categories) != COCO_CLASSES:
        raise DataError(
            f"{path}: expected {COCO_CLASSES} categories, as COCO has and the recipe's detector, found "
            f"{len(categories)}; list all of COCO's under 'categories', also those without an object"
        )
    return categories


def _coco_pictures(values: Iterable[dict], folder: Path, path: Path) -> dict[int, Picture]:
    pictures: dict[int, Picture] = {}
    files: set[str] = set()
    for value in values:
        try:
            number, name = _get(value, "id", int), _get(value, "file_name", str)
            width, height = _get(value, "width", int), _get(value, "height", int)
            if width < 1 or height < 1:
                raise Fault(f"an image of {width} x {height} pixels")
            if number in pictures or name in files:
                raise Fault("another image has the same id or file_name")
        except Fault as fault:
            raise DataError(f"{path}, image {value.get('id')} ({value.get('file_name')}): {fault}") from None
        files.add(name)
        pictures[number] = Picture(folder / name, width, height)
    return pictures


def _coco_object(
    thing: Mapping[str, Any],
    pictures: Mapping[int, Picture],
    categories: Mapping[int, str],
    testing: bool,
    polygons: bool,
) -> None:
    _get(thing, "id", int)
    image, category = _get(thing, "image_id", int), _get(thing, "category_id", int)
    if image not in pictures:
        raise Fault(f"no image has the id {image}")
    if category not in categories:
        raise Fault(f"no category has the id {category}")
    x, y, width, height = _numbers(thing, "bbox", 4)
    picture = pictures[image]
    if width < 0 or height < 0:
        raise Fault(f"bbox {thing['bbox']}: expected x, y, width and height, found a negative extent")
    if x > picture.width or y > picture.height or x + width < 0 or y + height < 0:
        raise Fault(f"bbox {thing['bbox']} is outside of its image of {picture.width} x {picture.height}")
    crowd = _get(thing, "iscrowd", int) if testing or "iscrowd" in thing else 0
    if crowd not in (0, 1):
        raise Fault(f"iscrowd: expected 0 or 1, found {crowd}")
    if thing.get("ignore"):
        raise Fault("'ignore' is not known to Detectron2")
    if testing:
        _numbers({"area": [thing.get("area")]}, "area", 1)
    _mask(thing, picture, testing, polygons and not testing and not crowd)


def _mask(thing: Mapping[str, Any], picture: Picture, testing: bool, polygons: bool) -> None:
    mask = thing.get("segmentation")
    if not mask:
        raise Fault("no segmentation")
    if isinstance(mask, dict) and not polygons:
        counts = mask.get("counts")
        if mask.get("size") != [picture.height, picture.width] or not isinstance(counts, list | str):
            raise Fault(f"a run-length mask of another size than its image, {picture.height} x {picture.width}")
        if isinstance(counts, list) and sum(_numbers(mask, "counts")) != picture.height * picture.width:
            raise Fault("the counts of its run-length mask do not add up to its image")
        return
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        raise Fault("segmentation: expected a list of polygons, each a list x, y, x, y, ...")
    for number, polygon in enumerate(mask):
        _numbers({f"polygon {number + 1}": polygon}, f"polygon {number + 1}")
    usable = [len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask]
    if not (usable[0] if testing else any(usable)):  # COCO's own code looks at the first one
        raise Fault("segmentation: no polygon of three points or more")


def _numbers(values: Mapping[str, Any], key: str, count: int | None = None) -> list[float]:
    """A list of finite numbers, `count` of them."""
    numbers = values.get(key)
    fits = isinstance(numbers, list) and set(map(type, numbers)) <= {int, float} and count in (None, len(numbers))
    if not fits or not abs(sum(numbers)) < 1e300:  # false for NaN as well
        raise Fault(f"{key}: expected {f'{count} ' if count else ''}numbers, found {str(numbers)[:60]}")
    return numbers


def _get(values: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in values:
        raise Fault(f"no '{key}'")
    if type(values[key]) is not kind:
        expected = {int: "a whole number", str: "a text"}[kind]
        raise Fault(f"{key}: expected {expected}, found {str(values[key])[:60]!r}")
    return values[key]


def _named(thing: Mapping[str, Any], pictures: Mapping[int, Picture]) -> str:
    """An annotation by its id and its image's file."""
    image = thing.get("image_id")
    known = isinstance(image, int) and image in pictures
    return f"{thing.get('id')} of image {pictures[image].file.name if known else image}"
