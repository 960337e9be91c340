"""Data sets are verified before training, and what is read is a pure function of seed, epoch and index."""

import io
import math
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import RandomResizedCrop

from mixmask import augment, datasets, registry
from mixmask.config import Augment, ConfigError, UserError
from mixmask.datasets import DataError, Expected, cache, cifar100, decoding, loading, photos
from mixmask.datasets.views import train_batches

WNIDS = ("n03", "n01", "n02")  # not sorted: wnids.txt, not the alphabet, gives the class index
TINY = Expected(classes=3, train=6, test=6, side=64)
IMAGENET = Expected(classes=3, train=6, test=3)


def jpeg(path: Path, value: int = 128, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 40, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise + np.uint8(value)).save(path, "JPEG")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A Tiny-ImageNet of 3 classes with 2 training and 2 test images each."""
    folder = tmp_path / "tiny-imagenet-200"
    for i, wnid in enumerate(WNIDS):
        for k in range(2):
            jpeg(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", 60 * i)
    for k in range(6):
        jpeg(folder / "val" / "images" / f"val_{k}.JPEG", 30 * k)
    lines = [f"val_{k}.JPEG\t{WNIDS[k * 2 % 3]}\t0\t0\t62\t62\n" for k in (5, 3, 1, 0, 2, 4)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    return folder


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """An ImageNet of 3 classes with 2 training images and 1 test image each, of various sizes."""
    folder = tmp_path / "imagenet"
    for i, wnid in enumerate(sorted(WNIDS)):
        for k in range(2):
            jpeg(folder / "train" / wnid / f"{wnid}_{k}.JPEG", 60 * i + k, (90 + 30 * i, 80 + 17 * k))
        jpeg(folder / "val" / wnid / f"val_{i}.JPEG", 60 * i, (100, 70))
    return folder


def load_tiny(root: Path, split: str = "train", **options) -> datasets.Resident:
    return datasets.load("tiny_imagenet", root, split, expected=TINY, **options)


def load_imagenet(root: Path, split: str = "train", **options) -> datasets.Files:
    return datasets.load("imagenet", root, split, expected=IMAGENET, **options)


# ------------------------------------------------------------------------------------------------ published counts


def counts(name: str) -> tuple[int, int, int, int]:
    spec = registry.DATASETS[name]
    return spec.classes, spec.train, spec.test, spec.side


def test_expected_counts_are_the_published_ones():
    assert counts("cifar100") == (100, 50_000, 10_000, 32)
    assert counts("cifar100_reduced") == (100, 100 * 100, 100 * 50, 32)
    assert counts("tiny_imagenet") == (200, 200 * 500, 200 * 50, 64)
    assert counts("imagenet") == (1000, 1_281_167, 50_000, 0)


def test_real_counts_are_checked_when_none_are_given(tiny, imagenet):
    with pytest.raises(DataError, match=r"found 3 classes, expected 200"):
        datasets.load("tiny_imagenet", tiny, "train", allow_partial=True)
    with pytest.raises(DataError, match=r"found 6 images in 3 classes .* expected 1,281,167 in 1000"):
        datasets.load("imagenet", imagenet, "train")


def test_unknown_names_and_splits_are_refused(tmp_path):
    assert issubclass(DataError, UserError)
    with pytest.raises(DataError, match=r"unknown data set 'cifar10'; expected one of cifar100"):
        datasets.load("cifar10", tmp_path, "train")
    with pytest.raises(DataError, match=r"unknown split 'val'"):
        datasets.load("photos", tmp_path, "val")


@pytest.mark.parametrize("name", ["cifar100", "tiny_imagenet", "imagenet"])
def test_missing_root_is_refused_and_not_created(name, tmp_path):
    with pytest.raises(DataError, match=r"data root '.*nowhere' does not exist"):
        datasets.load(name, tmp_path / "nowhere", "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet"])
def test_wrong_tree_lists_the_places_tried_and_what_is_there(name, tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(DataError, match=f"not found: expected .*train, val in one of {tmp_path}, .*: holiday"):
        datasets.load(name, tmp_path, "train")


# ------------------------------------------------------------------------------------------------------- CIFAR-100


def test_cifar100_absent_without_download(tmp_path):
    with pytest.raises(DataError, match=f"no folder {tmp_path / 'cifar-100-python'}"):
        datasets.load("cifar100", tmp_path, "train", download=False)


def test_cifar100_truncated_file_is_named_and_kept(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(b"\x80\x02cut")
    for root in (tmp_path, folder):
        with pytest.raises(DataError, match=r"cifar-100-python/train is truncated or altered \(5 bytes"):
            datasets.load("cifar100", root, "train")
    assert [path.name for path in folder.iterdir()] == ["train"]


def test_cifar100_images_stand_upright_with_their_labels(tmp_path, monkeypatch):
    """In its files: three planes of 32 rows of 32 pixels, red first."""
    rows = np.arange(2 * 3072).reshape(2, 3072) % 251
    for split in ("train", "test"):
        content = {"data": rows.astype(np.uint8), "fine_labels": [1, 0]}
        (tmp_path / "cifar-100-python").mkdir(exist_ok=True)
        (tmp_path / "cifar-100-python" / split).write_bytes(pickle.dumps(content))
    names = {"fine_label_names": ["apple", "baby"]}
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(names))
    for place in ("mixmask.datasets.cifar100", "torchvision.datasets.cifar"):
        monkeypatch.setattr(f"{place}.check_integrity", lambda *_: True)
    for split in ("train", "test"):
        found = datasets.load("cifar100", tmp_path, split, expected=Expected(2, 2, 2, 32))
        assert found.images.flatten(1).tolist() == rows.tolist() and found.images.shape == (2, 3, 32, 32)
        assert found.labels.tolist() == [1, 0] and found.classes == ("apple", "baby")


@pytest.mark.parametrize(("split", "each"), [("train", 2), ("test", 1)])
def test_reduced_cifar100_is_the_first_images_of_each_class_of_that_split_in_the_order_of_its_file(
    monkeypatch, tmp_path, split, each
):
    whole = {"train": [2, 0, 0, 1, 0, 2, 1, 1, 2], "test": [1, 1, 0, 2, 0, 2]}

    def whole_set(root, split, expected, download):
        assert expected == registry.DATASETS["cifar100"]  # all of it is verified, not the part
        labels = torch.tensor(whole[split])
        images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        return datasets.Resident(images, labels, ("a", "b", "c"), "cifar100")

    monkeypatch.setattr(cifar100, "read", whole_set)
    found = datasets.load("cifar100_reduced", tmp_path, split, expected=Expected(3, 6, 3, 2))
    assert found.images[:, 0, 0, 0].tolist() == {"train": [0, 1, 2, 3, 5, 6], "test": [0, 2, 3]}[split]
    assert found.labels.bincount().tolist() == [each] * 3 and found.name == "cifar100_reduced"
    assert found.labels.tolist() == [whole[split][i] for i in found.images[:, 0, 0, 0].tolist()]


def test_cifar100_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(cifar100, "download_url", refuse)
    with pytest.raises(DataError, match=r"download failed \(no route to host\); unpack .* by hand"):
        datasets.load("cifar100", tmp_path, "train")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- Tiny-ImageNet


def test_tiny_imagenet_labels_follow_wnids_and_val_annotations(tiny):
    for root in (tiny, tiny.parent):
        train, test = load_tiny(root), load_tiny(root, "test")
        assert train.classes == test.classes == WNIDS
        assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert test.labels.tolist() == [0, 2, 1, 0, 2, 1]  # val_k has class 2k mod 3
        assert train.images.shape == (6, 3, 64, 64) and train.images.dtype == torch.uint8
        brightness = train.images.float().mean((1, 2, 3)).view(3, 2).mean(1)  # images made with 60 * class
        assert torch.equal(brightness.argsort(), torch.arange(3))
        assert train.note == test.note == ""


def test_tiny_imagenet_missing_class(tiny):
    for image in (tiny / "train" / "n01" / "images").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"found 4 images in 2 classes .* expected 6 in 3; no image of n01"):
        load_tiny(tiny)


def test_tiny_imagenet_partial_is_refused_unless_allowed(tiny):
    (tiny / "train" / "n02" / "images" / "n02_1.JPEG").unlink()
    with pytest.raises(DataError, match=r"found 5 images .* expected 6 .* 1 to 2 images a class, fewest in n02"):
        load_tiny(tiny)
    partial = load_tiny(tiny, allow_partial=True)
    assert len(partial) == 5 and "expected 6" in partial.note


def test_tiny_imagenet_surplus_is_refused_even_when_partial_is_allowed(tiny):
    jpeg(tiny / "train" / "n02" / "images" / "more.JPEG")
    with pytest.raises(DataError, match=r"found 7 images"):
        load_tiny(tiny, allow_partial=True)


def test_tiny_imagenet_unbalanced_is_refused(tiny):
    folder = tiny / "train"
    (folder / "n01" / "images" / "n01_0.JPEG").rename(folder / "n02" / "images" / "n01_0.JPEG")
    with pytest.raises(DataError, match=r"not 2 in each class"):
        load_tiny(tiny)


def test_tiny_imagenet_flat_val_is_explained(tiny):
    for image in (tiny / "val" / "images").iterdir():
        image.rename(tiny / "val" / image.name)
    (tiny / "val" / "images").rmdir()
    with pytest.raises(DataError, match=r"val/images is missing .*expected the original layout"):
        load_tiny(tiny, "test")


def test_tiny_imagenet_missing_annotations(tiny):
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"val_annotations.txt is missing .*which holds the labels"):
        load_tiny(tiny, "test")


def test_tiny_imagenet_annotations_of_unknown_classes_or_images(tiny):
    annotations = tiny / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.write_text(text.replace("n01", "n99", 1))
    with pytest.raises(DataError, match=r"val_annotations.txt, line \d: .*'val_\d.JPEG\\tn99"):
        load_tiny(tiny, "test")
    annotations.write_text(text + "val_9.JPEG\tn01\n")
    with pytest.raises(DataError, match=r"val_9.JPEG, named in val_annotations.txt, are missing"):
        load_tiny(tiny, "test")
    annotations.write_text(text.split("\n", 1)[1])
    with pytest.raises(DataError, match=r"no label for val_5.JPEG"):
        load_tiny(tiny, "test")


def test_tiny_imagenet_truncated_file_is_named(tiny):
    truncate(tiny / "train" / "n02" / "images" / "n02_0.JPEG")
    with pytest.raises(DataError, match=r"n02_0.JPEG is missing, truncated or no image"):
        load_tiny(tiny)
    assert not (tiny / "mixmask_train.pt").exists()


def test_tiny_imagenet_wrong_size_is_named(tiny):
    jpeg(tiny / "train" / "n02" / "images" / "n02_0.JPEG", 5, (32, 64))
    with pytest.raises(DataError, match=r"n02_0.JPEG has 32x64 pixels, expected 64x64"):
        load_tiny(tiny)


def test_tiny_imagenet_cache_is_used_checked_and_renewed(tiny, monkeypatch):
    first = load_tiny(tiny)
    kept = tiny / "mixmask_train.pt"
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_image", None)  # a second load decodes nothing
        assert torch.equal(load_tiny(tiny).images, first.images)
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)  # one flipped bit
    assert torch.equal(load_tiny(tiny).images, first.images)
    kept.write_bytes(content[: len(content) // 2])  # cut off
    assert torch.equal(load_tiny(tiny).images, first.images)
    jpeg(tiny / "train" / "n02" / "images" / "n02_0.JPEG", 7)
    assert not torch.equal(load_tiny(tiny).images, first.images)


def test_tiny_imagenet_read_only_folder_is_read_without_cache(tiny, monkeypatch, caplog):
    def refuse(*args):
        raise OSError("Read-only file system")

    monkeypatch.setattr(cache.torch, "save", refuse)
    assert len(load_tiny(tiny)) == 6
    assert "cannot write" in caplog.text and not list(tiny.glob("*mixmask*"))


# -------------------------------------------------------------------------------------------------------- ImageNet


def test_imagenet_labels_follow_sorted_wnids(imagenet):
    for root in (imagenet, imagenet.parent):
        train, test = load_imagenet(root), load_imagenet(root, "test")
        assert train.classes == test.classes == ("n01", "n02", "n03")
        assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and test.labels.tolist() == [0, 1, 2]
        assert all(Path(p).parent.name == train.classes[i] for p, i in zip(train.paths, train.labels, strict=True))


def test_imagenet_flat_val_is_explained(imagenet):
    for image in list((imagenet / "val").glob("*/*")):
        image.rename(imagenet / "val" / image.name)
        image.parent.rmdir()
    with pytest.raises(DataError, match=r"val is flat: 3 images and no class folders, expected 3 folders"):
        load_imagenet(imagenet, "test", allow_partial=True)


def test_imagenet_missing_class_is_refused_unless_allowed(imagenet):
    (imagenet / "val" / "n02" / "val_1.JPEG").unlink()
    (imagenet / "val" / "n02").rmdir()
    with pytest.raises(DataError, match=r"found 2 images in 2 classes .* expected 3 in 3; no image of n02"):
        load_imagenet(imagenet, "test")
    partial = load_imagenet(imagenet, "test", allow_partial=True)
    assert partial.labels.tolist() == [0, 2] and "no image of n02" in partial.note


def test_imagenet_val_class_unknown_to_train(imagenet):
    jpeg(imagenet / "val" / "n77" / "val_9.JPEG")
    with pytest.raises(DataError, match=r"class folders n77 are not in"):
        load_imagenet(imagenet, "test", allow_partial=True)


# --------------------------------------------------------------------------------------------------------- readers


VIEW = Augment(("crop",), 32, (0.2, 1.0))


def read_all(files: datasets.Files, workers: int, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    order = datasets.batch_indices(len(files), 2, seed=1, epoch=0)
    batches = list(loading.loader(files, order, 1, epoch, [VIEW, VIEW], workers))
    return torch.cat([torch.stack(crops, 1) for crops, _ in batches]), torch.cat([index for _, index in batches])


def test_crops_do_not_depend_on_workers_or_on_what_was_read_before(imagenet):
    files = load_imagenet(imagenet)
    state = torch.get_rng_state()
    crops, index = read_all(files, workers=0)
    again, order = read_all(files, workers=2)
    assert crops.shape == (6, 2, 3, 32, 32) and crops.dtype == torch.uint8
    assert torch.equal(crops, again) and torch.equal(index, order)
    assert torch.equal(state, torch.get_rng_state())
    alone, _ = next(loading.loader(files, [[int(index[-1])]], 1, 0, [VIEW, VIEW], workers=0))
    assert torch.equal(torch.cat(alone), crops[-1])
    other, _ = read_all(files, workers=0, epoch=1)
    assert not torch.equal(crops, other) and not torch.equal(crops[:, 0], crops[:, 1])


def test_a_process_reads_only_its_rows_of_a_batch(imagenet, monkeypatch):
    """And gets what the one process that reads whole batches gets in these rows."""
    files, read, read_image = load_imagenet(imagenet), [], loading.read_image
    monkeypatch.setattr(loading, "read_image", lambda path, upright: read.append(path) or read_image(path, upright))
    view = Augment(("crop", "flip"), 32, (0.2, 1.0), flip_prob=0.5, mean=(0.5,) * 3, std=(0.2,) * 3)

    def batches(rows: slice) -> list:
        read.clear()
        return list(train_batches(files, view, 4, 1, 0, 2, torch.device("cpu"), rows=rows))

    whole, part = batches(slice(None)), batches(slice(2, 4))
    assert len(read) == 2 * len(part) and len(part) == len(whole)
    for (views, index), (own_views, own_index) in zip(whole, part, strict=True):
        assert torch.equal(index[2:4], own_index)
        for view, own in zip(views, own_views, strict=True):
            assert torch.equal(view[2:4], own)


def test_centre_crop_resizes_the_shorter_side(imagenet):
    files = load_imagenet(imagenet, "test")
    crops, index = next(loading.centre_loader(files, 3, resize=36, size=32, workers=0))
    assert crops.shape == (3, 3, 32, 32) and crops.dtype == torch.uint8 and index.tolist() == [0, 1, 2]
    with Image.open(files.paths[0]) as image:  # 100 x 70 -> 51 x 36
        pillow = np.array(image.resize((51, 36), Image.Resampling.BILINEAR).crop((10, 2, 42, 34)))
    assert np.abs(crops[0].permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_raises_one_line_that_names_it(imagenet, workers):
    files = load_imagenet(imagenet)
    truncate(Path(files.paths[3]))
    with pytest.raises(DataError) as error:
        read_all(files, workers)
    assert str(error.value).startswith(f"image file {files.paths[3]} is") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("RGB", "BMP")],
)
def test_any_image_behind_a_jpeg_name_is_read_as_rgb(mode, form, tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 100, 50)).convert(mode).save(stream, form)
    (tmp_path / "a.JPEG").write_bytes(stream.getvalue())
    image = decoding.read_image(str(tmp_path / "a.JPEG"))
    grey = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    expected = torch.tensor([grey] * 3 if mode == "L" else [200.0, 100.0, 50.0])
    assert image.shape == (3, 10, 20) and image.dtype == torch.uint8
    assert (image.float().mean((1, 2)) - expected).abs().max() <= 4


def test_crop_boxes_lie_inside_the_image_and_follow_torchvision():
    rng, scale, ratio = np.random.default_rng(0), (0.2, 1.0), (3 / 4, 4 / 3)
    view = Augment(("crop",), 8, scale, ratio)
    ours = np.array([loading.crop_box(view, 70, 100, rng) for _ in range(4000)])
    image = torch.empty(3, 70, 100)
    torch.manual_seed(0)
    drawn = [RandomResizedCrop(8, scale, ratio).make_params([image]) for _ in range(4000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    top, left, height, width = ours.T
    assert top.min() >= 0 and left.min() >= 0 and height.min() > 0 and width.min() > 0
    assert (top + height).max() <= 70 and (left + width).max() <= 100
    deciles = np.arange(10, 100, 10)
    difference = np.percentile(ours, deciles, axis=0) - np.percentile(theirs, deciles, axis=0)
    assert np.abs(difference).max() <= 3  # pixels; sampling noise of 4,000 draws is about 1


def test_crop_boxes_follow_the_plain_statement_draw_by_draw():
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    view, rng, plain = Augment(("crop",), 8, scale, ratio), np.random.default_rng(1), np.random.default_rng(1)

    def box(height: int, width: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * plain.uniform(*scale)
            aspect = math.exp(plain.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(plain.integers(0, height - h + 1)), int(plain.integers(0, width - w + 1)), h, w
        return augment.central_crop(ratio, height, width)

    for height, width in np.random.default_rng(2).integers(1, 600, (5000, 2)).tolist():
        assert loading.crop_box(view, height, width, rng) == box(height, width)


def test_crop_box_falls_back_to_the_central_crop():
    rng = np.random.default_rng(0)
    whole = Augment(("crop",), 8)
    assert loading.crop_box(whole, 10, 100, rng) == (0, 43, 10, 13)
    assert loading.crop_box(whole, 100, 10, rng) == (43, 0, 13, 10)
    assert loading.crop_box(Augment(("crop",), 8, crop_ratio=(1.0, 1.0)), 32, 32, rng) == (0, 0, 32, 32)


# --------------------------------------------------------------------------------------------- the embedded default


def test_photos_counts_classes_and_time():
    start = time.monotonic()
    train, test = datasets.load("photos", "", "train"), datasets.load("photos", "", "test")
    assert time.monotonic() - start < 10  # about 0.3 s on an idle core
    for part, count in ((train, 2000), (test, 800)):
        assert part.images.shape == (count, 3, 32, 32) and part.images.is_contiguous()
        assert len(part.classes) == 16 and (torch.bincount(part.labels) == count // 16).all()
    assert torch.equal(train.images, datasets.load("photos", "", "train").images)


def test_photos_share_no_pixel_between_training_and_test():
    for index, name in enumerate(photos.PHOTOS):
        width, height = photos.photo(name).size
        seen = np.zeros((2, height, width), dtype=bool)
        for part, split in enumerate(("train", "test")):
            corners = photos.photo_corners((width, height), index, split, 125)
            assert corners.min() >= 0 and (corners.max(0) + photos.PATCH <= (width, height)).all()
            for x, y in corners:
                seen[part, y : y + photos.PATCH, x : x + photos.PATCH] = True
        assert not (seen[0] & seen[1]).any() and seen[0].any() and seen[1].any(), name


def test_photos_need_no_network_and_write_nothing(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(datasets.load("photos", tmp_path / "nowhere", "test")) == 800
    assert not list(tmp_path.iterdir())


def test_resident_moves_to_a_device_whole():
    moved = datasets.load("photos", "", "test").to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta" and moved.name == "photos"


# ------------------------------------------------------------------------------------------------- orders, subsets


def test_batch_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = datasets.batch_indices(103, 10, seed=3, epoch=7)
    assert order.shape == (10, 10) and order.dtype == torch.long
    assert len(order.unique()) == 100 and order.min() >= 0 and order.max() < 103
    assert torch.equal(order, datasets.batch_indices(103, 10, seed=3, epoch=7))
    assert not torch.equal(order, datasets.batch_indices(103, 10, seed=3, epoch=8))
    assert not torch.equal(order, datasets.batch_indices(103, 10, seed=4, epoch=7))
    assert datasets.batch_indices(5, 10, 0, 0).shape == (0, 10)


def test_subset_rounds_the_share_of_each_class_and_keeps_one_image_at_least():
    labels = torch.tensor([0] * 15 + [1] * 24 + [2])
    for fraction, counts in ((0.64, [10, 15, 1]), (0.1, [2, 2, 1]), (0.01, [1, 1, 1]), (1.0, [15, 24, 1])):
        assert labels[datasets.subset(labels, fraction, 0)].bincount().tolist() == counts
    halves = [datasets.subset(torch.arange(2).repeat_interleave(20), 0.5, 0)[i : i + 10] % 20 for i in (0, 10)]
    assert not torch.equal(*halves)  # each class has its own draw


def test_subset_is_balanced_sorted_and_a_function_of_the_seed():
    labels = torch.arange(20).repeat(50)
    chosen = datasets.subset(labels, 0.1, seed=0)
    assert (torch.bincount(labels[chosen]) == 5).all() and torch.equal(chosen, chosen.unique())
    assert torch.equal(chosen, datasets.subset(labels, 0.1, seed=0))
    assert not torch.equal(chosen, datasets.subset(labels, 0.1, seed=1))
    assert (torch.bincount(labels[datasets.subset(labels, 0.001, seed=0)]) == 1).all()  # never an empty class


# ------------------------------------------------------------------------------------------------ what a tree can hold


def test_hidden_files_are_passed_over(tiny, imagenet):
    for folder in (tiny / "train" / "n01" / "images", tiny / "val" / "images", imagenet / "train" / "n01"):
        (folder / "._n01_0.JPEG").write_bytes(b"\0\5\x16\7")
        (folder / ".DS_Store").write_bytes(b"")
    (imagenet / "train" / "n01" / "n01_9.JPEG").mkdir()  # a folder is no image, whatever its name
    assert len(load_tiny(tiny)) == len(load_tiny(tiny, "test")) == len(load_imagenet(imagenet)) == 6


def test_links_that_lead_nowhere_are_named_before_training(imagenet):
    (imagenet / "train" / "n01" / "n01_0.JPEG").unlink()
    (imagenet / "train" / "n01" / "n01_0.JPEG").symlink_to("gone.JPEG")
    with pytest.raises(DataError, match=r"n01_0.JPEG is a broken link \(gone.JPEG\); fix or remove it$"):
        load_imagenet(imagenet)


def test_links_that_lead_somewhere_are_images(imagenet, tmp_path):
    image = imagenet / "train" / "n01" / "n01_0.JPEG"
    image.rename(tmp_path / "elsewhere.JPEG")
    image.symlink_to(tmp_path / "elsewhere.JPEG")
    assert len(load_imagenet(imagenet)) == 6


def test_unreadable_folders_and_files_are_one_line(tiny, imagenet, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("n02"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"^folder .*train/n02 cannot be read: Permission denied$"):
        load_imagenet(imagenet)
    (tiny / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"val_annotations.txt cannot be read: 'utf-8' codec"):
        load_tiny(tiny, "test")


@pytest.mark.parametrize("order", [(), ("jitter",), ("jitter", "crop"), ("flip", "crop")])
def test_order_that_workers_cannot_follow_is_refused(imagenet, order):
    view = Augment(order, 32, mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(
        ConfigError, match=rf"augment.order: .*expected crop first, found {', '.join(order) or 'nothing'}"
    ):
        next(train_batches(load_imagenet(imagenet), view, 2, 0, 0, 2, torch.device("cpu")))


def test_home_is_understood_in_a_data_root(imagenet, monkeypatch):
    monkeypatch.setenv("HOME", str(imagenet.parent))
    assert load_imagenet("~/imagenet").paths == load_imagenet(imagenet).paths
