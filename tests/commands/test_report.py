"""`deme report` writes one file, says what was missing, and its commands make the same files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import Result

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.errors import ConfigError, MissingError
from deme_cli.reporting.command_lines import command_lines
from deme_cli.reporting.folder import open_folder
from deme_cli.reporting.protocol_lines import sampling
from deme_cli.run_file import RunFile

Deme = Callable[..., Result]
EXPERTS = [f"ft_{index}of4.safetensors" for index in range(1, 5)]


def _words(line: str) -> list[str]:
    """What a shell makes of a line, without `deme`."""
    return shlex.split(line.replace("\\\n", ""))[1:]


def test_the_page_the_notes_and_the_document(deme: Deme, run_folder: Path) -> None:
    (run_folder / "torn.safetensors").write_bytes(b"x")
    result = deme("report", "--json", "--title", "Mine & yours")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["paths"] == ["report.html"]
    content = Path("report.html").read_bytes()
    assert document["bytes"] == len(content)
    assert b"<h1>Mine &amp; yours</h1>" in content
    assert document["sections"]["artifacts"] == 5
    assert document["sections"]["tables"] == 0
    assert document["missing"][0]["what"] == "curves of training"
    assert [one["name"] for one in document["unread"]] == ["torn.safetensors"]
    assert "1 base, 4 experts; the page has" in result.stderr
    assert "not there: a merged model (deme merge ft_*.safetensors" in result.stderr
    assert "torn.safetensors: not shown: not a whole safetensors file" in result.stderr


def test_a_report_goes_into_its_folder_and_replaces_nothing_unasked(
    deme: Deme, run_folder: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert deme("report", run_folder, "-q").stdout == f"{run_folder / 'report.html'}\n"
    first = (run_folder / "report.html").read_bytes()
    result = deme("report", run_folder)
    assert isinstance(result.exception, ConfigError)
    assert "report.html exists; add --force" in str(result.exception)
    assert deme("report", run_folder, "--force").exit_code == 0
    assert (run_folder / "report.html").read_bytes() == first
    assert deme("report", run_folder, "-o", "mine.html").exit_code == 0
    assert [path.name for path in Path().iterdir()] == ["mine.html"]


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (["nowhere"], MissingError, "nowhere: no such folder"),
    (["base.safetensors"], MissingError, "is a file, not a run folder"),
    (["empty"], MissingError, "empty: nothing of deme's here; a run begins with"),
    (["-o", "report.pdf"], ConfigError, "expected a name that ends in .html"),
])  # fmt: skip
def test_bad_input_is_told_and_nothing_is_written(
    deme: Deme, run_folder: Path, arguments: list[str], error: type, message: str
) -> None:
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    result = deme("report", *arguments)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert sorted(Path().rglob("*")) == before


def test_the_commands_told_make_the_same_files_again(deme: Deme, run_folder: Path) -> None:
    train = ["--steps", 2, "-b", 4, "--held-out", 0, "--ema-lengths", "0.1", "--no-flip"]
    made = [
        ["finetune", "--range", "2/4", "--data", "digits", "--lr", 1e-3, "--antithetic",
         "--p", 0.25, *train, "-o", "-again.safetensors"],
        ["finetune", "--range", "10:40", "--data", "digits", "--projection", "none", *train],
        ["merge", *EXPERTS, "-w", "0.1,-0.2,0.3,0.4", "--method", "ties", "--density", 0.25,
         "--coefficients-for", "mid_block.*=1,0,0,0.5", "-o", "a file.safetensors"],
        ["sample", "a file.safetensors", "-n", 3, "--steps", 2, "--eta", 0.5, "--seed", 7],
        ["ensemble-sample", *EXPERTS, "-n", 3, "--steps", 2, "--sampler", "ddpm"],
    ]  # fmt: skip
    for line in made:
        result = deme(*line)
        assert result.exit_code == 0, result.exception
    names = ["-again", "ft_10-40", "a file", "a file-samples", "ensemble"]
    before = {name: read_record(Path(f"./{name}.safetensors")).fingerprint for name in names}
    told = [_words(line) for line in command_lines(open_folder(Path()))]
    assert [words[0] for words in told] == [
        "split", "finetune", "finetune", "finetune", "merge", "sample", "ensemble-sample",
    ]  # fmt: skip
    for words in told:
        if words[0] != "split" and words[:3] != ["finetune", "--range", "all"]:
            result = deme(*words, "--force")
            assert result.exit_code == 0, (words, result.exception)
    after = {name: read_record(Path(f"./{name}.safetensors")).fingerprint for name in names}
    assert after == before


def test_a_task_vector_is_told_by_its_expert_and_is_none_itself(
    deme: Deme, run_folder: Path
) -> None:
    assert deme("task-vector", EXPERTS[1]).exit_code == 0
    lines = [line.split() for line in command_lines(open_folder(Path()))]
    assert [words[1] for words in lines] == ["split", "finetune", "task-vector"]
    assert lines[1][2:4] == ["--range", "all"]
    assert lines[2][2:] == EXPERTS[1:2]


def test_lines_follow_what_deme_toml_would_give(deme: Deme, run_folder: Path) -> None:
    Path("deme.toml").write_text('[data]\nsource = "digits"\n[finetune]\nsteps = 3\nlr = 0.5\n')
    for name in EXPERTS:
        record = read_record(Path(name))
        training = {"steps": 20_000, "lr": 0.5, "p": 0.3, "ema_lengths": [0.05, 0.1], "flip": False}
        write_artifact(Path(name), load_tensors(Path(name)), replace(record, training=training))
    lines = command_lines(open_folder(Path()))
    assert lines[1:] == ["deme finetune --range all --steps 20000 --lr 0.5 --ema-lengths 0.05,0.1"]
    Path("deme.toml").write_text("[finetune]\nsteps = -1\n")
    assert lines[0] == "deme split tiny -n 4 --data digits"
    assert command_lines(open_folder(Path()))[0] == "deme split tiny -n 4"


def _rung(objective: str, num: int, keep: int) -> dict:
    return {"objective": objective, "num": num, "keep": keep}


@pytest.mark.parametrize(("search", "told"), [
    ({"method": "grid", "grid": [[0, 0.5]] * 4, "objective": "frechet_digits", "num": 500,
      "protocol": {"steps": 10}, "rungs": [_rung("frechet_digits", 500, 10)], "per": "model"},
     "--search grid --objective fid --grid 0,0.5 --num 500 --steps 10 --no-report"),
    ({"method": "random", "objective": "loss", "num": 64, "protocol": {"range": "250:500"},
      "per": "model"}, "--search random --loss-range 250:500 --num 64 --no-report"),
    ({"method": "cmaes", "bounds": [[0, 1], [0, 2], [0, 1], [0, 1]], "objective": "kid", "seed": 5,
      "rungs": [_rung("loss", 64, 8), _rung("kid", 900, 2)], "per": "block", "num": 900},
     "--per block --search cmaes --objective loss@64:8,kid@900:2 --bounds '0,1;0,2;0,1;0,1' "
     "--seed 5 --no-report"),
    ({"method": "post-hoc EMA", "ema_length": 0.1}, "--ema-length 0.1"),
    ({"method": "grid", "grid": 3, "objective": "loss"}, None),
])  # fmt: skip
def test_a_search_is_told_as_it_was_asked_for(
    deme: Deme, run_folder: Path, search: dict, told: str | None
) -> None:
    assert deme("merge", *EXPERTS).exit_code == 0
    path = Path("merged.safetensors")
    write_artifact(path, load_tensors(path), replace(read_record(path), search=search))
    lines = [line.replace("\\\n    ", "") for line in command_lines(open_folder(Path()))]
    merges = [line for line in lines if line.startswith("deme merge")]
    expected = f"deme merge {' '.join(EXPERTS)} {told}"
    assert merges == ([expected] if told else [])


@pytest.mark.parametrize(("prediction_type", "live", "told"), [
    ("epsilon", {}, "--sampler euler"), ("flow", {}, "--sampler euler"),
    ("epsilon", {"sampler": "euler"}, ""),
])  # fmt: skip
def test_a_sampler_is_left_out_only_where_it_is_that_of_the_run(
    prediction_type: str, live: dict, told: str
) -> None:
    card = {"model": "base", "fingerprints": ["0"], "sampler": "euler", "steps": 50,
            "prediction_type": prediction_type}  # fmt: skip
    words = sampling(card, "x-samples.safetensors", RunFile(Path(), {"sample": live}), {"0": "x"})
    assert " ".join(words) == f"sample x {told}".strip()


@pytest.mark.parametrize("rows", [[], [{}], [{"kind": "base", "protocol": {}, "metrics": {}}]])
def test_a_table_of_another_shape_is_told_by_no_line(
    deme: Deme, run_folder: Path, rows: list
) -> None:
    before = command_lines(open_folder(Path()))
    Path("eval.json").write_text(json.dumps({"schema_version": 1, "rows": rows}))
    assert command_lines(open_folder(Path())) == before


def test_an_analysis_is_told_with_its_models_and_numbers(deme: Deme, run_folder: Path) -> None:
    record = read_record(Path("base.safetensors"))
    Path("gradients.json").write_text(json.dumps({
        "schema_version": 1, "kind": "gradients", "reading": "x", "protocol": {
            "num": 4, "seed": 3, "data": {"source": "digits", "split": "train"},
            "model": {"source": "base", "fingerprint": record.fingerprint},
        },
    }))  # fmt: skip
    line = command_lines(open_folder(Path()))[-1]
    assert line == "deme analyze gradients base.safetensors --num 4 --seed 3 --data digits"


def test_a_landscape_is_told_with_what_lies_beside_its_plane(deme: Deme, run_folder: Path) -> None:
    names = ["base.safetensors", *EXPERTS[:3]]
    models = [{"fingerprint": read_record(Path(name)).fingerprint} for name in names]
    protocol = {"along": "vectors", "spanning": 3, "models": models, "points": 5}
    Path("landscape.json").write_text(json.dumps({
        "schema_version": 1, "kind": "landscape", "protocol": protocol,
    }))  # fmt: skip
    line = command_lines(open_folder(Path()))[-1].replace("\\\n    ", "")
    assert line == (
        f"deme analyze landscape {' '.join(names[:3])} --mark {names[3]} --along vectors --points 5"
    )


@pytest.mark.parametrize(
    "line",
    [
        "losses base.safetensors ft_1of4.safetensors --data digits --buckets 4 --num 4",
        "activations base.safetensors ft_1of4.safetensors --data digits --num 4 --controls 0 "
        "--range all",
        "landscape base.safetensors ft_1of4.safetensors ft_4of4.safetensors --data digits "
        "--mark ft_2of4.safetensors --points 3 --num 16 --report-num 16",
        "gradients base.safetensors --data digits --buckets 6 --num 4 --num-ranges 3",
    ],
)
def test_the_line_told_of_an_analysis_makes_the_same_document(
    deme: Deme, run_folder: Path, line: str
) -> None:
    assert deme("analyze", *line.split(), "-o", "found.json").exit_code == 0
    first = Path("found.json").read_bytes()
    told = command_lines(open_folder(Path()))[-1]
    again = deme(*_words(told), "--force")
    assert again.exit_code == 0, f"{told}: {again.exception}"
    assert Path("found.json").read_bytes() == first, told
