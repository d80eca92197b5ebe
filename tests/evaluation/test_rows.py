"""Finished images and the prompts they are measured by belong together, however both are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from deme_cli.config import SampleConfig
from deme_cli.data.prompts import read_prompts
from deme_cli.errors import ArtifactError, ConfigError, DemeError
from deme_cli.evaluation.row_plans import plan_rows
from deme_cli.evaluation.rows import Row, RowOpener

NUM = 12


def write_images(folder: Path, name: str) -> list[str]:
    """Image i has level i, and the name that `name` makes of i."""
    names = [name.format(i) for i in range(NUM)]
    for level, file in enumerate(names):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(folder / file)
    return names


def open_row(folder: Path, prompts: Path | str | None = None, **sample: int) -> Row:
    found = read_prompts(str(prompts)) if prompts else None
    opener = RowOpener(SampleConfig(**sample), found, ["text"])
    return opener.open(plan_rows([str(folder)]).plans[0])


def shown(row: Row) -> list[tuple[int, str]]:
    """The level of each image, and its prompt."""
    assert row.finished is not None
    assert row.prompts is not None
    levels = row.finished.batch(range(len(row.finished)))[:, 0, 0, 0].tolist()
    return list(zip(levels, row.prompts, strict=True))


RIGHT = [(level, f"level {level}") for level in range(NUM)]


@pytest.mark.parametrize("name", ["{:05d}.png", "{}.png", "image{}-a.png", "part{}/x.png"])
def test_prompts_in_order_are_those_of_images_as_people_number_them(
    tmp_path: Path, name: str
) -> None:
    write_images(tmp_path / "images", name)
    (tmp_path / "p.txt").write_bytes(
        b"\xef\xbb\xbf" + b"".join(f"level {level}\r\n".encode() for level in range(NUM))
    )
    assert shown(open_row(tmp_path / "images", tmp_path / "p.txt")) == RIGHT


@pytest.mark.parametrize("name", ["{:05d}.png", "{}.png", "{0}/{0}.png"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "coco", "elsewhere", "beside"])
def test_names_of_files_decide_where_there_are_any(tmp_path: Path, name: str, kind: str) -> None:
    names = write_images(tmp_path / "images", name)
    pairs = [(file, f"level {level}") for level, file in enumerate(names)][::-1]
    rows = [{"file_name": file, "text": prompt} for file, prompt in pairs]
    path = tmp_path / f"p.{kind}"
    if kind in ("csv", "tsv", "elsewhere"):
        mark, root = "\t" if kind == "tsv" else ",", "C:\\images\\" if kind == "elsewhere" else ""
        path = path.with_suffix(".tsv" if kind == "tsv" else ".csv")
        lines = [("file_name", "text"), *((root + file, prompt) for file, prompt in pairs)]
        path.write_text("\n".join(map(mark.join, lines)))
    elif kind == "coco":
        path = path.with_suffix(".json")
        images = [{"id": i, "file_name": file} for i, (file, _) in enumerate(pairs)]
        told = [{"image_id": i, "id": i, "caption": p} for i, (_, p) in enumerate(pairs)]
        path.write_text(json.dumps({"images": images, "annotations": told}))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path = tmp_path / "images/metadata.jsonl" if kind == "beside" else path
        path.write_text("\n".join(map(json.dumps, rows)))
    assert shown(open_row(tmp_path / "images", None if kind == "beside" else path)) == RIGHT


def test_of_images_without_a_prompt_none_is_taken_and_the_number_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", "{}.png")
    path = tmp_path / "p.csv"
    path.write_text("prompt,file_name\nlevel 10,10.png\nlevel 2,2.png\nother,99.png\n")
    row = open_row(tmp_path / "images", path)
    assert shown(row) == [RIGHT[2], RIGHT[10]]
    assert "2 of its 12 images are taken, which" in capsys.readouterr().err
    assert row.card["images"] != open_row(tmp_path / "images").card["images"]


def test_of_more_images_than_prompts_the_first_are_taken(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "{}.png")
    (tmp_path / "p.txt").write_text("a\nb\n")
    row = open_row(tmp_path / "images", tmp_path / "p.txt", per_prompt=2)
    assert row.prompts == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("table", "refused", "match"),
    [
        ("text\n" + "a\n" * 13, ConfigError, "has 12 images, .* prompts for 13, .*file_name"),
        ("text,file_name\na,\n", ArtifactError, "row 1 has no file_name"),
        ("text,file_name\na,0.png\nb,0.png\n", ArtifactError, "rows 1 and 2 name 0.png"),
        ("text,file_name\na,x.png\n", ArtifactError, "names none of the images"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, table: str, refused: type[DemeError], match: str
) -> None:
    write_images(tmp_path / "images", "{}.png")
    (tmp_path / "p.csv").write_text(table)
    with pytest.raises(refused, match=match):
        open_row(tmp_path / "images", tmp_path / "p.csv")
