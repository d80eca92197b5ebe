"""Which rows a table has, from headers alone; and which prompt belongs to which finished image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_base, write_tiny_expert
from PIL import Image

from deme_cli.artifacts import SamplesRecord, StatisticsRecord, read_record, write_artifact
from deme_cli.config import SampleConfig
from deme_cli.data.prompts import read_prompts
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.rows import Row, folder_rows, open_rows, plan_rows

NUM = 12
EXPERTS = [f"ft_{index}of4.safetensors" for index in range(1, 5)]


def write_images(folder: Path, name: str) -> list[str]:
    """Image i has level i, and the name that `name` makes of i."""
    names = [name.format(i) for i in range(NUM)]
    for level, file in enumerate(names):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(folder / file)
    return names


def open_row(folder: Path, prompts: Path | str | None = None, **sample: int) -> Row:
    given = read_prompts(str(prompts)) if prompts else None
    plans, _ = plan_rows([str(folder)])
    (row,) = open_rows(plans, SampleConfig(**sample), prompts=given, needs_prompts=True)
    return row


def shown(row: Row) -> list[tuple[int, str]]:
    """The level of each image, and its prompt."""
    assert row.finished is not None
    assert row.prompts is not None
    levels = row.finished.batch(range(len(row.finished)))[:, 0, 0, 0].tolist()
    return list(zip(levels, row.prompts, strict=True))


RIGHT = [(level, f"level {level}") for level in range(NUM)]


@pytest.mark.parametrize("name", ["{:05d}.png", "part{}/x.png"])
def test_prompts_in_order_are_those_of_images_as_people_number_them(
    tmp_path: Path, name: str
) -> None:
    write_images(tmp_path / "images", name)
    (tmp_path / "p.txt").write_bytes(
        b"\xef\xbb\xbf" + b"".join(f"level {level}\r\n".encode() for level in range(NUM))
    )
    assert shown(open_row(tmp_path / "images", tmp_path / "p.txt")) == RIGHT


@pytest.mark.parametrize("kind", ["csv", "coco", "beside"])
def test_names_of_files_decide_where_there_are_any(tmp_path: Path, kind: str) -> None:
    names = write_images(tmp_path / "images", "{0}/{0}.png")
    pairs = [(file, f"level {level}") for level, file in enumerate(names)][::-1]
    path = tmp_path / "p.json"
    if kind == "csv":
        path = tmp_path / "p.csv"
        path.write_text("\n".join(map(",".join, [("file_name", "text"), *pairs, ("x", "y")])))
    elif kind == "coco":
        images = [{"id": i, "file_name": file} for i, (file, _) in enumerate(pairs)]
        told = [{"image_id": i, "id": i, "caption": p} for i, (_, p) in enumerate(pairs)]
        path.write_text(json.dumps({"images": images, "annotations": told}))
    else:
        rows = [{"file_name": file, "text": prompt} for file, prompt in pairs]
        (tmp_path / "images/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert shown(open_row(tmp_path / "images", None if kind == "beside" else path)) == RIGHT


def test_of_more_images_than_prompts_the_first_are_taken_of_fewer_none(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_images(folder, "{}.png")
    (tmp_path / "p.csv").write_text("text\na\nb\n")
    assert open_row(folder, tmp_path / "p.csv", per_prompt=2).prompts == ["a", "a", "b", "b"]
    (tmp_path / "p.csv").write_text("text\n" + "a\n" * 13)
    with pytest.raises(ConfigError, match=r"has 12 images, .* prompts for 13, .*file_name"):
        open_row(folder, tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text("text,file_name\na,0.png\nb,\n")
    with pytest.raises(ArtifactError, match=r"file_name lacks 11 of the 12 images .* 1\.png"):
        open_row(folder, tmp_path / "p.csv")


def table(*arguments: str) -> list[tuple[str, str]]:
    return [(plan.name, plan.kind) for plan in plan_rows(arguments)[0]]


def test_experts_that_cover_all_timesteps_are_one_row(run_folder: Path) -> None:
    plans, _ = folder_rows(Path("base.safetensors"))
    assert [(plan.name, plan.kind) for plan in plans] == [("base",) * 2, ("ensemble",) * 2]
    assert plans[1].arguments == tuple(EXPERTS)
    base, ensemble = open_rows(plans, SampleConfig())
    assert base.conditioning is ensemble.conditioning
    own = [read_record(Path(path)).fingerprint for path in EXPERTS]
    assert (ensemble.card["model"], ensemble.card["fingerprints"]) == ("ensemble", own)
    plans, warnings = plan_rows(EXPERTS[:3])  # which leave a gap
    assert [plan.kind for plan in plans] == ["expert"] * 3
    assert [warning.split()[5] for warning in warnings] == ["0:25", "25:50", "50:75"]
    Path(EXPERTS[0]).unlink()
    plans, (warning,) = folder_rows(Path("base.safetensors"))
    assert [plan.name for plan in plans] == ["base"]
    assert "ft_2of4" in warning


def test_every_division_and_every_base_makes_an_ensemble_of_its_own(run_folder: Path) -> None:
    base, other = Path("base.safetensors"), Path("other.safetensors")
    write_tiny_base(other, seed=1)
    names = {"ft_{}of2": (base, 2), "other_{}": (other, 4), "control": (base, 1)}
    for name, (parent, of) in names.items():
        for index in range(1, of + 1):
            path = Path(f"{name.format(index)}.safetensors")
            write_tiny_expert(path, parent, index=index, of=of)
    two = ["ft_1of2.safetensors", "ft_2of2.safetensors"]
    assert table("control.safetensors", *EXPERTS, *two) == [
        ("control", "expert"), ("ensemble-4", "ensemble"), ("ensemble-2", "ensemble"),
    ]  # fmt: skip
    others = [f"other_{index}.safetensors" for index in range(1, 5)]
    assert [kind for _, kind in table(*EXPERTS, *others)] == ["ensemble", "ensemble"]


def test_what_is_a_row_and_what_cannot_be_measured(run_folder: Path, image_folder: Path) -> None:
    images = {"images": np.zeros((3, 8, 8, 1), np.uint8)}
    write_artifact(Path("drawn.safetensors"), images, SamplesRecord(protocol={}))
    write_artifact(Path("told.safetensors"), images, SamplesRecord(protocol={}, prompts=["a"]))
    record = StatisticsRecord(n=2, extractor={}, resize="none", source="x")
    write_artifact(Path("ref.safetensors"), {"mu": np.zeros(2)}, record)
    Path("broken.safetensors").write_bytes(b"12")
    write_tiny_base(Path("large.safetensors"), sample_size=16)
    Path("other").mkdir()
    write_tiny_base(Path("other/base.safetensors"), seed=1)
    assert table("drawn.safetensors", "images") == [("drawn", "samples"), ("images", "samples")]
    paths = "base.safetensors", "other/base.safetensors"
    assert table(*paths) == [(path, "base") for path in paths], "of one name"
    (image_folder / "samples.json").write_text('{"protocol": null}')
    for arguments, kind, words in (
        ("images", ArtifactError, "expected a table under protocol, found None"),
        ("base.safetensors base.safetensors", ConfigError, "given twice"),
        ("nowhere.safetensors", MissingError, "nowhere"),
        ("broken.safetensors", ArtifactError, "not a whole safetensors"),
        ("ref.safetensors", ArtifactError, "kind 'statistics' cannot be measured"),
        ("base.safetensors large.safetensors", ArtifactError, "large has 16x16 images, base 8x8"),
        ("told.safetensors", ArtifactError, "expected 3 prompts"),
    ):
        with pytest.raises(kind, match=words):
            open_rows(plan_rows(arguments.split())[0], SampleConfig())
    with pytest.raises(MissingError, match="nothing to measure"):
        folder_rows(run_folder / "elsewhere" / "base.safetensors")
