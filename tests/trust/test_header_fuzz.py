"""The reader of headers against files made to break it: a DemeError, soon, in bounded memory."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
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


def whole_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def one_tensor(**changes: object) -> bytes:
    return json.dumps({"a": {**TENSOR, **changes}}).encode()


def pairs(*texts: str) -> bytes:
    return ("{" + ",".join(texts) + "}").encode()


A = f'"a":{json.dumps(TENSOR)}'
BAD_FILES = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a length alone": struct.pack("<Q", 2),
    "length of 2^64 - 1": b"\xff" * 8 + b"{}",
    "length of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length one past the end": struct.pack("<Q", 3) + b"{}",
    "zeros": b"\0" * 4096,
    "not JSON": whole_file(b"hello you"),
    "deep lists": whole_file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "deep tables": whole_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "invalid UTF-8": whole_file(b'{"\xff\xfe":1}'),
    "overlong UTF-8": whole_file(b'{"\xc0\xaf":1}'),
    "UTF-16": whole_file('{"a":1}'.encode("utf-16")),
    "a byte order mark": whole_file(b"\xef\xbb\xbf{}"),
    "half of a surrogate pair": whole_file(
        b'{"\\ud800":' + json.dumps(TENSOR).encode() + b"}", b"\0" * 4
    ),
    "a number of 5000 digits": whole_file(b'{"a":' + b"9" * 5000 + b"}"),
    "shape of 4300 digits": whole_file(
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,' + b"9" * 4300 + b"]}}"
    ),
    "a name twice": whole_file(pairs(A, A), b"\0" * 4),
    "a field twice": whole_file(b'{"a":{"dtype":"F32","dtype":"F32"}}'),
    "metadata twice": whole_file(pairs('"__metadata__":{}', '"__metadata__":{}')),
    "metadata of a list": whole_file(pairs('"__metadata__":[1]')),
    "metadata of numbers": whole_file(pairs('"__metadata__":{"a":1}')),
    "NaN": whole_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
    "Infinity": whole_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}'),
    "a null tensor": whole_file(b'{"a":null}'),
    "a tensor of text": whole_file(b'{"a":"dtype shape data_offsets"}'),
    "overlapping tensors": whole_file(pairs(A, A.replace('"a"', '"b"')), b"\0" * 8),
    "a hole": whole_file(one_tensor(data_offsets=[4, 8]), b"\0" * 8),
    "begin after end": whole_file(one_tensor(shape=[0], data_offsets=[4, 0]), b"\0" * 4),
    "ends past the file": whole_file(one_tensor(data_offsets=[0, 4])),
    "bytes behind the last": whole_file(one_tensor(), b"\0" * 5),
    "a huge tensor": whole_file(one_tensor(shape=[1 << 61], data_offsets=[0, 1 << 63])),
    "a product of sizes that overflows": whole_file(
        one_tensor(shape=[1 << 32, 1 << 32], data_offsets=[0, 0])
    ),
    "100,000 dimensions": whole_file(one_tensor(shape=[1 << 62] * 100_000 + [0])),
} | {
    f"{name} of {value!r}": whole_file(one_tensor(**{name: value}), b"\0" * 4)
    for name, values in {
        "shape": (-1, [-1], [1.0], [True], ["1"], "1", "", {}, None, [[1]], [1 << 70]),
        "dtype": (None, 1, [], {}, "F31", "f32", ""),
        "data_offsets": (None, 4, [0], [0, 4, 8], [0.0, 4.0], [False, 4], "04", [-4, 0], {}),
    }.items()
    for value in values
}  # fmt: skip


@pytest.fixture(params=BAD_FILES, ids=str)
def bad_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(BAD_FILES[request.param])
    return path


def test_a_file_made_to_break_the_reader_is_refused_soon_and_cheaply(bad_file: Path) -> None:
    limits = BoundedTime(SECONDS), BoundedMemory(bad_file)
    with limits[0], limits[1], pytest.raises(ArtifactError) as refused:
        read_header(bad_file)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600 + len(str(bad_file))


class BoundedTime:
    """Fails where what is inside took longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        assert time.monotonic() - self._began < self.seconds


class BoundedMemory:
    """Fails where Python allocated more than a share of the header plus a constant."""

    def __init__(self, path: Path) -> None:
        self.limit = CONSTANT_BYTES + BYTES_PER_HEADER_BYTE * path.stat().st_size

    def __enter__(self) -> None:
        tracemalloc.start()

    def __exit__(self, *error: object) -> None:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= self.limit, f"took {peak} bytes, {self.limit} at most"


