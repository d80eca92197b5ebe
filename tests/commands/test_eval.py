"""`deme eval` from the command line: tables, JSON, the gate, and what is told when things lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stand_ins import write_statistics_npz
from typer.testing import Result

from deme_cli.artifacts import write_artifact
from deme_cli.errors import ArtifactError, ConfigError, GateError, MissingError
from deme_cli.records import SamplesRecord

Deme = Callable[..., Result]
FEW = ("-n", "6", "--steps", "2")


def document(result: Result) -> dict:
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def test_the_folder_is_measured_against_the_digits(run_folder: Path, deme: Deme) -> None:
    found = document(deme("eval", "--fid", "digits", *FEW, "--repeats", "2", "--json"))
    assert found["schema_version"] == 1
    base, ensemble = found["rows"]
    assert (base["name"], base["kind"]) == ("base", "base")
    assert (ensemble["name"], ensemble["kind"]) == ("ensemble", "ensemble")
    figure = ensemble["metrics"]["frechet_digits"]
    assert (figure["n"], figure["repeats"]) == (6, 2)
    assert figure["value"] == pytest.approx(np.mean(figure["values"]))
    assert figure["sd"] > 0
    assert figure["difference"]["to"] == "base"
    protocol = base["protocol"]
    assert protocol["seeds"] == [0, 1]
    assert protocol["references"]["frechet_digits"]["n"] == 359
    assert protocol["features"] == "digits"
    assert (protocol["sampler"], protocol["steps"]) == ("ddim", 2)
    assert protocol["versions"]["torch"]
    assert "fid" not in base["metrics"]
    assert not list(run_folder.glob(".deme-eval*"))


def test_the_table_shows_figures_differences_and_the_protocol(run_folder: Path, deme: Deme) -> None:
    shown = deme("eval", "--fid", "digits", *FEW, "--repeats", "2")
    assert shown.stdout == ""
    for words in ("frechet_digits", "minus base", "ensemble", "6 x 2", "±", "ddim 2 steps",
                  "held-out, 359 images", "seed 0 to 1"):  # fmt: skip
        assert words in shown.stderr


def test_quiet_says_nothing_but_the_document(run_folder: Path, deme: Deme) -> None:
    shown = deme("eval", "base.safetensors", "--fid", "digits", *FEW, "--quiet", "--json")
    assert json.loads(shown.stdout)
    assert shown.stderr == ""


def test_settings_come_from_deme_toml_and_the_command_line_wins(
    run_folder: Path, deme: Deme
) -> None:
    Path("deme.toml").write_text(
        '[eval]\nfid = "digits"\nnum = 5\nseed = 3\n[sample]\nsteps = 3\nsampler = "ddpm"\n'
    )
    (row,) = document(deme("eval", "base.safetensors", "--json"))["rows"]
    protocol = row["protocol"]
    assert (protocol["num"], protocol["steps"], protocol["sampler"]) == (5, 3, "ddpm")
    (row,) = document(deme("eval", "base.safetensors", "--json", "-n", "4", "--seed", "9"))["rows"]
    assert (row["protocol"]["num"], row["protocol"]["seeds"]) == (4, [9])


def test_a_reference_beside_a_deme_toml_elsewhere_is_found(
    run_folder: Path, deme: Deme, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("deme.toml").write_text('[eval]\nfid = "images"\nfeatures = "digits"\n')
    elsewhere = run_folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (base, _) = document(deme("eval", "--config", "../deme.toml", *FEW, "--json"))["rows"]
    assert base["protocol"]["references"]["frechet_digits"]["n"] == 10


def test_fid_and_kid_are_measured_side_by_side(run_folder: Path, deme: Deme) -> None:
    (row,) = document(
        deme("eval", "base.safetensors", "--fid", "digits", "--kid", "digits", *FEW, "--json")
    )["rows"]
    assert set(row["metrics"]) == {"frechet_digits", "kernel_digits"}


def test_cifar10_runs_through_with_a_stand_in_and_statistics(
    run_folder: Path, cache: Path, stand_in: Path, deme: Deme
) -> None:
    write_statistics_npz(cache / "cifar10_clean_train_32.npz")
    shown = deme(
        "eval", "base.safetensors", "--fid", "cifar10", "--weights", stand_in, *FEW, "--json"
    )
    (row,) = document(shown)["rows"]
    assert set(row["metrics"]) == {"fid"}
    assert row["metrics"]["fid"]["value"] > 0
    protocol = row["protocol"]
    assert protocol["weights_published"] is False
    assert len(protocol["weights_sha256"]) == 64
    assert protocol["references"]["fid"]["file"] == "cifar10_clean_train_32.npz"
    assert "not the published inception weights" in shown.stderr


def test_statistics_of_ones_own_stand_for_the_images(run_folder: Path, deme: Deme) -> None:
    made = deme("stats", "digits", "-o", "ref.safetensors", "--split", "test", "--json")
    assert document(made)["n"] == 359
    arguments = ("base.safetensors", *FEW, "--json")
    (one,) = document(deme("eval", "--fid", "ref.safetensors", *arguments))["rows"]
    (other,) = document(deme("eval", "--fid", "digits", *arguments))["rows"]
    value = other["metrics"]["frechet_digits"]["value"]
    assert one["metrics"]["frechet_digits"]["value"] == pytest.approx(value, rel=1e-9)


def test_samples_with_fewer_images_are_measured_with_a_warning(
    run_folder: Path, deme: Deme
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    write_artifact(Path("drawn.safetensors"), {"images": images}, SamplesRecord(protocol={}))
    shown = deme("eval", "drawn.safetensors", "--fid", "digits", "-n", "9", "--json")
    assert document(shown)["rows"][0]["metrics"]["frechet_digits"]["n"] == 5
    assert "drawn has 5 images, not 9" in shown.stderr


def test_the_gate_is_met_or_ends_with_a_gate_error(run_folder: Path, deme: Deme) -> None:
    arguments = ("eval", "base.safetensors", "--fid", "digits", *FEW, "--json", "--max-fid")
    assert deme(*arguments, "1e6").exit_code == 0
    failed = deme(*arguments, "0.001")
    assert isinstance(failed.exception, GateError)
    assert "above --max-fid 0.001: base" in str(failed.exception)
    assert json.loads(failed.stdout)["rows"], "the figures are shown all the same"


def test_the_document_is_written_to_a_file_too(run_folder: Path, deme: Deme) -> None:
    arguments = ("eval", "base.safetensors", "--fid", "digits", *FEW, "-o", "figures.json")
    assert deme(*arguments).stdout.strip() == "figures.json"
    assert json.loads(Path("figures.json").read_text())["schema_version"] == 1
    assert isinstance(deme(*arguments).exception, ConfigError)
    assert deme(*arguments, "--force").exit_code == 0


def test_a_dry_run_says_what_would_be_measured(run_folder: Path, deme: Deme) -> None:
    shown = deme("eval", "--fid", "digits", "--dry-run", "--json")
    assert [row["name"] for row in document(shown)["rows"]] == ["base", "ensemble"]
    assert "would measure frechet_digits of base, ensemble against digits" in shown.stderr


def test_without_a_reference_there_is_nothing_to_measure(run_folder: Path, deme: Deme) -> None:
    assert "add --fid REF" in str(deme("eval").exception)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("--fid", "digits", "-n", "0"), ConfigError, "num = 0"),
        (("--fid", "digits", "--repeats", "0"), ConfigError, "repeats = 0"),
        (("--fid", "digits", "--resize", "bicubic"), ConfigError, "resize = 'bicubic'"),
        (("--fid", "digits", "--dtype", "fp8"), ConfigError, "--dtype fp8"),
        (("--kid", "digits", "--max-fid", "3"), ConfigError, "--max-fid needs --fid"),
        (("--fid", "digits", "--features", "nothing.pt"), MissingError, "no such file"),
        (("--fid", "digits", "-o", "nowhere/x.json", "-n", "1"), ConfigError, "at least 2 images"),
        (("--fid", "imagenet"), MissingError, "deme stats"),
        (("--fid", "digits", "base.safetensors", "base.safetensors"), ConfigError, "given twice"),
    ],
)
def test_bad_input_is_one_clear_line(
    run_folder: Path, cache: Path, stand_in: Path, deme: Deme,
    arguments: tuple, kind: type, words: str,
) -> None:  # fmt: skip
    (cache / "inception-2015-12-05.pt").write_bytes(stand_in.read_bytes())
    error = deme("eval", *arguments).exception
    assert isinstance(error, kind)
    assert words in str(error)


def test_statistics_made_otherwise_are_refused(
    run_folder: Path, stand_in: Path, deme: Deme
) -> None:
    deme("stats", "digits", "-o", "ref.safetensors")
    refused = deme("eval", "--fid", "ref.safetensors", "--features", stand_in)
    assert isinstance(refused.exception, ArtifactError)
    assert "made with digits" in str(refused.exception)


def test_cifar10_without_network_or_weights_ends_at_once_with_exit_code_3(
    run_folder: Path, cache: Path
) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "deme_cli", "eval", "--fid", "cifar10"],
        capture_output=True, text=True, env={**environment, **proxy_to_nowhere()},
    )  # fmt: skip
    assert done.returncode == 3
    assert time.monotonic() - began < 7  # under 1 s on a machine with nothing else to do
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    for words in ("inception-2015-12-05.pt", "f58cb9b6", "cifar10_clean_train_32.npz", "no answer"):
        assert words in done.stderr


def proxy_to_nowhere() -> dict[str, str]:
    """As if there were no network, wherever the test runs."""
    root = str(Path(__file__).parents[2])
    return {
        "https_proxy": "http://127.0.0.1:9",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }


def test_checks_come_before_torch(run_folder: Path, cache: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from deme_cli.app import app\n"
        "found = CliRunner().invoke(app, ['eval', '--fid', 'cifar10'])\n"
        "assert found.exception.exit_code == 3\n"
        "assert CliRunner().invoke(app, ['eval', '--fid', 'digits', '--dry-run']).exit_code == 0\n"
        "print(sorted({'torch', 'diffusers', 'cleanfid', 'scipy'} & set(sys.modules)))"
    )
    environment = {**os.environ, **proxy_to_nowhere()}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
