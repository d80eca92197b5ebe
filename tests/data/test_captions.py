"""Data sets as other tools write them: pixels equal PIL's, captions and classes lie as they say."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from encoded import encoded as encoded_pixels
from encoded import parquet
from PIL import Image

from deme_cli.artifacts import SamplesRecord, write_artifact
from deme_cli.data.captions import NoAnnotations
from deme_cli.data.images import ImageData, open_images
from deme_cli.errors import ArtifactError, DemeError


def encoded(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return encoded_pixels(pixels, kind)


def write(folder: Path, files: Mapping[str | bytes, str | bytes]) -> None:
    for name, content in files.items():
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def table(**columns: list) -> bytes:
    """A parquet file, of as many images as the columns have rows."""
    rows = [{"bytes": encoded(n), "path": None} for n, _ in enumerate(next(iter(columns.values())))]
    return parquet(image=rows, **columns)


def tar(files: Mapping[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def images(*names: str, kind: str = "PNG") -> dict[str, bytes]:
    return {name: encoded(number, kind) for number, name in enumerate(names)}


def shard(*samples: Mapping[str, str | bytes]) -> bytes:
    """A shard of webdataset: files of one sample share a name and differ in their suffix."""
    return tar({f"{n}.{kind}": c for n, each in enumerate(samples) for kind, c in each.items()})


def open_all(path: Path | str, wants: str, split: str = "all", **more: object) -> ImageData:
    return open_images(str(path), shape=None, split=split, wants=wants, **more)


def captions_of(data: ImageData) -> list[str]:
    return data.captions(range(len(data)))


def labels_of(data: ImageData) -> list[int]:
    return data.labels(range(len(data)))


def lines(*rows: Mapping) -> str:
    return "\n".join(map(json.dumps, rows))


# what each tool writes: images in the order in which they come, what lies beside them, and what
# each shows


def metadata(*rows: tuple[str, object], column: str = "text") -> str:
    return lines(*({"file_name": name, column: value} for name, value in rows))


Told = list[str] | list[int] | None
LAYOUTS: dict[str, tuple[list[str], dict[str | bytes, str | bytes], Told]] = {
    "bare": (["0.png", "1.gif", "2.TIF", "3.webp", "4.bmp", "5.jfif", "6.ppm", "7.jp2", "10.png"],
             {"notes.md": "no image", ".hidden.png": encoded(9), "__MACOSX/0.png": encoded(9)},
             None),
    "names not in UTF-8": (["tea.png"], {b"caf\xe9.png": encoded(0), b"caf\xe9.txt": "coffee",
                           "tea.txt": "tea"}, ["coffee", "tea"]),
    "kohya": (["5_cat/2.png", "5_cat/10.png", "5_dog/x.y.png"],
              {"5_cat/2.txt": "\ufeff\r\nsks cat \r\nmore\r\n", "5_cat/10.caption": "sks cat, b"},
              ["sks cat", "sks cat, b", "dog"]),
    "kohya, by names": (["7_my cat/a.png", "7_my dog/b.png"], {}, ["my cat", "my dog"]),
    "metadata.jsonl": (["b/2.png", "b/10.png"],
                       {"metadata.jsonl": metadata(("b/10.png", "ten"), ("b/2.png", "two"))},
                       ["two", "ten"]),
    "metadata.csv": (["a.png", "b.png"],
                     {"metadata.csv": 'file_name,text\n./b.png,"b, ""drawn"""\na.png,a\n'},
                     ["a", 'b, "drawn"']),
    "metadata at several levels": (
        ["a/x.png", "b/x.png", "c/d/y.png"],
        {"a/metadata.jsonl": metadata(("x.png", "of a"), column="caption"),
         "metadata.csv": "file_name,text\nb/x.png,of b\n./c/d/y.png,of d\n"},
        ["of a", "of b", "of d"]),
    "metadata.parquet": (
        ["a/2.png", "a/10.png", "b.png"],
        {"metadata.parquet": parquet(file_name=["b.png", "a/10.png", "a/2.png"],
                                         text=["c", "b", "a"])}, ["a", "b", "c"]),
    "img2dataset, files": (
        ["00000/000000000.jpg", "00000/000000002.jpg", "00001/000010001.jpg"],
        {"00000/000000000.txt": "c 0", "00000/000000000.json": '{"caption": "no", "url": "u"}',
         "00000/000000002.json": '{"caption": "c 1", "url": "u", "status": "success"}',
         "00001/000010001.txt": "c 2", "00000_stats.json": "{}",
         "00000.parquet": parquet(key=["0", "1"], status=["success", "failed"]),
         "00001.parquet": parquet(key=["0", "1"], status=["success", "failed"])},
        ["c 0", "c 1", "c 2"]),
    "labels": (["a/0.png", "b/1.png", "b/2.png"],  # floats, as pandas writes them
               {"metadata.csv": "file_name,label\na/0.png,10.0\nb/1.png,2.0\nb/2.png,9.0\n"},
               [10, 2, 9]),
    "names of labels": (["0.png", "1.png", "2.png"],
                        {"metadata.jsonl": metadata(("0.png", "b"), ("1.png", "a"), ("2.png", "b"),
                                                    column="label")}, [1, 0, 1]),
    "digit folders": (["2/x.png", "007/x.png", "10/x.png"], {}, [2, 7, 10]),
    "GTSRB": (["00003/00000_1.ppm", "00003/00000_2.ppm", "00012/00000_0.ppm"], {}, [3, 3, 12]),
    "StyleGAN": (["00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png"],
                 {"dataset.json": json.dumps({"labels": [["00001/img00001000.png", 0],
                                                         ["00000/img00000001.png", 9],
                                                         ["00000/img00000000.png", 6]]})},
                 [6, 9, 0]),
    "named folders": (["train/1/x.png", "train/cat/x.png", "train/dog/y.png"], {}, [0, 1, 2]),
    "Tiny ImageNet": (["n01/images/a.png", "n02/images/a.png", "n02/images/b.png"], {}, [0, 1, 1]),
    "folders at several depths": (["cat/a.png", "cat/tabby/a.png", "dog/pug/old/a.png"], {},
                                  [0, 0, 1]),
    "classes called like splits": (["beaker/0.png", "test tube/1.png", "train/2.png"], {},
                                   [0, 1, 2]),
}  # fmt: skip
KINDS = {".gif": "GIF", ".TIF": "TIFF", ".webp": "WEBP", ".bmp": "BMP", ".jfif": "JPEG",
         ".ppm": "PPM", ".jp2": "JPEG2000", ".jpg": "JPEG"}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_its_tool_means_it(tmp_path: Path, name: str) -> None:
    names, beside, told = LAYOUTS[name]
    content = [encoded(n + 1, KINDS.get(Path(each).suffix, "PNG")) for n, each in enumerate(names)]
    write(tmp_path, {**dict(zip(names, content, strict=True)), **beside})
    first = [encoded(0)] if name == "names not in UTF-8" else []
    compare(tmp_path, [*first, *content], told)


