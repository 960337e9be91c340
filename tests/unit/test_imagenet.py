"""ImageNet as it is delivered: tar archives and parquet shards give the images, order and draws of folders."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from mixmask import datasets
from mixmask.config import Augment
from mixmask.datasets import DataError, Expected, imagenet_tar
from mixmask.datasets.views import test_batches, train_batches

WNIDS = ("n00000003", "n00000001", "n00000002")  # the development kit's order is not the alphabet's
EXPECTED = Expected(classes=3, train=9, test=6)
VIEW = Augment(("crop", "flip"), 16, (0.2, 1.0), flip_prob=0.5, mean=(0.5,) * 3, std=(0.2,) * 3)


def jpeg(value: int) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 255, (20 + value, 30 - value, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


TRAIN = {f"{wnid}/{wnid}_{k}.JPEG": jpeg(3 * i + k) for i, wnid in enumerate(WNIDS) for k in (10, 9, 2)}
TRUTH = (3, 1, 2, 2, 1, 3)  # of validation image 1, 2, ...: the kit's number of its class
VAL = {f"{WNIDS[TRUTH[k] - 1]}/ILSVRC2012_val_{k + 1:08}.JPEG": jpeg(k) for k in range(6)}


def write_folders(root: Path) -> None:
    for split, images in (("train", TRAIN), ("val", VAL)):
        for name, content in images.items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(content)


def write_tars(root: Path) -> None:
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in WNIDS:
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for name, content in TRAIN.items():
                    if name.startswith(wnid):
                        add(inner, name.split("/")[1], content)
            add(outer, f"{wnid}.tar", stream.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, content in VAL.items():
            add(tar, name.split("/")[1], content)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array([(i + 1, wnid, 0) for i, wnid in enumerate(WNIDS)] + [(4, "n99999999", 2)], dtype=kind)
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": synsets})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", stream.getvalue())
        truth = "".join(f"{number}\n" for number in TRUTH).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)


def write_parquet(root: Path) -> None:
    """Shuffled over two shards of row groups of two, as the published shards are over many."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (root / "data").mkdir(parents=True)
    for split, images in (("train", TRAIN), ("validation", VAL)):
        names = sorted(images, key=lambda name: hashlib.sha256(name.encode()).digest())
        for shard in range(2):
            rows = []
            for name in names[shard::2]:
                wnid, file = name.split("/")
                rows.append({"bytes": images[name], "path": f"{file.removesuffix('.JPEG')}_{wnid}.JPEG"})
            labels = [sorted(WNIDS).index(name.split("/")[0]) for name in names[shard::2]]
            path = root / "data" / f"{split}-{shard:05}-of-00002.parquet"
            parquet.write_table(pyarrow.table({"image": rows, "label": labels}), path, row_group_size=2)


WRITERS = {"tar": write_tars, "parquet": write_parquet}


