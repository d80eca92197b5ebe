"""`sample` and `ensemble-sample` in several processes: the images of one, whatever happens."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import ends, launch, stop_when, succeed
from typer.testing import Result

from deme_cli.artifacts import load_tensors, read_record, write_artifact

Deme = Callable[..., Result]
pytestmark = pytest.mark.slow
ODD = ["-n", 17, "-b", 4, "--steps", 6, "--device", "cpu"]
LONG = ["-n", 700, "-b", 4, "--steps", 10, "--device", "cpu"]


def alone(deme: Deme, *words: object) -> None:
    done = deme(*words)
    assert done.exit_code == 0, done.exception


def test_three_processes_write_the_artifact_of_one_though_two_batches_are_all(
    run_folder: Path, deme: Deme
) -> None:
    words = ["sample", "base.safetensors", "-n", 5, *ODD[2:], "--eta", 1]
    shown = succeed(launch(run_folder, *words, "-o", "three.safetensors", "--json", num=3))
    document = json.loads(shown)
    assert document["paths"] == ["three.safetensors", "three.png"]
    assert (document["num"], document["kept"]) == (5, 0)
    alone(deme, *words, "-o", "one.safetensors")
    for suffix in (".safetensors", ".png"):
        pair = [Path(name).with_suffix(suffix).read_bytes() for name in ("one", "three")]
        assert pair[0] == pair[1]
    assert not list(run_folder.glob(".*"))


def test_two_processes_fill_the_folder_of_one(run_folder: Path, deme: Deme) -> None:
    words = ["ensemble-sample", *sorted(run_folder.glob("ft_*.safetensors")), *ODD]
    succeed(launch(run_folder, *words, "-o", "two"))
    alone(deme, *words, "-o", "one")
    names = sorted(os.listdir("one"))
    assert sorted(os.listdir("two")) == names
    for name in names:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name


def test_however_processes_ended_what_they_drew_is_gone_on_with(
    run_folder: Path, deme: Deme
) -> None:
    words = ["sample", "base.safetensors", *LONG, "-o"]
    unfinished = Path(".out.safetensors.unfinished")
    enough = 0

    def has_drawn() -> bool:
        return unfinished.exists() and unfinished.stat().st_size > enough

    for killed in (0, 1):
        enough += 4000  # bytes, of which an image has 64 and the card some hundreds
        processes = launch(run_folder, *words, "out.safetensors")
        codes, said = stop_when(has_drawn, processes, rank=killed, by=signal.SIGKILL)
        assert sorted(codes) == [-signal.SIGKILL, 1]
        assert len(said) == 1, said
        assert "ended" in said[0]
    enough += 4000
    processes = launch(run_folder, *words, "out.safetensors", num=3)
    codes, said = stop_when(has_drawn, processes, rank=2)
    assert codes == [75] * 3
    assert len(said) == 1, said
    assert "of 700 images" in said[0]
    assert "run the same command again" in said[0]
    kept = int(said[0].split("; ")[1].split(" of")[0])
    assert 100 < kept < 700
    assert kept % 4 == 0
    assert json.loads(deme(*words, "out.safetensors", "--json").stdout)["kept"] == kept
    alone(deme, *words, "one.safetensors")
    assert Path("one.safetensors").read_bytes() == Path("out.safetensors").read_bytes()
    assert not list(run_folder.glob(".*"))


def test_weights_that_are_not_finite_end_all_with_5(run_folder: Path) -> None:
    weights = load_tensors(Path("base.safetensors"))
    weights["conv_out.bias"][0] = float("nan")
    write_artifact(Path("nan.safetensors"), weights, read_record(Path("base.safetensors")))
    codes, said = ends(launch(run_folder, "sample", "nan.safetensors", *ODD))
    assert codes == [5, 5]
    assert len(said) == 1, said
    assert "not finite" in said[0]
    assert not list(run_folder.glob("*nan-samples*"))


def test_what_cannot_be_drawn_together_is_refused_once(run_folder: Path) -> None:
    def refused(code: int, word: str, *words: object, **options: object) -> None:
        codes, said = ends(launch(run_folder, "sample", *words, *ODD, **options))
        assert codes == [code, code]
        assert len(said) == 1, said
        assert word in said[0]

    Path("there.safetensors").write_bytes(b"")
    refused(2, "there.safetensors exists", "base.safetensors", "-o", "there.safetensors")
    refused(2, "process 1 has seed = 1", "base.safetensors",
            by_rank=lambda rank: ["--seed", str(rank)])  # fmt: skip
