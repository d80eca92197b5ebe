from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deme_cli.artifacts import StatisticsRecord, record_of, write_artifact
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.files import read_header, tensor_bytes
from deme_cli.merging.inputs import Inputs
from deme_cli.merging.tensor_stream import (
    TensorStream,
    plan_runs,
    to_bytes,
    to_numbers,
)

RECORD = StatisticsRecord(n=0, extractor={}, resize="", source="")


def edge_cases() -> torch.Tensor:
    """Floats of every size, ties between neighbouring bfloat16 numbers among them."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, generator=generator) * 10 ** torch.randint(-30, 30, (4096,))
    ties = torch.tensor([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 0.0, -0.0, 1e-40, 65504.0])
    return torch.cat([spread, ties])


@pytest.mark.parametrize(
    ("code", "dtype"),
    [("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16),
     ("BF16", torch.bfloat16)],
)  # fmt: skip
def test_numbers_from_and_to_bytes_are_those_of_torch(code: str, dtype: torch.dtype) -> None:
    values = edge_cases() if code != "F16" else edge_cases().clamp(-65504, 65504)
    expected = values.to(dtype)
    raw = np.array(tensor_bytes(expected))
    numbers = to_numbers(raw, code, np.empty(len(values), np.float32))
    assert np.array_equal(numbers, expected.double().numpy().astype(numbers.dtype))

    written = np.empty_like(raw)
    wide = torch.float64 if code == "F64" else torch.float32
    to_bytes(values.to(wide).numpy(), code, written)
    assert np.array_equal(written, raw)


def test_tensors_in_one_order_are_read_as_one_run(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2), "n": torch.tensor(1), "h": torch.ones(2)}
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        write_artifact(path, {**tensors, "h": tensors["h"].half()}, RECORD)
    headers = [read_header(path) for path in paths]
    runs = plan_runs(list(headers[0].tensors.values()), headers)
    assert [[spec.name for spec in run.specs] for run in runs] == [["n"], ["a", "b"], ["h"]]
    grouped = plan_runs(list(headers[0].tensors.values()), headers, lambda spec: spec.name)
    assert len(grouped) == 4
    assert runs[1].name_at(2) == "a"
    assert runs[1].name_at(3) == "b"


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, {"a": torch.zeros(100)}, RECORD)
    header = read_header(path)
    (run,) = plan_runs(list(header.tensors.values()), [header])
    inputs = Inputs(header, record_of(header), ())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with TensorStream(inputs) as stream, pytest.raises(ArtifactError, match="ended while 'a'"):
        stream.read(0, run, 0, np.empty(400, np.uint8))
    path.unlink()
    with pytest.raises(MissingError, match="no such file"), TensorStream(inputs):
        pass
