"""What lies in a folder is read with care: no links out, no pipes, no lies about being a PNG."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deme_cli.errors import ArtifactError, MissingError
from deme_cli.reporting import pictures
from deme_cli.reporting.folder import open_folder
from deme_cli.reporting.pictures import read_picture


def test_what_cannot_be_read_is_listed_with_its_reason(
    told_copy: Path, page_of: Callable, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"schema_version": 1, "kind": "losses", "reading": "a secret"}')
    (told_copy / "outside.json").symlink_to(secret)
    (told_copy / "inside.png").symlink_to(told_copy / "merged.search.png")
    (told_copy / "circle.png").symlink_to(told_copy / "circle.png")
    os.mkfifo(told_copy / "waits.json")
    (told_copy / "torn.safetensors").write_bytes((told_copy / "base.safetensors").read_bytes()[:-9])
    (told_copy / "deep.json").write_text("[" * 100_000)
    (told_copy / "bytes.json").write_bytes(b"\xff\xfe{")
    (told_copy / "newer.json").write_text('{"schema_version": 9, "kind": "losses"}')
    (told_copy / "liar.png").write_bytes(b"<svg onload='alert(1)'/>")
    whole = (told_copy / "given-samples.png").read_bytes()
    (told_copy / "given-samples.png").write_bytes(whole[:60])
    page, folder = page_of(told_copy)
    reasons = {one.name: one.reason for one in folder.unread}
    assert set(reasons) == {
        "outside.json", "torn.safetensors", "deep.json", "bytes.json", "newer.json", "liar.png",
        "given-samples.png",
    }  # fmt: skip
    assert "leads out of the folder" in reasons["outside.json"]
    assert reasons["torn.safetensors"].startswith("truncated or padded")
    assert "schema_version 9, this deme reads 1" in reasons["newer.json"]
    assert reasons["liar.png"] == "not a whole PNG file"
    assert "a secret" not in page.text()
    assert "no preview beside given-samples.safetensors" in page.section("samples")
    assert str(tmp_path) not in page.text()


def test_a_large_picture_is_reduced_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(path)
    assert read_picture(path).remark == ""
    monkeypatch.setattr(pictures, "MAX_BYTES", 5000)
    found = read_picture(path)
    assert found.remark == "reduced from 90 x 60 pixels"
    assert found.width < 90
    assert len(found.uri) < 7000
    monkeypatch.setattr(pictures, "_MAX_PIXELS", 100)
    with pytest.raises(ArtifactError, match="too many for a page"):
        read_picture(path)


def test_a_folder_of_images_shows_its_grid_and_its_prompts(
    told_copy: Path, page_of: Callable
) -> None:
    folder = told_copy / "drawn"
    folder.mkdir()
    card = {"protocol": {"model": "merged", "num": 2, "sampler": "euler", "steps": 3, "seed": 5}}
    (folder / "samples.json").write_text(json.dumps(card))
    rows = [{"file_name": f"{i}.png", "text": f"a {w}", "label": i} for i, w in enumerate("bc")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    Image.new("L", (8, 8)).save(told_copy / "drawn.png")
    page, _ = page_of(told_copy)
    shown = page.section("samples")
    assert "drawn2 images of merged: euler, 3 steps, seed 5." in shown
    assert "a b a c" in shown
    assert "Classes, row by row: 0, 1" in shown
    (folder / "samples.json").write_text("[]")
    page, found = page_of(told_copy)
    assert [one.name for one in found.unread] == ["drawn/samples.json"]


def test_other_pictures_are_shown_up_to_a_number(told_copy: Path, page_of: Callable) -> None:
    for index in range(14):
        Image.new("L", (4, 4)).save(told_copy / f"extra{index:02d}.png")
    page, folder = page_of(told_copy)
    assert "extra11.png" in page.section("figures")
    assert [one.name for one in folder.unread] == ["extra12.png", "extra13.png"]


def test_artifacts_further_down_are_counted(told_copy: Path, page_of: Callable) -> None:
    (told_copy / "more" / "deep").mkdir(parents=True)
    for name in ("a", "b"):
        (told_copy / "more" / "deep" / f"{name}.safetensors").write_bytes(b"")
    page, folder = page_of(told_copy)
    assert folder.below == {"more/deep": 2}
    assert "2 more artifacts in 1 folders below" in page.section("artifacts")


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: None, "no such folder"),
    (lambda p: p.write_text(""), "is a file, not a run folder"),
    (lambda p: p.mkdir(), "a run begins with `deme split digits -n 4`"),
    (lambda p: (p / "sub").mkdir(parents=True) or (p / "sub" / "x.safetensors").touch(), "but in"),
    (lambda p: p.mkdir() or (p / "x.safetensors").touch(), "that can be read"),
])  # fmt: skip
def test_a_folder_without_a_run_is_an_error(tmp_path: Path, make: Callable, message: str) -> None:
    make(tmp_path / "run")
    with pytest.raises(MissingError, match=message):
        open_folder(tmp_path / "run")
