"""Every bad input once, through the command line: one clear line, the right exit code, no trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert
from PIL import Image
from typer.testing import Result

from deme_cli.artifacts import (
    SamplesRecord,
    StatisticsRecord,
    load_tensors,
    read_record,
    write_artifact,
)
from deme_cli.errors import DemeError
from deme_cli.jobs import claim

Deme = Callable[..., Result]
CPU = ("--device", "cpu")
FINETUNE = (
    "finetune", "--data", "digits", "--steps", 2, "--batch-size", 2, "--held-out", 0, *CPU,
)  # fmt: skip
SAMPLE = ("-n", 1, "--steps", 1, *CPU)
FID = ("--fid", "digits", "-n", 2, "--steps", 1, *CPU)
EXTRACTOR = ("--features", "digits")  # else Inception is wanted first, which is not here
EXPERTS = tuple(f"ft_{index}of4.safetensors" for index in range(1, 5))
# A command line for each command that reads an artifact, with the artifact's place open.
READERS: dict[str, Callable[[str], tuple]] = {
    "finetune": lambda file: (*FINETUNE, "--range", "1/4", "--base", file, "-o", "x.safetensors"),
    "task-vector": lambda file: ("task-vector", EXPERTS[0], file, "-o", "vectors"),
    "task-vector --base": lambda file: (
        "task-vector", EXPERTS[0], "--base", file, "-o", "vectors",
    ),
    "merge": lambda file: ("merge", EXPERTS[0], file),
    "merge --base": lambda file: ("merge", EXPERTS[0], "--base", file),
    "sample": lambda file: ("sample", file, *SAMPLE),
    "ensemble-sample": lambda file: ("ensemble-sample", *EXPERTS[1:], file, *SAMPLE),
    "eval": lambda file: ("eval", file, *FID),
    "eval --fid": lambda file: ("eval", "base.safetensors", "--fid", file, "-n", 2, *EXTRACTOR),
    "stats": lambda file: ("stats", file, "-o", "ref.safetensors"),
    "inspect": lambda file: ("inspect", file),
    "export": lambda file: ("export", file, "pipeline"),
    "split": lambda file: ("split", file, "-o", "run"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse(deme: Deme, folder: Path, exit_code: int, words: str, *arguments: object) -> None:
    """The command ends with `exit_code` and one line with `words`; every file is as it was."""
    before = contents(folder)
    result = deme(*arguments)
    error = result.exception
    assert isinstance(error, DemeError), repr(error) or result.output
    assert error.exit_code == exit_code, error
    assert words in str(error)
    assert "\n" not in str(error)
    assert result.stdout == ""
    assert contents(folder) == before


def write_nan(source: Path, path: Path) -> None:
    """A copy of an artifact with one weight that is not a number."""
    weights = load_tensors(source)
    weights["conv_in.bias"][0] = float("nan")
    write_artifact(path, weights, read_record(source))


@pytest.fixture
def bad_files(run_folder: Path) -> Path:
    """The run folder, with files beside the run that are not whole, or no safetensors at all."""
    whole = (run_folder / EXPERTS[0]).read_bytes()
    (run_folder / "truncated.safetensors").write_bytes(whole[:-100])
    (run_folder / "text.safetensors").write_text("these are no tensors, only words of mine\n" * 9)
    (run_folder / "empty.safetensors").touch()
    return run_folder


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_no_whole_artifact_is_named(
    bad_files: Path, deme: Deme, reader: str
) -> None:
    refuse(deme, bad_files, 4, "truncated", *READERS[reader]("truncated.safetensors"))


@pytest.mark.parametrize("reader", ["inspect", "split"])
def test_what_is_no_file_of_tensors_is_named(bad_files: Path, deme: Deme, reader: str) -> None:
    for file in ("text.safetensors", "empty.safetensors"):
        refuse(deme, bad_files, 4, file, *READERS[reader](file))
    below, name = "base.safetensors/x.safetensors", os.fsdecode(b"a\xff.safetensors")
    refuse(deme, bad_files, 3, below, *READERS[reader](below))
    refuse(deme, bad_files, 2, "is not UTF-8", *READERS[reader](name))


@pytest.mark.parametrize(
    ("reader", "file"),
    [
        ("finetune", EXPERTS[0]),
        ("finetune", "samples.safetensors"),
        ("task-vector", "base.safetensors"),
        ("task-vector --base", EXPERTS[1]),
        ("merge", "base.safetensors"),
        ("merge", "statistics.safetensors"),
        ("merge --base", EXPERTS[1]),
        ("sample", "samples.safetensors"),
        ("ensemble-sample", "base.safetensors"),
        ("ensemble-sample", "samples.safetensors"),
        ("eval", "statistics.safetensors"),
        ("eval --fid", "base.safetensors"),
        ("stats", "base.safetensors"),
        ("export", "samples.safetensors"),
        ("split", EXPERTS[0]),
    ],
)
def test_an_artifact_of_another_kind_is_named(
    run_folder: Path, deme: Deme, reader: str, file: str
) -> None:
    images = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
    write_artifact(
        run_folder / "samples.safetensors", {"images": images}, SamplesRecord(protocol={})
    )
    statistics = StatisticsRecord(n=3, extractor={"name": "digits"}, resize="clean", source="x")
    write_artifact(run_folder / "statistics.safetensors", {"mu": torch.zeros(2)}, statistics)
    refuse(deme, run_folder, 4, file, *READERS[reader](file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5/4", "1 <= i <= N"),
        ("0/4", "1 <= i <= N"),
        ("1/0", "1 <= i <= N"),
        ("1/101", "into 101 ranges"),
        ("a/b", "expected i/N"),
        ("500:250", "start < stop"),
        ("0:2000", "<= 100"),
        ("-5:50", "0 <= start"),
    ],
)
def test_a_range_outside_the_timesteps_is_refused(
    run_folder: Path, deme: Deme, text: str, words: str
) -> None:
    refuse(deme, run_folder, 2, words, *FINETUNE, f"--range={text}", "-o", "x.safetensors")


@pytest.mark.parametrize("p", ["-0.1", "1.1", "nan"])
def test_a_probability_is_from_0_to_1(run_folder: Path, deme: Deme, p: str) -> None:
    refuse(deme, run_folder, 2, "probability from 0 to 1", *FINETUNE, "--range", "1/2", f"--p={p}")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--dtype", "fp23"), "--dtype fp23: expected one of fp32, bf16, fp16"),
        (("--device", "toaster"), "--device toaster: expected auto, cpu, cuda, cuda:i or mps"),
    ],
)
def test_an_unknown_precision_or_device_is_refused(
    run_folder: Path, deme: Deme, option: tuple, words: str
) -> None:
    refuse(deme, run_folder, 2, words, "sample", "base.safetensors", *option)


def test_precision_and_device_are_checked_before_torch_is_loaded(run_folder: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from deme_cli.app import app\n"
        "for words in ('finetune --range 1/2', 'merge x', 'sample x', 'stats x -o y',"
        " 'ensemble-sample x', 'eval --fid digits'):\n"
        "    for option in ('--dtype=fp23', '--device=toaster'):\n"
        "        done = CliRunner().invoke(app, [*words.split(), option])\n"
        "        assert getattr(done.exception, 'exit_code', done.exit_code) == 2, done.exception\n"
        "print(sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_device_of_another_machine_is_missing(run_folder: Path, deme: Deme) -> None:
    arguments = ("sample", "base.safetensors", "-n", 1, "--steps", 1)
    refuse(deme, run_folder, 3, "CUDA GPUs", *arguments, "--device", "cuda:99")
    if not torch.backends.mps.is_available():
        refuse(deme, run_folder, 3, "no Metal GPU", *arguments, "--device", "mps")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("merge", *EXPERTS), "was finetuned from base"),
        (("task-vector", *EXPERTS, "-o", "vectors"), "was finetuned from base"),
        (("ensemble-sample", *EXPERTS, *SAMPLE), "another base"),
    ],
)
def test_experts_of_another_base_are_refused(
    run_folder: Path, deme: Deme, arguments: tuple, words: str
) -> None:
    path = run_folder / EXPERTS[1]
    record = replace(read_record(path), base="0" * 64)
    write_artifact(path, load_tensors(path), record)
    refuse(deme, run_folder, 4, words, *arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("conv_in.bias"), "lacks"),
        (lambda weights: weights.update(another=torch.zeros(2)), "'another'"),
        (lambda weights: weights.update({"conv_in.bias": torch.zeros(9)}), "'conv_in.bias'"),
    ],
)
@pytest.mark.parametrize(
    "reader", ["finetune", "task-vector", "merge", "sample", "ensemble-sample", "eval", "export"]
)
def test_experts_of_other_keys_or_shapes_are_refused(
    run_folder: Path, deme: Deme, reader: str, change: Callable, words: str
) -> None:
    source = "base.safetensors" if reader in ("finetune", "sample") else EXPERTS[0]
    weights = load_tensors(run_folder / source)
    record = read_record(run_folder / source)
    change(weights)
    write_artifact(run_folder / "other.safetensors", weights, record)
    arguments = READERS[reader]("other.safetensors")
    if reader in ("task-vector", "merge"):
        arguments = tuple(EXPERTS[1] if word == EXPERTS[0] else word for word in arguments)
    refuse(deme, run_folder, 4, words, *arguments)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (EXPERTS[:3], "no expert covers timesteps 75:100"),
        (EXPERTS[1:], "no expert covers timesteps 0:25"),
        ((*EXPERTS, "ft_1of2.safetensors"), "two experts cover timesteps 0:25"),
        ((*EXPERTS, EXPERTS[3]), "two experts cover timesteps 75:100"),
    ],
)
def test_an_ensemble_covers_every_timestep_once(
    run_folder: Path, deme: Deme, experts: tuple, words: str
) -> None:
    base = run_folder / "base.safetensors"
    write_tiny_expert(run_folder / "ft_1of2.safetensors", base, index=1, of=2)
    refuse(deme, run_folder, 4, words, "ensemble-sample", *experts, *SAMPLE)


@pytest.mark.parametrize(
    ("coefficients", "words"),
    [
        ("0.5", "1 coefficients for 4 experts"),
        ("0.1,0.2,0.3,0.2,0.2", "5 coefficients for 4 experts"),
        ("a,b,c,d", "expected numbers separated by commas"),
        ("", "expected numbers separated by commas"),
        ("nan,0,0,0", "expected finite numbers"),
        ("0,0,0,inf", "expected finite numbers"),
    ],
)
def test_coefficients_are_one_finite_number_for_each(
    run_folder: Path, deme: Deme, coefficients: str, words: str
) -> None:
    refuse(deme, run_folder, 2, words, "merge", *EXPERTS, "-w", coefficients)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[finetune]\nlearning_rate = 1", "unknown key 'learning_rate' in [finetune]"),
        ("[fine]\np = 1", "unknown table [fine]"),
        ("[finetune", "not valid TOML"),
        ('[finetune]\np = "a"', "[finetune] p = 'a': expected a number"),
        ("[split]\nranges = [1, 2]", "[split] ranges = 1: expected a text"),
        ('[split]\nranges = ["0:50", "50:2000"]', "50:2000 needs 0 <= start < stop <= 100"),
        ('[split]\nranges = ["0:50", "50:20"]', "50:20"),
        ('[merge]\ncoefficients = ["a"]', "[merge] coefficients = 'a': expected a number"),
        ("[finetune]\np = 2.0", "p = 2.0"),
    ],
)
def test_a_wrong_run_file_is_named_where_it_is_wrong(
    run_folder: Path, deme: Deme, text: str, words: str
) -> None:
    (run_folder / "deme.toml").write_text(text)
    refuse(deme, run_folder, 2, words, *FINETUNE, "--range", "2/2")


@pytest.mark.parametrize(
    "arguments",
    [
        (*FINETUNE, "--range", "1/2"),
        ("task-vector", *EXPERTS),
        ("merge", *EXPERTS),
        ("sample", "base.safetensors"),
        ("ensemble-sample", *EXPERTS),
        ("eval", "--fid", "digits"),
        ("stats", "digits", "-o", "x.safetensors"),
    ],
)
def test_a_run_file_that_cannot_be_read_is_missing(
    run_folder: Path, deme: Deme, arguments: tuple
) -> None:
    for name in ("none.toml", "."):
        refuse(deme, run_folder, 3, name, *arguments, "--config", name)


def _fill(kind: str, folder: Path) -> int:
    """Make `folder` an image folder that is bad in the way of `kind`; returns the exit code."""
    folder.mkdir()
    if kind == "missing":
        folder.rmdir()
        return 3
    if kind == "empty":
        return 3
    if kind == "loop":
        folder.rmdir()
        folder.symlink_to(folder.name)
        return 3
    for index in range(3):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / f"{index}.png")
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:40])
    return 4


STATS = ("stats", "images", "-o", "ref.safetensors", "--features", "digits", *CPU)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        *((STATS, kind) for kind in ("missing", "empty", "loop", "corrupt")),
        ((*FINETUNE, "--range", "1/2", "--data", "images"), "corrupt"),
        (("eval", "base.safetensors", *FID, "--fid", "images", *EXTRACTOR), "missing"),
        (("eval", "base.safetensors", *FID, "--kid", "images", *EXTRACTOR), "missing"),
        (("eval", "images", *FID), "corrupt"),
    ],
)
def test_a_bad_folder_of_images_is_named(
    run_folder: Path, deme: Deme, arguments: tuple, kind: str
) -> None:
    exit_code = _fill(kind, run_folder / "images")
    words = "1.png" if kind == "corrupt" else "images"
    refuse(deme, run_folder, exit_code, words, *arguments)


WRITERS: dict[str, Callable[[str], tuple]] = {
    "finetune": lambda out: (*FINETUNE, "--range", "1/2", "-o", out),
    "merge": lambda out: ("merge", *EXPERTS, "-o", out),
    "sample": lambda out: ("sample", "base.safetensors", *SAMPLE, "-o", out),
    "ensemble-sample": lambda out: ("ensemble-sample", *EXPERTS, *SAMPLE, "-o", out),
    "stats": lambda out: ("stats", "digits", "--split", "test", *CPU, "-o", out),
    "eval": lambda out: ("eval", "base.safetensors", *FID, "-o", out),
    "export": lambda out: ("export", "base.safetensors", out),
    "task-vector": lambda out: ("task-vector", EXPERTS[0], "-o", out),
    "split": lambda out: ("split", "digits", "-o", out),
}


@pytest.mark.parametrize(
    "writer", [name for name in WRITERS if name not in ("task-vector", "split")]
)
def test_an_existing_output_is_kept(run_folder: Path, deme: Deme, writer: str) -> None:
    (run_folder / "out.safetensors").write_text("mine")
    refuse(deme, run_folder, 2, "--force", *WRITERS[writer]("out.safetensors"))


def test_existing_outputs_in_a_folder_are_kept(run_folder: Path, deme: Deme) -> None:
    (run_folder / "out").mkdir()
    for name in ("tv_1of4.safetensors", "deme.toml"):
        (run_folder / "out" / name).write_text("")
    for writer in ("task-vector", "split", "export"):
        refuse(deme, run_folder, 2, "--force", *WRITERS[writer]("out"))
    for writer in ("finetune", "merge", "eval"):
        refuse(deme, run_folder, 2, "is a folder", *WRITERS[writer]("out"), "--force")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_takes_no_files_is_named(run_folder: Path, deme: Deme, writer: str) -> None:
    below = "base.safetensors/out.safetensors"
    refuse(deme, run_folder, 3, "part of this path is a file", *WRITERS[writer](below))


def test_a_place_without_permission_and_a_long_name_are_named(run_folder: Path, deme: Deme) -> None:
    long = f"{'x' * 300}.safetensors"
    refuse(deme, run_folder, 3, "the name is too long", *WRITERS["merge"](long))
    if Path("/proc/self").exists():
        refuse(deme, run_folder, 3, "choose another", *WRITERS["merge"]("/proc/deme/out"))


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "eval"])
def test_a_full_disk_is_told_and_nothing_is_written(
    run_folder: Path, deme: Deme, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(1 << 20, 1 << 20, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    refuse(deme, run_folder, 3, "free some space", *WRITERS[writer]("out.safetensors"))


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


@pytest.mark.parametrize("writer", ["finetune", "merge", "sample", "ensemble-sample", "stats"])
def test_an_output_that_another_run_writes_is_left_to_it(
    run_folder: Path, deme: Deme, writer: str
) -> None:
    held = {"finetune": "out.metrics.jsonl", "sample": ".out.safetensors.unfinished"}
    held["ensemble-sample"] = held["sample"]
    with claim(run_folder / held.get(writer, "out.safetensors")):
        refuse(deme, run_folder, 2, "another", *WRITERS[writer]("out.safetensors"))


@pytest.mark.parametrize(
    "arguments",
    [
        (*FINETUNE, "--range", "1/2", "--base", "nan.safetensors"),
        ("sample", "nan.safetensors", *SAMPLE),
        ("sample", "nan.safetensors", *SAMPLE, "-o", "folder"),
        ("ensemble-sample", "nan_expert.safetensors", *EXPERTS[1:], *SAMPLE),
        ("merge", "nan_expert.safetensors", *EXPERTS[1:]),
        ("task-vector", "nan_expert.safetensors"),
        ("eval", "nan.safetensors", *FID),
        ("export", "nan.safetensors", "pipeline"),
    ],
)
def test_weights_that_are_not_finite_end_with_5(
    run_folder: Path, deme: Deme, arguments: tuple
) -> None:
    write_nan(run_folder / "base.safetensors", run_folder / "nan.safetensors")
    write_nan(run_folder / EXPERTS[0], run_folder / "nan_expert.safetensors")
    refuse(deme, run_folder, 5, "", *arguments)


def test_a_loss_that_is_not_finite_ends_with_5_and_keeps_no_output(
    run_folder: Path, deme: Deme
) -> None:
    before = set(contents(run_folder))
    result = deme(*FINETUNE, "--range", "1/2", "--lr", 1e30, "--steps", 6)
    assert getattr(result.exception, "exit_code", None) == 5, result.exception
    assert "lower --lr" in str(result.exception)
    assert {name for name in set(contents(run_folder)) - before if "metrics" not in name} == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "owner/model"),
        ("split", "owner/model", "-o", "run"),
        ("eval", "owner/model", *FID),
        (*FINETUNE, "--range", "1/2", "--data", "owner/data"),
        ("stats", "owner/data", "-o", "ref.safetensors"),
        ("eval", "base.safetensors", "--fid", "owner/data", "--features", "digits"),
    ],
)
def test_a_hub_id_without_network_is_missing_at_once(
    run_folder: Path, cache: Path, deme: Deme, arguments: tuple
) -> None:
    began = time.monotonic()
    refuse(deme, run_folder, 3, "owner/", *arguments)
    assert time.monotonic() - began < 10


def test_two_bases_of_one_shape_are_told_apart(run_folder: Path, deme: Deme) -> None:
    write_tiny_base(run_folder / "second.safetensors", seed=1)
    arguments = ("--base", "second.safetensors")
    refuse(deme, run_folder, 4, "was finetuned from base", "merge", *EXPERTS, *arguments)
    refuse(
        deme, run_folder, 4, "was finetuned from base",
        "task-vector", *EXPERTS, *arguments, "-o", "vectors",
    )  # fmt: skip


def test_a_wrong_reference_is_told_before_missing_weights(
    run_folder: Path, cache: Path, deme: Deme
) -> None:
    refuse(deme, run_folder, 4, "'samples'", "eval", "--fid", "base.safetensors")
