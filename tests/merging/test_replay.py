"""A merged artifact made again from its experts: the same bytes, or a message that says why not."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import ArtifactWriter, load_tensors, read_record, write_artifact
from deme_cli.errors import ArtifactError, MissingError, NumericsError
from deme_cli.files import read_header, tensor_bytes
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import open_experts, open_inputs
from deme_cli.merging.methods import MethodSettings
from deme_cli.merging.replay import replay as replay_with
from deme_cli.run_file import RunFile

W = Coefficients((0.25, 0.75), {"mid_block.*": (1.0, 0.0), "conv_*": (0.5, 0.5)})
MERGED, AGAIN = Path("merged.safetensors"), Path("again.safetensors")


replay = partial(replay_with, run=RunFile())


def merge(name: str = "linear", **settings: object) -> None:
    """`merged.safetensors` in the current folder, from ft_2of4 and ft_1of4."""
    paths = [Path(f"ft_{index}of4.safetensors") for index in (2, 1)]
    inputs = open_inputs(Path("base.safetensors"), open_experts(paths, "expert"))
    merge_inputs(
        inputs, None if name == "model-stock" else W, MERGED,
        method=MethodSettings(name, **settings),
        search={"method": "grid", "best": 0.1}, report={"rows": []},
    )  # fmt: skip


def test_the_file_may_be_replaced_by_itself(run_folder: Path) -> None:
    merge()
    before = MERGED.read_bytes()
    replay(MERGED, MERGED, force=True)
    assert MERGED.read_bytes() == before


def with_header(path: Path, change: Callable[[dict], None]) -> None:
    """Change the JSON of the deme record in a file's header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    record = json.loads(header["__metadata__"]["deme"])
    record.pop("digest", None)  # as files of older versions, which have none
    change(record)
    header["__metadata__"]["deme"] = json.dumps(record)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_the_header_is_kept_as_another_deme_wrote_it(run_folder: Path) -> None:
    merge("dare")
    with_header(MERGED, lambda record: record.update(created_by="deme 0.0.1", newer="field"))
    with_header(MERGED, lambda record: record.pop("report"))
    replay(MERGED, AGAIN, force=True)
    assert AGAIN.read_bytes() == MERGED.read_bytes()


def test_parents_are_found_here_beside_the_file_or_as_given(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge()
    elsewhere, apart = run_folder / "elsewhere", run_folder / "apart"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    replay(run_folder / MERGED, elsewhere / AGAIN, force=True)  # beside the merged file
    apart.mkdir()
    moved = []
    for index in (1, 2):
        moved.append(apart / f"expert-{index}.safetensors")
        shutil.move(run_folder / f"ft_{index}of4.safetensors", moved[-1])
    with pytest.raises(MissingError, match=r"ft_2of4.safetensors: not found.*fingerprint \w{12}\)"):
        replay(run_folder / MERGED, elsewhere / AGAIN, force=True)
    replay(run_folder / MERGED, elsewhere / AGAIN, experts=moved, force=True)
    base = shutil.move(run_folder / "base.safetensors", apart / "start.safetensors")
    with pytest.raises(MissingError, match="name its file with --base"):
        replay(run_folder / MERGED, elsewhere / "b.safetensors", experts=moved, force=True)
    replay(run_folder / MERGED, elsewhere / AGAIN, experts=moved, base=Path(base), force=True)
    assert (elsewhere / AGAIN).read_bytes() == (run_folder / MERGED).read_bytes()
    assert not (elsewhere / "b.safetensors").exists()


def test_a_file_that_differs_is_named(run_folder: Path) -> None:
    merge()
    shutil.copy("ft_3of4.safetensors", "ft_1of4.safetensors")
    with pytest.raises(ArtifactError, match=r"ft_1of4.* not the expert that merged"):
        replay(MERGED, AGAIN, force=True)
    with pytest.raises(ArtifactError, match="kind 'merged', found 'base'"):
        replay(Path("base.safetensors"), AGAIN, force=True)
    assert not AGAIN.exists()


def test_weights_that_are_not_those_of_their_record_are_named(run_folder: Path) -> None:
    merge()
    data = bytearray(Path("ft_2of4.safetensors").read_bytes())
    data[-2] ^= 1
    Path("ft_2of4.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"ft_2of4.*its weights have the fingerprint"):
        replay(MERGED, AGAIN, force=True)
    assert not list(run_folder.glob("*again*")) + list(run_folder.glob(".again*.replay*"))


def test_a_record_that_does_not_give_its_weights_is_told(run_folder: Path) -> None:
    merge()
    with_header(MERGED, lambda record: record.update(coefficients=[0.25, 0.5]))
    AGAIN.write_text("an earlier result")
    with pytest.raises(NumericsError, match="it was made otherwise than recorded"):
        replay(MERGED, AGAIN, force=True)
    assert AGAIN.read_text() == "an earlier result"


def test_a_method_of_an_older_deme_is_named(run_folder: Path) -> None:
    merge()
    with_header(MERGED, lambda record: record.update(method="fisher", settings={"num": 64}))
    with pytest.raises(ArtifactError, match="merged by method 'fisher', which this deme does not"):
        replay(MERGED, AGAIN, force=True)
    assert not AGAIN.exists()
    assert read_record(MERGED).settings == {"num": 64}


def test_a_file_whose_tensors_are_in_another_order_keeps_it(run_folder: Path) -> None:
    merge("ties")
    tensors, layout = load_tensors(MERGED), list(read_header(MERGED).tensors.values())[::-1]
    with ArtifactWriter(MERGED, layout, read_record(MERGED)) as writer:
        for spec in layout:
            writer.write(tensor_bytes(tensors[spec.name]))
    replay(MERGED, AGAIN, force=True)
    assert AGAIN.read_bytes() == MERGED.read_bytes()


def test_a_merge_of_task_vectors_with_projections_is_replayed(
    write_inputs: Callable, weights: Callable, tmp_path: Path
) -> None:
    name = "channel_projection.mid_block.weight"
    experts = [{**weights(seed), name: torch.eye(3) + seed} for seed in (1, 2)]
    base, paths = write_inputs(weights(0), experts, projection="block")
    inputs = open_inputs(base, open_experts(paths, "expert"))
    for settings in (MethodSettings("ties"), MethodSettings("dare")):
        merge_inputs(inputs, [0.0, 0.3], tmp_path / MERGED, method=settings)
        replay(tmp_path / MERGED, tmp_path / AGAIN, force=True)
        assert (tmp_path / AGAIN).read_bytes() == (tmp_path / MERGED).read_bytes()
    merge_inputs(inputs, [0.0, 0.0], tmp_path / MERGED)
    replay(tmp_path / MERGED, tmp_path / AGAIN, force=True)
    assert name not in load_tensors(tmp_path / AGAIN)
    record = read_record(tmp_path / MERGED)
    write_artifact(tmp_path / MERGED, weights(3), replace(record, coefficients=[1.0, 1.0]))
    with pytest.raises(ArtifactError, match="does not have the tensors of its base and parents"):
        replay(tmp_path / MERGED, tmp_path / AGAIN, force=True)
