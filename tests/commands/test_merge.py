"""`task-vector` and `merge` as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_tiny_expert
from PIL import Image

from deme_cli.artifacts import fingerprint_file, load_tensors, read_record, write_artifact
from deme_cli.config import MergeConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError, Stopped
from deme_cli.merging.combine import merge_artifacts
from deme_cli.merging.objectives import HeldOutLoss
from deme_cli.training.examples import PixelExamples

PAIR = ("ft_1of4.safetensors", "ft_3of4.safetensors")
GRID = ("--search", "grid", "--grid", "0,0.5;0,1", "--num", "16")


def test_task_vectors_lie_beside_their_experts(run_folder: Path, deme: Callable) -> None:
    result = deme("task-vector", *sorted(run_folder.glob("ft_*")), "--json")
    document = json.loads(result.stdout)
    assert [Path(path).name for path in document["paths"]] == [
        f"tv_{index}of4.safetensors" for index in range(1, 5)
    ]
    assert len(document["cosines"]) == 4
    record = read_record(run_folder / "tv_2of4.safetensors", "task-vector")
    assert record.norms == document["norms"][1]
    assert "Cosines" in result.stderr
    result = deme("task-vector", "ft_1of4.safetensors")
    assert isinstance(result.exception, ConfigError)
    assert "--force" in str(result.exception)
    result = deme("task-vector", "ft_1of4.safetensors", "-o", "vectors")
    assert result.stdout.strip() == "vectors/tv_1of4.safetensors"


def test_a_free_span_names_its_vector(run_folder: Path, deme: Callable) -> None:
    record = write_tiny_expert(
        run_folder / "span.safetensors", run_folder / "base.safetensors", index=2, of=5
    )
    assert record.range == [20, 40]
    weights = load_tensors(run_folder / "span.safetensors")
    write_artifact(run_folder / "span.safetensors", weights, replace(record, index=None, of=None))
    assert deme("task-vector", "span.safetensors").stdout.strip() == "tv_20-40.safetensors"
    assert deme("task-vector", PAIR[0]).exit_code == 0
    merged = deme("merge", "tv_20-40.safetensors", "tv_1of4.safetensors", "-w", "1,0.5")
    assert merged.exit_code == 0


def test_two_experts_of_one_name_do_not_overwrite_each_other(
    run_folder: Path, deme: Callable
) -> None:
    base, twin = run_folder / "base.safetensors", run_folder / "more" / PAIR[0]
    record = write_tiny_expert(twin, base, index=1, of=4, scale=0.1)
    assert record.index == 1
    result = deme("task-vector", PAIR[0], twin, "-o", "vectors")
    assert isinstance(result.exception, ConfigError)
    assert "would both be written" in str(result.exception)


def test_given_coefficients_follow_the_arguments(run_folder: Path, deme: Callable) -> None:
    result = deme("merge", *PAIR, "-w", "0.25,0.5", "--json")
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["path"] == "merged.safetensors"
    assert document["coefficients"] == [0.25, 0.5]
    assert (document["objective"], document["evaluations"]) == (None, 0)
    assert document["fingerprint"] == fingerprint_file(run_folder / "merged.safetensors")
    deme("merge", *reversed(PAIR), "-w", "0.5,0.25", "-o", "same.safetensors")
    record = read_record(run_folder / "same.safetensors", "merged")
    assert [parent["range"] for parent in record.parents] == [[50, 75], [0, 25]]


def test_coefficients_of_the_run_file_follow_the_ranges(run_folder: Path, deme: Callable) -> None:
    (run_folder / "deme.toml").write_text("[merge]\ncoefficients = [0.25, 0.5]\n")
    deme("merge", *reversed(PAIR))
    assert read_record(run_folder / "merged.safetensors").coefficients == [0.5, 0.25]
    (run_folder / "deme.toml").write_text(
        '[data]\nsource = "digits"\n[merge]\nsearch = "grid"\nnum = 8\ngrid = [[1.0], [0.5]]\n'
    )
    result = deme("merge", *reversed(PAIR), "-o", "searched.safetensors", "--json")
    assert json.loads(result.stdout)["search"]["grid"] == [[0.5], [1.0]]


def test_without_coefficients_each_expert_counts_alike(run_folder: Path, deme: Callable) -> None:
    result = deme("merge", *PAIR)
    assert "1/2 each" in result.stderr
    assert result.stdout.strip() == "merged.safetensors"
    assert read_record(run_folder / "merged.safetensors").coefficients == [0.5, 0.5]


def test_a_search_finds_what_brute_force_finds(run_folder: Path, deme: Callable) -> None:
    result = deme("merge", *PAIR, *GRID, "--json")
    document = json.loads(result.stdout)
    base = load_denoiser(run_folder / "base.safetensors")
    data = open_images("digits", shape=base.sample_shape, split="held-out")
    loss = HeldOutLoss(PixelExamples(data), base.schedule, MergeConfig(num=16))
    values = {}
    for point in ((0, 0), (0.5, 0), (0, 1), (0.5, 1), (0.5, 0.5)):
        path = run_folder / "candidate.safetensors"
        merge_artifacts(run_folder / "base.safetensors", list(map(Path, PAIR)), point, path)
        values[point] = loss(load_denoiser(path), lambda: None)
    winner = min(values, key=values.get)
    assert tuple(document["coefficients"]) == winner
    assert document["evaluations"] == 5
    search = read_record(run_folder / "merged.safetensors").search
    assert document["search"] == search
    assert document["objective"] == search["best"] == pytest.approx(values[winner], rel=1e-5)
    assert search["values"]["base"] == pytest.approx(values[0, 0], rel=1e-5)
    assert search["values"]["mean"] == pytest.approx(values[0.5, 0.5], rel=1e-5)
    assert search["protocol"]["split"] == "held-out"
    assert "The best of 5 candidates" in result.stderr
    with Image.open(run_folder / "merged.search.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


def test_a_search_by_distance_tells_its_protocol(run_folder: Path, deme: Callable) -> None:
    result = deme(
        "merge", *PAIR, "--search", "grid", "--objective", "fid", "--grid", "0,0.5", "--num", "8",
        "--steps", "2", "--json",
    )  # fmt: skip
    search = json.loads(result.stdout)["search"]
    assert search["objective"] == "frechet_digits"
    assert search["protocol"]["steps"] == 2
    assert search["protocol"]["seed"] == search["seed"] == 1_000_003
    assert "fid" not in json.dumps(search).lower()


def test_a_search_stopped_by_a_signal_goes_on_where_it_stood(
    run_folder: Path, deme: Callable
) -> None:
    words = ["merge", *PAIR, "--search", "grid", "--grid", "0,0.2,0.4,0.6,0.8,1", "--num", "64"]
    log = run_folder / "merged.trials.jsonl"

    def stop() -> None:
        while not log.exists() or len(log.read_text().splitlines()) < 4:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    result = deme(*words)
    thread.join()
    assert isinstance(result.exception, Stopped)
    assert result.exception.exit_code == 75
    assert "run the same command again" in str(result.exception)
    done = len(log.read_text().splitlines()) - 1
    assert 3 <= done < 37
    assert not (run_folder / "merged.safetensors").exists()
    again = deme(*words)
    assert f"continuing after {done} candidates" in again.stderr
    whole = deme(*words, "-o", "whole.safetensors")
    assert whole.exit_code == 0
    assert log.read_text() == (run_folder / "whole.trials.jsonl").read_text()
    assert read_record(run_folder / "merged.safetensors") == read_record(
        run_folder / "whole.safetensors"
    )


def test_an_expert_of_nan_is_left_out_by_a_search_and_refused_by_a_merge(
    run_folder: Path, deme: Callable
) -> None:
    def spoil(name: str) -> None:
        path = run_folder / name
        weights = load_tensors(path)
        weights["conv_in.bias"] = weights["conv_in.bias"] * float("nan")
        write_artifact(path, weights, read_record(path))

    spoil(PAIR[0])
    assert deme("merge", *PAIR, *GRID).exit_code == 0
    assert read_record(run_folder / "merged.safetensors").coefficients[0] == 0
    result = deme("merge", *PAIR, "-w", "1,1", "--force")
    assert isinstance(result.exception, NumericsError)


def test_dry_run_checks_and_writes_nothing(run_folder: Path, deme: Callable) -> None:
    before = sorted(run_folder.iterdir())
    result = deme("merge", *PAIR, *GRID, "--dry-run", "--json")
    assert json.loads(result.stdout)["dry_run"] is True
    assert "would merge 2 artifacts" in result.stderr
    assert deme("merge", *PAIR, "--dry-run").stdout == ""
    assert sorted(run_folder.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["-w", "1,2", "--search", "grid"], ConfigError, "keep one"),
        (["-w", "1,2,3"], ConfigError, "3 coefficients for 2 experts"),
        (["-w", "1,x"], ConfigError, "expected numbers"),
        (["--grid", "0,1"], ConfigError, "--grid belongs to a search"),
        (["-w", "1,1", "--num", "3"], ConfigError, "--num belongs to a search"),
        (["--search", "grid", "--steps", "3"], ConfigError, "--steps are those of sampling"),
        (["--search", "random"], ConfigError, "expected one of none, grid"),
        (["--search", "grid", "--num", "0"], ConfigError, "above 0"),
        (["--search", "grid", "--grid", "0;0;0"], ConfigError, "3 lists of values for 2"),
        (["--search", "grid", "--objective", "fid", "--num", "1"], ConfigError, "at least 2"),
        (["--dtype", "fp8"], ConfigError, "--dtype fp8"),
        (["--base", "ft_2of4.safetensors"], ArtifactError, "was finetuned from base"),
        (["--base", "absent.safetensors"], MissingError, "no such file"),
        (["-o", "base.safetensors"], ConfigError, "--force"),
    ],
)
def test_wrong_usage_is_told(
    run_folder: Path, deme: Callable, words: list[str], error: type, message: str
) -> None:
    result = deme("merge", *PAIR, *words)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (run_folder / "merged.safetensors").exists()


def test_wrong_settings_in_the_run_file_are_told(run_folder: Path, deme: Callable) -> None:
    (run_folder / "deme.toml").write_text('[merge]\nsearch = "grid"\ncoefficients = [0.5, 0.5]\n')
    assert "keep one of them" in str(deme("merge", *PAIR).exception)
    (run_folder / "deme.toml").write_text('[data]\nsource = "nowhere"\n')
    result = deme("merge", *PAIR, *GRID)
    assert isinstance(result.exception, MissingError)
    assert "nowhere" in str(result.exception)
