"""Prompts are read as they stand in every format, in order; a wrong file is told in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from deme_cli.data import prompts
from deme_cli.data.prompts import PromptSet, prompt_assets, read_prompts, select_prompts
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError
from deme_cli.fetch import Asset


def write_parti(path: Path, count: int = 1632) -> list[str]:
    """A table of PartiPrompts' shape: quotes, unpaired ones too, stand in fields as they are."""
    said = [f'"Sign {i}" on a wall' if i % 3 else f'a 5" board, no. {i}' for i in range(count)]
    rows = [f"{prompt}\tArtifacts\tBasic\t\n" for prompt in said]
    path.write_text("Prompt\tCategory\tChallenge\tNote\n" + "".join(rows), encoding="utf-8")
    return said


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# formats


def test_a_text_file_holds_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes('\ufeffein Käse\r\n\r\n  a cat, "and" a dog \u2028 \nlast'.encode())
    read = read_prompts(str(path))
    assert read.prompts == ("ein Käse", 'a cat, "and" a dog', "last")
    assert (read.classes, read.cycles, read.template) == (None, False, None)


def test_a_table_of_coco_is_read_with_commas_quotes_and_newlines_in_its_fields(
    tmp_path: Path,
) -> None:
    said = [f'A cat, a dog and "{i}".' for i in range(20)]
    with (tmp_path / "coco_30k.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "source", "prompt", "evaluation_seed"])
        writer.writerows([f"{i:012d}", "coco-30k", f"{t}\n", i + 7] for i, t in enumerate(said))
    assert list(read_prompts(str(tmp_path / "coco_30k.csv")).prompts) == said


def test_coco_captions_give_the_first_of_each_image_in_order(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 9, "id": 4, "caption": "nine, later"},
        {"image_id": 9, "id": 3, "caption": "nine \n"},
        {"image_id": 10, "id": 1, "caption": "ten"},
        {"image_id": 2, "id": 8, "caption": "two"},
    ]
    source = write(tmp_path / "c.json", json.dumps({"annotations": annotations, "images": []}))
    assert read_prompts(source).prompts == ("two", "nine", "ten")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", '["one", "two"]'),
        ("p.json", '[{"caption": "one", "id": 1}, {"caption": "two"}]'),
        ("p.jsonl", '{"caption": "one"}\n\n{"caption": "two"}\n'),
        ("p.csv", "n,TEXT\n1,one\n2,two\n"),
        ("p.csv", "text,caption,Prompt\nx,y,one\nx,y,two\n"),
        ("p.tsv", "caption\ttext\none\tx\ntwo\tx\n"),
    ],
)
def test_other_tables_are_read_by_their_usual_columns(
    tmp_path: Path, name: str, content: str
) -> None:
    assert read_prompts(write(tmp_path / name, content)).prompts == ("one", "two")


def test_the_column_can_be_named_and_classes_come_along(tmp_path: Path) -> None:
    source = write(tmp_path / "p.csv", "prompt,alt,label\nx,one,3\ny,two,0\n")
    read = read_prompts(source, column="alt")
    assert (read.prompts, read.classes) == (("one", "two"), (3, 0))
    words = read_prompts(write(tmp_path / "q.csv", "prompt,label\nx,cat\ny,dog\n"))
    assert words.classes is None


# known sets


def test_imagenet_is_the_class_names_of_open_clip_in_a_stated_template() -> None:
    read = read_prompts("imagenet")
    assert (len(read), read.template, read.cycles) == (1000, "a photo of a {}", True)
    assert read.prompts[0] == "a photo of a tench"
    assert read.classes == tuple(range(1000))


def test_digits_are_ten_prompts_in_turn() -> None:
    read = read_prompts("digits")
    assert read.prompts[::9] == ("a zero", "a nine")
    assert select_prompts(read, num=12, per_prompt=1)[9:] == [
        ("a nine", 9), ("a zero", 0), ("a one", 1),
    ]  # fmt: skip


def test_a_known_set_that_is_absent_says_where_it_comes_from_and_goes(cache: Path) -> None:
    (asset,) = prompt_assets("parti")
    with pytest.raises(MissingError) as raised:
        read_prompts("parti")
    for part in (asset.name, asset.sha256, asset.url, str(cache)):
        assert part in str(raised.value)


