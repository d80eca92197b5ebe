from __future__ import annotations

from pathlib import Path

import pytest

from deme_cli.config import (
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
    SplitConfig,
    parse_numbers,
)
from deme_cli.errors import ConfigError, MissingError
from deme_cli.run_file import read_run_file


def write(folder: Path, text: str) -> Path:
    path = folder / "deme.toml"
    path.write_text(text)
    return path


def test_the_command_line_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    run = read_run_file(write(tmp_path, "[finetune]\np = 0.5\nlr = 1\n"))
    config = run.settings(FinetuneConfig, p=0.1, steps=None)
    assert (config.p, config.lr, config.steps) == (0.1, 1.0, FinetuneConfig().steps)
    assert type(config.lr) is float


def test_coefficients_that_are_given_take_the_place_of_a_search_and_the_other_way(
    tmp_path: Path,
) -> None:
    run = read_run_file(write(tmp_path, '[merge]\nsearch = "grid"\n'))
    assert run.settings(MergeConfig, coefficients=[1.0]).search == "none"
    run = read_run_file(write(tmp_path, "[merge]\ncoefficients = [1, 2]\n"))
    assert run.settings(MergeConfig, search="none").coefficients == [1.0, 2.0]
    assert run.settings(MergeConfig, search="grid").coefficients is None


def test_no_file_means_defaults_and_a_named_file_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_run_file(None).settings(SampleConfig) == SampleConfig()
    with pytest.raises(MissingError, match="deme split"):
        read_run_file(tmp_path / "other.toml")


def test_a_wrong_file_is_refused_where_it_is_wrong(tmp_path: Path) -> None:
    for text, word in (
        ("[finetune]\nlearning_rate = 1", "key 'learning_rate' in [finetune]; did you mean 'lr'?"),
        ("[finetune]\nstep = 3", "did you mean 'steps'"),
        ("[split]\nnum_ranges = 4", "unknown key 'num_ranges' in [split]; did you mean 'n'?"),
        ("[data]\ntrain_data_dir = 'x'", "did you mean 'source'?"),
        ("[finetunes]\n", "did you mean 'finetune'"),
        ("[finetune]\nsteps = 'many'", "[finetune] steps = 'many': expected a whole number"),
        ("[finetune]\nsteps = true", "expected a whole number"),
        ("[finetune]\np = [1]", "expected a number"),
        ("[split]\nranges = [1, 2]", "[split] ranges = 1: expected a text"),
        ('[merge]\ncoefficients = ["a"]', "[merge] coefficients = 'a': expected a number"),
        ("[eval]\nclip_score = 1", "expected true or false"),
        ("finetune = 3", "should be a table"),
        ("[finetune", "not valid TOML"),
        ("[finetune]\nsteps = " + "9" * 5000, "not valid TOML"),
        ("[finetune]\ngrid = " + "[" * 9000 + "]" * 9000, "not valid TOML"),
        ("[finetune]\nsteps = 0x" + "f" * 5000, "more than 64 bits"),
        ("[finetune]\nlr = " + "9" * 400, "[finetune] lr: a number of more than 64 bits"),
        ("[merge]\ngrid = [0.5, 1" + "0" * 400 + "]", "more than 64 bits"),
    ):
        with pytest.raises(ConfigError, match=r"deme\.toml.*") as caught:
            read_run_file(write(tmp_path, text))
        assert word in str(caught.value), text


def test_a_config_that_exists_can_run() -> None:
    for config, options, word in (
        (FinetuneConfig, {"p": 1.5}, "probability from 0 to 1"),
        (FinetuneConfig, {"p": float("nan")}, "probability from 0 to 1"),
        (FinetuneConfig, {"steps": 0}, "above 0"),
        (FinetuneConfig, {"consistency": -1.0}, "0 or more"),
        (FinetuneConfig, {"ema_decay": 1.0}, "below 1"),
        (FinetuneConfig, {"projection": "fould"}, "fold, block, none"),
        (SplitConfig, {"n": 0}, "above 0"),
        (MergeConfig, {"density": 0.0}, "a share above 0"),
        (SampleConfig, {"eta": -0.5}, "0 or more"),
        (SampleConfig, {"sampler": "magic"}, "ddim"),
        (SampleConfig, {"num": 0}, "num = 0"),
        (SampleConfig, {"guidance": -1.0}, "guidance = -1"),
        (SampleConfig, {"resize": 0}, "resize = 0"),
        (EvalConfig, {"resize": "bicubic"}, "resize = 'bicubic'"),
        (EvalConfig, {"repeats": 0}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=word):
            config(**options)


def test_ranges_and_numbers_are_parsed(tmp_path: Path) -> None:
    run = read_run_file(write(tmp_path, '[split]\nn = 2\nranges = ["0:100", "100:1000"]\n'))
    spans = [str(span) for span in run.settings(SplitConfig).timestep_ranges]
    assert spans == ["0:100", "100:1000"]
    with pytest.raises(ConfigError, match="expected start:stop"):
        _ = SplitConfig(ranges=["low"]).timestep_ranges
    assert parse_numbers("0.1, 2,-3", "-w") == [0.1, 2.0, -3.0]
    with pytest.raises(ConfigError, match=r"-w '0\.1;2'"):
        parse_numbers("0.1;2", "-w")
