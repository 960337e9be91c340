"""Detection data (VOC, COCO): what is wrong in annotations and images is a line, before training, with its place."""

import dataclasses
import io
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection import annotations, datasets, photos, pictures
from mixmask import config as configs
from mixmask.config import Detection
from mixmask.datasets import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    photos.write(root, "voc")
    photos.write(root, "coco")
    return root


@pytest.fixture
def copy(trees, tmp_path) -> Path:
    shutil.copytree(trees, tmp_path / "data")
    return tmp_path / "data"


def recipe(root: Path, task: str, *items: str) -> Detection:
    recipe = ROOT / "detection" / "configs" / f"{task}.yaml"
    settings = [f"run.data_root={root}", "run.workers=1", "allow_partial_data=true", *items]
    return configs.load(recipe, configs.parse_overrides(settings), Detection)


def prepare(root: Path, task: str, directory: Path | None = None, *items: str) -> datasets.Data:
    directory = directory or root / "runs" / "run"
    directory.mkdir(parents=True, exist_ok=True)
    return datasets.prepare(recipe(root, task, *items), directory)


def xml(split: str, *changes: tuple[str, str]):
    """Replace patterns in the first image's annotations of a split, each once."""

    def change(root: Path) -> None:
        path = root / "VOC2007" / "Annotations" / f"{split}_000000.xml"
        text = path.read_text()
        for pattern, replacement in changes:
            text, count = re.subn(pattern, replacement, text, count=1, flags=re.S)
            assert count, pattern
        path.write_text(text)

    return change