COSTLY = {
    "empty lists": lambda: b'{"a":[' + b"[]," * 1_000_000 + b"[]]}",
    "empty tables": lambda: b'{"a":[' + b"{}," * 1_000_000 + b"{}]}",
    "numbers": lambda: pairs(*(f'"{i}":0' for i in range(200_000))),
    "100,000 tensors": lambda: pairs(
        *(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(100_000))
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_time_and_memory_are_bounded_by_the_header(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole_file(COSTLY[name]()))
    for limit in (BoundedTime(20.0), BoundedMemory(path)):
        with limit:
            if name == "100,000 tensors":
                assert len(read_header(path).tensors) == 100_000
            else:
                with pytest.raises(ArtifactError):
                    read_header(path)


def test_the_tensors_of_a_file_are_not_read_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    size = 1 << 34
    path.write_bytes(whole_file(one_tensor(dtype="U8", shape=[size], data_offsets=[0, size])))
    os.truncate(path, path.stat().st_size + size)
    tracemalloc.start()
    assert read_header(path).num_parameters == size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < CONSTANT_BYTES


def test_a_pipe_a_device_and_a_link_to_itself_are_refused_unopened(tmp_path: Path) -> None:
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)  # opening it would wait for a writer for ever
    loop.symlink_to(loop)
    for place in (pipe, Path("/dev/zero")):
        with pytest.raises(ArtifactError, match="found a pipe or a device"):
            read_header(place)
    with pytest.raises(ArtifactError, match="found a folder"):
        read_header(tmp_path)
    with pytest.raises(MissingError, match="cannot be read"):
        read_header(loop)
    for place in (tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(MissingError, match="no such file"):
            read_header(place)
    with pytest.raises(MissingError, match="cannot be read"):
        read_header(tmp_path / ("x" * 5000))


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "a.safetensors"
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3).half()}
    write_artifact(path, tensors, RECORD)
    return path


Edit = tuple[str, int, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete"]),
        st.integers(0, 1000),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from(
                [b"NaN", b"-1", b"1e9", b"true", b"null", b"[", b"}", b'"', b"\\u0000", b"9" * 50]
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[Edit]) -> bytes:
    for how, place, piece in edits:
        at = place % (len(content) + 1)
        end = at if how == "insert" else at + len(piece)
        content = content[:at] + (b"" if how == "delete" else piece) + content[end:]
    return content


def survives(path: Path) -> None:
    """Every reader of a file gives what is there, or raises a DemeError of one line."""
    for read in (read_header, read_record, fingerprint_file, load_tensors):
        try:
            read(path)
        except DemeError as error:
            said = str(error)
        else:
            continue
        assert "\n" not in said


def check_edits(path: Path, sound: Path, edits: list[Edit]) -> None:
    path.write_bytes(edited(sound.read_bytes(), edits))
    with BoundedMemory(path):
        survives(path)


LENIENT = {"derandomize": True, "deadline": None, "database": None,
           "suppress_health_check": [HealthCheck.function_scoped_fixture]}  # fmt: skip


@settings(max_examples=60, **LENIENT)
@given(edits=EDITS)
def test_no_edit_of_a_sound_file_raises_anything_but_a_deme_error(
    tmp_path: Path, sound_file: Path, edits: list[Edit]
) -> None:
    check_edits(tmp_path / "a.safetensors", sound_file, edits)


@pytest.mark.slow
@settings(max_examples=5_000, **LENIENT)
@given(edits=EDITS)
def test_no_edit_of_many_raises_anything_but_a_deme_error(
    tmp_path: Path, sound_file: Path, edits: list[Edit]
) -> None:
    check_edits(tmp_path / "a.safetensors", sound_file, edits)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 12), st.integers(), st.floats(),
        st.text(max_size=5), st.sampled_from(["F32", "BF16", "BOOL", "U8", "I64"]),
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "deme", "format", "x"]), inner
    ),
    max_leaves=8,
)  # fmt: skip
SPECS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F64"]) | JSON,
        "shape": st.lists(st.integers(0, 3), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 12), st.integers(0, 12)) | JSON,
    }
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3), SPECS | JSON
)


def check_header(path: Path, header: dict, data: bytes) -> None:
    path.write_bytes(whole_file(json.dumps(header).encode(), data))
    survives(path)


@settings(max_examples=25, **LENIENT)
@given(header=HEADERS, data=st.binary(max_size=12))
def test_no_header_raises_anything_but_a_deme_error(
    tmp_path: Path, header: dict, data: bytes
) -> None:
    check_header(tmp_path / "a.safetensors", header, data)


@pytest.mark.slow
@settings(max_examples=5_000, **LENIENT)
@given(header=HEADERS, data=st.binary(max_size=12))
def test_no_header_of_many_raises_anything_but_a_deme_error(
    tmp_path: Path, header: dict, data: bytes
) -> None:
    check_header(tmp_path / "a.safetensors", header, data)


def layouts() -> Iterator[dict[str, torch.Tensor]]:
    yield {}
    yield {"a": torch.zeros(0, 3)}
    yield {"a": torch.tensor(1.0), "b": torch.zeros(2, dtype=torch.uint8)}
    yield {"\u00e9\n": torch.ones(3, dtype=torch.bool), "": torch.zeros(1, dtype=torch.int64)}


def test_whatever_the_library_writes_is_read(tmp_path: Path) -> None:
    for tensors in layouts():
        path = tmp_path / "a.safetensors"
        save_file(tensors, path)
        assert read_header(path).tensors.keys() == tensors.keys()
        assert load_tensors(path).keys() == tensors.keys()