def compare(folder: Path, content: list[bytes], told: Told) -> None:
    wants = "nothing" if told is None else "text" if isinstance(told[0], str) else "class"
    data = open_all(folder, wants)
    assert len(data) == len(content)
    for index, image in enumerate(content):
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        assert np.array_equal(data.batch([index])[0].permute(1, 2, 0), pixels)
    if told is not None:
        assert (captions_of if wants == "text" else labels_of)(data) == told


def test_shards_of_img2dataset_are_read_with_their_captions(tmp_path: Path) -> None:
    """A field may be null in one shard and text in the next; tables beside them are passed over."""
    content = []
    for part in range(2):
        samples = []
        for number in range(3):
            meta = {"caption": f"{part} {number}", "width": 8, "exif": "{}" if part else None}
            image = encoded(10 * part + number, "JPEG")
            content.append(image)
            samples.append({"jpg": image, "txt": f"{part} {number}", "json": json.dumps(meta)})
        write(tmp_path, {f"{part:05d}.tar": shard(*samples), f"{part:05d}_stats.json": "{}"})
        write(tmp_path, {f"{part:05d}.parquet": parquet(key=["0"], caption=["wrong"])})
    compare(tmp_path, content, [f"{part} {number}" for part in range(2) for number in range(3)])


def test_tables_of_img2dataset_are_read_without_what_was_not_downloaded(tmp_path: Path) -> None:
    content = [encoded(0, "JPEG"), None, encoded(2, "JPEG")]
    status = ["success", "failed_to_download", "success"]
    columns = {"key": ["0", "1", "2"], "url": ["u"] * 3, "caption": list("abc"), "status": status}
    write(tmp_path, {"00000.parquet": parquet(**columns, jpg=content)})
    compare(tmp_path, [encoded(0, "JPEG"), encoded(2, "JPEG")], ["a", "c"])


