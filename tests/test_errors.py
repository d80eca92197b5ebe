"""What a library says of too little memory is one line, and nothing else is taken for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_base
from diffusers import UNet2DModel
from safetensors import SafetensorError

from deme_cli.__main__ import main
from deme_cli.errors import MissingError, is_out_of_memory, writing

LACKS = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "MPS backend out of memory (MPS allocated: 7.23 GB, max allowed: 9.07 GB).",
    "Invalid buffer size: 19.45 GB",
    "Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",  # NCCL
    "err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 2359296 bytes.",
    "data. DefaultCPUAllocator: not enough memory: you tried to allocate 911360 bytes.",
]
OTHERS = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 3x2)"),
    ValueError("CUDA out of memory."),
]


def test_a_lack_of_memory_is_recognised_however_it_is_said() -> None:
    for text in LACKS:
        assert is_out_of_memory(RuntimeError(text)), text
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert not any(map(is_out_of_memory, OTHERS))


def test_a_lack_of_memory_that_nobody_mends_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiny_base(tmp_path / "base.safetensors")
    monkeypatch.chdir(tmp_path)
    words = ["sample", "base.safetensors", "-n", "1", "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["deme", *words])
    for text, ends in (("some bug", RuntimeError), (LACKS[0], SystemExit)):

        def refuse(self: object, *args: object, text: str = text, **options: object) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr(UNet2DModel, "forward", refuse)
        with pytest.raises(ends) as ended:
            main()
    assert ended.value.code == 3
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("deme: this does not fit into the memory of the device; use a smal")


AT_THE_END = r"""
import atexit, sys, tempfile
from deme_cli.__main__ import run
folder = tempfile.TemporaryDirectory()
atexit.register(print, "exits run")
print(folder.name, end="\n" * 100_000)
sys.argv = ["deme", "--version"]
run()
"""


def test_a_process_that_ends_at_once_has_written_all_and_cleared_up() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True)
    folder, *_, said = done.stdout.split()
    assert (done.returncode, said, done.stderr) == (0, "run", "")
    assert done.stdout.endswith("exits run\n")
    assert not Path(folder).exists()


@pytest.mark.slow
def test_a_profiled_command_tells_its_profile() -> None:
    command = [sys.executable, "-m", "cProfile", "-m", "deme_cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "function calls" in done.stdout


def test_a_full_disk_is_told_whatever_library_meets_it() -> None:
    with pytest.raises(MissingError, match="no space left on the disk"), writing(Path("out")):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
