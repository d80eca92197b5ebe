"""A merged artifact made again from its experts: the same bytes, or a message that says why not."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deme_cli.artifacts import ArtifactWriter, load_tensors, read_record, write_artifact
from deme_cli.errors import ArtifactError, DemeError, MissingError, NumericsError
from deme_cli.files import read_header, tensor_bytes
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.combine import merge_inputs
from deme_cli.merging.inputs import open_experts, open_inputs
from deme_cli.merging.merge import replay
from deme_cli.merging.methods import MethodSettings

W = Coefficients((0.25, 0.75), {"mid_block.*": (1.0, 0.0), "conv_*": (0.5, 0.5)})
MERGED, AGAIN = Path("merged.safetensors"), Path("again.safetensors")


def merge(name: str = "linear") -> None:
    """`merged.safetensors` in the current folder, from ft_2of4 and ft_1of4."""
    paths = [Path(f"ft_{index}of4.safetensors") for index in (2, 1)]
    inputs = open_inputs(Path("base.safetensors"), open_experts(paths, "expert"))
    merge_inputs(inputs, W, MERGED, method=MethodSettings(name), search={"best": 0.1})


def with_header(path: Path, **changed: object) -> None:
    """Change the JSON of the deme record in a file's header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    record = json.loads(header["__metadata__"]["deme"])
    record.pop("digest", None)  # as files of older versions, which have none
    header["__metadata__"]["deme"] = json.dumps({**record, **changed})
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_the_header_is_kept_as_another_deme_wrote_it(run_folder: Path) -> None:
    merge("dare")
    with_header(MERGED, created_by="deme 0.0.1", newer="field")
    before = MERGED.read_bytes()
    assert replay(MERGED, AGAIN).record == read_record(MERGED)
    assert AGAIN.read_bytes() == before
    replay(MERGED, MERGED, force=True)  # it may be replaced by itself
    assert MERGED.read_bytes() == before
    assert not list(run_folder.glob(".*replay*"))


def test_parents_are_found_here_beside_the_file_or_as_given(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge()
    elsewhere, apart = run_folder / "elsewhere", run_folder / "apart"
    elsewhere.mkdir()
    apart.mkdir()
    monkeypatch.chdir(elsewhere)
    replay(run_folder / MERGED, AGAIN)  # beside the merged file
    moved = [apart / f"expert-{index}.safetensors" for index in (1, 2)]
    for index, path in enumerate(moved, start=1):
        shutil.move(run_folder / f"ft_{index}of4.safetensors", path)
    with pytest.raises(MissingError, match=r"ft_2of4.safetensors: not found.*fingerprint \w{12}\)"):
        replay(run_folder / MERGED, AGAIN, force=True)
    base = shutil.move(run_folder / "base.safetensors", apart / "start.safetensors")
    with pytest.raises(MissingError, match="or name it with --base"):
        replay(run_folder / MERGED, AGAIN, experts=moved, force=True)
    replay(run_folder / MERGED, AGAIN, experts=moved, base=Path(base), force=True)
    assert AGAIN.read_bytes() == (run_folder / MERGED).read_bytes()


def other_expert() -> None:
    shutil.copy("ft_3of4.safetensors", "ft_1of4.safetensors")


def flipped_bit() -> None:
    data = bytearray(Path("ft_2of4.safetensors").read_bytes())
    data[-2] ^= 1
    Path("ft_2of4.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (other_expert, ArtifactError, r"ft_1of4.* not the expert that merged"),
        (flipped_bit, ArtifactError, r"ft_2of4.*its weights have the fingerprint"),
        (lambda: with_header(MERGED, coefficients=[0.25, 0.5]), NumericsError,
         "it was made otherwise than recorded"),
        (lambda: with_header(MERGED, method="fisher"), ArtifactError,
         "merged by method 'fisher', which this deme does not"),
        (lambda: shutil.copy("base.safetensors", MERGED), ArtifactError, "found 'base'"),
    ],
)  # fmt: skip
def test_what_differs_is_named_and_nothing_is_written(
    run_folder: Path, spoil: Callable[[], None], error: type[DemeError], words: str
) -> None:
    merge()
    AGAIN.write_text("an earlier result")
    spoil()
    with pytest.raises(error, match=words):
        replay(MERGED, AGAIN, force=True)
    assert AGAIN.read_text() == "an earlier result"
    assert not list(run_folder.glob(".again*.replay*"))


def test_a_file_whose_tensors_are_in_another_order_keeps_it(run_folder: Path) -> None:
    merge("ties")
    tensors, layout = load_tensors(MERGED), list(read_header(MERGED).tensors.values())[::-1]
    with ArtifactWriter(MERGED, layout, read_record(MERGED)) as writer:
        for spec in layout:
            writer.write(tensor_bytes(tensors[spec.name]))
    replay(MERGED, AGAIN)
    assert AGAIN.read_bytes() == MERGED.read_bytes()


def test_projections_that_nothing_moved_are_left_out_again(
    write_inputs: Callable, weights: Callable, tmp_path: Path
) -> None:
    name = "channel_projection.mid_block.weight"
    experts = [{**weights(seed), name: torch.eye(3) + seed} for seed in (1, 2)]
    base, paths = write_inputs(weights(0), experts, projection="block")
    inputs = open_inputs(base, open_experts(paths, "expert"))
    merged, again = tmp_path / MERGED, tmp_path / AGAIN
    for coefficients in ([0.0, 0.3], [0.0, 0.0]):
        merge_inputs(inputs, coefficients, merged, method=MethodSettings("ties"))
        replay(merged, again, force=True)
        assert again.read_bytes() == merged.read_bytes()
        record = read_record(merged)
        moved = any(coefficients)
        assert (name in load_tensors(again), record.projection == "block") == (moved, moved)
    write_artifact(merged, weights(3), replace(record, coefficients=[1.0, 1.0]))
    with pytest.raises(ArtifactError, match="does not have the tensors of its base and parents"):
        replay(merged, again, force=True)
