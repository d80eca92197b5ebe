"""Laws of what is parsed: ranges, records, deme.toml, coefficients. Made-up input, same each time.

Each is held on a few drawn values; on more where DEME_EXAMPLES says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deme_cli.artifacts import KINDS, ExpertRecord, Record, parse_record
from deme_cli.commands.merge import _parse_coefficients_for as parse_coefficients_for
from deme_cli.config import TABLES, SplitConfig, parse_lists, parse_numbers
from deme_cli.errors import ArtifactError, ConfigError, DemeError
from deme_cli.merging.coefficients import (
    Coefficients,
    require_matches,
    resolve_bounds,
    resolve_grid,
)
from deme_cli.merging.plan import parse_time
from deme_cli.run_file import read_run_file, render_run_file
from deme_cli.timesteps import parse_range, parse_span

SAME = {"derandomize": True, "deadline": None, "database": None,
        "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow,
                                  HealthCheck.filter_too_much]}  # fmt: skip
NUM = int(os.environ.get("DEME_EXAMPLES", "25"))  # of each law; 3,000 now and then


def law(**drawn: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return lambda check: settings(max_examples=NUM, **SAME)(given(**drawn)(check))


def only(kind: type[DemeError], work: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or None after an error of this kind in one line; any other error is a bug."""
    try:
        return work(*arguments)
    except kind as error:
        said = str(error)
    assert "\n" not in said or any("\n" in str(a) for a in arguments)
    return None


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=20)
# Words that parsers look for, in any order.
WORDS = ["1", "2", "-", "/", ":", ",", ";", "=", "*", "[", "]", "e", ".", "9" * 30, " ", "inf",
         "nan", "loss", "fid", "kid", "experts", "@", "k", "s", "m", "h", "all", "\u0661", "_",
         "1e400"]  # fmt: skip
SCRAWL = st.lists(st.sampled_from(WORDS), max_size=8).map("".join) | TEXT


@law(text=SCRAWL, total=st.integers(1, 2000))
def test_text_that_is_no_range_gives_a_config_error(text: str, total: int) -> None:
    if choice := only(ConfigError, parse_range, text, total):
        assert 0 <= choice.range.start < choice.range.stop <= total
    only(ConfigError, parse_span, text, "span")
    only(ConfigError, lambda: SplitConfig(ranges=[text]).timestep_ranges)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TYPES: dict[str, st.SearchStrategy] = {
    "str": TEXT, "int": st.integers(-(1 << 63), (1 << 63) - 1), "float": NUMBERS,
    "None": st.none(), "bool": st.booleans(), "Any": JSON,
    "dict[str, Any]": st.dictionaries(TEXT, JSON, max_size=3),
    "dict[str, list[float]]": st.dictionaries(TEXT, st.lists(NUMBERS, max_size=3), max_size=3),
}  # fmt: skip


def of_type(declared: str) -> st.SearchStrategy:
    """Values of a declared type such as `list[int] | None`."""
    options = []
    for option in declared.split(" | "):
        inner = option.partition("list[")[2].removesuffix("]")
        is_list = option.startswith("list[")
        options.append(st.lists(of_type(inner), max_size=3) if is_list else TYPES[option])
    return st.one_of(options)


@st.composite
def records(draw: st.DrawFn) -> Record:
    kind = draw(st.sampled_from(list(KINDS.values())))
    values = {item.name: draw(of_type(item.type)) for item in fields(kind)}
    if issubclass(kind, ExpertRecord):
        total = draw(st.integers(2, 1000))
        start = draw(st.integers(0, total - 1))
        values["num_train_timesteps"] = total
        values["range"] = [start, draw(st.integers(start + 1, total))]
    return kind(**values)


@law(record=records(), place=st.integers(0, 10_000), piece=st.binary(min_size=1, max_size=3))
def test_a_record_survives_its_json_and_damaged_text_is_refused(
    record: Record, place: int, piece: bytes
) -> None:
    text = record.to_json()
    assert parse_record(text, "here") == record
    place %= len(text)
    damaged = text[:place] + piece.decode("latin-1") + text[place + len(piece) :]
    assume(damaged != text)
    with pytest.raises(ArtifactError):
        parse_record(damaged, "here")