def test_samples_of_webdataset_are_files_of_one_name_up_to_the_first_dot(tmp_path: Path) -> None:
    found = {"a/0.png": encoded(0), "a/1.JPG": encoded(1, "JPEG"), "b/1.png": encoded(2)}
    files: dict[str, str | bytes] = {"README.md": "no sample", "._a.png": "x"}
    for label, (name, content) in enumerate(found.items()):
        files |= {f"{name[:-4]}.mask.png": encoded(9), name: content}
        files |= {f"{name[:-4]}.cls": f"{3 * label}\n", f"{name[:-4]}.json": '{"label": 1}'}
    write(tmp_path, {"0.tar": tar(files)})
    compare(tmp_path, list(found.values()), [0, 3, 6])


SPLITS = {  # the files of training, those held out, and those in neither
    "train_test": (["train/a.png", "train/b.png"], ["test/c.png"], []),
    "coco": (["train2017/1.png"], ["val2017/2.png"], ["extra/3.png", "logo.png"]),
    "three": (["training_set/1.png"], ["Val/0.png", "test_set/1.png"], []),
    "sets": (["train set/1.png"], ["test set/2.png"], ["sample/3.png"]),
    "images": (["train/1.png"], ["test_images/2.png"], []),
    "classes_above": (["cat/train/1.png"], ["cat/test/1.png"], []),
    "classes_below": (["train/cat/1.png", "train/dog/1.png"], ["valid/cat/1.png"], []),
    "no_train": (["a.png", "more/b.png"], ["validation/c.png"], []),
    "names": (["train_1.png", "train-2.png"], ["test_1.png"], []),
    "test_alone": (["test/1.png"], [], []),
    "words": (["contest/1.png", "evaluate/2.png", "a test.png"], [], []),
    "a_class": (["beaker/1.png", "test tube/2.png"], [], []),
}


@pytest.mark.parametrize("kept", SPLITS.values(), ids=SPLITS)
def test_folders_of_splits_are_the_splits(tmp_path: Path, kept: tuple[list[str], ...]) -> None:
    train, held_out, neither = kept
    every = {name: encoded(n) for n, name in enumerate([*train, *held_out, *neither])}
    write(tmp_path, every)
    name_of = {np.asarray(Image.open(io.BytesIO(e))).tobytes(): n for n, e in every.items()}

    def names(split: str) -> set[str]:
        data = open_images(str(tmp_path), shape=None, split=split)
        found = data.batch(range(len(data))).permute(0, 2, 3, 1).numpy()
        return {name_of[image.tobytes()] for image in found}

    assert names("all") == {*train, *held_out}
    if held_out:
        assert (names("train"), names("held-out")) == (set(train), set(held_out))


