from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deme_cli.data.digits import BASE_PATH
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser
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


@pytest.fixture
def digits() -> tuple[Denoiser, torch.Tensor]:
    denoiser = load_denoiser(BASE_PATH)
    return denoiser, torch.zeros(1, *denoiser.sample_shape)


def test_a_thread_is_taken_for_each_share_of_work_and_no_more_than_there_are(
    digits: tuple[Denoiser, torch.Tensor], four_threads: None
) -> None:
    denoiser, x_t = digits
    work = forward_flops(denoiser.network, x_t, {})

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