def names(text: str):
    """The list of the test split's images."""
    return lambda root: (root / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text(text)


SPLIT = "".join(f"test_{number:06}\n" for number in range(photos.IMAGES))
VOC = {
    "cut off": (xml("test", ("</object>.*", "")), r"test_000000\.xml: (unclosed token|no element found)"),
    "training: cut off": (xml("trainval", ("<bndbox>.*", "")), r"cannot read .*trainval_000000\.xml: no element found"),
    "a web page": (xml("test", (".*", "<html>404</html>")), r"test_000000\.xml: no <size><width>"),
    "unknown encoding": (
        xml("test", ("^", '<?xml version="1.0" encoding="x"?>')),
        r"test_000000\.xml: unknown encoding",
    ),
    "no size": (xml("test", ("<width>", "<w>"), ("</width>", "</w>")), r"000000\.xml: no <size><width>"),
    "size 0": (xml("trainval", (r"<width>\d+", "<width>0")), "an image of 0 x 160 pixels"),
    "unknown class": (xml("test", ("<name>", "<name>un")), r"test_000000\.xml, object 1 \('un\w+'\): unknown class"),
    "training: unknown class": (xml("trainval", ("<name>", "<name> ")), r"object 1 \(' \w+'\): unknown class"),
    "no name": (xml("test", ("<name>.*?</name>", "")), r"test_000000\.xml: no <name>"),
    "training: no box": (xml("trainval", ("<bndbox>.*?</bndbox>", "")), r"object 1 \('\w+'\): no <bndbox><xmin>"),
    "training: text": (xml("trainval", ("<xmin>", "<xmin>a")), r"object 1 .*bndbox/xmin: expected a number, found 'a"),
    "training: NaN": (xml("trainval", (r"<xmin>\d+", "<xmin>nan")), "expected a number, found 'nan'"),
    "a part of a pixel": (
        xml("test", (r"(<ymax>\d+)", r"\1.5")),
        r"bndbox/ymax: expected a whole number, found '\d+.5'",
    ),
    "turned round": (xml("trainval", (r"<xmin>\d+", "<xmin>127")), "object 1 .*box 127 .* is empty, or outside"),
    "outside": (xml("test", (r"<xmin>\d+", "<xmin>500"), (r"<xmax>\d+", "<xmax>600")), "outside of its image of 128"),
    "no pose": (xml("test", ("<pose>.*?</pose>", "")), r"test_000000\.xml, object 1 .*: no <pose>"),
    "no difficult": (xml("test", ("<difficult>0</difficult>", "")), "object 1 .*: no <difficult>"),
    "two columns": (
        names(SPLIT.replace("\n", "  1\n")),
        "line 1: expected the name of one image, found 'test_000000  1'",
    ),
    "blank line": (names(SPLIT + "\n"), r"test\.txt, line 9: expected the name of one image, found ''"),
    "byte order mark": (names("\ufeff" + SPLIT), "line 1: expected the name of one image"),
    "twice": (names(SPLIT + "test_000003\n"), "test_000003 is listed 2 times"),
    "no images": (names(""), r"test\.txt, line 1"),
    "suffixes": (
        names(SPLIT.replace("\n", ".jpg\n")),
        r"8 of 8 files are missing or empty, first: \['test_000000\.jpg\.xml",
    ),
    "training image in the test": (
        names(SPLIT + "trainval_000001\n"),
        "images are in the test split too, first trainval",
    ),
}


@pytest.mark.parametrize("fault", VOC)
def test_faults_of_voc_are_named_before_training(fault, copy):
    change, message = VOC[fault]
    change(copy)
    with pytest.raises(DataError, match=message) as error:
        prepare(copy, "voc")
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_what_voc_has_and_detectron2_takes_is_accepted(copy):
    """VOC 2012 has parts of pixels; carriage returns, other files and links that lead nowhere disturb nobody."""
    xml("trainval", (r"(<ymax>\d+)", r"\1.5"), ("<pose>.*?</pose>", ""), ("<difficult>0</difficult>", ""))(copy)
    names(SPLIT.replace("\n", "\r\n"))(copy)
    (copy / "VOC2007" / "JPEGImages" / "._test_000000.jpg").write_bytes(b"x")
    (copy / "VOC2007" / "JPEGImages" / "zz.jpg").symlink_to("/nowhere")
    assert not prepare(copy, "voc").absent
    box = annotations.read_voc(copy / "VOC2007", "trainval")[0]["annotations"][0]["bbox"]
    assert box[3] % 1 == 0.5 and box[0] % 1 == 0


def test_class_without_an_object_that_counts_is_noted(copy):
    for path in (copy / "VOC2007" / "Annotations").glob("test_*.xml"):
        text = path.read_text().replace("<name>dog<", "<name>cat<")
        text = re.sub(r"(<name>sofa</name>((?!</object>).)*<difficult>)0", r"\g<1>1", text, flags=re.S)
        path.write_text(text)
    data = prepare(copy, "voc")
    assert data.absent == ["dog", "sofa"]
    assert "no object that counts of dog, sofa: its AP is the mean over the other 18 classes" in data.notes[-1]
    for path in (copy / "VOC2007" / "Annotations").glob("test_*.xml"):
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    with pytest.raises(DataError, match="test: no object that is not difficult in any of its 8 images"):
        prepare(copy, "voc")


# ------------------------------------------------------------------------------------------------------------ COCO


def of_object(**values):
    """Change the fourth annotation; None: drop the key."""

    def change(content: dict) -> None:
        thing = content["annotations"][3]
        thing.update(values)
        for key in [key for key in values if values[key] is None]:
            del thing[key]

    return change


def of_image(**values):
    def change(content: dict) -> None:
        content["images"][2].update(values)

    return change


def on(key: str, value):
    return lambda content: content.__setitem__(key, value)


RLE = {"counts": [10, 20], "size": [160, 128]}
OBJECT = r"instances_(train|val)2017\.json, annotation 103 of image 000000000001\.jpg: "
COCO = {
    "no bbox": (of_object(bbox=None), OBJECT + "bbox: expected 4 numbers, found None"),
    "three numbers": (of_object(bbox=[1, 2, 3]), OBJECT + "bbox: expected 4 numbers"),
    "NaN": (of_object(bbox=[1, 2, 3, float("nan")]), OBJECT + "bbox: expected 4 numbers"),
    "beyond all numbers": (of_object(bbox=[1, 2, 3, 10**400]), OBJECT + "bbox: expected 4 numbers"),
    "negative": (of_object(bbox=[50, 50, -3, 3]), OBJECT + r"bbox \[50, 50, -3, 3\]: .* negative extent"),
    "outside": (of_object(bbox=[500, 50, 3, 3]), OBJECT + "bbox .* outside of its image of 128 x 160"),
    "no segmentation": (of_object(segmentation=None), OBJECT + "no segmentation"),
    "empty segmentation": (of_object(segmentation=[]), OBJECT + "no segmentation"),
    "a line": (of_object(segmentation=[[1, 2, 3, 4]]), OBJECT + "segmentation: no polygon of three points"),
    "flat polygon": (of_object(segmentation=[1, 2, 3, 4, 5, 6]), OBJECT + "segmentation: expected a list of polygons"),
    "text": (of_object(segmentation=[["1", 2, 3, 4, 5, 6]]), OBJECT + "polygon 1: expected numbers"),
    "crowd of another size": (
        of_object(iscrowd=1, segmentation={"counts": [1], "size": [1, 1]}),
        OBJECT + "a run-length",
    ),
    "crowd cut off": (of_object(iscrowd=1, segmentation=RLE), OBJECT + "the counts of its run-length mask"),
    "iscrowd": (of_object(iscrowd=2), OBJECT + "iscrowd: expected 0 or 1, found 2"),
    "ignore": (of_object(ignore=1), OBJECT + "'ignore' is not known"),
    "no category": (of_object(category_id=None), OBJECT + "no 'category_id'"),
    "unknown category": (of_object(category_id=91), OBJECT + "no category has the id 91"),
    "unknown image": (of_object(image_id=77), "annotation 103 of image 77: no image has the id 77"),
    "one id twice": (of_object(id=100), "annotation 100 of .*: another annotation has the same id"),
    "no annotations": (on("annotations", []), "holds no annotations"),
    "no list": (on("annotations", None), "expected COCO's annotations, found no list 'annotations'"),
    "a number": (lambda content: content["images"].append(3), "entry 9 of 'images': expected an object, found '3'"),
    "image without id": (lambda content: content["images"][2].pop("id"), r"image None \(000000000003\.jpg\): no 'id'"),
    "image id twice": (of_image(id=1), r"image 1 \(000000000003\.jpg\): another image has the same id"),
    "file twice": (of_image(file_name="000000000001.jpg"), "image 3 .*another image has the same id or file_name"),
    "width": (of_image(width=161), r"000000000003\.jpg has 128 x 160 pixels; annotated are 161 x 160"),
    "no width": (of_image(width=None), "image 3 .*width: expected a whole number, found 'None'"),
    "81 categories": (
        lambda content: content["categories"].append({"id": 81, "name": "background"}),
        "expected 80 categories, .* found 81",
    ),
    "79 categories": (lambda content: content["categories"].pop(0), "expected 80 categories, .* found 79"),
    "a category twice": (lambda content: content["categories"][1].update(id=1), "category 1: another category has the"),
    "other categories": (
        lambda content: content["categories"][0].update(name="hat"),
        "category 1 is '(hat|class 1)', in the test split '(hat|class 1)'; expected the same",
    ),
}


@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize("fault", COCO)
def test_faults_of_coco_are_named_before_training(fault, split, copy):
    change, message = COCO[fault]
    path = copy / "coco" / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        prepare(copy, "coco")
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("area", None), ("area", "7"), ("iscrowd", None)])
def test_what_only_cocos_evaluation_reads_must_be_there_in_the_test_split(key, value, copy):
    for split, refused in (("train2017", False), ("val2017", True)):
        path = copy / "coco" / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        of_object(**{key: value})(content)
        path.write_text(json.dumps(content))
        if refused:
            with pytest.raises(DataError, match=f"{OBJECT}.*{key}"):
                prepare(copy, "coco")
        else:
            prepare(copy, "coco")


