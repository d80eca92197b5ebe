"""Data as benchmarks publish it: LSUN's LMDB, zips, `save_to_disk` folders, ADM's `.npz`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5, sha1
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from encoded import encoded
from PIL import Image

from deme_cli.data import archives, images
from deme_cli.data.images import ImageData, open_images
from deme_cli.errors import ArtifactError, ConfigError, MissingError

PIXELS = np.random.default_rng(3).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
PNGS = [encoded(image) for image in PIXELS]
LABELS = [[f"00000/img{i:08d}.png", (2 * i) % 5] for i in range(6)]


def open_all(path: Path, **options) -> ImageData:
    return open_images(str(path), shape=None, split="all", **options)


def pixels_of(data: ImageData) -> np.ndarray:
    return data.batch(range(len(data))).permute(0, 2, 3, 1).numpy()


def write_lsun(folder: Path, values: list[bytes]) -> Path:
    """As LSUN has it: the SHA-1 of an image is its key."""
    environment = lmdb.open(str(folder), map_size=1 << 40)
    with environment.begin(write=True) as transaction:
        for value in values:
            transaction.put(sha1(value).hexdigest().encode(), value)
    environment.close()
    return folder


def write_zip(path: Path, method: int = zipfile.ZIP_STORED, **others: str) -> Path:
    """As dataset_tool.py of StyleGAN and EDM writes it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for (name, _), png in zip(LABELS, PNGS, strict=True):
            archive.writestr(name, png)
        for name, text in others.items():
            archive.writestr(name.replace("_", "."), text)
    return path


def unpacked(path: Path) -> Path:
    folder = path.with_suffix("")
    zipfile.ZipFile(path).extractall(folder)
    return folder


# LMDB


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_an_lmdb_gives_the_images_of_a_folder_in_the_order_of_keys(
    tmp_path: Path, kind: str
) -> None:
    values = sorted((encoded(p, kind) for p in PIXELS), key=lambda value: sha1(value).hexdigest())
    path = write_lsun(tmp_path / "church_outdoor_train_lmdb", values)
    (tmp_path / "folder").mkdir()
    for place, value in enumerate(values):
        (tmp_path / "folder" / f"{place}.{kind.lower()}").write_bytes(value)
    data, beside = open_all(path), open_all(tmp_path / "folder")
    assert np.array_equal(pixels_of(data), pixels_of(beside))
    assert data.name(0) == f"{path}: key {sha1(values[0]).hexdigest()}"
    assert torch.equal(open_all(path / "data.mdb").batch([4]), data.batch([4]))
    with pytest.raises(ArtifactError, match="an LMDB holds images alone, no captions"):
        open_all(path, wants="text")


def test_lmdbs_side_by_side_split_as_their_names_say(tmp_path: Path) -> None:
    for name, chosen in (("bedroom_train_lmdb", PNGS[:4]), ("bedroom_val_lmdb", PNGS[4:])):
        write_lsun(tmp_path / name, chosen)
    data = {split: open_images(str(tmp_path), shape=None, split=split)
            for split in ("train", "held-out", "all")}  # fmt: skip
    assert [len(one) for one in data.values()] == [4, 2, 6]
    assert torch.equal(data["all"].batch([4, 5]), data["held-out"].batch([0, 1]))
    assert len({one.fingerprint for one in data.values()}) == 3
    assert len(open_images(str(tmp_path / "bedroom_val_lmdb"), shape=None)) == 1