def test_each_split_has_its_own_metadata_and_all_share_the_classes(tmp_path: Path) -> None:
    write(tmp_path, images("train/a/0.png", "train/c/1.png", "test/b/2.png", "test/c/3.png"))
    told = [{"file_name": "a/0.png", "text": "x"}, {"file_name": "c/1.png", "text": "y"}]
    write(tmp_path, {"train/metadata.jsonl": lines(*told)})
    write(tmp_path, {"metadata.csv": "file_name\nextra.png\n", "extra.png": encoded(4)})
    train = open_images(str(tmp_path), shape=None, wants="text")  # test/ has no captions
    assert train.captions([0, 1]) == ["x", "y"]
    labels = [
        open_images(str(tmp_path), shape=None, split=split, wants="class").labels([0, 1])
        for split in ("train", "held-out")
    ]
    assert labels == [[0, 2], [1, 2]]


def test_training_sees_images_as_often_as_kohyas_folders_repeat_them(tmp_path: Path) -> None:
    names = [f"{folder}/{n}.png" for folder in ("20_cat", "10_dog") for n in range(26)]
    write(tmp_path, images(*names))
    data = open_images(str(tmp_path), shape=None, wants="text")
    assert data.captions(range(len(data))) == ["dog"] * 26 + ["cat"] * 50
    held_out = open_images(str(tmp_path), shape=None, split="held-out", wants="text")
    assert held_out.captions([0]) == ["cat"]
    assert len(open_images(str(tmp_path), shape=None, split="all", wants="text")) == 52


@pytest.mark.parametrize(
    ("names", "stored", "expected"),
    [
        (["0", "1", "10", "2"], [0, 2, 3], [0, 10, 2]),  # as `datasets` sorts names of folders
        (["3", "7"], [1, 0, 1], [7, 3, 7]),
        (["1", "2", "3"], [0, 2, 1], [0, 2, 1]),
        (["dog", "cat", "10"], [2, 0, 1], [2, 0, 1]),
    ],
)
def test_declared_classes_whose_names_are_numbers_are_these_numbers(
    tmp_path: Path, names: list[str], stored: list[int], expected: list[int]
) -> None:
    import datasets

    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    rows = {"img": [{"bytes": encoded(0), "path": None}] * 3, "label": stored}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "t.parquet")
    data = open_images(str(tmp_path), shape=None, split="all", wants="class")
    assert data.labels(range(3)) == expected


def test_named_folders_are_classes_as_datasets_numbers_them(tmp_path: Path) -> None:
    import datasets

    write(tmp_path, images("Zoo/1.png", "b1/1.png", "b10/1.png", "b2/1.png", "é/1.png"))
    oracle = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    expected = {np.asarray(row["image"]).tobytes(): row["label"] for row in oracle}
    data = open_images(str(tmp_path), shape=None, split="all", wants="class")
    for index in range(5):
        pixels = np.ascontiguousarray(data.batch([index])[0].permute(1, 2, 0))
        assert data.labels([index]) == [expected[pixels.tobytes()]]


@pytest.mark.parametrize(
    ("files", "wants", "said"),
    [
        ({"cat/1.png": b"", "emu/1.png": b""}, "class", "2 classes by .*: 0 cat, 1 emu"),
        ({"10/1.png": b"", "3/1.png": b""}, "class", "2 classes by .*sub-folders.*: 3, 10"),
        ({"1.png": b"", "a.heic": b"x", "b.heic": b"x"}, "nothing", "left out .*: 2 .heic"),
        ({"train/1.png": b"", "test/1.png": b""}, "nothing", "held out are 1 images in test/"),
        ({"1_a/1.png": b"", "2_b/1.png": b""}, "text", "how often training sees .*: 2_b 2, 1_a 1"),
    ],
)  # fmt: skip
def test_what_was_taken_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, files: dict, wants: str, said: str
) -> None:
    write(tmp_path, {name: content or encoded(0) for name, content in files.items()})
    for _ in range(2):
        open_images(str(tmp_path), shape=None, split="all", wants=wants)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)


