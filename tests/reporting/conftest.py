"""A small run with everything in it, made by the commands themselves, and its page taken apart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import pytest
from PIL import Image
from typer.testing import CliRunner

from deme_cli.analysis.result import document_bytes
from deme_cli.reporting.folder import Folder, open_folder
from deme_cli.reporting.page import gather, render

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
            ["eval", "base.safetensors", "given.safetensors", "--fid", "digits", "-n", "70",
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


@pytest.fixture
def page_of() -> Callable[..., tuple[Page, Folder]]:
    """The page of a folder, parsed, and what was found there."""

    def make(path: Path, **options: object) -> tuple[Page, Folder]:
        folder = open_folder(path)
        page = Page(render(gather(folder, **options)))
        page.require_safe()
        return page, folder

    return make