@law(record=records(), data=st.data(), value=JSON | st.lists(JSON, max_size=3))
def test_a_changed_entry_of_a_record_gives_a_record_or_an_artifact_error(
    record: Record, data: Any, value: Any
) -> None:
    document = json.loads(record.to_json())
    del document["digest"]  # as in files of before
    name = data.draw(st.sampled_from([*document, "unknown"]))
    lacking = {key: entry for key, entry in document.items() if key != name}
    for changed in ({**document, name: value}, lacking, value):
        found = only(ArtifactError, parse_record, json.dumps(changed), "here")
        assert found is None or isinstance(found, Record)
    with pytest.raises(ArtifactError):  # its checksum fits no more
        parse_record(json.dumps({**json.loads(record.to_json()), "unknown": value}), "here")


@st.composite
def tables(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Live settings, of the declared types, some of each table."""
    found: dict[str, dict[str, Any]] = {}
    for table, config in TABLES.items():
        chosen = draw(st.lists(st.sampled_from([item.name for item in fields(config)]), max_size=4))
        for item in fields(config):
            if item.name in chosen:
                declared = item.type.removesuffix(" | None").replace("list[Any]", "list[float]")
                found.setdefault(table, {})[item.name] = draw(of_type(declared))
    return found


@law(live=tables())
def test_what_is_written_to_deme_toml_is_read_from_it(
    tmp_path: Path, live: dict[str, dict[str, Any]]
) -> None:
    path = tmp_path / "deme.toml"
    path.write_text(render_run_file(live), encoding="utf-8")
    run = read_run_file(path)
    for table, config in TABLES.items():
        assert dict(run.tables.get(table, {})) == live.get(table, {})
        only(ConfigError, run.settings, config)


TOML = st.lists(
    st.sampled_from(
        [f"[{table}]\n" for table in TABLES]
        + [f"{item.name} = " for config in TABLES.values() for item in fields(config)]
        + ["1\n", "-1\n", "0.5\n", "nan\n", "inf\n", '"x"\n', "[1, [2]]\n", "true\n", "{}\n",
           "1979-05-27\n", '"a"\n"b"\n', "\ufeff", "[[model]]\n", "9" * 5000 + "\n", "\x00"]
    ),
    max_size=8,
).map("".join)  # fmt: skip


@law(text=TOML | st.text(max_size=60) | st.binary(max_size=40))
def test_any_text_as_deme_toml_gives_settings_or_a_config_error(
    tmp_path: Path, text: str | bytes
) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (tmp_path / "deme.toml").write_bytes(data)
    if run := only(ConfigError, read_run_file, tmp_path / "deme.toml"):
        for config in TABLES.values():
            only(ConfigError, run.settings, config)


@law(values=st.lists(NUMBERS, min_size=1, max_size=5))
def test_numbers_survive_their_text(values: list[float]) -> None:
    text = ",".join(map(str, values))
    assert parse_numbers(text, "-w") == values
    assert parse_coefficients_for([f"mid_block.*={text}"]) == {"mid_block.*": tuple(values)}
    assert parse_lists(f"{text};{text}", "--grid") == [values, values]


@law(text=SCRAWL, num=st.integers(1, 3))
def test_text_that_is_no_coefficient_gives_a_config_error(text: str, num: int) -> None:
    numbers = only(ConfigError, parse_numbers, text, "-w") or []
    found = only(ConfigError, Coefficients, tuple(numbers))
    assert found is None or all(map(math.isfinite, found.values))
    only(ConfigError, parse_coefficients_for, [text])
    only(ConfigError, parse_coefficients_for, [f"*={text}", text])
    if lists := only(ConfigError, parse_lists, text, "--grid"):
        grid = only(ConfigError, resolve_grid, lists, num)
        assert grid is None or len(grid) == num
        only(ConfigError, resolve_bounds, lists, num)
    if seconds := only(ConfigError, parse_time, text):
        assert seconds > 0
    names = {"conv_in.weight", "down_blocks.10.attentions.1.to_q.weight"}
    only(ConfigError, require_matches, [text], names)
    chosen = Coefficients((1.0,), {text: (2.0,)})
    assert {chosen.of(name) for name in names} <= {(1.0,), (2.0,)}
