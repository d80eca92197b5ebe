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


def test_no_file_means_defaults_and_a_named_file_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_run_file(None).settings(SampleConfig) == SampleConfig()
    with pytest.raises(MissingError, match="deme split"):
        read_run_file(tmp_path / "other.toml")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (
            "[finetune]\nlearning_rate = 1e-4",
            "unknown key 'learning_rate' in [finetune]; did you mean 'lr'?",
        ),
        ("[finetune]\nstep = 3", "did you mean 'steps'"),
        ("[split]\nnum_ranges = 4", "unknown key 'num_ranges' in [split]; did you mean 'n'?"),
        ("[data]\ntrain_data_dir = 'x'", "did you mean 'source'?"),
        ("[finetunes]\n", "did you mean 'finetune'"),
        ("[finetune]\nsteps = 'many'", "expected a whole number"),
        ("[finetune]\nsteps = true", "expected a whole number"),
        ("[finetune]\np = [1]", "expected a number"),
        ("finetune = 3", "should be a table"),
        ("[finetune", "not valid TOML"),
        ("[finetune]\nsteps = " + "9" * 5000, "not valid TOML"),
        ("[finetune]\ngrid = " + "[" * 9000 + "]" * 9000, "not valid TOML"),
        ("[finetune]\nsteps = 0x" + "f" * 5000, "more than 64 bits"),
        ("[finetune]\nlr = " + "9" * 400, "[finetune] lr: a number of more than 64 bits"),
        ("[merge]\ngrid = [0.5, 1" + "0" * 400 + "]", "more than 64 bits"),
    ],
)
def test_a_wrong_file_is_refused_where_it_is_wrong(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=r"deme\.toml.*") as caught:
        read_run_file(write(tmp_path, text))
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "options", "word"),
    [
        (FinetuneConfig, {"p": 1.5}, "probability from 0 to 1"),
        (FinetuneConfig, {"p": -0.1}, "probability from 0 to 1"),
        (FinetuneConfig, {"p": float("nan")}, "probability from 0 to 1"),
        (FinetuneConfig, {"steps": 0}, "above 0"),
        (FinetuneConfig, {"lr": -1.0}, "above 0"),
        (FinetuneConfig, {"consistency": -1.0}, "0 or more"),
        (FinetuneConfig, {"ema_decay": 1.0}, "below 1"),
        (FinetuneConfig, {"projection": "fould"}, "fold, block, none"),
        (FinetuneConfig, {"lr_schedule": "step"}, "constant, linear, cosine"),
        (SplitConfig, {"n": 0}, "above 0"),
        (SplitConfig, {"by": "magic"}, "uniform"),
        (MergeConfig, {"search": "magic"}, "grid"),
        (SampleConfig, {"sampler": "magic"}, "ddim"),
        (SampleConfig, {"eta": -0.5}, "0 or more"),
        (EvalConfig, {"repeats": 0}, "above 0"),
        (EvalConfig, {"resize": "bicubic"}, "clean"),
    ],
)
def test_a_config_that_exists_can_run(config: type, options: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        config(**options)


def test_ranges_in_the_file_are_parsed(tmp_path: Path) -> None:
    run = read_run_file(write(tmp_path, '[split]\nn = 2\nranges = ["0:100", "100:1000"]\n'))
    assert [str(span) for span in run.settings(SplitConfig).timestep_ranges] == [
        "0:100",
        "100:1000",
    ]
    with pytest.raises(ConfigError, match="expected start:stop"):
        _ = SplitConfig(ranges=["low"]).timestep_ranges


def test_numbers_come_separated_by_commas() -> None:
    assert parse_numbers("0.1, 2,-3", "-w") == [0.1, 2.0, -3.0]
    with pytest.raises(ConfigError, match=r"-w '0\.1;2'"):
        parse_numbers("0.1;2", "-w")
