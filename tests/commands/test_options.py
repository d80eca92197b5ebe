"""Options made of settings: a command takes a whole table of them in one parameter."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from deme_cli.app import COMMANDS, build
from deme_cli.commands.options import Given, OptionsOf, command
from deme_cli.config import TABLES, EvalConfig, MergeConfig, SampleConfig
from deme_cli.errors import OTHER_WORDS, ConfigError, closest

seen: dict[str, Any] = {}


@command()
def merging(
    given: Annotated[Given, OptionsOf(MergeConfig)],
    own: Annotated[bool, typer.Option("--own")] = False,
    as_json: bool = False,
) -> None:
    seen.update(given, own=own)


@command()
def measuring(
    of_rows: Annotated[Given, OptionsOf(EvalConfig, ("num", "resize"))],
    of_images: Annotated[Given, OptionsOf(SampleConfig, without=("num", "seed", "batch_size"))],
    as_json: bool,
) -> None:
    seen.update(of_rows=of_rows, of_images=of_images)


def call(tried: Any, *words: str) -> dict[str, Any]:
    seen.clear()
    app = typer.Typer()
    app.command()(tried)
    outcome = CliRunner().invoke(app, words)
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == 0, outcome.output
    return dict(seen)


def test_every_setting_is_there_and_none_where_its_option_is_not_given() -> None:
    found = call(merging)
    names = {item.name for item in fields(MergeConfig) if item.metadata["option"]}
    assert found == {**dict.fromkeys(names), "own": False}
    assert "bounds" not in names, "a setting of deme.toml alone"


def test_numbers_words_switches_and_lists_are_read() -> None:
    found = call(
        merging, "--grid", "0,0.5;0,1", "-w", "0.5,0.25", "-n", "3", "--no-report",
        "--objective", "fid", "--own",
    )  # fmt: skip
    given = {name: value for name, value in found.items() if value is not None}
    assert given == {
        "grid": [[0, 0.5], [0, 1]], "coefficients": [0.5, 0.25], "num": 3,
        "report": False, "objective": "fid", "own": True,
    }  # fmt: skip
    for text in ("", "0,x", "1,,2"):
        with pytest.raises(ConfigError, match=f"--grid {text!r}: expected numbers"):
            call(merging, "--grid", text)


def test_settings_of_two_tables_with_one_name_go_by_their_flags() -> None:
    found = call(measuring, "--resize", "clean", "--resize-to", "64", "--num", "5", "--steps", "7")
    assert found["of_rows"] == {"num": 5, "resize": "clean"}
    images = {name: value for name, value in found["of_images"].items() if value is not None}
    assert images == {"resize": 64, "steps": 7}


def test_two_options_of_one_name_are_a_mistake_that_is_seen_at_once() -> None:
    def twice(
        first: Annotated[Given, OptionsOf(EvalConfig, ("num",))],
        second: Annotated[Given, OptionsOf(SampleConfig, ("num",))],
    ) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name"):
        command()(twice)


def test_a_wrong_word_is_one_line_that_names_the_right_one(deme) -> None:
    for words, told in (
        ("finetun", "no command 'finetun'; did you mean 'finetune'?"),
        ("generate x", "no command 'generate'; did you mean 'sample'?"),
        ("xyz", "no command 'xyz'; known: split, finetune"),
        ("analyze loses", "no command 'loses'; did you mean 'losses'?"),
        ("finetune --rnage 1/4", "finetune: no option --rnage; did you mean --range?"),
        ("finetune --learning_rate=1", "no option --learning_rate; did you mean --lr?"),
        ("finetune --batch_size 1", "did you mean --batch-size?"),
        ("finetune --output-dir x", "did you mean --output?"),
        ("finetune --mixed_precision bf16", "did you mean --dtype?"),
        ("finetune --snr_gamma 5", "did you mean --weighting-gamma?"),
        ("sample x --num-inference-steps 1", "did you mean --steps?"),
        ("sample x --guidance-scale 1", "did you mean --guidance?"),
        ("merge --weights 1,2", "did you mean --coefficients?"),
        ("merge --loss-range 1:2", "no option --loss-range; set loss_range under [merge] in deme"),
        ("eval --weights", "eval: option '--weights' requires an argument; see deme eval --help"),
        ("analyze losses --num_samples 3", "analyze losses: no option --num_samples; did you mean"),
        ("finetune --xyzzy", "finetune: no option --xyzzy; see deme finetune --help"),
        ("sample", "sample: missing argument 'MODEL'; see deme sample --help"),
        ("sample x --steps abc", "sample: --steps abc: expected a valid integer; see deme"),
        ("finetune --jobs 0", "--jobs 0: expected greater than or equal to 1; see deme"),
        ("sample x --eta y", "sample: --eta y: expected a valid number; see deme sample --help"),
        ("finetune 2/4", "unexpected extra argument(s) (2/4); see deme finetune --help"),
        ("--xyzzy", "no option --xyzzy; see deme --help"),
    ):
        result = deme(*words.split())
        assert isinstance(result.exception, ConfigError), result.output
        assert told in str(result.exception)
        assert "\n" not in str(result.exception)


def test_every_word_of_another_tool_leads_to_a_word_of_ours_that_is_there() -> None:
    flags = set()
    for name in COMMANDS:
        command = build(name)
        for one in getattr(command, "commands", {"": command}).values():
            flags |= {flag.lstrip("-") for item in one.params for flag in item.opts}
    known = (
        {name.replace("-", "_") for name in flags}
        | set(COMMANDS)
        | {item.name for table in TABLES.values() for item in fields(table)}
    )
    assert {name.replace("-", "_") for name in OTHER_WORDS} <= {
        name.replace("-", "_") for name in known
    }
    for name, others in OTHER_WORDS.items():
        assert {closest(other, [name]) for other in others.split()} == {name}


def test_every_command_of_the_pages_and_scripts_has_its_options() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *sorted((root / "examples").rglob("*.md"))]
    pages += sorted((root / "examples").rglob("*.sh"))
    count = 0
    for page in pages:
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.match(r"\s*deme [a-z]", line) else []
            if len(words) < 2 or not re.fullmatch("[a-z-]+", words[1]):
                continue
            command = build(words[1])
            command = getattr(command, "commands", {}).get((*words, "", "")[2], command)
            known = {flag for item in command.params for flag in (*item.opts, *item.secondary_opts)}
            for word in words[2:]:
                if re.match("--?[a-z]", word):
                    assert word.partition("=")[0] in known | {"--help"}, f"{page.name}: {line}"
                    count += 1
    assert count > 50


@pytest.mark.parametrize("words", [
    "sample base.safetensors -n 1 -o base.safetensors",
    "ensemble-sample ft_1of4.safetensors -n 1 -o ft_1of4.safetensors",
    "stats base.safetensors -o base.safetensors",
])  # fmt: skip
def test_what_is_read_is_not_written_over(run_folder: Path, refuse: Callable, words: str) -> None:
    refuse(2, "is read, so it cannot be written as well", *words.split(), "--force")