PNG = encoded(0)
ONE = {"x.png": PNG}
TWO = {"x.png": PNG, "y.png": PNG}


def labelled(value: object) -> dict[str, bytes | str]:
    """Two images, the second of this class."""
    rows = ({"file_name": "x.png", "label": 1}, {"file_name": "y.png", "label": value})
    return {**TWO, "metadata.jsonl": lines(*rows)}


UNTOLD: list[tuple[dict[str, str | bytes], str, str]] = [
    (ONE, "text", r"no captions: looked for metadata\.jsonl or metadata\.csv.*caption"),
    ({**ONE, "x.txt": "\n"}, "text", r"captions missing for 1 of 1.*x\.png"),
    ({**ONE, "x.txt": b"\xff\xff"}, "text", r"x\.txt: not UTF-8 at byte 0"),
    ({**ONE, "metadata.parquet": "PAR"}, "text", r"metadata\.parquet: broken"),
    ({**ONE, "metadata.jsonl": "\n"}, "text", r"metadata\.jsonl: the file is empty"),
    ({**ONE, "metadata.csv": "a,b\nx,y\n"}, "text", "no column file_name.*columns: a, b"),
    ({**ONE, "metadata.jsonl": "[1]\n"}, "text", "line 1: expected a JSON object"),
    ({**ONE, "metadata.jsonl": '{"text": "x"}\n{"file_name": "x.png"}'}, "text",
     "row 1 has no file_name"),
    ({**ONE, "metadata.jsonl": '{"file_name": "x.png", "alt": "x"}'}, "text",
     "no column text or.*columns: file_name, alt"),
    ({**ONE, "metadata.jsonl": '{"file_name": "x.png", "text": 7}'}, "text",
     "expected text .*found int"),
    ({**ONE, "metadata.csv": "file_name,text\ngone.png,b\n"}, "text",
     r"1 of 1 rows name .*not there.*gone\.png"),
    ({**ONE, "metadata.csv": "file_name,text\nx.png,b\nx.png,c\n"}, "text",
     r"row 2 names x\.png again"),
    ({"a/x.png": PNG, "x.png": PNG}, "class", r"labels missing for 1 of 2.*the names of sub-"),
    ({"1_a/x.png": PNG, "1_a/x.txt": "t"}, "class", "folders of repeats"),
    ({"0/0.png": PNG, "dataset.json": '{"labels": null}'}, "class", "no labels in it"),
    ({"0.png": PNG, "dataset.json": '{"labels": [1]}'}, "class", "expected labels as pairs"),
    (labelled(2.5), "class", r"y\.png: 2\.5 in column 'label' .*is no class"),
    (labelled("cat"), "class", r"y\.png: 'cat'.*is no class"),
    (labelled(-7), "class", r"y\.png: -7.*is no class"),
    (labelled(-1), "class", r"labels missing for 1 of 2 images, the first .*y\.png"),
    ({"t.parquet": table(alt=["x"])}, "text", "no column text or caption.*columns: image, alt"),
    ({"t.parquet": table(text=["x", None, ""])}, "text",
     "captions missing for 2 of 3 images.*row 1; .*column 'text'"),
    ({"0.tar": "no archive"}, "text", r"broken or not webdataset"),
    ({"x.heic": "x", "y.zip": "x"}, "nothing", r"no images that Pillow.*1 \.heic, 1 \.zip"),
]  # fmt: skip


def test_what_cannot_be_told_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for index, (files, wants, match) in enumerate(UNTOLD):
        write(folder := tmp_path / str(index), files)
        with subtests.test(match):
            with pytest.raises(DemeError, match=match) as refused:
                open_all(folder, wants)
            without = any(word in match for word in ("no labels in", "repeats", "looked for"))
            assert not without or isinstance(refused.value, NoAnnotations)


