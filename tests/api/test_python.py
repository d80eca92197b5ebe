"""deme in Python: typed, light to import, and as plain in its refusals as the command line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import deme_cli
from deme_cli.config import (
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
    SplitConfig,
)
from deme_cli.errors import ConfigError, DemeError, MissingError
from deme_cli.evaluation.rows import find_prompts
from deme_cli.run_file import RunFile

PLAN = """
title = "Two rows"
n = 2
updates = 2
[eval]
fid = "digits"
[[row]]
name = "Before"
kind = "base"
[[row]]
name = "Plain"
kind = "finetune"
"""


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


def test_what_cannot_be_done_is_said_before_anything_is_loaded(run_folder: Path) -> None:
    parents = sorted(run_folder.glob("ft_*.safetensors"))
    with pytest.raises(ConfigError, match="3 values for 4 experts"):
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


def test_what_the_command_refuses_python_refuses_in_the_same_words(run_folder: Path, deme) -> None:
    Path("two.txt").write_text("a one\na two\n")
    bedroom = {"protocol": "lsun-bedroom-50k"}
    for words, evaluation, sampling, told in (
        ("-n 3 --prompts two.txt", {"num": 3}, {"prompts": "two.txt"}, "-n says 3"),
        ("-n 5 --protocol lsun-bedroom-50k", {"num": 5, **bedroom}, {}, "has 50000"),
        (
            "--steps 7 --protocol lsun-bedroom-50k", bedroom, {"steps": 7},
            "--steps 7: the protocol lsun-bedroom-50k has 50;",
        ),
        ("--prompts far.txt", {}, {"prompts": "far.txt"}, "far.txt: no such file"),
    ):  # fmt: skip
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


def test_what_cannot_be_looked_at_is_said_before_torch_is_loaded(run_folder: Path) -> None:
    Path("two.toml").write_text(PLAN)
    Path("report.html").touch()
    before = sorted(Path().rglob("*"))
    code = """if True:
        import sys
        from pathlib import Path
        from deme_cli.comparison.compare import compare
        from deme_cli.html_report import report
        from deme_cli.artifacts import inspect
        from deme_cli.merging.show_search import show_search
        from deme_cli.errors import DemeError

        for call in (
            lambda: compare("nowhere"),
            lambda: compare("two.toml", seeds=[1, 1]),
            lambda: compare("two.toml", budget="time"),
            lambda: compare("two.toml", updates=0),
            lambda: report(),
            lambda: report(output=Path("report.pdf")),
            lambda: report(Path("nowhere")),
            lambda: inspect([Path("nowhere")]),
            lambda: inspect([Path("two.toml")]),
            lambda: show_search(Path("nowhere")),
        ):
            try:
                call()
            except DemeError as error:
                print(error)
            else:
                raise AssertionError("nothing was refused")
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [
        "nowhere: no such plan", "seeds = [1, 1]", "budget = 'time'", "updates = 0",
        "report.html exists", "ends in .html", "nowhere: no such folder", "nowhere",
        "two.toml: not a", "nowhere: no such journal",
    ]  # fmt: skip
    for line, part in zip(done.stdout.splitlines(), expected, strict=True):
        assert part in line
    assert sorted(Path().rglob("*")) == before
