"""How many threads a forward pass should take on a processor: as many as it has work for.

Threads that share an operation of microseconds spend the time waiting for each other: a network of
ten thousand parameters was measured two to ten times slower with two of them than with one, one of
36 million parameters nearly twice as fast. The work is counted, not timed, so that the same network
and batch get the same number of threads in every run, and round alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.denoiser import predict

FLOPS_PER_THREAD = 4e9  # of one forward pass: some 100 ms of a core
Inputs = tuple[Tensor, Conditions]


def fitting_number(network: nn.Module, inputs: Callable[[], Inputs], *, num_images: int) -> int:
    """Threads for passes of `num_images`: at most those of now, which OMP_NUM_THREADS says.

    inputs: makes x_t (1, C, H, W) and the conditions (1, ...) of one image, if they are needed.
    On other devices: those of now.
    """
    most = torch.get_num_threads()
    if most == 1 or next(network.parameters()).device.type != "cpu":
        return most
    work = forward_flops(network, *inputs()) * num_images
    return max(1, min(most, round(work / FLOPS_PER_THREAD)))


def forward_flops(network: nn.Module, x_t: Tensor, conditions: Conditions) -> int:
    """Floating-point operations of one pass, counted without making it.

    Of convolutions, matrix products and attention, which is nearly all there is.
    """
    counter, fake = FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fake, counter:
        predict(network, x_t, torch.zeros(len(x_t), dtype=torch.long), conditions)
    return counter.get_total_flops()


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """While entered, torch takes this many threads for an operation."""
    before = torch.get_num_threads()
    if number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
