"""Images come from folders, tables, artifacts and the embedded set; upright, at one shape."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encoded, parquet
from PIL import Image, ImageCms

from deme_cli.artifacts import BaseRecord, SamplesRecord, write_artifact
from deme_cli.data import image_source, images
from deme_cli.data.digits import load_digits
from deme_cli.data.fitting import crop_corner, fit
from deme_cli.data.images import ImageData, open_images, to_unit
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError


def all_images(data: ImageData) -> torch.Tensor:
    return data.batch(range(len(data)))


def write_parquet(path: Path, pixels: np.ndarray) -> Path:
    rows = [{"bytes": encoded(image), "path": None} for image in pixels]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(parquet(label=list(range(len(rows))), img=rows))
    return path


def colour_pixels(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_digits_split_as_the_embedded_set_does() -> None:
    train = open_images("digits", shape=(1, 8, 8))
    held_out = open_images("digits", shape=None, split="held-out")
    assert (len(train), len(held_out)) == (1438, 359)
    expected = torch.from_numpy(load_digits("all")[0][4::5]).permute(0, 3, 1, 2)
    assert torch.equal(all_images(held_out), expected)
    assert held_out.shape == (1, 8, 8)
    assert not held_out.can_flip
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


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


def test_channels_and_size_are_converted_to_the_wanted_shape(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = 200  # the centre square
    Image.fromarray(wide).save(tmp_path / "0.png")
    grey = open_images(str(tmp_path), shape=(1, 4, 4), split="all")
    colour = open_images(str(tmp_path), shape=(3, 8, 8), split="all")
    assert grey.batch([0]).shape == (1, 1, 4, 4)
    assert colour.batch([0]).min() == 200


def on_white(image: Image.Image) -> np.ndarray:
    """(H, W, 3) as Pillow composes it."""
    opaque = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB"))


def translucent(mode: str) -> Image.Image:
    """8x8 of every alpha in `mode`."""
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colours = np.stack([ramp, 255 - 3 * ramp, 4 * ramp, 255 - 4 * ramp], axis=-1)
    return Image.fromarray(colours).convert(mode)


def keyed(mode: str, key: object) -> Image.Image:
    """8x8 of four levels in `mode`, of which `key` is transparent."""
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).convert(mode)
    if mode == "P":
        image.putpalette([255, 0, 255, 9, 200, 7, 0, 0, 90, 255, 255, 0])
    image.info["transparency"] = key
    return image


@pytest.mark.parametrize(
    ("image", "file"),
    [
        (translucent("RGBA"), "0.png"),
        (translucent("LA"), "0.png"),
        (translucent("RGBA"), "0.webp"),
        (keyed("P", 0), "0.gif"),
        (keyed("P", bytes([0, 40, 255, 128])), "0.png"),
        (keyed("RGB", (2, 2, 2)), "0.png"),
        (keyed("L", 2), "0.png"),
        (Image.new("CMYK", (8, 8), (10, 200, 30, 20)), "0.jpg"),
        (Image.new("1", (8, 8), 1), "0.png"),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else value,
)
def test_pixels_are_pillows_and_alpha_is_put_on_white_whatever_mode_carries_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image: Image.Image, file: str
) -> None:
    """The suffix does not matter: Pillow looks at the bytes."""
    options = {"lossless": True, "exact": True} if file.endswith("webp") else {}
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[Path(file).suffix], **options)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(buffer.getvalue())
    expected = on_white(Image.open(buffer))
    data = open_images(str(tmp_path), shape=(3, 8, 8), split="all")
    difference = data.batch([0])[0].permute(1, 2, 0).numpy().astype(int) - expected
    assert abs(difference).max() <= 1
    has_alpha = image.has_transparency_data
    assert capsys.readouterr().err.count("put on white (clean-fid drops") == has_alpha


def gamma_profile(space: str) -> bytes:
    """An ICC profile of linear light: grey, or RGB with the primaries of sRGB."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    primaries = {
        b"r": (0.4361, 0.2225, 0.0139), b"g": (0.3851, 0.7169, 0.0971),
        b"b": (0.1431, 0.0606, 0.7139),
    }  # fmt: skip
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    if space == "GRAY":
        tags[b"kTRC"] = b"curv" + bytes(8)
    else:
        for name, xyz in primaries.items():
            tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*xyz)
            tags[name + b"TRC"] = b"curv" + bytes(8)
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">II", place + len(body), len(value))
        body += value
    head = struct.pack(
        ">I4xI4s4s4s", place + len(body), 0x02400000, b"mntr", space.encode(), b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("L", "GRAY"), ("L", "RGB "), ("RGBA", "RGB "), ("I;16", "GRAY"), ("RGB", "sRGB"),
     ("RGB", "junk"), ("RGB", "GRAY")],
)  # fmt: skip
def test_colour_profiles_are_applied_and_what_is_no_profile_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, profile: str
) -> None:
    """Linear light of 55 is 128 in sRGB: 1.055 (55 / 255)^(1 / 2.4) - 0.055."""
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 55 * 257, dtype=np.uint16))
    else:
        image = Image.new("RGB", (4, 4), (55, 55, 55))
        image = image.convert(mode)
    if profile == "sRGB":
        encoded = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    else:
        encoded = b"junk" * 40 if profile == "junk" else gamma_profile(profile)
    image.save(tmp_path / "0.png", icc_profile=encoded)
    data = open_images(str(tmp_path), shape=None, split="all")
    said = capsys.readouterr().err
    is_used = "converted to sRGB" in said
    assert data.batch([0]).unique().tolist() == [128 if is_used else 55]
    assert is_used == (profile.strip() in ("RGB", "GRAY") and (mode, profile) != ("RGB", "GRAY"))
    assert is_used or ("is ignored" in said) == (profile != "sRGB")


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


