"""The pipeline through the command line, as a newcomer walks it, on the embedded digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deme_cli.artifacts import load_tensors, read_record


@pytest.fixture
def walk(deme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run command lines in an empty folder; each must succeed."""
    monkeypatch.chdir(tmp_path)

    def step(line: str):
        done = deme(*line.split())
        assert done.exit_code == 0, f"deme {line}: {done.exception!r}\n{done.stderr}"
        return done

    return step


def test_split_finetune_task_vector_merge_sample_eval_export(walk, tmp_path: Path) -> None:
    walk("split digits -n 2")
    walk("finetune --range all --steps 3 --held-out 0")
    vectors = walk("task-vector ft_1of2.safetensors ft_2of2.safetensors")
    assert vectors.stdout.split() == ["tv_1of2.safetensors", "tv_2of2.safetensors"]
    walk(
        "merge ft_1of2.safetensors ft_2of2.safetensors --search grid --objective fid "
        "--grid 0,1 --num 20 --steps 2 --no-report"
    )
    record = read_record(tmp_path / "merged.safetensors", "merged")
    assert record.search is not None
    assert set(record.coefficients) <= {0.0, 1.0}
    assert (tmp_path / "merged.search.png").exists()

    walk("sample merged.safetensors -n 6 --steps 3")
    assert load_tensors(tmp_path / "merged-samples.safetensors")["images"].shape == (6, 8, 8, 1)
    walk("ensemble-sample ft_1of2.safetensors ft_2of2.safetensors -n 6 --steps 3")

    measured = json.loads(walk("eval --fid digits --num 20 --repeats 2 --steps 2 --json").stdout)
    assert [row["name"] for row in measured["rows"]] == ["base", "ensemble", "merged"]
    for row in measured["rows"]:
        assert row["metrics"]["frechet_digits"]["repeats"] == 2
        assert row["metrics"]["frechet_digits"]["value"] > 0
        assert row["protocol"]["steps"] == 2

    walk("export merged.safetensors pipeline")
    assert (tmp_path / "pipeline" / "model_index.json").exists()
    shown = walk("inspect base.safetensors merged.safetensors --verify --json")
    kinds = [artifact["kind"] for artifact in json.loads(shown.stdout)["artifacts"]]
    assert kinds == ["base", "merged"]


def test_the_embedded_base_says_how_it_was_trained() -> None:
    from deme_cli.data.digits import BASE_PATH

    record = read_record(BASE_PATH, "base")
    assert record.training["steps"] >= 10_000
    assert record.training["data"]["source"] == "digits"


@pytest.mark.slow
def test_the_demo_ends_in_a_table_and_a_picture(walk, tmp_path: Path) -> None:
    document = json.loads(walk("demo --quick --json").stdout)
    names = [Path(path).name for path in document["paths"]]
    assert names == ["demo.png", "eval.json", "report.html"]
    assert "<!doctype html>" in (tmp_path / "deme-demo" / "report.html").read_text().lower()
    assert [row["name"] for row in document["rows"]] == ["base", "control", "ensemble", "merged"]
    assert (tmp_path / "deme-demo" / "demo.png").stat().st_size > 10_000
