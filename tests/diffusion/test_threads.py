"""Threads are those that the work of a pass pays for, counted without doing it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deme_cli.data.digits import BASE_PATH
from deme_cli.diffusion.denoiser import load_denoiser, predict
from deme_cli.diffusion.execution import (
    FLOPS_PER_THREAD,
    fitting_number,
    forward_flops,
    using_threads,
)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_a_thread_is_taken_for_each_share_of_work_and_no_more_than_there_are(
    four_threads: None,
) -> None:
    denoiser = load_denoiser(BASE_PATH)
    x_t = torch.zeros(1, *denoiser.sample_shape)
    work = forward_flops(denoiser.network, x_t, {})
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        predict(denoiser.network, x_t, torch.zeros(1, dtype=torch.long))
    assert work == counter.get_total_flops() > 0

    def number(shares: float) -> int:
        size = int(shares * FLOPS_PER_THREAD / work)
        return fitting_number(denoiser.network, lambda: (x_t, {}), num_images=size)

    assert [number(shares) for shares in (0.001, 1, 2, 3, 9)] == [1, 1, 2, 3, 4]
    torch.set_num_threads(1)
    assert number(9) == 1


def test_threads_are_given_back(four_threads: None) -> None:
    with using_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 4
