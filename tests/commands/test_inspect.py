from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from deme_cli import report
from deme_cli.artifacts import load_tensors, read_record
from deme_cli.files import read_header


def test_inspect_tells_what_the_header_says(run_folder: Path, deme: Callable) -> None:
    result = deme("inspect", "base.safetensors", "ft_2of4.safetensors", "--json")
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    for artifact, name in zip(document["artifacts"], ("base", "ft_2of4"), strict=True):
        path = run_folder / f"{name}.safetensors"
        header, record = read_header(path), read_record(path)
        assert artifact == {
            "path": f"{name}.safetensors",
            "kind": record.kind,
            "parameters": header.num_parameters,
            "tensors": len(header.tensors),
            "fingerprint": record.fingerprint,
            "record": asdict(record),
        }
    assert document["artifacts"][1]["record"]["range"] == [25, 50]


def test_inspect_shows_facts_in_lines_that_can_be_read(run_folder: Path, deme: Callable) -> None:
    experts = [path.name for path in sorted(run_folder.glob("ft_*"))]
    deme("merge", *experts, "-w", "0.1,0.2,0.3,0.4")
    deme("task-vector", "ft_2of4.safetensors")
    shown = deme("inspect", "merged.safetensors", "tv_2of4.safetensors").stdout
    for fact in ("0.1, 0.2, 0.3, 0.4", "75:100  expert", "25:50", "mid_block = ", "task-vector"):
        assert fact in shown
    assert "block_out_channels" not in shown
    found = deme(
        "merge", *experts, "--search", "random", "--per", "layer", "--evaluations", 2, "-n", 8,
        "--no-report", "--force",
    )  # fmt: skip
    assert found.exit_code == 0, found.exception
    lines = deme("inspect", "merged.safetensors").stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert "    best = " in "\n".join(lines)
    assert not any("None" in line or "{" in line for line in lines)


def test_verify_finds_a_changed_byte(run_folder: Path, deme: Callable, refuse: Callable) -> None:
    path = run_folder / "ft_1of4.safetensors"
    result = deme("inspect", "--verify", path)
    assert result.exit_code == 0
    assert "the fingerprint is right" in result.stderr
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert deme("inspect", path).exit_code == 0
    refuse(4, "altered or damaged", "inspect", "--verify", "--json", path)


def test_an_export_is_known_as_one_and_verified_by_its_hash(
    run_folder: Path, deme: Callable, refuse: Callable
) -> None:
    assert deme("export", "ft_2of4.safetensors", "lora.safetensors", "--lora", 2).exit_code == 0
    result = deme("inspect", "--verify", "lora.safetensors", "--json")
    assert (result.exit_code, result.stderr.count("SHA-256 of its tensors")) == (0, 1)
    (told,) = json.loads(result.stdout)["artifacts"]
    of_expert = read_record(run_folder / "ft_2of4.safetensors").fingerprint
    assert (told["kind"], told["record"]["exported_from"]) == ("export", f"expert {of_expert}")
    refuse(4, "exported by deme", "merge", "lora.safetensors", "ft_2of4.safetensors")
    torch.save({"conv_in.weight": torch.ones(1)}, "pickle.safetensors")
    page = report(run_folder)
    assert page.unread.keys() == {"pickle.safetensors"}
    assert "it is a pickle" in page.unread["pickle.safetensors"]
    assert "exported: a LoRA" in page.path.read_text()
    path = run_folder / "lora.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    refuse(4, "altered or damaged", "inspect", "--verify", path)


def test_a_pickle_is_called_one_whatever_its_name(run_folder: Path, refuse: Callable) -> None:
    torch.save(load_tensors(Path("base.safetensors")), "weights.tmp")
    Path("numbers").write_bytes(pickle.dumps([1, 2], protocol=4))
    refuse(4, "it is a pickle: end its name in .bin first", "merge", "weights.tmp")
    refuse(4, "a pickle, but not of weights that torch saved", "sample", "numbers")
