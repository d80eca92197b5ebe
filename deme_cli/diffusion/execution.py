"""How the calls of a network are made fast: by as many threads as pay, or compiled.

Threads that share an operation of microseconds spend the time waiting for each other: a network of
ten thousand parameters was measured two to ten times slower with two of them than with one, one of
36 million parameters nearly twice as fast. The work is counted, not timed, so that the same network
and batch get the same number of threads in every run, and round alike.

A compiled network is the same object: its parameters keep their names, and only its calls change,
by rounding. It is off on processors unless asked for, so that results there stay bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deme_cli import console
from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.denoiser import predict
from deme_cli.errors import ConfigError, MissingError
from deme_cli.fetch import cache_folder

FLOPS_PER_THREAD = 4e9  # of one forward pass: some 100 ms of a core
_PAYS_OFF = 1_000  # forwards: a network takes about a minute to compile, and gains a part of each
Inputs = tuple[Tensor, Conditions]


def fitting_number(network: nn.Module, inputs: Callable[[], Inputs], *, num_images: int) -> int:
    """Threads for passes of `num_images`: at most those of now, which OMP_NUM_THREADS says.

    inputs: makes x_t (1, C, H, W) and the conditions (1, ...) of one image, if they are needed.
    On other devices than processors: those of now.
    """
    most = torch.get_num_threads()
    if most == 1 or next(network.parameters()).device.type != "cpu":
        return most
    x_t, conditions = inputs()
    num_uses = sum(weight.numel() for weight in network.parameters()) * x_t[0, 0].numel()
    if not conditions and 2 * num_uses * num_images < FLOPS_PER_THREAD:  # were each used everywhere
        return 1
    work = forward_flops(network, x_t, conditions) * num_images
    return max(1, min(most, round(work / FLOPS_PER_THREAD)))


def forward_flops(network: nn.Module, x_t: Tensor, conditions: Conditions) -> int:
    """Floating-point operations of one pass, counted without making it.

    Of convolutions, matrix products and attention, which is nearly all there is.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # these take half a second
    from torch.utils.flop_counter import FlopCounterMode

    counter, fake = FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fake, counter:
        predict(network, x_t, torch.zeros(len(x_t), dtype=torch.long), conditions)
    return counter.get_total_flops()


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """While entered, torch takes this many threads for an operation."""
    before = torch.get_num_threads()
    if number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number != before:
            torch.set_num_threads(before)


def is_compiled(device: torch.device, how: str, *, num_forwards: int) -> bool:
    """Whether networks on `device` are to be compiled; what was is kept in the cache folder.

    how: `on`, `off`, or `auto`: on a GPU, for at least a thousand forwards, where there is a
    compiler. Raises MissingError for `on` without a compiler.
    """
    if how == "off" or (how == "auto" and (device.type != "cuda" or num_forwards < _PAYS_OFF)):
        return False
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    reason = _why_not(device)
    if reason and how == "on":
        raise MissingError(
            f"--compile on: this machine cannot compile for {device.type} ({reason}); install "
            f"a C++ compiler, for GPUs Triton as well, or use --compile off"
        )
    return not reason


@cache
def _why_not(device: torch.device) -> str:
    """Why nothing can be compiled for `device`, found by trying; empty where it can."""
    try:
        torch.compile(torch.add)(torch.zeros(8, device=device), 1)
    except (RuntimeError, ImportError, OSError) as error:
        return _first_line(error)
    return ""


def compile_network(network: nn.Module, how: str, *, num_forwards: int) -> None:
    """Compile the calls of `network`, in place, where `is_compiled` says so."""
    if is_compiled(next(network.parameters()).device, how, num_forwards=num_forwards):
        compile_calls(network, how)


def compile_calls(network: nn.Module, how: str) -> None:
    """Compile the calls of `network`, in place.

    Where the compiler fails on it, `auto` goes on as it was written after a warning; with `on` the
    call raises ConfigError. What is wrong with a call itself, it raises as if it were not compiled.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config

    if hasattr(config, "force_non_lazy_backward_lowering"):
        # else left to the first backward pass, where it is too late to make a call otherwise
        config.force_non_lazy_backward_lowering = True
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


@cache
def _warn(reason: str) -> None:
    """Say so once: the frozen base fails like the network under training."""
    console.warn(f"the compiler fails on this network ({reason}): it goes on uncompiled")


def _first_line(error: Exception) -> str:
    """What it says, in short; of what a compiler raised within torch, that alone."""
    error = getattr(error, "inner_exception", error)
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Inside, the calls of `network` are as they were written, whatever shapes and weights come."""
    compiled, network._compiled_call_impl = network._compiled_call_impl, None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled
