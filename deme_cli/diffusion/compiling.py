"""`torch.compile` for a network that will be asked often, where this machine can compile.

A compiled network is the same object: its parameters keep their names, and only its calls change,
by rounding. It is off on processors unless asked for, so that results there stay bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from deme_cli import console
from deme_cli.errors import ConfigError, MissingError
from deme_cli.fetch import cache_folder

_PAYS_OFF = 1_000  # forwards: a network takes about a minute, and gains a part of each


def compile_network(network: nn.Module, how: str, *, num_forwards: int) -> None:
    """Compile the calls of `network`, in place, where `is_compiled` says so."""
    if is_compiled(next(network.parameters()).device, how, num_forwards=num_forwards):
        compile_calls(network, how)


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


def compile_calls(network: nn.Module, how: str) -> None:
    """Compile the calls of `network`, in place.

    Where the compiler fails on it, `auto` goes on as it was written after a warning; with `on` the
    call raises ConfigError. What is wrong with a call itself, it raises as if it were not compiled.
    """
    from torch._dynamo.exc import TorchDynamoException

    _compile_backward_with_forward()
    network.compile()
    compiled = network._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **options: Any) -> Any:
        try:
            return compiled(*args, **options)
        except TorchDynamoException as error:
            failure = error
        with uncompiled(network):
            output = network(*args, **options)  # raises what is wrong with the call itself
        if how == "on":
            raise ConfigError(
                f"--compile on: the compiler fails on this network ({_first_line(failure)}); use "
                f"--compile off"
            ) from failure
        network._compiled_call_impl = None
        _warn(_first_line(failure))
        return output

    network._compiled_call_impl = call


def _compile_backward_with_forward() -> None:
    """Torch leaves it to the first backward pass, where it is too late to make a call otherwise.

    One that cannot be told so still fails there.
    """
    from torch._functorch import config

    if hasattr(config, "force_non_lazy_backward_lowering"):
        config.force_non_lazy_backward_lowering = True


@cache
def _warn(reason: str) -> None:
    """Say so once: the frozen base fails like the network under training."""
    console.warn(f"the compiler fails on this network ({reason}): it goes on uncompiled")


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
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    """What it says, in short; of what a compiler raised within torch, that alone."""
    error = getattr(error, "inner_exception", error)
    return str(error).strip().partition("\n")[0] or type(error).__name__
