"""The page holds what the folder holds, is valid, runs nothing, and opens in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deme_cli.artifacts import SamplesRecord, load_tensors, read_record, write_artifact
from deme_cli.reporting.folder import open_folder
from deme_cli.reporting.page import gather, render

PageOf = Callable[..., tuple]
SECTIONS = ("results", "training", "search", "figures", "samples", "artifacts")
EVIL = "<img src=x onerror=alert(1)>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def test_a_run_with_everything_has_every_section(told_run: Path, page_of: PageOf) -> None:
    page, folder = page_of(told_run)
    assert [e.get("id") for e in page.all("section")] == list(SECTIONS)
    assert not folder.unread
    assert "my run" in page.text(page.all("h1")[0])
    rows = json.loads((told_run / "eval.json").read_text())["rows"]
    assert f"{rows[1]['metrics']['frechet_digits']['value']:.1f}"[:3] in page.section("results")
    assert "minus base" in page.section("results")
    assert "weights_sha256" in page.section("results")
    assert "again, t in 0:25" in page.section("training")
    assert "held-out" in page.section("training")
    assert "Search random by loss: 11 evaluations" in page.section("search")
    assert "11 trials begun, 11 finished" in page.section("search")
    assert "gain of the ensemble kept" in page.section("search")
    assert "experts gained 2 % in their ranges." in page.section("figures")
    assert "4 images of given: ddim, 2 steps, seed 0" in page.section("samples")
    for artifact in folder.artifacts:
        assert artifact.record.fingerprint[:12] in page.section("artifacts")
    assert "not in this folder" not in page.text().lower()


def test_the_document_is_laid_out_for_readers_and_machines(told_run: Path, page_of: PageOf) -> None:
    page, _ = page_of(told_run)
    html = page.all("html")[0]
    assert html.get("lang") == "en"
    levels = [int(e.tag[1]) for e in page.elements if e.tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for table in page.all("table"):
        assert table[0].tag == "caption"
        assert all(cell.get("scope") for cell in table.iter("th"))
    policy = [e.get("content") for e in page.all("meta") if e.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for mark in (b"prefers-color-scheme: dark", b"@media print", b"width=device-width"):
        assert mark in page.content


def test_the_same_folder_makes_the_same_bytes(told_run: Path, told_copy: Path) -> None:
    first = render(gather(open_folder(told_run)))
    (told_copy / "report.html").write_bytes(first)
    for index, path in enumerate(sorted(told_copy.iterdir(), reverse=True)):
        os.utime(path, (index, index))
    assert render(gather(open_folder(told_copy))) == first


def test_a_shared_page_names_no_place_of_the_machine(told_copy: Path, page_of: PageOf) -> None:
    data = {"source": "/home/somebody/church", "fingerprint": "0", "num": 3}
    for name in ("ft_1of4", "merged"):
        path = told_copy / f"{name}.safetensors"
        record = read_record(path)
        if name == "merged":
            parents = [
                {**one, "path": f"C:\\Users\\somebody\\{one['path']}"} for one in record.parents
            ]
            record = replace(record, parents=parents)
        else:
            record = replace(record, data=data, source="~somebody/models/ddpm")
        write_artifact(path, load_tensors(path), record)
    (told_copy / "base.safetensors").unlink()
    document = json.loads((told_copy / "eval.json").read_text())
    document["rows"][0]["protocol"]["references"]["frechet_digits"]["source"] = data["source"]
    (told_copy / "eval.json").write_text(json.dumps(document))
    document = json.loads((told_copy / "losses.json").read_text())
    document["protocol"]["models"] = [{"source": "/home/somebody/ft_1of4.safetensors"}]
    (told_copy / "losses.json").write_text(json.dumps(document))
    page, _ = page_of(told_copy)
    assert "somebody" not in page.text()
    assert "models.1.source ft_1of4.safetensors" in page.section("figures")
    assert "church, 3 in training" in page.text(page.all("header")[0])


def test_half_of_it_missing_is_told_with_the_commands_that_make_it(
    told_copy: Path, page_of: PageOf
) -> None:
    for name in (
        "ft_3of4.safetensors", "merged.safetensors", "given.safetensors",
        "given-samples.safetensors", "eval.json", "losses.json", "again.metrics.jsonl",
    ):  # fmt: skip
        (told_copy / name).unlink()
    page, _ = page_of(told_copy)
    assert [e.get("id") for e in page.all("section")] == ["search", "figures", "artifacts"]
    shown = page.text(page.all("header")[0])
    for command in (
        "deme finetune --range 3/4", "deme finetune --range all", "deme merge ft_*.safetensors",
        "deme sample base.safetensors", "deme eval --fid REF", "deme analyze",
    ):  # fmt: skip
        assert command in shown
    assert "The search of merged is not finished: 11 trials begun" in page.section("search")


def _spoil(folder: Path) -> None:
    """Names, prompts, readings, protocols and records that try to be markup."""
    shutil.copy(folder / "ft_1of4.safetensors", folder / f"ft_{EVIL[:-1]}>.safetensors")
    (folder / f"{EVIL}.metrics.jsonl").write_text('{"step": 1, "loss": 2, "lr": 0.1}\n')
    protocol = {
        "model": EVIL,
        "num": 2,
        "seed": "'\"><script>alert(2)</script>",
        EVIL: {EVIL: [EVIL]},
    }
    images = {"images": np.zeros((2, 8, 8, 1), np.uint8), "seeds": np.zeros(2, np.int64)}
    prompts = [
        "</figure><script>alert(1)</script>",
        "\x00\x07 control \ud800 and \U0001fffe </style>",
    ]
    write_artifact(
        folder / "shown.safetensors", images, SamplesRecord(protocol=protocol, prompts=prompts)
    )
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


def test_nothing_that_a_file_says_becomes_markup(told_copy: Path, page_of: PageOf) -> None:
    _spoil(told_copy)
    page, folder = page_of(told_copy, title=f"</title><script>{EVIL}")
    assert not folder.unread
    shown = page.text()
    assert f"ft_{EVIL}.safetensors" in shown
    assert "</figure><script>alert(1)</script>" in page.section("samples")
    assert "\N{REPLACEMENT CHARACTER}" in page.section("samples")
    assert "<svg/onload=alert(4)> & 'quoted'" in page.section("figures")
    assert "{{ 7 * 7 }}" in page.section("results")
    assert f"--> {EVIL}" in page.section("results")
    assert "The rows differ in sampler" in page.section("results")
    images = [image.get("alt") for image in page.all("img")]
    assert "\" onload='alert(3)' x=\"<svg/onload=alert(4)> & 'quoted'" in images
    assert {e.tag for e in page.root.iter("script")} == set()


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_real_browser_opens_the_page(told_copy: Path, tmp_path: Path) -> None:
    _spoil(told_copy)
    place = tmp_path / "report.html"
    place.write_bytes(render(gather(open_folder(told_copy))))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
        place.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for name in SECTIONS:
        assert f'id="{name}"' in done.stdout
    assert "<script" not in done.stdout
    assert "</figure>&lt;" not in done.stdout
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in done.stdout
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert not complaints
