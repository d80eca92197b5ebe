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
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError
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


@pytest.mark.parametrize("name", ["{:05d}.png", "{}.png", "image{}-a.png", "part{}/x.png"])
def test_prompts_in_order_are_those_of_images_as_people_number_them(
    tmp_path: Path, name: str
) -> None:
    write_images(tmp_path / "images", name)
    (tmp_path / "p.txt").write_bytes(
        b"\xef\xbb\xbf" + b"".join(f"level {level}\r\n".encode() for level in range(NUM))
    )
    assert shown(open_row(tmp_path / "images", tmp_path / "p.txt")) == RIGHT


@pytest.mark.parametrize("name", ["{}.png", "{0}/{0}.png"])
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
    whole = open_rows(plan_rows([str(tmp_path / "images")])[0], SampleConfig())
    assert row.card["images"] != whole[0].card["images"]


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


def table(*arguments: str) -> list[tuple[str, str]]:
    return [(plan.name, plan.kind) for plan in plan_rows(arguments)[0]]


def test_experts_that_cover_all_timesteps_are_one_row(run_folder: Path) -> None:
    plans, warnings = plan_rows(["base.safetensors", *EXPERTS])
    assert table("base.safetensors", *EXPERTS) == [("base", "base"), ("ensemble", "ensemble")]
    assert plans[1].arguments == tuple(EXPERTS)
    assert warnings == []
    base, ensemble = open_rows(plans, SampleConfig())
    assert base.conditioning is ensemble.conditioning
    assert ensemble.card["model"] == "ensemble"
    own = [read_record(Path(path)).fingerprint for path in EXPERTS]
    assert ensemble.card["fingerprints"] == own


def test_an_expert_of_all_timesteps_is_a_row_of_its_own(run_folder: Path) -> None:
    write_tiny_expert(Path("control.safetensors"), Path("base.safetensors"), index=1, of=1)
    assert table("control.safetensors", *EXPERTS) == [
        ("control", "expert"),
        ("ensemble", "ensemble"),
    ]


def test_two_divisions_of_one_base_are_two_ensembles(run_folder: Path) -> None:
    for index in (1, 2):
        path = Path(f"ft_{index}of2.safetensors")
        write_tiny_expert(path, Path("base.safetensors"), index=index, of=2)
    names = table(*EXPERTS, "ft_1of2.safetensors", "ft_2of2.safetensors")
    assert names == [("ensemble-4", "ensemble"), ("ensemble-2", "ensemble")]


def test_experts_of_two_bases_are_two_ensembles(run_folder: Path) -> None:
    write_tiny_base(Path("other.safetensors"), seed=1)
    others = [f"other_{index}of4.safetensors" for index in range(1, 5)]
    for index, path in enumerate(others, start=1):
        write_tiny_expert(Path(path), Path("other.safetensors"), index=index, of=4)
    assert [kind for _, kind in table(*EXPERTS, *others)] == ["ensemble", "ensemble"]


def test_experts_that_leave_a_gap_are_rows_with_a_warning(run_folder: Path) -> None:
    plans, warnings = plan_rows(EXPERTS[:3])
    assert [plan.kind for plan in plans] == ["expert"] * 3
    assert len(warnings) == 3
    assert "timesteps 0:25" in warnings[0]


def test_without_arguments_the_folder_makes_the_rows(run_folder: Path) -> None:
    plans, _ = folder_rows(Path("base.safetensors"))
    assert [plan.name for plan in plans] == ["base", "ensemble"]
    Path(EXPERTS[0]).unlink()
    plans, (warning,) = folder_rows(Path("base.safetensors"))
    assert [plan.name for plan in plans] == ["base"]
    assert "ft_2of4" in warning
    with pytest.raises(MissingError, match="nothing to measure"):
        folder_rows(run_folder / "elsewhere" / "base.safetensors")


def test_samples_and_image_folders_are_rows(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.zeros((3, 8, 8, 1), np.uint8)
    write_artifact(Path("drawn.safetensors"), {"images": images}, SamplesRecord(protocol={}))
    assert table("drawn.safetensors", "images") == [("drawn", "samples"), ("images", "samples")]
    (image_folder / "samples.json").write_text('{"protocol": null}')
    with pytest.raises(ArtifactError, match="expected a table under protocol, found None"):
        open_rows(plan_rows(["images"])[0], SampleConfig())


def test_rows_of_one_name_are_told_apart_by_their_paths(run_folder: Path) -> None:
    Path("other").mkdir()
    write_tiny_base(Path("other/base.safetensors"), seed=1)
    names = [name for name, _ in table("base.safetensors", "other/base.safetensors")]
    assert names == ["base.safetensors", "other/base.safetensors"]
    with pytest.raises(ConfigError, match="given twice"):
        table("base.safetensors", "base.safetensors")


def test_what_cannot_be_measured_is_refused(run_folder: Path) -> None:
    with pytest.raises(MissingError, match="nowhere"):
        table("nowhere.safetensors")
    Path("broken.safetensors").write_bytes(b"12")
    with pytest.raises(ArtifactError, match="not a whole safetensors"):
        table("broken.safetensors")
    record = StatisticsRecord(n=2, extractor={}, resize="none", source="x")
    write_artifact(Path("ref.safetensors"), {"mu": np.zeros(2)}, record)
    with pytest.raises(ArtifactError, match="kind 'statistics' cannot be measured"):
        table("ref.safetensors")
    write_tiny_base(Path("large.safetensors"), sample_size=16)
    plans, _ = plan_rows(["base.safetensors", "large.safetensors"])
    with pytest.raises(ArtifactError, match="large has 16x16 images, base 8x8"):
        open_rows(plans, SampleConfig())
    record = SamplesRecord(protocol={}, prompts=["a"])
    write_artifact(Path("drawn.safetensors"), {"images": np.zeros((3, 8, 8, 1), np.uint8)}, record)
    with pytest.raises(ArtifactError, match="expected 3 prompts"):
        open_rows(plan_rows(["drawn.safetensors"])[0], SampleConfig())