def test_a_known_set_is_read_from_the_cache_and_checked(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deme_cli.fetch import sha256_of

    said = write_parti(cache / "P.tsv", 1632)
    own = Asset("P.tsv", "prompts", "http://nowhere", sha256_of(cache / "P.tsv"))
    monkeypatch.setitem(prompts._ASSETS, "parti", own)
    read = read_prompts("parti")
    assert (list(read.prompts), read.source) == (said, "parti")
    write_parti(cache / "P.tsv", 4)
    with pytest.raises(ArtifactError, match=r"P\.tsv: expected the prompts, sha256 .*remove it"):
        read_prompts("parti")


# bad input


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("p.txt", " \n\n", ArtifactError, "holds no prompts"),
        ("p.csv", "prompt\n", ArtifactError, "holds no prompts"),
        ("p.json", '{"annotations": []}', ArtifactError, "holds no prompts"),
        ("p.csv", "id,alt\n1,x\n", ArtifactError, "no column prompt, caption, text; columns: id, "),
        ("p.csv", "prompt,id\nx,1\n,2\n", ArtifactError, "row 2 has no prompt in column 'prompt'"),
        ("p.csv", "id,prompt\n1,a, b\n", ArtifactError, "row 1 has 3 fields, the header 2"),
        ("p.csv", "prompt,class\nx,1\ny,cat\n", ArtifactError, "row 2 has 'cat' in column 'class'"),
        ("p.json", "{oops", ArtifactError, "not JSON"),
        ("p.json", '{"images": []}', ArtifactError, "expected COCO captions .*annotations"),
        ("p.json", '{"annotations": [{"image_id": 1, "id": 2, "bbox": []}]}', ArtifactError,
         "annotation 1 is no caption: expected image_id, id and caption, found image_id, id, bbox"),
        ("p.jsonl", "{}\n{oops\n", ArtifactError, "line 2 is not JSON"),
        ("p.png", "x", ConfigError, r"prompts are a file in \.txt"),
        ("p.txt", None, MissingError, r"p\.txt: no such file; .*parti, coco, imagenet"),
        ("p.csv", "prompt,alt\nx,y\n", ConfigError, "no column 'wrong'; columns: prompt, alt"),
        ("p.json", '{"annotations": [{"image_id": 1}]}', ConfigError,
         "annotation 1 is no caption: expected image_id, id and wrong, found image_id"),
        ("p.txt", "x\n", ConfigError, "has no columns.*'wrong'"),
        ("digits", None, ConfigError, "digits has no columns.*'wrong'"),
    ],
)  # fmt: skip
def test_what_holds_no_prompts_is_told(
    tmp_path: Path, name: str, content: str | None, error: type[DemeError], match: str
) -> None:
    source = write(tmp_path / name, content) if content is not None else str(tmp_path / name)
    with pytest.raises(error, match=match):
        read_prompts(
            name if name == "digits" else source, column="wrong" if "wrong" in match else None
        )


# which image has which prompt


def test_a_file_gives_each_prompt_its_images_in_order() -> None:
    two = PromptSet("p.txt", ("x", "y"))
    assert select_prompts(two, num=None, per_prompt=1) == [("x", None), ("y", None)]
    expected = [("x", None), ("x", None), ("y", None), ("y", None)]
    assert select_prompts(two, num=4, per_prompt=2) == expected


def test_a_number_that_the_prompts_do_not_make_is_refused() -> None:
    two = PromptSet("p.txt", ("x", "y"))
    with pytest.raises(ConfigError, match=r"p\.txt holds 2 prompts, -n says 3; leave -n out"):
        select_prompts(two, num=3, per_prompt=1)
    with pytest.raises(ConfigError, match="2 images each make 4"):
        select_prompts(two, num=2, per_prompt=2)


def test_sets_in_turn_take_any_number_and_one_image_at_a_time() -> None:
    read = read_prompts("digits")
    assert len(select_prompts(read, num=None, per_prompt=1)) == 10
    assert len(select_prompts(read, num=3, per_prompt=1)) == 3
    with pytest.raises(ConfigError, match="per_prompt must be 1"):
        select_prompts(read, num=20, per_prompt=2)
