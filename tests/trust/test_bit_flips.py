"""One flipped bit, or one cut, anywhere in an artifact of any kind: `inspect --verify` finds it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deme_cli.artifacts import (
    BaseRecord,
    ExpertRecord,
    MergedRecord,
    Record,
    SamplesRecord,
    StatisticsRecord,
    TaskVectorRecord,
    parse_record,
    read_record,
    write_artifact,
)
from deme_cli.errors import ArtifactError
from deme_cli.files import read_header, require_intact, with_checksum
from deme_cli.inspection import inspect

MARK = "ab" * 32
MODEL = {"source": "tiny", "model_config": {"sample_size": 8}, "num_train_timesteps": 100,
         "scheduler_config": {"beta_start": 1e-05, "note": "h\u00e9"}}  # fmt: skip
TRAINED = {**MODEL, "range": [25, 50], "index": 2, "of": 4, "base": MARK, "p": 0.3, "steps": 400,
           "seed": 0, "projection": "fold", "data": {"source": "digits", "fingerprint": MARK},
           "training": {"lr": 5e-05, "ema_lengths": [0.05]}}  # fmt: skip
PARENT = {"path": "ft_2of4.safetensors", "kind": "expert", "fingerprint": MARK, "range": [25, 50]}
RECORDS: dict[str, Record] = {
    record.kind: record
    for record in (
        BaseRecord(**MODEL),
        ExpertRecord(**TRAINED),
        TaskVectorRecord(**TRAINED, expert=MARK, norms={"total": 1.5, "relative": 1e-03}),
        MergedRecord(
            **MODEL, base=MARK, parents=[PARENT], coefficients=[0.5], method="linear",
            projection="fold", search={"best": 1e-09},
        ),
        SamplesRecord(protocol={"seed": 3, "eta": 0.0}, prompts=["a caf\u00e9", "\u6570"]),
        StatisticsRecord(n=3, extractor={"name": "digits"}, resize="clean", source="digits"),
    )
}  # fmt: skip
WEIGHTS = {"a.weight": torch.randn(4, 3), "a.bias": torch.zeros(4), "half": torch.ones(2).half()}
TENSORS = dict.fromkeys(RECORDS, WEIGHTS) | {
    "samples": {"images": np.zeros((2, 4, 4, 1), np.uint8), "seeds": np.arange(2)},
    "statistics": {"mu": np.zeros(3), "sigma": np.eye(3), "n": np.array(3)},
}


@pytest.fixture(params=RECORDS)
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny artifact of each kind."""
    path = tmp_path / f"{request.param}.safetensors"
    write_artifact(path, TENSORS[request.param], RECORDS[request.param])
    return path


def require_found(path: Path, content: bytes, where: str) -> None:
    """`inspect --verify` refuses the file with these bytes, in one line."""
    path.write_bytes(content)
    try:
        inspect([path], verify=True)
    except ArtifactError as error:
        said = str(error)
    else:
        raise AssertionError(f"not found: {where}")
    assert "\n" not in said


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def test_a_flipped_bit_or_a_cut_at_every_hundredth_of_a_file_is_found(artifact: Path) -> None:
    whole = artifact.read_bytes()
    for percent in range(100):
        place = len(whole) * percent // 100
        require_found(artifact, flipped(whole, place, percent % 8), f"byte {place}")
        require_found(artifact, whole[:place], f"cut to {place} bytes")
    require_found(artifact, whole + b"\0", "a byte more")


def test_a_damaged_record_is_refused_by_every_reader_not_by_verify_alone(artifact: Path) -> None:
    artifact.write_bytes(artifact.read_bytes().replace(b"deme 0", b"deme 9"))
    for read in (read_header, read_record):
        with pytest.raises(ArtifactError, match="altered or damaged"):
            read(artifact)


def test_files_of_before_checksums_and_of_tools_that_keep_them_are_read(artifact: Path) -> None:
    record, metadata = read_record(artifact), read_header(artifact).metadata
    save_file(load_file(artifact), artifact, metadata)
    inspect([artifact], verify=True)
    document = json.loads(metadata["deme"])
    del document["digest"]
    save_file(load_file(artifact), artifact, {"format": "pt", "deme": json.dumps(document)})
    assert inspect([artifact], verify=True)[0].record == record


def test_a_checksum_is_the_documented_hash_and_a_damaged_one_does_not_pass_for_none() -> None:
    digest = hashlib.sha256(b'{"a": 1}').hexdigest()
    assert with_checksum('{"a": 1}') == f'{{"a": 1, "digest": "{digest}"}}'
    require_intact('{"a": 1}', "here")
    require_intact("", "here")
    text = RECORDS["base"].to_json()
    for place in range(text.index(', "digest"'), len(text)):
        for bit in range(7):
            damaged = text[:place] + chr(ord(text[place]) ^ (1 << bit)) + text[place + 1 :]
            with pytest.raises(ArtifactError):
                require_intact(damaged, "here")
    with pytest.raises(ArtifactError, match="altered or damaged"):
        parse_record(text.replace(MODEL["source"], "TINY", 1), "here")


def test_another_format_than_the_contract_says_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    record = write_artifact(path, WEIGHTS, RECORDS["base"])
    save_file(load_file(path), path, {"format": "qt", "deme": record.to_json()})
    with pytest.raises(ArtifactError, match="should have format 'pt', found 'qt'"):
        read_record(path)
