"""Your own images: layouts, the share that is held out, and the numbers that are fitted to them."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixmask import config as configs
from mixmask import datasets
from mixmask.config import ConfigError, Finetune, Linear, UserError
from mixmask.datasets import DataError, Files, Resident, folder
from mixmask.datasets.settle import fit, fitting_batch, inherit, settle
from mixmask.datasets.verify import verify


def image(path: Path, side: int = 16, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """DIR/CLASS/*: 40 cats, 25 dogs, of which some are one folder deeper."""
    root = tmp_path / "meine Bilder ä"
    for k in range(40):
        image(root / "cat" / f"{k}.png")
    for k in range(25):
        image(root / "dög" / ("" if k % 2 else "deeper") / f"{k}.WEBP", lossless=True)
    return root


def load(root: Path, split: str = "train", **options) -> Files | Resident:
    return datasets.load("folder", root, split, **options)


def names(root: Path, split: str, held_out: float = 0.1) -> set[str]:
    return set(folder.listing(root, split, held_out).paths)


# --------------------------------------------------------------------------------------------------------- layouts


def test_class_folders_hold_a_share_out_by_their_paths(pets):
    train, test = names(pets, "train"), names(pets, "test")
    assert len(train | test) == 65 and not train & test and 2 <= len(test) <= 14
    assert load(pets).classes == load(pets, "test").classes == ("cat", "dög")
    for k in range(40, 60):
        image(pets / "cat" / f"{k}.png")
    assert train <= names(pets, "train") and test <= names(pets, "test")  # nobody has moved
    assert names(pets, "test") <= names(pets, "test", 0.3)
    assert len(names(pets, "test", 0.0)) == 0 and len(load(pets, "test", held_out=0.0)) == 0


def test_place_of_a_path_is_uniform_pinned_and_the_same_however_accents_are_written():
    places = torch.tensor([folder.place(f"class/{k}.jpg") for k in range(4000)], dtype=torch.double)
    assert 0 <= places.min() and places.max() < 1 and abs(places.mean() - 0.5) < 0.02
    assert folder.place("cat/1.png") == pytest.approx(PINNED, abs=1e-12)
    assert folder.place("d\u00f6g/1.png") == folder.place("do\u0308g/1.png")


PINNED = int.from_bytes(hashlib.sha256(b"cat/1.png").digest()[:8], "big") / 2**64


@pytest.mark.parametrize("test", ["val", "test"])
def test_train_and_test_folders(tmp_path, test):
    for split, count in (("train", 3), (test, 2)):
        for name in ("b", "a"):
            for k in range(count):
                image(tmp_path / split / name / f"{k}.jpg")
    (tmp_path / test / "b" / "0.jpg").unlink()
    assert load(tmp_path).labels.tolist() == [0] * 3 + [1] * 3
    assert load(tmp_path, "test").labels.tolist() == [0, 0, 1]
    image(tmp_path / test / "c" / "0.jpg")
    with pytest.raises(DataError, match=f"{test}: class folders c are not in .*train"):
        load(tmp_path, "test")


def test_train_folder_alone_holds_out_and_a_class_may_be_called_train(tmp_path):
    for k in range(30):
        image(tmp_path / "one" / "train" / "a" / f"{k}.png")
        image(tmp_path / "one" / "train" / "b" / f"{k}.png")
        image(tmp_path / "two" / "train" / f"{k}.png")
        image(tmp_path / "two" / "car" / f"{k}.png")
    assert load(tmp_path / "one").classes == ("a", "b") and len(load(tmp_path / "one", "test")) > 0
    assert load(tmp_path / "two").classes == ("car", "train")


@pytest.mark.parametrize("below", ["", "all", "train"])
def test_images_without_class_folders_have_no_labels(tmp_path, below):
    for k in range(5):
        image(tmp_path / below / f"{k}.bmp")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert len(train) == 5 and train.classes == () and len(test) == 0


def test_what_cannot_be_meant_is_one_line(tmp_path, pets):
    with pytest.raises(DataError, match=r"run.data_root: '.*nowhere' does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"run.data_root: '.*notes.txt' is a file; expected a folder of images"):
        load(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images under .*empty .*; found: nothing"):
        load(tmp_path / "empty")
    (pets / "documents").mkdir()
    (pets / "documents" / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no images in documents \(found: a.txt\); remove what is not a class"):
        load(pets)
    (pets / "documents" / "a.txt").unlink()
    (pets / "documents").rmdir()
    image(pets / "loose.png")
    with pytest.raises(DataError, match=r"holds images beside class folders \(loose.png beside cat, dög\)"):
        load(pets)


def test_class_of_which_all_would_be_held_out_is_named(tmp_path):
    for k in range(30):
        image(tmp_path / "many" / f"{k}.png")
    few = next(f"{k}.png" for k in range(100) if folder.place(f"few/{k}.png") < 0.1)
    image(tmp_path / "few" / few)
    with pytest.raises(DataError, match=r"folder.held_out: 0.1 leaves no training image of few \(1 in all of few\)"):
        load(tmp_path)


def test_hidden_files_links_and_other_endings(pets):
    (pets / "cat" / "._1.png").write_bytes(b"\0")
    (pets / "cat" / "notes.txt").write_text("no image")
    assert len(names(pets, "train") | names(pets, "test")) == 65
    (pets / "cat" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"gone.png is a broken link"):
        load(pets)
    (pets / "cat" / "gone.png").unlink()
    (pets / "cat" / "more").symlink_to(pets.resolve() / "cat")  # a circle
    with pytest.raises(DataError, match=r"cat/more is a link to a folder that holds it; remove it$"):
        load(pets)
    (pets / "cat" / "more").unlink()
    (pets.parent / "elsewhere").mkdir()
    image(pets.parent / "elsewhere" / "new.png")
    (pets / "cat" / "more").symlink_to(pets.parent / "elsewhere")
    assert len(names(pets, "train") | names(pets, "test")) == 66


# ---------------------------------------------------------------------------------------------------- what is read


def test_small_equal_images_are_held_in_memory_others_are_read_by_workers(pets, monkeypatch):
    train = load(pets)
    assert isinstance(train, Resident) and train.images.shape[1:] == (3, 16, 16)
    monkeypatch.setattr(folder, "decode_all", lambda *a, **k: pytest.fail("decoded twice"))
    assert torch.equal(load(pets).images, train.images)
    monkeypatch.setattr(folder, "MEMORY", 100)
    assert isinstance(load(pets), Files)
    monkeypatch.undo()
    image(pets / "cat" / "large.png", 17)
    assert isinstance(load(pets), Files) and isinstance(load(pets, "test"), Files)


def test_images_in_memory_follow_their_labels_when_class_folders_are_renamed(tmp_path):
    """Files of equal names, sizes and times, as many archives hold them."""
    for name, value in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        for k in range(3):
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / name / f"{k}.bmp")
            os.utime(tmp_path / name / f"{k}.bmp", (0, 0))
    assert load(tmp_path, held_out=0.0).images[:, 0, 0, 0].tolist() == [10] * 3 + [200] * 3
    (tmp_path / "a").rename(tmp_path / "c")
    held = load(tmp_path, held_out=0.0)
    assert held.classes == ("b", "c") and held.images[:, 0, 0, 0].tolist() == [200] * 3 + [10] * 3


def test_test_images_are_labelled_by_the_classes_of_training_where_they_lack_one(tmp_path):
    for place in ("train/a/1", "train/b/1", "train/c/1", "val/b/1", "val/c/1", "val/c/2"):
        image(tmp_path / f"{place}.png")
    assert load(tmp_path).labels.tolist() == [0, 1, 2]
    held = load(tmp_path, "test")
    assert held.labels.tolist() == [1, 2, 2] and held.classes == ("a", "b", "c")


def test_images_of_one_longest_side_and_two_shapes_are_read_by_workers(tmp_path):
    for name, sides in (("a", (8, 12)), ("b", (12, 8))):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.fromarray(np.zeros((*sides, 3), np.uint8)).save(tmp_path / name / f"{k}.png")
    assert isinstance(load(tmp_path, held_out=0.0), Files)


def test_names_that_are_no_unicode_are_names(tmp_path):
    """As an old archive has them: bytes of Latin-1."""
    for name in (b"caf\xe9", b"th\xe9"):
        for k in range(5):
            image(tmp_path / os.fsdecode(name) / os.fsdecode(b"\xfc%d.png" % k))
    for items in (("held_out", 0.0), ("held_out", 0.3)):
        assert isinstance(load(tmp_path, **dict([items])), Resident)
    assert settle(recipe(tmp_path, "folder.held_out=0")).data.startswith("train: 10 images in 2 classes")


def test_images_are_upright_in_memory_and_from_workers(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[0] = 255  # the top row; turned: the rightmost column
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(3):
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png", exif=exif)
    held = load(tmp_path, held_out=0.0)
    assert held.images.shape == (6, 3, 12, 8) and held.images[:, :, :, -1].eq(255).all()
    Image.fromarray(np.zeros((300, 200, 3), np.uint8)).save(tmp_path / "a" / "large.png")
    files = load(tmp_path, held_out=0.0)
    reader = datasets.loading.ImageReader.of(files)
    assert reader[0].shape == (3, 12, 8) and reader[0][:, :, -1].eq(255).all()


def test_verify_names_all_that_are_no_images(pets, capsys):
    verify(load(pets))
    (pets / "cat" / "1.png").write_bytes(b"no image")
    (pets / "cat" / "2.png").write_bytes((pets / "cat" / "2.png").read_bytes()[:100])
    image(pets / "cat" / "large.png", 30)
    config = folder.listing(pets, "train", 0.0)
    files = Files(config.paths, config.labels, config.classes, "folder", upright=True)
    with pytest.raises(
        DataError, match=r"2 of 66 files cannot be read: image file .*cat/1.png .*; image file .*cat/2.png"
    ):
        verify(files)


# ------------------------------------------------------------------------------------------------- what is settled


def recipe(pets: Path, *items: str, name: str = "folder_small_moco") -> configs.Pretrain:
    overrides = configs.parse_overrides([*items])
    return configs.load(f"pretrain/configs/{name}.yaml", {**overrides, "run.data_root": str(pets)})


def test_numbers_are_fitted_and_said(pets, capsys):
    config = settle(recipe(pets))
    images = len(names(pets, "train"))
    assert config.batch_size == 8 and config.batch_size * 4 <= images  # the largest power of two of four steps
    assert config.settings["queue"] == images // 8 * 8 and config.knn.k == images // 2
    out = capsys.readouterr().out
    assert f"batch_size: 256 becomes 8, which fits {images} training images" in out
    assert "moco.queue: 4096 becomes" in out and "knn.k: 200 becomes" in out
    assert settle(config) == config and capsys.readouterr().out == ""


def test_numbers_that_fit_stay(pets):
    config = recipe(pets, "batch_size=8", "moco.queue=16", "knn.k=3")
    assert dataclasses.replace(settle(config), data="") == config


def test_fitted_batch_keeps_its_groups():
    config = recipe(Path(), "backbone.bn_groups=3", "mix_groups=2", "batch_size=96")
    assert fitting_batch(config, 96 * 4) == 96 and fitting_batch(config, 96 * 4 - 1) == 48
    assert fitting_batch(config, 48) == 12
    with pytest.raises(ConfigError, match="47 images are too few; expected at least 48"):
        fitting_batch(config, 47)


def test_published_data_sets_are_not_looked_at_and_keep_their_identity():
    config = configs.load("pretrain/configs/cifar100_moco.yaml", {"run.data_root": "/nowhere"})
    assert settle(config) is config and config.data == ""
    assert not {"data", "folder"} & configs.identity(config).keys()


def test_other_images_are_another_run(pets, tmp_path):
    before = settle(recipe(pets))
    assert settle(recipe(pets)) == before and "images in 2 classes" in before.data
    Path(pets).rename(tmp_path / "elsewhere")
    assert configs.hash8(settle(recipe(tmp_path / "elsewhere"))) == configs.hash8(
        before
    )  # where they are does not count
    seen = {configs.hash8(before)}
    for change in (
        lambda cat: image(cat / "77.png"),
        lambda cat: image(cat / "77.png", 14),  # of another size
        lambda cat: (cat / "77.png").rename(cat / "78.png"),
    ):
        change(tmp_path / "elsewhere" / "cat")
        found = configs.hash8(settle(recipe(tmp_path / "elsewhere")))
        assert found not in seen
        seen.add(found)


def test_probes_take_from_the_pretraining_what_they_leave_open(pets, capsys):
    pretraining = configs.to_dict(settle(recipe(pets, "augment.size=16", "folder.held_out=0.2", "run.workers=0")))
    for name, cls in (("folder_linear", Linear), ("folder_finetune", Finetune)):
        values = configs.read_yaml(f"eval/configs/{name}.yaml")
        config = configs.resolve(inherit(values, pretraining), {}, cls)
        assert config.augment.size == 16 and config.folder.held_out == 0.2 and config.run.data_root == str(pets)
        told = {**values, "augment": {**values["augment"], "size": 24}, "folder": {"held_out": 0.3}}
        told = configs.resolve(inherit(told, pretraining), {}, cls)
        assert told.augment.size == 24 and told.folder.held_out == 0.3
        assert settle(config).batch_size == 8
    other = inherit(
        configs.read_yaml("eval/configs/cifar100_linear_adam.yaml"), {**pretraining, "allow_partial_data": True}
    )
    assert "allow_partial_data" not in other and other["run"]["checkpoint_every"] == 25


def test_probes_of_images_without_labels_are_refused(tmp_path):
    for k in range(20):
        image(tmp_path / f"{k}.png")
    values = inherit(configs.read_yaml("eval/configs/folder_linear.yaml"), configs.to_dict(recipe(tmp_path)))
    config = configs.resolve(values, {}, Linear)
    with pytest.raises(UserError, match=r"^dataset: the images in .* have no labels; expected folders, one a class$"):
        settle(config)
    pretraining = settle(recipe(tmp_path))
    assert pretraining.batch_size == 4 and pretraining.knn.k == 20


def test_finetuning_batch_fits_the_labelled_images(pets):
    values = inherit(configs.read_yaml("eval/configs/folder_finetune.yaml"), configs.to_dict(recipe(pets)))
    config = configs.resolve(values, {"labels": 50, "run.data_root": str(pets)}, Finetune)
    train = folder.listing(pets, "train", 0.1)
    assert fit(config, train)[0].batch_size == 4