@pytest.fixture
def official(monkeypatch, tmp_path):
    """`official(root)`: the archives in `root` are the official ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def declare(root: Path) -> None:
        for key, (name, _) in list(imagenet_tar.ARCHIVE_META.items()):
            digest = hashlib.md5((root / name).read_bytes()).hexdigest()
            monkeypatch.setitem(imagenet_tar.ARCHIVE_META, key, (name, digest))

    return declare


def load(root: Path, split: str, **options) -> datasets.Files:
    return datasets.load("imagenet", root, split, expected=EXPECTED, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", WRITERS)
def test_order_draws_and_numbers_are_those_of_folders(kind, workers, tmp_path, official):
    write_folders(tmp_path / "folders")
    WRITERS[kind](tmp_path / kind)
    if kind == "tar":
        official(tmp_path / kind)
    for split in ("train", "test"):
        folders, packed = (load(tmp_path / name, split) for name in ("folders", kind))
        assert packed.classes == folders.classes and torch.equal(packed.labels, folders.labels)
        tails = [[Path(path).parts[-2:] for path in files.paths] for files in (folders, packed)]
        assert tails[0] == tails[1] and packed.note == folders.note == ""
        device = torch.device("cpu")
        streams = [train_batches(files, VIEW, 4, 1, 2, 2, device, workers) for files in (folders, packed)]
        for (ours, index), (theirs, other) in zip(*streams, strict=True):
            assert torch.equal(index, other) and all(map(torch.equal, ours, theirs))
        streams = [test_batches(files, VIEW, 18, device, 4, workers) for files in (folders, packed)]
        assert all(torch.equal(a, b) for a, b in zip(*streams, strict=True))
        part = torch.tensor([3, 1])
        taken = [list(test_batches(files.take(part), VIEW, 18, device)) for files in (folders, packed)]
        assert torch.equal(taken[0][0], taken[1][0])


def test_some_images_of_an_archive_are_each_read_whole_at_their_place(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"aaabbcccc")
    some = imagenet_tar.TarMembers(str(tmp_path / "x.tar"), np.array([0, 3, 5]), np.array([3, 2, 4])).take([2, 1])
    assert [some.read(index) for index in (0, 1)] == [b"cccc", b"bb"]


def test_archives_are_checked_and_indexed_once(tmp_path, official, monkeypatch, capsys):
    root = tmp_path / "tar"
    write_tars(root)
    official(root)
    load(root, "train")
    assert "are checked and indexed once" in capsys.readouterr().out
    assert (root / "ILSVRC2012_img_train.tar.index.npz").exists()
    monkeypatch.setattr(imagenet_tar, "_training_images", lambda path: pytest.fail("indexed twice"))
    assert len(load(root, "train")) == 9 and capsys.readouterr().out == ""
    index = root / "ILSVRC2012_img_train.tar.index.npz"
    index.write_bytes(index.read_bytes()[:50])  # cut off: made anew
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    official(root)
    assert len(load(root, "train")) == 9 and "indexed once" in capsys.readouterr().out


def test_index_lies_in_the_users_cache_where_the_archive_may_not_have_it_beside(tmp_path, official, monkeypatch):
    root = tmp_path / "tar"
    write_tars(root)
    official(root)
    save = np.savez_compressed

    def refuse(path, **content):
        if Path(path).parent == root:
            raise PermissionError(13, "Permission denied")
        save(path, **content)

    monkeypatch.setattr(np, "savez_compressed", refuse)
    load(root, "train")
    assert len(list((tmp_path / "cache" / "mixmask").glob("*.index.npz"))) == 1 and not list(root.glob("*.npz"))


def test_other_archives_are_refused_unless_partial_data_are_allowed(tmp_path, monkeypatch):
    root = tmp_path / "tar"
    write_tars(root)
    with pytest.raises(DataError, match=r"img_train.tar is not the official archive: md5 \w{32}, expected 1d675b47"):
        load(root, "train")
    assert len(load(root, "train", allow_partial=True)) == 9
    assert load(root, "test", allow_partial=True).labels.tolist() == [0, 0, 1, 1, 2, 2]
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(DataError, match=r"devkit_t12.tar.gz is missing: it holds the labels"):
        load(root, "test", allow_partial=True)


def test_archives_that_are_cut_off_are_one_line(tmp_path, official):
    root = tmp_path / "tar"
    write_tars(root)
    official(root)
    files = load(root, "train")
    archive = root / "ILSVRC2012_img_train.tar"
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"img_train.tar is cut off: an image at [\d,]+ bytes is not whole"):
        list(test_batches(files, VIEW, 18, torch.device("cpu")))
    with pytest.raises(DataError, match=r"img_train.tar is truncated or not an archive of ImageNet"):
        load(root, "train")


def test_parquet_without_pyarrow_names_it(tmp_path, monkeypatch):
    import sys

    from mixmask.datasets import imagenet_parquet

    (tmp_path / "data").mkdir()
    for name in ("train-0.parquet", "validation-0.parquet"):
        (tmp_path / "data" / name).write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    imagenet_parquet._opened.cache_clear()
    with pytest.raises(DataError, match="reading parquet needs pyarrow; pip install pyarrow"):
        load(tmp_path, "train")


def test_damaged_or_foreign_parquet_is_one_line(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for name in ("train-0.parquet", "validation-0.parquet"):
        (tmp_path / "data" / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"^.*train-0.parquet cannot be read: .+$"):
        load(tmp_path, "train")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "data" / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0.parquet, row group 0: no column 'image.path' can be read"):
        load(tmp_path, "train")
