"""Every image has its caption or class, wherever these lie; the first without one is named."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deme_cli.artifacts import SamplesRecord, write_artifact
from deme_cli.data.fitting import crop_corner, fit
from deme_cli.data.images import ImageData, open_images
from deme_cli.errors import ArtifactError, DemeError

NAMES = [f"{index:02d}.png" for index in range(10)]  # of the fixture image_folder


def write_lines(path: Path, rows: Sequence[Mapping]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def encoded(level: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, count: int, **columns: object) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"bytes": encoded(level), "path": None} for level in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, **columns}), path)


def write_shard(path: Path, samples: Sequence[Mapping[str, bytes]]) -> None:
    """A webdataset shard: files of one sample share a name and differ in their suffix."""
    with tarfile.open(path, "w") as shard:
        for index, sample in enumerate(samples):
            for suffix, content in sample.items():
                info = tarfile.TarInfo(f"{path.stem}-{index:04d}.{suffix}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))


def open_text(source: Path | str, split: str = "all", **more: object) -> ImageData:
    return open_images(str(source), shape=None, split=split, wants="text", **more)


def open_classes(source: Path | str, split: str = "all", **more: object) -> ImageData:
    return open_images(str(source), shape=None, split=split, wants="class", **more)


def captions_of(data: ImageData) -> list[str]:
    return data.captions(range(len(data)))


def labels_of(data: ImageData) -> list[int]:
    return data.labels(range(len(data)))


def refused(source: Path, match: str, **more: object) -> None:
    with pytest.raises(ArtifactError, match=match):
        open_text(source, **more)


# folders


@pytest.mark.parametrize("write", [write_lines, write_csv])
def test_metadata_gives_each_image_of_a_folder_its_caption(image_folder: Path, write) -> None:
    rows = [{"file_name": name, "text": f'a "{name}", drawn'} for name in reversed(NAMES)]
    suffix = "jsonl" if write is write_lines else "csv"
    write(image_folder / f"metadata.{suffix}", rows)
    data = open_text(image_folder)
    assert captions_of(data) == [f'a "{name}", drawn' for name in NAMES]
    assert open_text(image_folder, "held-out").captions([0]) == ['a "09.png", drawn']
    assert open_text(image_folder, "train").captions([8, 0]) == [f'a "{n}", drawn' for n in
                                                                 ("08.png", "00.png")]  # fmt: skip


def test_nested_folders_may_each_have_metadata_or_share_one_at_the_root(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", "c/d/y.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    write_lines(tmp_path / "a" / "metadata.jsonl", [{"file_name": "x.png", "caption": "of a"}])
    rows = [{"file_name": f, "text": t} for f, t in (("b/x.png", "of b"), ("./c/d/y.png", "of d"))]
    write_csv(tmp_path / "metadata.csv", rows)
    assert captions_of(open_text(tmp_path)) == ["of a", "of b", "of d"]


def test_the_column_asked_for_goes_before_the_usual_ones(image_folder: Path) -> None:
    rows = [{"file_name": n, "text": "usual", "long": ["first", "second"]} for n in NAMES]
    write_lines(image_folder / "metadata.jsonl", rows)
    assert captions_of(open_text(image_folder)) == ["usual"] * 10
    assert captions_of(open_text(image_folder, captions="long")) == ["first"] * 10
    refused(image_folder, "no column short.*columns: file_name, text, long", captions="short")


def test_images_without_captions_are_counted_and_the_first_is_named(image_folder: Path) -> None:
    rows = [{"file_name": name, "text": "some"} for name in NAMES]
    rows[4]["text"] = " "
    del rows[3], rows[6]["text"]
    write_lines(image_folder / "metadata.jsonl", rows)
    refused(image_folder, r"captions missing for 3 of 10 images, the first .*03\.png")


def test_a_folder_without_metadata_says_what_was_looked_for(image_folder: Path) -> None:
    refused(image_folder, r"no captions: looked for metadata\.jsonl or metadata\.csv.*caption")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("metadata.jsonl", "\n", r"metadata\.jsonl: the file is empty"),
        ("metadata.csv", "file_name,text\n", r"metadata\.csv: the file is empty"),
        ("metadata.csv", "", r"metadata\.csv: the file is empty"),
        ("metadata.csv", "file,text\na,b\n", "no column file_name.*columns: file, text"),
        ("metadata.csv", "file_name,text\na.png,one, two\n", "row 1 has 3 fields, the header 2"),
        ("metadata.jsonl", '{"file_name": "00.png"}\n{oops\n', "line 2 is not JSON"),
        ("metadata.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("metadata.jsonl", '{"text": "x"}\n{"file_name": "00.png"}', "row 1 has no file_name"),
        ("metadata.jsonl", '{"file_name": "00.png", "alt": "x"}', "no column text or.*columns: f"),
        ("metadata.jsonl", '{"file_name": "00.png", "text": 7}', "expected text .*found int"),
        ("metadata.csv", "file_name,text\ngone.png,b\n", r"1 of 1 rows name .*not there.*gone\.p"),
        ("metadata.csv", "file_name,text\n00.png,b\n00.png,c\n", r"row 2 names 00\.png again"),
    ],
)
def test_bad_metadata_is_named(image_folder: Path, name: str, content: str, match: str) -> None:
    (image_folder / name).write_text(content)
    refused(image_folder, match)


def test_metadata_that_is_not_utf8_is_named(image_folder: Path) -> None:
    (image_folder / "metadata.csv").write_bytes("file_name,text\n00.png,é\n".encode("latin-1"))
    refused(image_folder, "not UTF-8 at byte 22")


def test_folders_of_classes_are_numbered_by_name(tmp_path: Path) -> None:
    for name in ("train/10/x.png", "train/9/x.png", "train/cat/x.png", "train/cat/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    data = open_classes(tmp_path)
    assert (labels_of(data), data.num_classes) == ([1, 0, 2, 2], 3)  # 9 lies before 10
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ArtifactError, match=r"labels missing for 1 of 5 .*a\.png; looked in.*sub-"):
        open_classes(tmp_path)


@pytest.mark.parametrize(
    ("values", "expected", "num_classes"),
    [
        (["dog", "cat"] * 5, [1, 0] * 5, 2),
        (["10", "2"] * 5, [10, 2] * 5, 11),
        ([0, 3] * 5, [0, 3] * 5, 4),
    ],
)
def test_labels_in_metadata_are_numbers_or_names(
    image_folder: Path, values: list, expected: list[int], num_classes: int
) -> None:
    rows = [{"file_name": n, "label": v} for n, v in zip(NAMES, values, strict=True)]
    write_lines(image_folder / "metadata.jsonl", rows)
    data = open_classes(image_folder)
    assert (labels_of(data), data.num_classes) == (expected, num_classes)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (2.5, "02.png: 2.5 in column 'label' .*is no class"),
        ("cat", "02.png: 'cat'.*is no class"),
        (-7, "02.png: -7.*is no class"),
        (None, "labels missing for 1 of 10 images, the first .*02.png"),
        (-1, "labels missing for 1 of 10 images, the first .*02.png"),
    ],
)
def test_a_label_that_is_no_class_is_named(image_folder: Path, value: object, match: str) -> None:
    rows = [{"file_name": n, "label": 1} for n in NAMES]
    rows[2]["label"] = value
    write_lines(image_folder / "metadata.jsonl", rows)
    with pytest.raises(ArtifactError, match=match):
        open_classes(image_folder)


# fingerprints


def test_the_fingerprint_covers_captions_only_where_they_are_wanted(image_folder: Path) -> None:
    bare = open_images(str(image_folder), shape=None).fingerprint
    rows = [{"file_name": name, "text": "one", "label": 1} for name in NAMES]
    seen = set()
    for text, label in (("one", 0), ("two", 0), ("two", 1)):
        rows[0].update(text=text, label=label)
        write_lines(image_folder / "metadata.jsonl", rows)
        assert open_images(str(image_folder), shape=None).fingerprint == bare
        seen |= {open_text(image_folder).fingerprint, open_classes(image_folder).fingerprint}
    assert len({bare, *seen}) == 5  # two sets of captions, two of labels, and the images alone


# tables


def test_a_table_gives_the_first_of_its_usual_caption_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    several = [["zero", "nought"], ["one", "unity"], ["two"]]
    write_parquet(path, 3, prompt=["a", "b", "c"], caption=several, alt=["x", "y", "z"])
    assert captions_of(open_text(path)) == ["zero", "one", "two"]
    assert captions_of(open_text(path, captions="alt")) == ["x", "y", "z"]
    refused(path, "no column short .*columns: image, prompt, caption, alt", captions="short")


def test_a_table_without_captions_names_its_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", 2, alt=["x", "y"])
    refused(tmp_path / "t.parquet", "no column text or caption or prompt.*columns: image, alt")


def test_a_row_without_a_caption_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", 4, text=["x", None, "", "y"])
    refused(tmp_path / "t.parquet", "captions missing for 2 of 4 images.*row 1; .*column 'text'")
    write_parquet(tmp_path / "n.parquet", 2, text=[1, 2])
    refused(tmp_path / "n.parquet", "row 0: expected text in column 'text', found int")


def test_classes_of_a_table_are_the_same_in_every_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", 3, label=["owl", "cat", "dog"])
    write_parquet(tmp_path / "test-0.parquet", 2, label=["owl", "emu"])
    train, held_out = open_classes(tmp_path, "train"), open_classes(tmp_path, "held-out")
    assert (labels_of(train), labels_of(held_out)) == ([3, 0, 1], [3, 2])
    assert train.num_classes == held_out.num_classes == 4


def test_a_declared_number_of_classes_is_kept(tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["cat", "dog", "emu"])
    features = datasets.Features({"img": datasets.Image(), "labels": label})
    rows = {"img": [{"bytes": encoded(), "path": None}] * 2, "labels": [1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "t.parquet")
    data = open_classes(tmp_path / "t.parquet")
    assert (labels_of(data), data.num_classes) == ([1, 0], 3)


# webdataset


def test_shards_hold_images_captions_and_classes(tmp_path: Path) -> None:
    for shard in range(2):
        samples = [
            {"png": encoded(10 * shard + index), "txt": f"{shard} {index}".encode(),
             "cls": str(index).encode()}
            for index in range(3)
        ]  # fmt: skip
        write_shard(tmp_path / f"{shard:05d}.tar", samples)
    data = open_text(tmp_path)
    assert captions_of(data) == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    assert data.batch(range(6))[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert labels_of(open_classes(tmp_path)) == [0, 1, 2, 0, 1, 2]
    assert captions_of(open_text(tmp_path / "00001.tar")) == ["1 0", "1 1", "1 2"]


def test_captions_of_a_shard_may_be_fields_of_its_json(tmp_path: Path) -> None:
    fields = [{"caption": f"a {index}", "alt": f"b {index}", "label": index} for index in range(3)]
    samples = [{"png": encoded(), "json": json.dumps(each).encode()} for each in fields]
    path = tmp_path / "0.tar"
    write_shard(path, samples)
    assert captions_of(open_text(path)) == ["a 0", "a 1", "a 2"]
    assert captions_of(open_text(path, captions="alt")) == ["b 0", "b 1", "b 2"]
    assert labels_of(open_classes(path)) == [0, 1, 2]
    refused(path, "no column short.*fields of json: caption, alt, label", captions="short")


def test_a_sample_without_text_is_named(tmp_path: Path) -> None:
    samples = [{"png": encoded(), "txt": b"some"} for _ in range(7)]
    del samples[6]["txt"]
    write_shard(tmp_path / "0.tar", samples)
    refused(tmp_path / "0.tar", "captions missing for 1 of 7 images, the first .*row 6")


@pytest.mark.parametrize("content", [b"no archive", b""])
def test_a_file_that_is_no_shard_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    refused(tmp_path / "0.tar", r"0\.tar: broken or not webdataset")


def test_a_shard_without_samples_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [])
    refused(tmp_path / "0.tar", r"0\.tar: broken or not webdataset")


# what deme itself has


def test_digits_have_captions_and_classes() -> None:
    from sklearn.datasets import load_digits

    expected = load_digits().target
    test, train = open_text("digits", "held-out"), open_classes("digits", "train")
    assert captions_of(test)[:3] == ["a four", "a nine", "a four"]
    assert labels_of(train) == np.delete(expected, np.s_[4::5]).tolist()
    assert train.num_classes == 10
    with pytest.raises(ArtifactError, match="digits: no column 'text'"):
        open_text("digits", captions="text")


def test_the_prompts_of_a_samples_artifact_are_its_captions(tmp_path: Path) -> None:
    pixels, seeds = np.zeros((2, 4, 4, 1), dtype=np.uint8), np.arange(2)
    path = tmp_path / "s.safetensors"
    tensors = {"images": pixels, "seeds": seeds}
    write_artifact(path, tensors, SamplesRecord(protocol={}, prompts=["a one", "a two"]))
    assert captions_of(open_text(path)) == ["a one", "a two"]
    with pytest.raises(ArtifactError, match="no classes"):
        open_classes(path)
    bare = tmp_path / "bare.safetensors"
    write_artifact(bare, tensors, SamplesRecord(protocol={}))
    refused(bare, "no captions.*give images with captions")


# crops


def test_the_crop_goes_where_its_centering_says(tmp_path: Path) -> None:
    ramp = np.arange(16, dtype=np.uint8)[None].repeat(8, 0)  # 8 high, 16 wide
    Image.fromarray(ramp).save(tmp_path / "0.png")
    data = open_images(str(tmp_path), shape=(1, 8, 8), split="all")
    corners = torch.tensor([[0.0, 0.3], [0.5, 0.5], [1.0, 0.9]])
    crops = data.batch([0, 0, 0], corners)
    assert crops[:, 0, 0, 0].tolist() == [0, 4, 8]
    assert torch.equal(crops[1:2], data.batch([0]))
    assert data.sizes([0]) == [(8, 16)]


def test_the_corner_told_is_the_corner_cropped() -> None:
    ramp = Image.fromarray(np.arange(40, dtype=np.uint8)[None].repeat(20, 0))
    top, left = crop_corner((20, 40), (1, 20, 20), (0.7, 0.2))
    assert (top, left) == (0, 14)
    assert fit(ramp, (1, 20, 20), (0.7, 0.2))[0, 0, 0] == 14
    assert crop_corner((40, 20), (3, 10, 10)) == (5, 0)  # scaled to 20 x 10 first


def test_images_that_are_not_kept_are_the_same(image_folder: Path) -> None:
    kept = open_images(str(image_folder), shape=(1, 8, 8))
    lazy = open_images(str(image_folder), shape=(1, 8, 8), keep=False)
    assert torch.equal(lazy.batch([3, 1]), kept.batch([3, 1]))
    (image_folder / "03.png").unlink()
    assert kept.batch([3]).shape == (1, 1, 8, 8)
    with pytest.raises(DemeError, match=r"03\.png"):
        lazy.batch([3])


def test_other_images_of_the_same_size_have_another_fingerprint(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(
                tmp_path / f"{index}.bmp"
            )  # of one size, whatever they show
        found.append(open_images(str(tmp_path), shape=None, split="all").fingerprint)
    assert found[0] != found[1]