def test_one_colour_image_makes_the_set_colour(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    assert open_images(str(tmp_path), shape=None, split="all").shape == (3, 4, 4)


def test_images_too_many_to_keep_are_decoded_by_batch(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = open_images(str(image_folder), shape=(3, 128, 128), split="all")
    assert kept.can_flip
    assert [len(open_images(str(image_folder), shape=None, split=split))
            for split in ("train", "held-out")] == [9, 1]  # fmt: skip
    monkeypatch.setattr(images, "_THREADED_PIXELS", 1)
    monkeypatch.setattr(images, "KEEP_BYTES", 100)
    lazy = open_images(str(image_folder), shape=(3, 128, 128), split="all")
    assert torch.equal(lazy.batch([7, 2, 2]), kept.batch([7, 2, 2]))
    assert lazy.fingerprint == kept.fingerprint
    (image_folder / "03.png").write_text("broken after it was opened")
    with pytest.raises(ArtifactError, match=r"03\.png"):
        lazy.batch([3])


def test_the_fingerprint_follows_names_and_bytes_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that are old, so that what was read of them is remembered."""
    monkeypatch.setenv("DEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deme_cli.data.image_source._SETTLED_NS", -1)
    folder = tmp_path / "images"
    folder.mkdir()
    for level in range(3):
        Image.new("L", (64, 64), level).save(folder / f"{level}.bmp")
        os.utime(folder / f"{level}.bmp", (1e9, 1e9))

    def fingerprint() -> str:
        return open_images(str(folder), shape=None, split="all").fingerprint

    before = fingerprint()
    assert (
        open_images(str(folder), shape=None, split="train").fingerprint == before == fingerprint()
    )
    retouched = Image.open(folder / "1.bmp")
    retouched.paste(9, (20, 20, 40, 40))
    retouched.save(folder / "1.bmp")  # of the same size, and at the same time
    os.utime(folder / "1.bmp", (1e9, 1e9))
    after = fingerprint()
    assert after != before
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    for broken in (b"{", b"[1]", b'{"1.bmp": 3}', b'{"1.bmp": [[1, 2], 3]}', b"\xff"):
        memory.write_bytes(broken)
        assert fingerprint() == after
    memory.unlink()
    memory.mkdir()  # cannot be written
    assert fingerprint() == after
    (folder / "0.bmp").rename(folder / "a.bmp")
    assert fingerprint() != after


def test_only_files_that_changed_are_read_again(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEME_CACHE", str(tmp_path / "cache"))
    read = []
    monkeypatch.setattr(image_source, "sha256_of", lambda path: read.append(path.name) or "0")
    paths = sorted(image_folder.iterdir())
    image_source.file_digests(image_folder, paths)
    image_source.file_digests(image_folder, paths)
    assert len(read) == 20  # too young to be trusted
    monkeypatch.setattr(image_source, "_SETTLED_NS", -1)
    for expected in (10, 0):
        read.clear()
        image_source.file_digests(image_folder, paths)
        assert len(read) == expected
    os.utime(paths[3])
    image_source.file_digests(image_folder, paths)
    assert read == [paths[3].name]


def test_a_table_that_was_replaced_at_the_same_time_is_read_anew(tmp_path: Path) -> None:
    fingerprints = set()
    for level in (1, 2):
        path = write_parquet(tmp_path / "t.parquet", np.full((2, 8, 8, 3), level, dtype=np.uint8))
        os.utime(path, (1e9, 1e9))
        data = open_images(str(path), shape=None, split="all")
        assert data.batch([0]).unique().tolist() == [level]
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 2


PNG = encoded(np.zeros((4, 4), dtype=np.uint8))
WIDE = encoded(np.zeros((4, 5), dtype=np.uint8))
NOTHING = {"bytes": None, "path": None}


BROKEN: list[tuple[dict[str, bytes | None], str, type[DemeError], str]] = [
    ({}, "photos", MissingError, r"no such file or folder.*digits"),
    ({}, "lsun-church", MissingError, "give the folder"),
    ({}, "cifar10", MissingError, r"HF_HUB_OFFLINE is set; .*give a folder of images"),
    ({}, "somebody/some-images", MissingError, r"HF_HUB_OFFLINE is set; .*give a folder"),
    ({"d/.hidden": PNG}, "d", MissingError, r"no images.*no parquet"),
    ({"x.rar": b"Rar"}, "x.rar", ConfigError, r"x\.rar: expected a folder or \.zip of images"),
    ({"base.safetensors": b""}, "base.safetensors", ArtifactError, "kind 'samples'.*'base'"),
    ({"d/0.png": PNG}, "d", ArtifactError, "too few images"),
    ({"d/0.png": PNG, "d/1.png": PNG[:42]}, "d", ArtifactError, r"1\.png: .*remove or mend"),
    ({"d/0.png": PNG, "d/1.png": b"x"}, "d", ArtifactError, r"1\.png: not a readable image"),
    ({"d/0.png": PNG, "d/1.png": None}, "d", MissingError, r"1\.png: no such file"),
    ({"d/0.png": PNG, "d/1.png": WIDE}, "d", ArtifactError, r"1\.png is 5x4.*one size"),
    ({"d/0.png": encoded(np.ones((4, 4), dtype=np.float32), "TIFF"), "d/1.png": PNG}, "d",
     ArtifactError, r"0\.png: .*floats.*save it with 8 or 16 bits"),
    ({"d/0.png": encoded(np.ones((4, 4), dtype=np.int32), "TIFF"), "d/1.png": PNG}, "d",
     ArtifactError, r"0\.png: .*save it with 8 or 16 bits"),
    ({"t.parquet": b"no table"}, "t.parquet", ArtifactError, "broken or not parquet"),
    ({"t.parquet": parquet(text=["a"])}, "t.parquet", ArtifactError,
     "no column holds images; columns: text"),
    ({"t.parquet": parquet(image=[{"bytes": b"x", "path": None}] * 2)}, "t.parquet",
     ArtifactError, r"t\.parquet: row 0: not a readable image"),
    ({"t.parquet": parquet(image=[{"bytes": PNG, "path": None}, NOTHING])}, "t.parquet",
     ArtifactError, "row 1 holds no image"),
]  # fmt: skip


def test_what_is_no_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for index, (files, argument, error, match) in enumerate(BROKEN):
        (folder := tmp_path / str(index)).mkdir()
        monkeypatch.chdir(folder)
        for name, content in files.items():
            path = Path(name)
            path.parent.mkdir(exist_ok=True)
            if name == "base.safetensors":
                record = BaseRecord(
                    source="x", model_config={}, scheduler_config={}, num_train_timesteps=1
                )
                write_artifact(path, {"w": np.zeros(1)}, record)
            elif content is None:
                path.symlink_to("gone.png")
            else:
                path.write_bytes(content)
        split = "train" if "too few" in match else "all"
        with subtests.test(match), pytest.raises(error, match=match):
            open_images(argument, shape=None, split=split)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)  # what the system does; root may read everything
    with pytest.raises(MissingError, match="cannot be read: Permission denied"):
        open_images(str(tmp_path), shape=None)


def test_a_folder_that_bears_a_known_name_is_taken(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder.rename("imagenet")
    assert len(open_images("imagenet", shape=None, split="all")) == 10


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
