"""`deme doctor` and `--version`: what is there, what is missing, and where to get it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tiny_pipelines import stable_diffusion
from typer.testing import Result

Deme = Callable[..., Result]


def test_doctor_lists_what_is_there_and_where_the_rest_comes_from(
    cache: Path, stand_in: Path, deme: Deme
) -> None:
    stand_in.rename(cache / "inception-2015-12-05.pt")
    weights = cache / "CLIP-ViT-g-14-laion2B-s34B-b88K" / "open_clip_model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    shown = deme("doctor", "--json")
    for line in ("present  inception-2015-12-05.pt", "missing  PartiPrompts.tsv", str(cache)):
        assert line in shown.stderr
    found = json.loads(shown.stdout)
    assert found["schema_version"] == 1
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["device"]["auto"] in ("cpu", "cuda", "mps")
    items = {item["name"]: item for item in found["items"]}
    inception = items["inception-2015-12-05.pt"]
    assert inception["present"]
    assert inception["path"] == str(cache / "inception-2015-12-05.pt")
    assert inception["intact"] is False
    assert items["digit-features.pt"]["present"]
    missing = items["cifar10_clean_train_32.npz"]
    assert not missing["present"]
    assert missing["whence"].startswith("https://")
    assert not items["ViT-B-32.pt"]["present"]
    prompts = items["PartiPrompts.tsv"]
    assert (prompts["present"], prompts["needed_for"]) == (False, "--prompts parti")
    clip = items["ViT-g-14/laion2b_s34b_b88k"]
    assert (clip["path"], clip["needed_for"]) == (str(weights), "--clip-score")
    assert "laion/CLIP-ViT-g-14-laion2B-s34B-b88K" in clip["whence"]


def test_doctor_lists_the_parts_that_the_base_of_this_folder_needs(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, deme: Deme
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = stable_diffusion(tmp_path / "tiny")
    split = deme("split", pipeline, "-n", "2")
    assert split.exit_code == 0, split.exception
    for path in (pipeline / "vae").glob("*.safetensors"):
        path.unlink()
    items = {item["name"]: item for item in json.loads(deme("doctor", "--json").stdout)["items"]}
    assert items["text_encoder"]["path"] == str(pipeline / "text_encoder")
    assert items["tokenizer"]["present"]
    assert not items["vae"]["present"]
    assert items["vae"]["whence"] == str(pipeline)


def test_the_version_names_the_libraries_and_the_device(deme: Deme) -> None:
    first, libraries, device = deme("--version").stdout.splitlines()
    assert first == f"deme {metadata.version('deme')}"
    assert f"torch {metadata.version('torch')}" in libraries
    assert f"diffusers {metadata.version('diffusers')}" in libraries
    assert re.fullmatch(r"device (cpu|cuda|mps) \(.+\)", device)
