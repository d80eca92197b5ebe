"""A process that fails while the others wait for it: all end, with one line and one exit code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import write_tiny_base
from launched import ends, launch

WORDS = [
    "finetune", "--range", "1/2", "--data", "digits", "--device", "cpu", "--batch-size", "6",
    "--held-out", "0", "--steps", "9", "--consistency", "0",
]  # fmt: skip
LITTLE_MEMORY = """
import os, torch
from diffusers import UNet2DModel
from deme_cli.__main__ import main

forward, passes = UNet2DModel.forward, 0

def with_little_memory(self, *args, **options):
    global passes
    output = forward(self, *args, **options)
    passes += torch.is_grad_enabled()
    if passes == 3 and os.environ["RANK"] == "RANK_THAT_FAILS":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return output

UNet2DModel.forward = with_little_memory
main()
"""
NO_KERNEL = """
import os, torch
from torch import nn
from deme_cli.diffusion import compiling
from deme_cli.__main__ import main

def refuse(graph, inputs):
    raise NotImplementedError("no kernel for tanh")

def compile(self):
    backend = refuse if os.environ["RANK"] == "RANK_THAT_FAILS" else "eager"
    self._compiled_call_impl = torch.compile(self._call_impl, backend=backend)

nn.Module.compile = compile
compiling.is_compiled = lambda device, how, **options: True
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_base(tmp_path / "base.safetensors")
    return tmp_path


def failing(folder: Path, program: str, rank: int, *words: str) -> list[subprocess.Popen]:
    """Two processes of finetune, of which the one of `rank` fails as `program` has it."""
    path = folder / "program.py"
    path.write_text(program.replace("RANK_THAT_FAILS", str(rank)))
    return launch(folder, *WORDS, *words, program=[str(path)])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lack_of_memory_ends_those_that_share_a_network_with_one_line(
    folder: Path, rank: int
) -> None:
    codes, said = ends(failing(folder, LITTLE_MEMORY, rank, "--shard"))
    assert codes == [3, 3]
    assert len(said) == 1, said
    assert "does not fit into the device's memory with 3 images at a time" in said[0]
    assert "--micro-batch 1" in said[0]


@pytest.mark.slow
def test_a_compiler_that_fails_in_one_process_ends_all_with_one_line(folder: Path) -> None:
    codes, said = ends(failing(folder, NO_KERNEL, 1, "--compile", "on"))
    assert codes == [2, 2]
    assert len(said) == 1, said
    assert "(no kernel for tanh); use --compile off" in said[0]


@pytest.mark.slow
def test_with_auto_a_compiler_that_fails_in_one_process_leaves_nobody_waiting(folder: Path) -> None:
    assert ends(failing(folder, NO_KERNEL, 1, "--compile", "auto")) == ([0, 0], [])
    assert (folder / "ft_1of2.safetensors").exists()