# columns that are asked for, fingerprints, splits of tables, what deme itself has


def test_the_column_asked_for_goes_before_the_usual_ones(tmp_path: Path) -> None:
    long = ["first", "second"]
    fields = [{"caption": f"a {n}", "alt": f"b {n}", "label": n} for n in range(3)]
    write(tmp_path, {
        "folder/x.png": PNG,
        "folder/metadata.jsonl": lines({"file_name": "x.png", "text": "usual", "long": long}),
        "t.parquet": table(prompt=["p"], caption=[["usual", "more"]], long=[long]),
        "0.tar": shard(*({"png": PNG, "json": json.dumps(each)} for each in fields)),
    })  # fmt: skip
    for name in ("folder", "t.parquet"):
        assert captions_of(open_all(tmp_path / name, "text")) == ["usual"]
        assert captions_of(open_all(tmp_path / name, "text", captions="long")) == ["first"]
        with pytest.raises(ArtifactError, match=r"no column short.*columns: .*long"):
            open_all(tmp_path / name, "text", captions="short")
    assert captions_of(open_all(tmp_path / "0.tar", "text")) == ["a 0", "a 1", "a 2"]
    assert captions_of(open_all(tmp_path / "0.tar", "text", captions="alt"))[1] == "b 1"
    assert labels_of(open_all(tmp_path / "0.tar", "class")) == [0, 1, 2]
    with pytest.raises(ArtifactError, match=r"no column short.*json: caption, alt, label"):
        open_all(tmp_path / "0.tar", "text", captions="short")


def test_the_fingerprint_covers_captions_only_where_they_are_wanted(tmp_path: Path) -> None:
    write(tmp_path, ONE)
    bare = open_all(tmp_path, "nothing").fingerprint
    seen = set()
    for text, label in (("one", 0), ("two", 0), ("two", 1)):
        row = {"file_name": "x.png", "text": text, "label": label}
        write(tmp_path, {"metadata.jsonl": lines(row)})
        assert open_all(tmp_path, "nothing").fingerprint == bare
        seen |= {open_all(tmp_path, wants).fingerprint for wants in ("text", "class")}
    assert len({bare, *seen}) == 5  # two sets of captions, two of labels, and the images alone


def test_classes_of_a_table_are_the_same_in_every_split(tmp_path: Path) -> None:
    write(tmp_path, {"train-0.parquet": table(label=["owl", "cat", "dog"])})
    write(tmp_path, {"test-0.parquet": table(label=["owl", "emu"])})
    train, held_out = (open_all(tmp_path, "class", split) for split in ("train", "held-out"))
    assert (labels_of(train), labels_of(held_out)) == ([3, 0, 1], [3, 2])
    assert train.num_classes == held_out.num_classes == 4


def test_digits_have_captions_and_classes() -> None:
    from sklearn.datasets import load_digits

    test, train = open_all("digits", "text", "held-out"), open_all("digits", "class", "train")
    assert captions_of(test)[:3] == ["a four", "a nine", "a four"]
    assert labels_of(train) == np.delete(load_digits().target, np.s_[4::5]).tolist()
    assert train.num_classes == 10
    with pytest.raises(ArtifactError, match="digits: no column 'text'"):
        open_all("digits", "text", captions="text")


def test_the_prompts_of_a_samples_artifact_are_its_captions(tmp_path: Path) -> None:
    tensors = {"images": np.zeros((2, 4, 4, 1), dtype=np.uint8), "seeds": np.arange(2)}
    path = tmp_path / "s.safetensors"
    write_artifact(path, tensors, SamplesRecord(protocol={}, prompts=["a one", "a two"]))
    assert captions_of(open_all(path, "text")) == ["a one", "a two"]
    with pytest.raises(ArtifactError, match="no classes"):
        open_all(path, "class")
