"""`torch.compile` for a network that will be asked often, where this machine can compile.

A compiled network is the same object: its parameters keep their names, and only its calls change,
by rounding. It is off on processors unless asked for, so that results there stay bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from deme_cli.assets import cache_folder
from deme_cli.errors import MissingError

_PAYS_OFF = 1_000  # forwards: a network takes about a minute, and gains a part of each


def compile_network(network: nn.Module, how: str, *, num_forwards: int) -> None:
    """Compile the calls of `network`, in place, where `is_compiled` says so."""
    if is_compiled(next(network.parameters()).device, how, num_forwards=num_forwards):
        network.compile()


def is_compiled(device: torch.device, how: str, *, num_forwards: int) -> bool:
    """Whether networks on `device` are to be compiled; what was is kept in the cache folder.

    how: `on`, `off`, or `auto`: on a GPU, for at least a thousand forwards, where there is a
    compiler. Raises MissingError for `on` without a compiler.
    """
    if how == "off" or (how == "auto" and (device.type != "cuda" or num_forwards < _PAYS_OFF)):
        return False
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    reason = why_not(device)
    if reason and how == "on":
        raise MissingError(
            f"--compile on: this machine cannot compile for {device.type} ({reason}); install "
            f"a C++ compiler, for GPUs Triton as well, or use --compile off"
        )
    return not reason


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Inside, the calls of `network` are as they were written, whatever shapes and weights come."""
    compiled, network._compiled_call_impl = network._compiled_call_impl, None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled


@cache
def why_not(device: torch.device) -> str:
    """Why nothing can be compiled for `device`, found by trying; empty where it can."""
    try:
        torch.compile(torch.add)(torch.zeros(8, device=device), 1)
    except (RuntimeError, ImportError, OSError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""