@pytest.mark.slow
def test_an_lmdb_is_read_in_threads_and_processes_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lsun(tmp_path / "church_lmdb", PNGS)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    path.chmod(0o555)
    (path / "lock.mdb").chmod(0o444)
    (path / "data.mdb").chmod(0o444)
    monkeypatch.setattr(images, "KEEP_BYTES", 0)
    data = open_all(path)
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda k: data.batch([k % 6]), range(400)))
    assert all(torch.equal(one, data.batch([k % 6])) for k, one in enumerate(batches))
    code = (
        "import sys; from deme_cli.data.images import open_images\n"
        "print(open_images(sys.argv[1], shape=None, split='all').batch(range(6)).sum().item())"
    )
    command = [sys.executable, "-c", code, str(path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {int(one.communicate()[0]) for one in started} == {int(PIXELS.sum(dtype=int))}
    now = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    path.chmod(0o755)
    assert now == before


def test_without_lmdb_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lsun(tmp_path / "church_lmdb", PNGS)
    monkeypatch.setattr(archives, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=re.escape("pip install 'deme[lsun]'")):
        open_all(path)


# zips


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_the_folder_it_was_made_of(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "set.zip", method, dataset_json=json.dumps({"labels": LABELS}))
    data, folder = (open_all(p, wants="class") for p in (path, unpacked(path)))
    assert np.array_equal(pixels_of(data), PIXELS)
    assert data.labels(range(6)) == [label for _, label in LABELS] == folder.labels(range(6))
    assert (data.fingerprint, data.file_names()) == (folder.fingerprint, folder.file_names())
    assert data.name(2) == f"{path}/00000/img00000002.png"


def test_captions_and_splits_of_a_zip_are_those_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index, png in enumerate(PNGS):
            split = ("train", "test")[index % 2]
            archive.writestr(f"./{split}/{index}.png", png)
            archive.writestr(f"{split}/{index}.txt", f"image {index}\n")
        archive.writestr("__MACOSX/._0.png", b"x")
        archive.writestr("train/.DS_Store", b"x")
    for split, expected in (("train", [0, 2, 4]), ("held-out", [1, 3, 5])):
        data = open_images(str(path), shape=None, split=split, wants="text")
        assert np.array_equal(pixels_of(data), PIXELS[expected])
        assert data.captions(range(3)) == [f"image {index}" for index in expected]
    rows = [{"file_name": name, "text": f"t{label}"} for name, label in LABELS]
    told = write_zip(tmp_path / "told.zip", metadata_jsonl="\n".join(map(json.dumps, rows)))
    assert open_all(told, wants="text").captions([1, 2]) == ["t2", "t4"]


# save_to_disk


def test_folders_of_save_to_disk_are_read_with_their_splits(tmp_path: Path) -> None:
    import datasets

    def table(chosen: slice) -> datasets.Dataset:
        shown = [Image.fromarray(image) for image in PIXELS[chosen]]
        return datasets.Dataset.from_dict({"image": shown, "label": [*range(6)][chosen]})

    both = datasets.DatasetDict(train=table(slice(4)), validation=table(slice(4, 6)))
    both.save_to_disk(tmp_path / "both")
    both["train"].save_to_disk(tmp_path / "one", num_shards=2)
    for split, expected in (("train", slice(4)), ("held-out", slice(4, 6)), ("all", slice(6))):
        data = open_images(str(tmp_path / "both"), shape=None, split=split, wants="class")
        assert np.array_equal(pixels_of(data), PIXELS[expected])
        assert data.labels(range(len(data))) == [*range(6)][expected]
        assert data.num_classes == 6
    one = open_all(tmp_path / "one")
    train = open_images(str(tmp_path / "both"), shape=None, split="train")
    assert one.fingerprint == train.fingerprint
    assert len(open_images(str(tmp_path / "one"), shape=None)) == 3  # the last is held out


# npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., :1]])
def test_an_npz_of_adm_gives_its_images_and_classes(tmp_path: Path, save, pixels) -> None:
    path = tmp_path / "samples.npz"
    save(path, pixels, np.array([3, 0, 1, 2, 3, 3]))  # arr_0, arr_1
    data = open_all(path, wants="class")
    assert data.shape == (pixels.shape[3], 16, 16)
    assert np.array_equal(pixels_of(data), pixels)
    assert (data.labels([0, 1]), data.num_classes, data.name(1)) == ([3, 0], 4, f"{path}: image 1")
    with pytest.raises(ArtifactError, match="no captions"):
        open_all(path, wants="text")


def test_a_stored_array_is_mapped_and_a_compressed_one_inflated_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "stored.npz", pixels)
    np.savez_compressed(tmp_path / "deflated.npz", pixels)
    assert isinstance(archives.npz_images(tmp_path / "stored.npz")[1](0), np.memmap)
    monkeypatch.setattr(archives, "_BLOCK_BYTES", 1)  # blocks of 64 images
    monkeypatch.setattr(archives, "_LARGE_BYTES", 1)
    _, image = archives.npz_images(tmp_path / "deflated.npz")
    assert "another order, as training has it, takes long" in capsys.readouterr().err
    order = [*range(400), 399, 300, 10, 70, 0]
    with ThreadPoolExecutor(8) as pool:
        assert np.array_equal(np.stack([*pool.map(image, order)]), pixels[order])


# what is wrong with them


def test_what_is_broken_or_no_images_is_named(tmp_path: Path, subtests) -> None:
    """A row: what is made of a good file, the error, and its words."""
    for name, (make, error, match) in BROKEN.items():
        with subtests.test(name):
            path = tmp_path / name
            path.mkdir()
            with pytest.raises(error, match=match):
                open_all(make(path), wants="class" if "class" in name else "nothing")


def spoilt(path: Path, *, keep: float = 1) -> Path:
    """The file with bytes cut off, all but a share to keep; else with other bytes in its middle."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        content[: int(len(content) * keep)] if keep < 1
        else content[:middle] + bytes(99) + content[middle + 99 :]
    )  # fmt: skip
    return path


def npz(path: Path, save=np.savez, **arrays: np.ndarray) -> Path:
    save(path / "x.npz", **arrays)
    return path / "x.npz"


def saved(path: Path) -> Path:
    import datasets

    shown = [Image.fromarray(image) for image in PIXELS]
    datasets.Dataset.from_dict({"image": shown}).save_to_disk(path / "d")
    return path / "d"


def lmdb_in_zip(path: Path) -> Path:
    shutil.make_archive(str(path / "x"), "zip", write_lsun(path / "d", PNGS))
    return path / "x.zip"


BROKEN = {
    "lmdb cut": (lambda p: spoilt(write_lsun(p / "d", PNGS) / "data.mdb", keep=0.7),
                 ArtifactError, r"data\.mdb: cut off: expected \d+ bytes, found \d+"),
    "lmdb none": (lambda p: spoilt(write_lsun(p / "d", PNGS) / "data.mdb", keep=0).parent,
                  ArtifactError, r"data\.mdb: not a whole LMDB"),
    "lmdb empty": (lambda p: write_lsun(p / "d", []), ArtifactError, "the LMDB is empty"),
    "lmdb value": (lambda p: write_lsun(p / "d", [b"no image"]), ArtifactError,
                   f"d: key {sha1(b'no image').hexdigest()}: not a readable image"),
    "zip cut": (lambda p: spoilt(write_zip(p / "x.zip"), keep=0.9), ArtifactError,
                r"x\.zip: not a whole \.zip file"),
    "zip bytes": (lambda p: spoilt(write_zip(p / "x.zip")), ArtifactError,
                  r"x\.zip/00000/img0000000\d\.png: broken \(Bad CRC"),
    "zip of lmdb": (lmdb_in_zip, MissingError, r"holds no images.*unpack it first.*2 \.mdb"),
    "zip class": (lambda p: write_zip(p / "x.zip", dataset_json="{"), ArtifactError,
                  r"x\.zip/dataset\.json: not JSON"),
    "disk cut": (lambda p: spoilt(next(saved(p).glob("*.arrow")), keep=0.5).parent, ArtifactError,
                 "d: broken or not of save_to_disk"),
    "disk json": (lambda p: spoilt(saved(p) / "state.json", keep=0.5).parent, ArtifactError,
                  "d: broken or not of save_to_disk"),
    "npz cut": (lambda p: spoilt(npz(p, arr_0=PIXELS), keep=0.9), ArtifactError,
                r"x\.npz: not a whole \.npz file"),
    "npz bytes": (lambda p: spoilt(npz(p, np.savez_compressed, arr_0=PIXELS)), ArtifactError,
                  r"x\.npz: arr_0, image \d: broken"),
    "npz statistics": (lambda p: npz(p, mu=np.zeros(2), sigma=np.eye(2)), ArtifactError,
                       "expected images, arr_0, found mu, sigma"),
    "npz floats": (lambda p: npz(p, arr_0=PIXELS / 255), ArtifactError,
                   r"arr_0 to be uint8 .*found float64 \(6, 16, 16, 3\)"),
    "npz objects": (lambda p: npz(p, arr_0=np.array([{}, {}], dtype=object)), ArtifactError,
                    "found object"),
    "npz class objects": (lambda p: npz(p, arr_0=PIXELS, arr_1=np.array([{}] * 6)),
                          ArtifactError, r"arr_1.*allow_pickle|allow_pickle"),
    "npz class of few": (lambda p: npz(p, arr_0=PIXELS, arr_1=np.arange(5)), ArtifactError,
                         r"each of 6 images, found int64 \(5,\)"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "batches", "tar"])
def test_the_command_told_for_cifars_pickles_makes_parquet_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    import pickle

    import torchvision

    folder, names = tmp_path / "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6))]
    folder.mkdir()
    for number, name in enumerate([*names, "test_batch"]):
        rows = PIXELS[number].repeat(2, 0).repeat(2, 1).transpose(2, 0, 1).reshape(1, -1)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [number]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdef"]}))
    argument = {"folder": tmp_path, "batches": folder}.get(
        form, tmp_path / "cifar-10-python.tar.gz"
    )
    if form == "tar":
        with tarfile.open(argument, "w:gz") as archive:
            archive.add(folder, folder.name)
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    with pytest.raises(ConfigError, match="pickles") as told:
        open_all(argument)
    monkeypatch.undo()
    assert "\n" not in str(told.value)
    code = shlex.split(str(told.value).split("make parquet files of them: ")[1])[2]
    checksums = {file.name: md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    cifar = torchvision.datasets.CIFAR10
    for attribute, listed in (("train_list", names), ("test_list", ["test_batch"])):
        monkeypatch.setattr(cifar, attribute, [[name, checksums[name]] for name in listed])
    monkeypatch.setitem(cifar.meta, "md5", checksums["batches.meta"])
    if form == "tar":
        monkeypatch.setattr(cifar, "tgz_md5", md5(argument.read_bytes()).hexdigest())
        shutil.rmtree(folder)
    exec(code, {})
    train = open_images(str(tmp_path), shape=None, split="train", wants="class")
    assert (len(train), train.labels(range(5))) == (5, [0, 1, 2, 3, 4])
    assert np.array_equal(pixels_of(train)[:, ::2, ::2], PIXELS[:5])
    assert len(open_images(str(tmp_path), shape=None, split="held-out")) == 1


def test_a_replaced_archive_is_read_anew(tmp_path: Path) -> None:
    seen = []
    for value in (PNGS[0], PNGS[1]):
        write_lsun(tmp_path / "new", [value])
        os.replace(tmp_path / "new" / "data.mdb", tmp_path / "data.mdb")
        shutil.rmtree(tmp_path / "new")
        seen.append(pixels_of(open_all(tmp_path)))
    assert np.array_equal(np.concatenate(seen), PIXELS[:2])
