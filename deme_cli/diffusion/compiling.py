"""`torch.compile` for a network that will be asked often, where this machine can compile.

A compiled network is the same object: its parameters keep their names, and only its calls change,
by rounding. It is off on processors unless asked for, so that results there stay bit for bit.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import nn

from deme_cli.assets import cache_folder
from deme_cli.errors import MissingError

_PAYS_OFF = 1_000  # forwards: a network takes about a minute, and gains a part of each


def compile_network(network: nn.Module, how: str, *, num_forwards: int) -> None:
    """Compile the calls of `network`, in place; what was compiled is kept in the cache folder.

    how: `on`, `off`, or `auto`: on a GPU, for at least a thousand forwards, where there is a
    compiler; else it stays as it is. Raises MissingError for `on` without a compiler.
    """
    device = next(network.parameters()).device
    if how == "off" or (how == "auto" and (device.type != "cuda" or num_forwards < _PAYS_OFF)):
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    if reason := why_not(device):
        if how == "on":
            raise MissingError(
                f"--compile on: this machine cannot compile for {device.type} ({reason}); install "
                f"a C++ compiler, for GPUs Triton as well, or use --compile off"
            )
        return
    network.compile()


@cache
def why_not(device: torch.device) -> str:
    """Why nothing can be compiled for `device`, found by trying; empty where it can."""
    try:
        torch.compile(torch.add)(torch.zeros(8, device=device), 1)
    except (RuntimeError, ImportError, OSError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""
