"""deme in Python: the same files, bit for bit, as the command line makes."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import deme_cli
from deme_cli.api.eval_request import find_prompts
from deme_cli.artifacts import read_record
from deme_cli.config import (
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
    SplitConfig,
)
from deme_cli.errors import ConfigError, DemeError, GateError, MissingError
from deme_cli.run_file import RunFile

EXPERTS = ["ft_1of2.safetensors", "ft_2of2.safetensors"]


def walk_the_command_line(deme) -> str:
    """The pipeline as one types it, in the current folder; returns what eval prints."""
    lines = [
        "split digits -n 2",
        "finetune --range all --steps 2 --held-out 0 -b 4",
        f"task-vector {' '.join(EXPERTS)}",
        f"merge {' '.join(EXPERTS)} -w 0.3,0.6",
        f"merge {' '.join(EXPERTS)} --search grid --grid 0,1 --num 8 -o found.safetensors",
        "sample merged.safetensors -n 5 --steps 2",
        f"ensemble-sample {' '.join(EXPERTS)} -n 5 --steps 2",
        "stats digits -o reference.safetensors",
        "eval base.safetensors merged.safetensors --fid digits -n 8 --steps 2 --repeats 2 --json",
    ]
    for line in lines:
        done = deme(*line.split())
        assert done.exit_code == 0, f"deme {line}: {done.exception!r}\n{done.stderr}"
    return done.stdout


def walk_in_python() -> deme_cli.Evaluation:
    """The same with functions, each given what the one before has returned."""
    run = deme_cli.split("digits", SplitConfig(n=2)).run
    settings = run.settings(FinetuneConfig, steps=2, held_out=0, batch_size=4)
    experts = deme_cli.finetune("all", settings, run=run)
    assert [path.name for path in experts] == EXPERTS
    vectors = deme_cli.task_vector(experts, run=run)
    assert vectors.measured.cosines[0][0] == pytest.approx(1)
    given = run.settings(MergeConfig, coefficients=[0.3, 0.6])
    merged = deme_cli.merge(experts, given, run=run)
    assert merged.record == read_record(merged.path, "merged")
    found = deme_cli.search(
        experts,
        run.settings(MergeConfig, search="grid", grid=[0.0, 1.0], num=8),
        output=Path("found.safetensors"),
        run=run,
    )
    assert [path.suffix for path in found.files] == [".png", ".jsonl"]
    drawing = run.settings(SampleConfig, num=5, steps=2)
    images = deme_cli.sample(merged.path, drawing, run=run)
    assert (images.num, images.num_kept) == (5, 0)
    assert images.preview.exists()
    deme_cli.ensemble_sample(experts, drawing, run=run)
    deme_cli.reference_statistics("digits", Path("reference.safetensors"), run=run)
    return deme_cli.evaluate(
        [run.base, merged.path],
        run.settings(EvalConfig, fid="digits", num=8, repeats=2),
        sampling=run.settings(SampleConfig, steps=2),
        run=run,
    )


def test_python_and_the_command_line_make_the_same_files(deme, tmp_path: Path, monkeypatch) -> None:
    typed, called = tmp_path / "typed", tmp_path / "called"
    for folder in (typed, called):
        folder.mkdir()
    monkeypatch.chdir(typed)
    printed = json.loads(walk_the_command_line(deme))
    monkeypatch.chdir(called)
    measured = walk_in_python()

    artifacts = sorted(path.name for path in typed.glob("*.safetensors"))
    assert len(artifacts) == 10
    assert artifacts == sorted(path.name for path in called.glob("*.safetensors"))
    for name in artifacts:
        ours, theirs = read_record(called / name), read_record(typed / name)
        assert ours.fingerprint == theirs.fingerprint, name
    assert measured.document["rows"] == printed["rows"]
    with pytest.raises(GateError, match="above --max-fid 1e-09: base"):
        measured.require_at_most(1e-9)


def test_a_base_from_scratch_and_its_export(tmp_path: Path, monkeypatch) -> None:
    from conftest import TINY_MODEL, TINY_SCHEDULER

    monkeypatch.chdir(tmp_path)
    description = tmp_path / "tiny.json"
    description.write_text(json.dumps({"model": TINY_MODEL, "scheduler": TINY_SCHEDULER}))
    (base,) = deme_cli.train_base(
        description,
        FinetuneConfig(steps=2, held_out=0, batch_size=4),
        images=DataConfig(source="digits"),
    )
    check = deme_cli.export(base, tmp_path / "pipeline")
    assert check.max_difference <= 1e-5
    assert (tmp_path / "pipeline" / "model_index.json").exists()


def test_a_merged_file_is_built_again(run_folder: Path) -> None:
    parents = sorted(run_folder.glob("ft_*.safetensors"))
    merged = deme_cli.merge(parents, MergeConfig(coefficients=[0.1, 0.2, 0.3, 0.4]))
    again = deme_cli.replay(merged.path)
    assert again.path.read_bytes() == merged.path.read_bytes()


def test_what_cannot_be_done_is_said_before_anything_is_loaded(run_folder: Path) -> None:
    parents = sorted(run_folder.glob("ft_*.safetensors"))
    with pytest.raises(ConfigError, match="looks for nothing"):
        deme_cli.search(parents, MergeConfig())
    with pytest.raises(ConfigError, match="3 coefficients for 4 experts"):
        deme_cli.merge(parents, MergeConfig(coefficients=[1, 1, 1]))
    with pytest.raises(ConfigError, match="closed form"):
        deme_cli.merge(parents, MergeConfig(method="slerp", search="grid"))
    with pytest.raises(ConfigError, match="no training images"):
        deme_cli.finetune("1/4", FinetuneConfig(), base=run_folder / "base.safetensors")
    with pytest.raises(MissingError, match="no base there"):
        deme_cli.finetune("1/4", images=DataConfig(source="digits"), base=Path("gone.safetensors"))
    with pytest.raises(ConfigError, match="nothing to measure"):
        deme_cli.evaluate([run_folder / "base.safetensors"])
    assert not (run_folder / "merged.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "evaluation", "sampling", "told"),
    [
        ("-n 50000 --prompts two.txt", {"num": 50_000}, {"prompts": "two.txt"}, "-n says 50000"),
        ("-n 3 --prompts two.txt", {"num": 3}, {"prompts": "two.txt"}, "-n says 3"),
        (
            "-n 5 --protocol lsun-bedroom-50k", {"num": 5, "protocol": "lsun-bedroom-50k"}, {},
            "has 50000",
        ),
        (
            "--steps 7 --protocol lsun-bedroom-50k", {"protocol": "lsun-bedroom-50k"}, {"steps": 7},
            "--steps 7: the protocol lsun-bedroom-50k has 50;",
        ),
        ("--prompts far.txt", {}, {"prompts": "far.txt"}, "far.txt: no such file"),
    ],
)  # fmt: skip
def test_what_the_command_refuses_python_refuses_in_the_same_words(
    run_folder: Path, deme, words: str, evaluation: dict, sampling: dict, told: str
) -> None:
    Path("two.txt").write_text("a one\na two\n")
    typed = deme("eval", "base.safetensors", "--fid", "digits", *words.split())
    run = deme_cli.read_run_file(None)
    with pytest.raises(DemeError, match=told) as called:
        deme_cli.evaluate(
            [run.base], run.settings(EvalConfig, fid="digits", **evaluation),
            sampling=run.settings(SampleConfig, **sampling), run=run,
        )  # fmt: skip
    assert str(called.value) == str(typed.exception)


def test_without_a_number_prompts_make_as_many_images_as_they_are(run_folder: Path) -> None:
    Path("two.txt").write_text("a one\na two\n")
    for prompts, num in ((None, 50_000), ("two.txt", 2), ("digits", 50_000)):
        sample = SampleConfig(prompts=prompts)
        _, config, drawn = find_prompts(RunFile(), EvalConfig(), sample)
        assert (config.num, drawn.num) == (num, num)


def test_prompts_beside_a_deme_toml_elsewhere_are_found_in_python_too(
    run_folder: Path, deme
) -> None:
    Path("far").mkdir()
    Path("far/two.txt").write_text("a one\na two\n")
    Path("far/deme.toml").write_text('[sample]\nprompts = "two.txt"\n')
    typed = deme("sample", "base.safetensors", "--config", "far/deme.toml")
    with pytest.raises(ConfigError, match="prompts") as called:
        deme_cli.sample("base.safetensors", run=deme_cli.read_run_file(Path("far/deme.toml")))
    assert str(called.value) == str(typed.exception)


def test_ranges_that_are_given_are_those_that_are_written(tmp_path: Path) -> None:
    own = ["0:100", "100:1000"]
    done = deme_cli.split("digits", SplitConfig(n=2, ranges=own), output=tmp_path)
    assert done.run.settings(SplitConfig).ranges == own
    for wrong, told in ((SplitConfig(ranges=own), "n = 4, but ranges has 2"),
                        (SplitConfig(n=1, ranges=own[:1]), "each of the 1000")):  # fmt: skip
        with pytest.raises(DemeError, match=told):
            deme_cli.split("digits", wrong, output=tmp_path, force=True)


def test_every_public_name_is_there_with_types_and_a_docstring() -> None:
    for name in deme_cli.__all__:
        thing = getattr(deme_cli, name)
        assert name in dir(deme_cli)
        if inspect.isfunction(thing):
            assert thing.__doc__, name
            hints = inspect.get_annotations(thing)
            assert set(hints) == {*inspect.signature(thing).parameters, "return"}, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deme_cli.nothing  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, deme_cli; deme_cli.merge, deme_cli.evaluate; "
        "print(sorted({'torch', 'numpy', 'diffusers', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
