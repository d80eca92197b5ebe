"""Images come from folders, tables, artifacts and the embedded set; upright, at one shape."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deme_cli.artifacts import write_artifact
from deme_cli.data import images
from deme_cli.data.digits import load_digits_images
from deme_cli.data.images import ImageData, open_images, to_unit
from deme_cli.data.places import natural_order
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.records import SamplesRecord


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` prepares out of the cache of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def all_images(data: ImageData) -> torch.Tensor:
    return data.batch(range(len(data)))


def write_parquet(path: Path, pixels: np.ndarray, *, column: str = "img") -> Path:
    """A parquet file of PNG bytes, as any writer of tables would make it."""
    import pyarrow
    import pyarrow.parquet

    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    table = pyarrow.table({"label": list(range(len(pixels))), column: encoded})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


def colour_pixels(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_digits_split_as_the_embedded_set_does() -> None:
    train = open_images("digits", shape=(1, 8, 8))
    held_out = open_images("digits", shape=None, split="held-out")
    assert (len(train), len(held_out)) == (1438, 359)
    expected = torch.from_numpy(load_digits_images("test")).permute(0, 3, 1, 2)
    assert torch.equal(all_images(held_out), expected)
    assert held_out.shape == (1, 8, 8)


def test_only_digits_must_not_be_mirrored(image_folder: Path) -> None:
    assert not open_images("digits", shape=None).can_flip
    assert open_images(str(image_folder), shape=None).can_flip


def test_unit_range_maps_0_and_255_to_minus_one_and_one() -> None:
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_a_folder_is_read_in_the_order_of_its_names_below_it(tmp_path: Path) -> None:
    for name, level in (("b/x.png", 2), ("a.PNG", 1), ("b/y.bmp", 3), (".hidden.png", 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), level).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = open_images(str(tmp_path), shape=None, split="all")
    assert all_images(data)[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert data.shape == (1, 4, 4)


@pytest.mark.parametrize("names", [[f"img{n:03d}_a" for n in range(0, 999, 7)], ["", "a", "a-1"]])
def test_names_without_bare_numbers_keep_their_text_order(names: list[str]) -> None:
    assert sorted(names, key=natural_order) == sorted(names)


def test_images_are_numbered_as_people_number_them(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number // 6 * 9 + 1}").mkdir(exist_ok=True)
        Image.new("L", (4, 4), number).save(tmp_path / f"{number // 6 * 9 + 1}" / f"{number}.png")
    data = open_images(str(tmp_path), shape=None, split="all")
    assert all_images(data)[:, 0, 0, 0].tolist() == list(range(12))


def test_every_fiftieth_image_is_held_out_of_a_source_without_a_test_split(tmp_path: Path) -> None:
    pixels = np.arange(101, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    path = tmp_path / "samples.safetensors"
    seeds = np.arange(101, dtype=np.int64)
    write_artifact(path, {"images": pixels, "seeds": seeds}, SamplesRecord(protocol={}))
    held_out = open_images(str(path), shape=None, split="held-out")
    train = open_images(str(path), shape=None, split="train")
    assert all_images(held_out)[:, 0, 0, 0].tolist() == [49, 99]
    assert len(train) == 99
    assert len(open_images(str(path), shape=None, split="all")) == 101


def test_a_small_folder_holds_out_its_last_image(image_folder: Path) -> None:
    assert len(open_images(str(image_folder), shape=None, split="held-out")) == 1
    assert len(open_images(str(image_folder), shape=None, split="train")) == 9


def test_one_image_is_too_few_to_train_and_hold_out(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "only.png")
    with pytest.raises(ArtifactError, match="too few images"):
        open_images(str(tmp_path), shape=None, split="train")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="held-out"):
        open_images("digits", shape=None, split="test")


def test_channels_and_size_are_converted_to_the_wanted_shape(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = 200  # the centre square
    Image.fromarray(wide).save(tmp_path / "0.png")
    grey = open_images(str(tmp_path), shape=(1, 4, 4), split="all")
    colour = open_images(str(tmp_path), shape=(3, 8, 8), split="all")
    assert grey.batch([0]).shape == (1, 1, 4, 4)
    assert colour.batch([0]).min() == 200


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "CMYK"])
def test_any_mode_of_colour_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / f"0.{suffix}")
    data = open_images(str(tmp_path), shape=(3, 4, 4), split="all")
    assert data.batch([0]).min() >= 254


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.full((4, 4), 32768, dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "0.png")
    data = open_images(str(tmp_path), shape=None, split="all")
    assert data.shape == (1, 4, 4)
    assert data.batch([0]).unique().tolist() == [128]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4) * 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    image.save(tmp_path / "0.png", exif=exif)
    data = open_images(str(tmp_path), shape=None, split="all")
    assert data.shape == (1, 4, 2)
    assert np.array_equal(data.batch([0])[0, 0], np.rot90(np.asarray(image), -1))


def test_images_of_different_sizes_need_a_shape(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    Image.new("L", (5, 4)).save(tmp_path / "1.png")
    with pytest.raises(ArtifactError, match=r"1\.png is 5x4.*one size"):
        open_images(str(tmp_path), shape=None, split="all")
    assert len(open_images(str(tmp_path), shape=(1, 4, 4), split="all")) == 2


def test_one_colour_image_makes_the_set_colour(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    assert open_images(str(tmp_path), shape=None, split="all").shape == (3, 4, 4)


def test_a_corrupt_image_among_good_ones_is_named(image_folder: Path) -> None:
    broken = image_folder / "05.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ArtifactError, match=r"05\.png: .*remove or mend"):
        open_images(str(image_folder), shape=(1, 8, 8), split="all")


def test_a_file_that_is_no_image_is_named(image_folder: Path) -> None:
    (image_folder / "05.png").write_text("hello")
    with pytest.raises(ArtifactError, match=r"05\.png: not a readable image"):
        open_images(str(image_folder), shape=(1, 8, 8), split="all")


def test_a_link_to_nothing_among_images_is_named(image_folder: Path) -> None:
    (image_folder / "05.png").unlink()
    (image_folder / "05.png").symlink_to("gone.png")
    with pytest.raises(MissingError, match=r"05\.png: no such file"):
        open_images(str(image_folder), shape=(1, 8, 8), split="all")


def test_images_too_many_to_keep_are_decoded_by_batch(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = open_images(str(image_folder), shape=(3, 128, 128), split="all")
    monkeypatch.setattr(images, "KEEP_BYTES", 100)
    lazy = open_images(str(image_folder), shape=(3, 128, 128), split="all")
    assert torch.equal(lazy.batch([7, 2, 2]), kept.batch([7, 2, 2]))
    assert lazy.fingerprint == kept.fingerprint
    (image_folder / "03.png").write_text("broken after it was opened")
    with pytest.raises(ArtifactError, match=r"03\.png"):
        lazy.batch([3])


def test_large_images_decode_the_same_in_threads(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = all_images(open_images(str(image_folder), shape=None, split="all"))
    monkeypatch.setattr(images, "_THREADED_PIXELS", 1)
    assert torch.equal(all_images(open_images(str(image_folder), shape=None, split="all")), alone)


def test_the_fingerprint_follows_names_and_sizes_of_a_folder(image_folder: Path) -> None:
    before = open_images(str(image_folder), shape=None, split="all").fingerprint
    assert open_images(str(image_folder), shape=None, split="train").fingerprint == before
    (image_folder / "00.png").rename(image_folder / "a0.png")
    assert open_images(str(image_folder), shape=None, split="all").fingerprint != before


def test_an_empty_folder_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no images.*no parquet"):
        open_images(str(tmp_path), shape=None)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)  # what the system does; root may read everything
    with pytest.raises(MissingError, match="cannot be read: Permission denied"):
        open_images(str(tmp_path), shape=None)


def test_a_missing_folder_says_what_images_may_be() -> None:
    with pytest.raises(MissingError, match=r"no such file or folder.*digits"):
        open_images("photos", shape=None)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"images\.zip: expected a folder of images"):
        open_images(str(tmp_path / "images.zip"), shape=None)


@pytest.mark.parametrize("name", ["lsun-church", "lsun-bedroom", "coco", "imagenet", "parti"])
def test_names_without_a_download_ask_for_a_folder(name: str) -> None:
    with pytest.raises(MissingError, match="give the folder"):
        open_images(name, shape=None)


@pytest.mark.parametrize("source", ["cifar10", "somebody/some-images"])
def test_a_hub_dataset_without_network_fails_at_once_and_says_how_to_go_on(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(MissingError, match=r"HF_HUB_OFFLINE is set; .*give a folder of images"):
        open_images(source, shape=(3, 32, 32))
    assert time.monotonic() - began < 6


def test_a_parquet_file_is_read_and_its_image_column_found(tmp_path: Path) -> None:
    pixels = colour_pixels(60)
    path = write_parquet(tmp_path / "set.parquet", pixels)
    data = open_images(str(path), shape=None, split="all")
    assert torch.equal(all_images(data), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert len(open_images(str(path), shape=None, split="held-out")) == 1


def test_a_folder_of_parquet_files_splits_by_their_names(tmp_path: Path) -> None:
    pixels = colour_pixels(6)
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", pixels[:4])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", pixels[4:])
    for split, expected in (("train", pixels[:4]), ("held-out", pixels[4:]), ("all", pixels)):
        data = open_images(str(tmp_path), shape=None, split=split)
        assert torch.equal(all_images(data), torch.from_numpy(expected).permute(0, 3, 1, 2))


def test_a_table_without_images_names_its_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(ArtifactError, match="no column holds images; columns: text"):
        open_images(str(tmp_path / "t.parquet"), shape=None)


def test_a_broken_image_in_a_table_is_named_by_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"bytes": b"nothing", "path": None}]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "t.parquet")
    with pytest.raises(ArtifactError, match=r"t\.parquet: row 0: not a readable image"):
        open_images(str(tmp_path / "t.parquet"), shape=(3, 8, 8), split="all")


def test_an_empty_row_in_a_table_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", colour_pixels(2))
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).column("img").to_pylist()
    rows[1] = {"bytes": None, "path": None}
    pyarrow.parquet.write_table(pyarrow.table({"img": rows}), path)
    with pytest.raises(ArtifactError, match=r"row 1 holds no image"):
        open_images(str(path), shape=(3, 8, 8), split="all")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("no table")
    with pytest.raises(ArtifactError, match=r"t\.parquet: broken or not parquet"):
        open_images(str(tmp_path / "t.parquet"), shape=None)


def test_an_artifact_of_another_kind_holds_no_images(run_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'samples', found 'base'"):
        open_images("base.safetensors", shape=None)


def test_a_folder_that_bears_a_known_name_is_taken(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder.rename("imagenet")
    assert len(open_images("imagenet", shape=None, split="all")) == 10