@pytest.mark.parametrize("text", ["[", "[]", "null", "[" * 100_000, "\ufeff{}"])
def test_file_that_holds_no_coco_annotations_is_named(text, copy):
    (copy / "coco" / "annotations" / "instances_val2017.json").write_text(text)
    with pytest.raises(
        DataError, match=r"instances_val2017\.json(: expected COCO's annotations| is cut off, or no JSON)"
    ):
        prepare(copy, "coco")


# ---------------------------------------------------------------------------------------------------------- images


def image(kind: str, mode: str = "RGB", size: tuple[int, int] = (128, 160), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def deep() -> bytes:
    """A PNG of 16 bits a pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((160, 128), 40_000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that says it has 900 million pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0" * 99))]
    framed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image("JPEG", exif=exif)


IMAGES = {
    "cut off": (image("JPEG")[:-100], "cannot be used .*truncated"),
    "cut off in its header": (image("JPEG")[:20], "cannot be used .*cannot identify"),
    "PNG cut off": (image("PNG")[:-30], "cannot be used"),
    "GIF cut off": (image("GIF")[:30], "cannot be used"),
    "a web page": (b"<html>404</html>", "cannot be used .*cannot identify"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 128 160\nshowpage\n", "cannot be used"),
    "a bomb": (bomb(), "cannot be used .*DecompressionBombError"),
    "16 bits": (deep(), "more than 8 bits a channel"),
    "another size": (image("JPEG", size=(129, 160)), "has 129 x 160 pixels; annotated are 128 x 160"),
    "turned by EXIF": (turned(), "has 160 x 128 pixels; annotated are 128 x 160"),
    "empty": (b"", "1 of 8 files are missing or empty"),
}


@pytest.mark.parametrize("split", ["test", "trainval"])
@pytest.mark.parametrize("fault", IMAGES)
def test_images_of_no_use_are_named_before_training(fault, split, copy):
    content, message = IMAGES[fault]
    (copy / "VOC2007" / "JPEGImages" / f"{split}_000000.jpg").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare(copy, "voc")
    assert f"{split}_000000.jpg" in str(error.value) and "\n" not in str(error.value)


def test_images_of_any_kind_that_detectron2_reads_are_accepted(copy):
    folder = copy / "VOC2007" / "JPEGImages"
    kinds = [image("JPEG", "L"), image("JPEG", "CMYK"), image("PNG", "LA"), image("PNG", "1"), image("GIF", "P")]
    for number, content in enumerate([*kinds, image("WEBP")]):
        picture = annotations.Picture(folder / f"test_{number:06}.jpg", 128, 160)
        picture.file.write_bytes(content)
        assert not pictures.fault(picture)


@pytest.mark.parametrize("kind", ["dangling link", "link in a circle", "folder"])
def test_what_is_no_file_counts_as_missing(kind, copy):
    path = copy / "VOC2012" / "JPEGImages" / "trainval_000003.jpg"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling link": "/nowhere/x.jpg", "link in a circle": path}[kind])
    with pytest.raises(DataError, match=r"1 of 8 files are missing or empty, first: \['trainval_000003\.jpg'\]"):
        prepare(copy, "voc")


# --------------------------------------------------------------------------------------- what is known of a data set


@pytest.mark.parametrize("task", ["voc", "coco"])
def test_images_are_opened_once_and_again_when_a_file_changes(task, copy, monkeypatch, capsys):
    opened = []
    real = pictures.fault
    monkeypatch.setattr(pictures, "fault", lambda picture: opened.append(picture) or real(picture))
    first = prepare(copy, task, copy / "runs" / "a")
    count = photos.IMAGES * (3 if task == "voc" else 2)
    assert len(opened) == count and f"opening {count} images" in capsys.readouterr().out
    assert prepare(copy, task, copy / "runs" / "a") == first  # the same run goes on
    assert prepare(copy, task, copy / "runs" / "b") == first  # another, beside it
    assert len(opened) == count
    path = next((copy / ("VOC2007/JPEGImages" if task == "voc" else "coco/val2017")).iterdir())
    path.write_bytes(path.read_bytes() + b"0")
    prepare(copy, task, copy / "runs" / "b")
    assert len(opened) == 2 * count


@pytest.mark.parametrize("task", ["voc", "coco"])
def test_a_run_does_not_go_on_with_other_data(task, copy, tmp_path):
    run = tmp_path / "runs" / "run"
    prepare(copy, task, run)
    (run / "config.yaml").write_text("begun\n")
    shutil.move(copy, tmp_path / "elsewhere")  # another place is no other data
    prepare(tmp_path / "elsewhere", task, run)
    if task == "voc":
        (tmp_path / "elsewhere" / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text("trainval_000000\n")
        found = r"8 \+ 8 \+ 8 images there, 1 \+ 8 \+ 8 now"
    else:
        path = tmp_path / "elsewhere" / "coco" / "annotations" / "instances_val2017.json"
        path.write_text(path.read_text().replace("class 7", "class seven"))
        path = path.with_name("instances_train2017.json")
        path.write_text(path.read_text().replace("class 7", "class seven"))
        found = r"8 \+ 8 images there, 8 \+ 8 now, or as many different ones"
    with pytest.raises(DataError, match=rf"run is a run on other data: {found}"):
        prepare(tmp_path / "elsewhere", task, run)


@pytest.mark.parametrize("task", ["voc", "coco"])
def test_a_part_of_the_data_is_in_the_run_s_identity(task, copy, tmp_path, monkeypatch):
    def settled() -> Detection:
        return datasets.settle(recipe(copy, task))

    first = settled()
    assert re.match(r"8 \+ 8( \+ 8)? images, [0-9a-f]{8}$", first.content) and datasets.settle(first) is first
    shutil.move(copy, tmp_path / "elsewhere")
    assert datasets.settle(recipe(tmp_path / "elsewhere", task)) == dataclasses.replace(
        first, run=dataclasses.replace(first.run, data_root=str(tmp_path / "elsewhere"))
    )
    shutil.move(tmp_path / "elsewhere", copy)
    images, file = {
        "voc": ("VOC2007/JPEGImages", "VOC2007/Annotations/test_000000.xml"),
        "coco": ("coco/train2017", "coco/annotations/instances_val2017.json"),
    }[task]
    image, file = min((copy / images).iterdir()), copy / file
    image.write_bytes(image.read_bytes() + b"0")
    second = settled()
    file.write_text(file.read_text() + "\n")
    third = settled()
    assert len({configs.hash8(config) for config in (recipe(copy, task), first, second, third)}) == 4
    image.unlink()
    with pytest.raises(DataError, match=rf"{image.name} is missing or unreadable"):
        settled()
    training, test = datasets.SPLITS[task]
    whole = (tuple(split._replace(images=8) for split in training), test._replace(images=8))
    monkeypatch.setitem(datasets.SPLITS, task, whole)
    assert settled().content == "" and configs.hash8(settled()) == configs.hash8(recipe(copy, task))
