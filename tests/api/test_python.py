"""deme in Python: typed, light to import, and as plain in its refusals as the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import deme_cli
from deme_cli.config import EvalConfig, SampleConfig, SplitConfig
from deme_cli.errors import ConfigError, DemeError
from deme_cli.evaluation.rows import find_prompts
from deme_cli.run_file import RunFile


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
