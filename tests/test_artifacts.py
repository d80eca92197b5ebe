from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_base, write_tiny_expert
from safetensors.torch import load_file, save_file

from deme_cli.artifacts import (
    KINDS,
    ArtifactWriter,
    BaseRecord,
    fingerprint,
    fingerprint_file,
    parse_record,
    read_record,
    write_artifact,
)
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.files import layout_of, require_output, write_whole
from deme_cli.jobs import claim
from deme_cli.merging.journal import Journal, read_journal

TENSORS = {
    "half": torch.randn(5, 3).half(),
    "brain": torch.randn(7).bfloat16(),
    "count": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "large": torch.randn(400, 400),  # hashed on the second thread
}
RECORD = BaseRecord(source="x", model_config={}, scheduler_config={}, num_train_timesteps=10)


def test_what_is_written_is_read_back_by_any_safetensors_tool(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    record = write_artifact(path, TENSORS, RECORD)
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert read_record(path, "base") == record
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_bytes_may_come_in_any_pieces(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32), "b": np.zeros((0, 2)), "c": np.ones(3)}
    layout = layout_of(tensors)
    data = b"".join(tensors[spec.name].tobytes() for spec in layout)
    for size in (1, 7, len(data)):
        path = tmp_path / f"{size}.safetensors"
        with ArtifactWriter(path, layout, RECORD) as writer:
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
        assert writer.record.fingerprint == fingerprint(tensors) == fingerprint_file(path)


def test_a_fingerprint_depends_on_tensors_alone(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine.safetensors", tmp_path / "theirs.safetensors"
    written = write_artifact(mine, TENSORS, RECORD).fingerprint
    save_file(TENSORS, theirs)
    assert written == fingerprint(TENSORS) == fingerprint_file(mine) == fingerprint_file(theirs)
    as_numpy = {"a": np.arange(6, dtype=np.float32)}
    assert fingerprint(as_numpy) == fingerprint({"a": torch.arange(6).float()})
    tensor = torch.ones(2)
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    line = f"a\0F32\0[2]\0{digest}\n".encode()
    assert fingerprint({"a": tensor}) == hashlib.sha256(line).hexdigest(), "the documented hash"
    for changed in (
        {"a": torch.zeros(4)}, {"b": torch.zeros(2, 2)},
        {"a": torch.zeros(2, 2, dtype=torch.int32)},
        {"a": torch.tensor([[0.0, 0.0], [0.0, 1e-30]])},
    ):  # fmt: skip
        assert fingerprint(changed) != fingerprint({"a": torch.zeros(2, 2)})


def test_a_foreign_file_and_another_kind_are_told(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ArtifactError, match="not written by deme"):
        read_record(tmp_path / "foreign.safetensors")
    write_tiny_base(tmp_path / "base.safetensors")
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'expert', found 'base'"):
        read_record(tmp_path / "base.safetensors", "expert")
    assert set(KINDS) == {"base", "expert", "task-vector", "merged", "samples", "statistics"}


def test_a_wrong_record_is_refused_by_field(tmp_path: Path) -> None:
    write_tiny_base(tmp_path / "base.safetensors")
    path = tmp_path / "expert.safetensors"
    record = write_tiny_expert(path, tmp_path / "base.safetensors", index=1, of=2)
    for change, word in (
        ({"kind": "soup"}, "unknown kind of artifact 'soup'"),
        ({"version": 99}, "record version 99"),
        ({"source": 5}, "'source' in the record should be str, found 5"),
        ({"num_train_timesteps": True}, "should be int, found True"),
        ({"source": None}, "should be str, found None"),
        *(
            ({"range": span}, "'range' in the record should be")
            for span in ([5], [5, 5], [0, 101], ["a", "b"], [-1, 3], [0, 1, 2])
        ),
    ):
        document = {**json.loads(record.to_json()), **change}
        with pytest.raises(ArtifactError, match=word):
            parse_record(json.dumps(document), "here")
    document = json.loads(record.to_json())
    del document["scheduler_config"]
    with pytest.raises(ArtifactError, match="lacks 'scheduler_config'"):
        parse_record(json.dumps(document), "here")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        parse_record("{", "here")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, TENSORS, RECORD)
    before = path.read_bytes()

    def fail_half_way() -> None:
        with ArtifactWriter(path, layout_of(TENSORS), RECORD) as writer:
            writer.write(b"\0" * 3)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MissingError, match="no permission"):
        require_output(tmp_path / "a.safetensors", force=False)


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has locks."""

    def flock(file: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr("fcntl.flock", flock)
    return request.param is None


def test_two_writers_of_one_output_exclude_each_other(tmp_path: Path, locks: bool) -> None:
    path, lock = tmp_path / "a.safetensors", tmp_path / ".a.safetensors.lock"
    with claim(path), pytest.raises(ConfigError, match="being written by another") as refused:
        write_artifact(path, TENSORS, RECORD)
    if not locks:
        assert f"process {os.getpid()} on " in str(refused.value)
        lock.write_text("4242\nanother-host\n77\n")  # of a process that was killed there
        with pytest.raises(ConfigError, match=rf"4242 on another-host; .* remove {lock}"):
            write_artifact(path, TENSORS, RECORD)
        lock.unlink()
    write_artifact(path, TENSORS, RECORD)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_journal_is_shared_with_and_without_flock(tmp_path: Path, locks: bool) -> None:
    path = tmp_path / "m.journal"
    for value in (1.0, 2.0):
        with Journal(path, ["w"], {}) as journal:
            with journal.asking():
                trial = journal.start(0, [value])
            journal.finish(trial, value)
    assert len(read_journal(path)[2]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m.journal"]


def test_plain_files_appear_whole(tmp_path: Path) -> None:
    for content in ("onetwo", b"onetwo", [b"one", b"two"]):
        write_whole(tmp_path / "a.txt", content)
        assert (tmp_path / "a.txt").read_bytes() == b"onetwo"
    assert len(list(tmp_path.iterdir())) == 1
