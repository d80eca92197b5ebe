"""The reader of headers against files made to break it: a DemeError, soon, in bounded memory."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deme_cli.artifacts import (
    BaseRecord,
    fingerprint_file,
    load_tensors,
    read_record,
    write_artifact,
)
from deme_cli.errors import ArtifactError, DemeError, MissingError
from deme_cli.files import read_header

BYTES_PER_HEADER_BYTE = 30  # what parsing may take: an empty list is 3 bytes there, 64 in memory
CONSTANT_BYTES = 1 << 20
SECONDS = 5.0  # for what takes milliseconds; this machine is shared
RECORD = BaseRecord(source="x", model_config={}, scheduler_config={}, num_train_timesteps=10)
TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
A = f'"a":{json.dumps(TENSOR)}'


def whole_file(header: bytes | str, data: bytes = b"") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def one_tensor(data: bytes = b"\0" * 4, **changes: object) -> bytes:
    return whole_file(json.dumps({"a": {**TENSOR, **changes}}), data)


BAD_FILES = {
    "empty": b"",
    "length of 2^64 - 1": b"\xff" * 8 + b"{}",
    "not JSON": whole_file("hello you"),
    "deep tables": whole_file('{"a":' * 100_000 + "1" + "}" * 100_000),
    "invalid UTF-8": whole_file(b'{"\xff\xfe":1}'),
    "half of a surrogate pair": whole_file('{"\\ud800":' + json.dumps(TENSOR) + "}", b"\0" * 4),
    "a number of 5000 digits": whole_file('{"a":' + "9" * 5000 + "}"),
    "a name twice": whole_file(f"{{{A},{A}}}", b"\0" * 4),
    "NaN": whole_file('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
    "overlapping tensors": whole_file(f"{{{A},{A.replace('a', 'b', 1)}}}", b"\0" * 8),
    "a hole": one_tensor(b"\0" * 8, data_offsets=[4, 8]),
    "ends past the file": one_tensor(b""),
    "bytes behind the last": one_tensor(b"\0" * 5),
    "100,000 dimensions": one_tensor(shape=[1 << 62] * 100_000 + [0]),
    "an unknown dtype": one_tensor(dtype="F31"),
    "a dtype that torch lacks": one_tensor(b"\0" * 8, dtype="C64", data_offsets=[0, 8]),
}


@contextmanager
def bounded(path: Path) -> Iterator[None]:
    """Fails where Python took long, or allocated more than a share of the header and a constant."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= CONSTANT_BYTES + BYTES_PER_HEADER_BYTE * path.stat().st_size
    assert time.monotonic() - began < SECONDS


def test_a_file_made_to_break_the_reader_is_refused_soon_and_cheaply(tmp_path: Path) -> None:
    for name, content in BAD_FILES.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with bounded(path), pytest.raises(ArtifactError) as refused:
            read_header(path)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600 + len(str(path))


def test_the_tensors_of_a_file_are_not_read_with_its_header(tmp_path: Path) -> None:
    path, size = tmp_path / "sparse.safetensors", 1 << 34
    path.write_bytes(one_tensor(b"", dtype="U8", shape=[size], data_offsets=[0, size]))
    header = path.stat().st_size
    os.truncate(path, header + size)
    tracemalloc.start()
    assert read_header(path).num_parameters == size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < CONSTANT_BYTES


def test_a_pipe_a_device_and_a_link_to_itself_are_refused_unopened(tmp_path: Path) -> None:
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)  # opening it would wait for a writer for ever
    loop.symlink_to(loop)
    for place, error, word in (
        (pipe, ArtifactError, "found a pipe or a device"),
        (Path("/dev/zero"), ArtifactError, "found a pipe or a device"),
        (tmp_path, ArtifactError, "found a folder"),
        (loop, MissingError, "cannot be read"),
        (tmp_path / ("x" * 5000), MissingError, "cannot be read"),
        (tmp_path / "none", MissingError, "no such file"),
        (tmp_path / "a\0b", MissingError, "no such file"),
    ):
        with pytest.raises(error, match=word):
            read_header(place)


def survives(path: Path) -> None:
    """Every reader of a file gives what is there, or raises a DemeError of one line."""
    for read in (read_header, read_record, fingerprint_file, load_tensors):
        said = ""
        try:
            read(path)
        except DemeError as error:
            said = str(error)
        assert "\n" not in said


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "a.safetensors"
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3).half()}
    write_artifact(path, tensors, RECORD)
    return path


BITS = [b"NaN", b"-1", b"1e9", b"true", b"null", b"[", b"}", b'"', b"\\u0000", b"9" * 50]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete"]),
        st.integers(0, 1000),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(BITS)),
    ),
    min_size=1,
    max_size=4,
)
LENIENT = {"derandomize": True, "deadline": None, "database": None,
           "suppress_health_check": [HealthCheck.function_scoped_fixture]}  # fmt: skip


@settings(max_examples=60, **LENIENT)
@given(edits=EDITS)
def test_no_edit_of_a_sound_file_raises_anything_but_a_deme_error(
    tmp_path: Path, sound_file: Path, edits: list[tuple[str, int, bytes]]
) -> None:
    content = sound_file.read_bytes()
    for how, place, piece in edits:
        at = place % (len(content) + 1)
        end = at if how == "insert" else at + len(piece)
        content = content[:at] + (b"" if how == "delete" else piece) + content[end:]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with bounded(path):
        survives(path)


def test_whatever_the_library_writes_is_read(tmp_path: Path) -> None:
    for tensors in (
        {},
        {"a": torch.zeros(0, 3)},
        {"a": torch.tensor(1.0), "b": torch.zeros(2, dtype=torch.uint8)},
        {"\u00e9\n": torch.ones(3, dtype=torch.bool), "": torch.zeros(1, dtype=torch.int64)},
    ):
        path = tmp_path / "a.safetensors"
        save_file(tensors, path)
        assert read_header(path).tensors.keys() == tensors.keys()
        assert load_tensors(path).keys() == tensors.keys()
