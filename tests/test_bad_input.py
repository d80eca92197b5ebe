"""Every bad input once, through the command line: one clear line, the right exit code, no trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, write_tiny_base, write_tiny_expert
from PIL import Image
from typer.testing import Result

from deme_cli.artifacts import (
    SamplesRecord,
    StatisticsRecord,
    load_tensors,
    read_record,
    write_artifact,
)
from deme_cli.errors import MissingError
from deme_cli.jobs import claim

Deme = Callable[..., Result]
CPU = ("--device", "cpu")
TUNE = ("finetune", "--data", "digits", "--steps", 2, "--batch-size", 2, "--held-out", 0, *CPU)
FINETUNE = (*TUNE, "--range", "1/2")
SAMPLE = ("-n", 1, "--steps", 1, *CPU)
FID = ("--fid", "digits", "-n", 2, "--steps", 1, *CPU)
BASE = ("sample", "base.safetensors")
EXTRACTOR = ("--features", "digits")  # else Inception is wanted first, which is not here
EXPERTS = tuple(f"ft_{index}of4.safetensors" for index in range(1, 5))
STATS = ("stats", "images", "-o", "ref.safetensors", *EXTRACTOR, *CPU)
# A command line for each command that reads an artifact, with the artifact's place open.
READERS: dict[str, Callable[[str], tuple]] = {
    "finetune": lambda file: (*FINETUNE, "--base", file, "-o", "x.safetensors"),
    "task-vector": lambda file: ("task-vector", EXPERTS[1], file, "-o", "vectors"),
    "task-vector --base": lambda f: ("task-vector", EXPERTS[0], "--base", f, "-o", "vectors"),
    "merge": lambda file: ("merge", EXPERTS[1], file),
    "merge --base": lambda file: ("merge", EXPERTS[0], "--base", file),
    "sample": lambda file: ("sample", file, *SAMPLE),
    "ensemble-sample": lambda file: ("ensemble-sample", *EXPERTS[1:], file, *SAMPLE),
    "eval": lambda file: ("eval", file, *FID),
    "eval --fid": lambda file: ("eval", "base.safetensors", "--fid", file, "-n", 2, *EXTRACTOR),
    "stats": lambda file: ("stats", file, "-o", "ref.safetensors"),
    "import --base": lambda file: ("import", EXPERTS[0], "--range", "1/2", "--base", file),
    "inspect": lambda file: ("inspect", file),
    "export": lambda file: ("export", file, "pipeline"),
    "split": lambda file: ("split", file, "-o", "run"),
}
WRITERS: dict[str, Callable[[str], tuple]] = {
    "finetune": lambda out: (*FINETUNE, "-o", out),
    "merge": lambda out: ("merge", *EXPERTS, "-o", out),
    "import": lambda out: ("import", EXPERTS[0], "--range", "1/4", "-o", out),
    "sample": lambda out: (*BASE, *SAMPLE, "-o", out),
    "ensemble-sample": lambda out: ("ensemble-sample", *EXPERTS, *SAMPLE, "-o", out),
    "stats": lambda out: ("stats", "digits", "--split", "test", *CPU, "-o", out),
    "eval": lambda out: ("eval", "base.safetensors", *FID, "-o", out),
    "export": lambda out: ("export", "base.safetensors", out),
    "task-vector": lambda out: ("task-vector", EXPERTS[0], "-o", out),
    "split": lambda out: ("split", "digits", "-o", out),
}
RUN_FILES = {
    "torn.toml": ("[finetune", "not valid TOML"),
    "p.toml": ("[finetune]\np = 2.0", "p = 2.0"),
    "past.toml": (
        '[split]\nranges = ["0:50", "50:2000"]',
        "50:2000 needs 0 <= start < stop <= 100",
    ),
    "empty.toml": ('[split]\nranges = ["0:50", "50:20"]', "50:20"),
}


@pytest.fixture(scope="module")
def bad_folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and files beside it that are wrong in every way. No command changes it."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(finished_run, folder, dirs_exist_ok=True)
    base, expert = folder / "base.safetensors", folder / EXPERTS[0]
    (folder / "truncated.safetensors").write_bytes(expert.read_bytes()[:-100])
    (folder / "text.safetensors").write_text("these are no tensors, only words of mine\n" * 9)
    (folder / "empty.safetensors").touch()
    (folder / "out.safetensors").write_text("mine")
    images = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
    write_artifact(folder / "samples.safetensors", {"images": images}, SamplesRecord(protocol={}))
    statistics = StatisticsRecord(n=3, extractor={"name": "digits"}, resize="clean", source="x")
    write_artifact(folder / "statistics.safetensors", {"mu": torch.zeros(2)}, statistics)
    write_tiny_base(folder / "second.safetensors", seed=1)
    write_tiny_expert(folder / "half.safetensors", base, index=1, of=2)
    strange = replace(read_record(expert), base="0" * 64)
    write_artifact(folder / "strange.safetensors", load_tensors(expert), strange)
    for kind, source in (("base", base), ("expert", expert)):
        for name, change in {
            "nan": lambda weights: weights["conv_in.bias"].fill_(torch.nan),
            "lacks": lambda weights: weights.pop("conv_in.bias"),
            "more": lambda weights: weights.update(another=torch.zeros(2)),
            "shape": lambda weights: weights.update({"conv_in.bias": torch.zeros(9)}),
        }.items():
            weights = load_tensors(source)
            change(weights)
            write_artifact(folder / f"{name}_{kind}.safetensors", weights, read_record(source))
    for name in ("tv_1of4.safetensors", "deme.toml"):
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).write_text("")
    (folder / "none").mkdir()
    for name, (text, _) in RUN_FILES.items():
        (folder / name).write_text(text)
    (folder / "loop").symlink_to("loop")
    (folder / "images").mkdir()
    for index in range(3):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "images" / f"{index}.png")
    (folder / "images" / "1.png").write_bytes((folder / "images" / "0.png").read_bytes()[:40])
    return folder


@pytest.fixture
def in_bad_folder(bad_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bad_folder)


def rows() -> Iterator[tuple[int, str, tuple]]:
    """Exit code, a word of the message, and the command line."""
    for reader in READERS.values():
        yield 4, "truncated", reader("truncated.safetensors")
    for reader in (READERS["inspect"], READERS["split"]):
        for file in ("text.safetensors", "empty.safetensors"):
            yield 4, file, reader(file)
        below = "base.safetensors/x.safetensors"
        yield 3, below, reader(below)
        yield 2, "is not UTF-8", reader(os.fsdecode(b"a\xff.safetensors"))
    for name, file in (  # artifacts of another kind
        ("finetune", EXPERTS[0]), ("finetune", "samples.safetensors"),
        ("task-vector", "base.safetensors"), ("task-vector --base", EXPERTS[1]),
        ("merge", "base.safetensors"), ("merge", "statistics.safetensors"),
        ("merge --base", EXPERTS[1]), ("sample", "samples.safetensors"),
        ("ensemble-sample", "base.safetensors"), ("ensemble-sample", "samples.safetensors"),
        ("eval", "statistics.safetensors"), ("eval --fid", "base.safetensors"),
        ("stats", "base.safetensors"), ("export", "samples.safetensors"), ("split", EXPERTS[0]),
    ):  # fmt: skip
        yield 4, file, READERS[name](file)
    changes = {"lacks": "lacks", "more": "'another'", "shape": "'conv_in.bias'"}
    of_base = ("finetune", "sample", "export")
    for change, words in changes.items():  # keys and shapes of another network
        for name in ("merge", "sample"):
            kind = "base" if name in of_base else "expert"
            yield 4, words, READERS[name](f"{change}_{kind}.safetensors")
    for name in ("finetune", "task-vector", "ensemble-sample", "eval", "export"):
        kind = "base" if name in of_base else "expert"
        yield 4, "'conv_in.bias'", READERS[name](f"shape_{kind}.safetensors")
    for name in ("finetune", "sample", "eval", "export"):  # not finite
        yield 5, "", READERS[name]("nan_base.safetensors")
    for name in ("merge", "task-vector", "ensemble-sample"):
        yield 5, "", READERS[name]("nan_expert.safetensors")
    yield 5, "", (*READERS["sample"]("nan_base.safetensors"), "-o", "folder")
    for text, words in (
        ("5/4", "1 <= i <= N"), ("1/101", "into 101 ranges"), ("a/b", "expected i/N"),
        ("0:2000", "<= 100"), ("-5:50", "0 <= start"),
    ):  # fmt: skip
        yield 2, words, (*TUNE, f"--range={text}", "-o", "x.safetensors")
    yield 2, "probability from 0 to 1", (*FINETUNE, "--p=nan")
    yield 2, "--dtype fp23: expected fp32, bf16, fp16", (*BASE, "--dtype", "fp23")
    yield 2, "toaster: expected auto, cpu, cuda, cuda:i or mps", (*BASE, "--device", "toaster")
    yield 3, "CUDA GPUs", (*BASE, "-n", 1, "--steps", 1, "--device", "cuda:99")
    # experts of another base, or that do not cover every timestep once
    yield 4, "was finetuned from base", READERS["merge"]("strange.safetensors")
    yield 4, "was finetuned from base", READERS["task-vector"]("strange.safetensors")
    yield 4, "another base", READERS["ensemble-sample"]("strange.safetensors")
    yield 4, "was finetuned from base", ("merge", *EXPERTS, "--base", "second.safetensors")
    yield 4, "was finetuned from base", READERS["task-vector --base"]("second.safetensors")
    ensemble = ("ensemble-sample", *SAMPLE)
    yield 4, "no expert covers timesteps 75:100", (*ensemble, *EXPERTS[:3])
    yield 4, "two experts cover timesteps 0:25", (*ensemble, *EXPERTS, "half.safetensors")
    for text, words in (
        ("0.5", "1 values for 4 experts"), ("", "expected numbers separated by commas"),
        ("nan,0,0,0", "expected finite numbers"),
    ):  # fmt: skip
        yield 2, words, ("merge", *EXPERTS, "-w", text)
    for name, (_, words) in RUN_FILES.items():
        yield 2, words, (*TUNE, "--range", "2/2", "--config", name)
    for arguments in (
        FINETUNE, ("task-vector", *EXPERTS), ("merge", *EXPERTS), BASE,
        ("ensemble-sample", *EXPERTS), ("eval", "--fid", "digits"),
        ("stats", "digits", "-o", "x.safetensors"),
    ):  # fmt: skip
        yield 3, "none.toml", (*arguments, "--config", "none.toml")
    yield 3, ".", (*FINETUNE, "--config", ".")
    # images
    measured = ("eval", "base.safetensors", *FID, *EXTRACTOR)
    for place, exit_code, word in (
        ("gone", 3, "gone"), ("none", 3, "none"), ("loop", 3, "loop"), ("images", 4, "1.png"),
    ):  # fmt: skip
        yield exit_code, word, ("stats", place, *STATS[2:])
    yield 4, "1.png", (*FINETUNE, "--data", "images")
    yield 4, "1.png", ("eval", "images", *FID)
    yield 3, "gone", (*measured, "--fid", "gone")
    yield 3, "gone", (*measured, "--kid", "gone")
    # places
    for name, writer in WRITERS.items():
        below = "base.safetensors/out.safetensors"
        yield 3, "part of this path is a file", writer(below)
        if name not in ("task-vector", "split"):
            yield 2, "--force", writer("out.safetensors")
    for name in ("task-vector", "split", "export"):
        yield 2, "--force", WRITERS[name]("out")
    for name in ("finetune", "merge", "eval"):
        yield 2, "is a folder", (*WRITERS[name]("out"), "--force")
    yield 3, "the name is too long", WRITERS["merge"](f"{'x' * 300}.safetensors")
    if Path("/proc/self").exists():
        yield 3, "choose another", WRITERS["merge"]("/proc/deme/out")


def test_each_is_refused_in_one_line(
    in_bad_folder: None, refuse: Callable[..., None], subtests: pytest.Subtests
) -> None:
    for exit_code, words, arguments in rows():
        with subtests.test(repr(arguments)):
            refuse(exit_code, words, *arguments)


EARLY = (
    "finetune --range 1/2 --dtype=fp23", "merge x --device=toaster", "sample x --dtype=fp23",
    "stats x -o y --device=toaster", "ensemble-sample x --dtype=fp23", "eval --dtype=fp23",
    "split nowhere", "split a/b", "split base.safetensors -o x -n 0", "merge --show nowhere",
    "split base.safetensors -o x -n 101", "report --output report.pdf", "compare nowhere",
    "inspect text.safetensors", "analyze losses --data digits --split test",
    "analyze gradients --data digits --buckets 1", "analyze landscape --data digits --points 2",
    "analyze activations base.safetensors --data digits", "analyze task-vectors base.safetensors",
)  # fmt: skip


def test_what_names_headers_and_settings_tell_is_said_before_torch_is_loaded(
    bad_folder: Path,
) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from deme_cli.app import app\n"
        f"for words in {EARLY}:\n"
        "    done = CliRunner().invoke(app, words.split())\n"
        "    assert getattr(done.exception, 'exit_code', 1) > 1, (words, done.exception)\n"
        "    assert 'torch' not in sys.modules, words"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=bad_folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


def test_a_full_disk_is_told_and_nothing_is_written(
    in_bad_folder: None, refuse: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(1 << 20, 1 << 20, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    for name, writer in WRITERS.items():
        if name != "eval":
            refuse(3, "free some space", *writer("full.safetensors"))


def test_an_output_that_another_run_writes_is_left_to_it(
    in_bad_folder: None, refuse: Callable[..., None]
) -> None:
    held = {"finetune": "new.metrics.jsonl", "sample": ".new.safetensors.unfinished"}
    for name in ("finetune", "merge", "sample", "stats"):
        with claim(Path(held.get(name, "new.safetensors"))):
            refuse(2, "another", *WRITERS[name]("new.safetensors"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("writer", ["merge", "sample", "stats"])
def test_a_disk_that_fills_up_during_the_work_leaves_nothing(
    run_folder: Path, deme: Deme, writer: str
) -> None:
    before = contents(run_folder)
    (run_folder / ".out.safetensors.partial").symlink_to("/dev/full")
    result = deme(*WRITERS[writer]("out.safetensors"))
    assert getattr(result.exception, "exit_code", None) == 3, result.exception
    assert "no space left on the disk" in str(result.exception)
    left = set(contents(run_folder)) - set(before)
    assert left <= {".out.safetensors.unfinished", "out.png"}  # drawn images are kept


def test_a_loss_that_is_not_finite_ends_with_5_and_keeps_no_output(
    run_folder: Path, deme: Deme
) -> None:
    before = set(contents(run_folder))
    result = deme(*FINETUNE, "--lr", 1e30, "--steps", 6)
    assert getattr(result.exception, "exit_code", None) == 5, result.exception
    assert "lower --lr" in str(result.exception)
    assert {name for name in set(contents(run_folder)) - before if "metrics" not in name} == set()


def test_a_missing_frozen_part_is_named_by_every_command_that_needs_it(
    deme: Deme, pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert deme("split", pipelines("sd"), "-n", 2, "--data", "digits").exit_code == 0
    shutil.copytree(pipelines("sd"), "broken")
    shutil.rmtree("broken/text_encoder")
    before = contents(tmp_path)
    for words in (
        (*FINETUNE, "--pipeline", "broken"), ("export", BASE[1], "out", "--pipeline", "broken"),
        (*BASE, *SAMPLE, "--prompt", "a boat", "--pipeline", "broken"),
        ("split", "broken", "-o", "again"),
    ):  # fmt: skip
        error = deme(*words).exception
        assert isinstance(error, MissingError), error
        assert "the text_encoder is missing" in str(error)
    assert contents(tmp_path) == before


def test_what_is_not_here_is_missing_at_once_without_network(
    in_bad_folder: None, refuse: Callable[..., None], cache: Path
) -> None:
    began = time.monotonic()
    for arguments in (
        ("sample", "owner/model"), ("split", "owner/model", "-o", "run"),
        ("eval", "owner/model", *FID), (*FINETUNE, "--data", "owner/data"),
        ("stats", "owner/data", "-o", "ref.safetensors"),
        ("eval", "base.safetensors", "--fid", "owner/data", *EXTRACTOR),
    ):  # fmt: skip
        refuse(3, "owner/", *arguments)
    assert time.monotonic() - began < 10
    refuse(4, "'samples'", "eval", "--fid", "base.safetensors")  # before missing weights
