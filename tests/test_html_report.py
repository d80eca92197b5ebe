"""The page of a run folder holds what lies there, is valid, runs nothing, and names no place."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import deme_cli
from deme_cli import run_folder
from deme_cli.analysis.result import document_bytes
from deme_cli.artifacts import SamplesRecord, load_tensors, read_record, write_artifact

SECTIONS = ("results", "training", "search", "figures", "samples", "artifacts")
EVIL = "<img src=x onerror=alert(1)>"
EXPERTS = [f"ft_{index}of4.safetensors" for index in range(1, 5)]
RUN_FILE = '[data]\nsource = "digits"\n[sample]\nsteps = 2\n[merge]\nreport_repeats = 2\n'


@pytest.fixture(scope="session")
def told_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, experts, a trained one with its curve, a search, samples, a table, an analysis."""
    from deme_cli.app import app

    folder = tmp_path_factory.mktemp("told") / "my run"
    shutil.copytree(finished_run, folder)
    (folder / "deme.toml").write_text(RUN_FILE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for line in (
            ["finetune", "--range", "1/4", "--steps", "6", "-b", "4", "--held-out", "8",
             "--checkpoint-every", "2", "-o", "again.safetensors"],
            ["merge", *EXPERTS, "--search", "random", "--evaluations", "3", "--num", "16"],
            ["merge", *EXPERTS, "-w", "0.4,0.1,0.2,0.3", "-o", "given.safetensors"],
            ["sample", "given.safetensors", "-n", "4"],
            ["eval", "base.safetensors", "given.safetensors", "--fid", "digits", "-n", "20",
             "--repeats", "2", "-o", "eval.json"],
        ):  # fmt: skip
            result = CliRunner().invoke(app, line)
            assert result.exit_code == 0, (line, result.exception)
    finally:
        os.chdir(before)
    document = {
        "reading": "experts gained 2 % in their ranges",
        "protocol": {"models": {"base": "0123"}, "num": 4}, "values": [1.0],
    }  # fmt: skip
    (folder / "losses.json").write_bytes(document_bytes("losses", document))
    Image.new("RGB", (40, 30), "white").save(folder / "losses.png")
    return folder


@pytest.fixture
def told_copy(told_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(told_run, tmp_path / "my run")


class Page:
    """A page parsed by the strict parser, which ends at the first error."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
        self.root = parser.parse(content.decode())
        self.elements: list[Element] = [e for e in self.root.iter() if isinstance(e.tag, str)]

    def all(self, tag: str) -> list[Element]:
        return [e for e in self.elements if e.tag == tag]

    def text(self, element: Element | None = None) -> str:
        return " ".join("".join((self.root if element is None else element).itertext()).split())

    def section(self, name: str) -> str:
        """The text of a section; empty where there is none."""
        return next((self.text(e) for e in self.all("section") if e.get("id") == name), "")

    def require_safe(self) -> None:
        """Nothing runs, nothing is fetched, every id is one of a kind."""
        active = {"script", "iframe", "object", "embed", "link", "base", "form", "audio", "video"}
        assert not active & {e.tag for e in self.elements}
        for element in self.elements:
            for name, value in element.attrib.items():
                assert not str(name).lower().startswith("on"), (element.tag, name)
                if str(name).split("}")[-1] in ("src", "href", "action", "srcset"):
                    assert value.startswith(("data:image/png;base64,", "#")), value[:80]
        ids = [e.get("id") for e in self.elements if e.get("id")]
        assert len(ids) == len(set(ids))
        anchors = {e.get("href") for e in self.all("a")}
        assert anchors <= {f"#{one}" for one in ids}
        assert all(image.get("alt") for image in self.all("img"))


def page_of(path: Path, **options: Any) -> tuple[Page, deme_cli.WrittenReport]:
    """The page of a folder, parsed, and what the report says of it."""
    made = deme_cli.report(path, force=True, **options)
    page = Page(made.path.read_bytes())
    page.require_safe()
    return page, made


def test_a_run_with_everything_has_every_section(told_run: Path) -> None:
    page, made = page_of(told_run)
    assert [e.get("id") for e in page.all("section")] == list(SECTIONS)
    assert (made.unread, made.counts["artifacts"]) == ({}, 9)
    assert "my run" in page.text(page.all("h1")[0])
    rows = json.loads((told_run / "eval.json").read_text())["rows"]
    figure = f"{rows[1]['metrics']['frechet_digits']['value']:.1f}"[:3]
    prints = [read_record(path).fingerprint[:12] for path in told_run.glob("*.safetensors")]
    for section, words in (
        ("results", (figure, "minus the first", "weights_sha256")),
        ("search", ("gain of the ensemble kept", "; trials in merged.tri",
                    "coefficients by random search of loss: 11 evaluations")),
        ("figures", ("experts gained 2 % in their ranges",)),
        ("samples", ("4 images: ddim, 2 steps, seed 0",)), ("artifacts", prints),
    ):  # fmt: skip
        assert all(word in page.section(section) for word in words), section
    alts = [str(image.get("alt")) for image in page.all("img")]
    assert "Training and held-out loss of again" in alts
    assert "not in this folder" not in page.text().lower()
    policy = [e.get("content") for e in page.all("meta") if e.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for index, path in enumerate(sorted(told_run.iterdir(), reverse=True)):
        os.utime(path, (index, index))
    assert page_of(told_run)[0].content == page.content


def test_a_shared_page_names_no_place_of_the_machine(told_copy: Path) -> None:
    path = told_copy / "merged.safetensors"
    record = read_record(path)
    parents = [{**one, "path": f"C:\\Users\\somebody\\{one['path']}"} for one in record.parents]
    record = replace(record, parents=parents, source="~somebody/models/ddpm")
    write_artifact(path, load_tensors(path), record)
    table, losses = (json.loads((told_copy / f"{n}.json").read_text()) for n in ("eval", "losses"))
    reference = table["rows"][0]["protocol"]["references"]["frechet_digits"]
    reference["source"] = "/home/somebody/church"
    losses["protocol"]["models"] = [{"source": "/home/somebody/ft_1of4.safetensors"}]
    (told_copy / "eval.json").write_text(json.dumps(table))
    (told_copy / "losses.json").write_text(json.dumps(losses))
    page, _ = page_of(told_copy)
    assert "somebody" not in page.text()
    assert "models.1.source ft_1of4.safetensors" in page.section("figures")
    assert "source church" in page.section("results")


def _spoil(folder: Path) -> None:
    """Names, prompts, readings, protocols and records that try to be markup."""
    shutil.copy(folder / "ft_1of4.safetensors", folder / f"ft_{EVIL[:-1]}>.safetensors")
    (folder / f"{EVIL}.metrics.jsonl").write_text('{"step": 1, "loss": 2, "lr": 0.1}\n')
    seed = "'\"><script>alert(2)</script>"
    record = SamplesRecord(
        protocol={"model": EVIL, "num": 2, "seed": seed, EVIL: {EVIL: [EVIL]}},
        prompts=["</figure><script>alert(1)</script>", "\x00\x07 a \ud800 and \U0001fffe </style>"],
    )
    images = {"images": np.zeros((2, 8, 8, 1), np.uint8), "seeds": np.zeros(2, np.int64)}
    write_artifact(folder / "shown.safetensors", images, record)
    Image.new("L", (8, 8)).save(folder / "shown.png")
    Image.new("L", (8, 8)).save(folder / f"{EVIL}.png")
    (folder / "losses.json").write_text(json.dumps({
        "schema_version": 1, "kind": "losses", "protocol": {"</dd><script>": "<b>"},
        "reading": "\" onload='alert(3)' x=\"<svg/onload=alert(4)> & 'quoted'",
    }))  # fmt: skip
    Image.new("RGB", (8, 8)).save(folder / "losses.png")
    document = json.loads((folder / "eval.json").read_text())
    document["rows"][1]["name"] = f"--> {EVIL}"
    document["rows"][1]["protocol"]["sampler"] = "{{ 7 * 7 }}"
    (folder / "eval.json").write_text(json.dumps(document))


def test_nothing_that_a_file_says_becomes_markup(told_copy: Path) -> None:
    _spoil(told_copy)
    page, made = page_of(told_copy, title=f"</title><script>{EVIL}")
    assert not made.unread
    shown = page.text()
    assert f"ft_{EVIL}.safetensors" in shown
    assert "</figure><script>alert(1)</script>" in page.section("samples")
    assert "\N{REPLACEMENT CHARACTER}" in page.section("samples")
    assert "<svg/onload=alert(4)> & 'quoted'" in page.section("figures")
    assert "{{ 7 * 7 }}" in page.section("results")
    assert f"--> {EVIL}" in page.section("results")
    assert "differs in 1" in page.section("results")
    images = [image.get("alt") for image in page.all("img")]
    assert "\" onload='alert(3)' x=\"<svg/onload=alert(4)> & 'quoted'" in images
    assert {e.tag for e in page.root.iter("script")} == set()


def test_what_cannot_be_read_is_listed_with_its_reason(
    told_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    (told_copy / "half.json").write_text('{"schema_version": 1, "rows": [{"name": 3}]}')
    (told_copy / "liar.png").write_bytes(b"<svg onload='alert(1)'/>")
    with (told_copy / "huge.json").open("wb") as file:
        file.truncate(1 << 27)
    Image.new("L", (4000, 4000)).save(told_copy / "wide.png")
    monkeypatch.setattr(run_folder, "_MAX_PIXELS", 10_000_000)
    (told_copy / "no.metrics.jsonl").write_text('[]\n{"step": 40, "lo')
    with (told_copy / "again.metrics.jsonl").open("a") as curve:
        curve.write('{"step": 40, "lo')  # torn by a kill, and left out
    whole = (told_copy / "given-samples.png").read_bytes()
    (told_copy / "given-samples.png").write_bytes(whole[:60])
    page, made = page_of(told_copy)
    for name, reason in {
        "outside.json": "leads out of the folder", "deep.json": "", "bytes.json": "",
        "torn.safetensors": "not a whole safetensors file", "newer.json": "schema_version 9",
        "half.json": "damaged", "liar.png": "not a whole PNG file", "given-samples.png": "",
        "no.metrics.jsonl": "no record of training", "huge.json": "more than a report reads",
        "wide.png": "4000 x 4000 pixels, too many",
    }.items():  # fmt: skip
        assert reason in made.unread.pop(name)
    assert not made.unread
    assert made.counts["curves"] == 1
    assert "a secret" not in page.text()
    assert "no preview beside given-samples.safetensors" in page.section("samples")
    assert str(tmp_path) not in page.text()


def test_a_folder_of_images_shows_its_grid_and_pictures_have_an_end(told_copy: Path) -> None:
    folder = told_copy / "drawn"
    folder.mkdir()
    card = {"protocol": {"model": "merged", "num": 2, "sampler": "euler", "steps": 3, "seed": 5}}
    (folder / "samples.json").write_text(json.dumps(card))
    Image.new("L", (8, 8)).save(told_copy / "drawn.png")
    for index in range(14):
        Image.new("L", (4, 4)).save(told_copy / f"extra{index:02d}.png")
    page, made = page_of(told_copy)
    assert "drawn2 images: euler, 3 steps, seed 5" in page.section("samples")
    assert made.counts["pictures"] == 12
    (folder / "samples.json").write_text("[]")
    assert list(page_of(told_copy)[1].unread) == ["drawn/samples.json"]


def test_a_comparison_shows_its_rows_and_apart_what_was_published(told_copy: Path) -> None:
    first = {"mean": 5.0, "sd": None, "repeats_sd": 0.2, "difference": None}
    difference = {"mean": -2.0, "sd": 0.1, "interval": [-3.0, -1.0], "over": ""}
    second = {"mean": 3.0, "sd": 0.5, "repeats_sd": 0.2, "difference": difference}
    document = {
        "schema_version": 1, "title": "Methods", "reading": ["best is B"], "protocol": ["ddim"],
        "columns": [{"title": "coco fid", "metric": "fid", "measure": "coco"}],
        "rows": [
            {"name": name, "kind": "merged", "updates": 1600, "metrics": metrics,
             "results": [{"seed": seed}] if metrics else [],
             "failures": [] if metrics else ["/home/somebody/x: lost"]}
            for name, seed, metrics in (
                ("A", None, {"coco fid": first}), ("B", 0, {"coco fid": second}), ("C", 0, {}),
            )
        ],
        "cards": {"coco": {"steps": 2}},
        "published": {"source": "them", "columns": ["CIFAR10"], "rows": {"A": [4.42], "C": [None]}},
    }  # fmt: skip
    (told_copy / "compare.json").write_text(json.dumps(document))
    page, made = page_of(told_copy)
    assert made.unread == {}
    shown = page.section("results")
    for words in (
        "Methods Measured rows of compare.json row coco fid \N{DOWNWARDS ARROW}",
        "5.00 ± 0.20\N{DAGGER}", "3.00 ± 0.50", "[\N{MINUS SIGN}3.00, \N{MINUS SIGN}1.00]",
        "1 1,600", "best is B", "Published, not measured here: them", "4.42",
    ):  # fmt: skip
        assert words in shown, words
    (better,) = [e for e in page.all("td") if "better" in str(e.get("class")).split()]
    assert "\N{MINUS SIGN}2.00" in page.text(better)
