"""Batches shared out: each is made once, as one process makes it, and comes back in order."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import pytest
import torch

from deme_cli.config import SampleConfig
from deme_cli.distributed import Launch, World
from deme_cli.sampling.compiled import Step
from deme_cli.sampling.ensemble import open_ensemble
from deme_cli.sampling.sampler import (
    ImageBatch,
    StepProgress,
    collect_images,
    denoise,
    draw_batch,
    sample_images,
)
from deme_cli.sampling.scheduler import build_scheduler
from deme_cli.sampling.shares import Shares


def member(rank: int, size: int) -> World:
    """A process that has joined nobody: shares can be computed, not exchanged."""
    return World(Launch(rank=rank, world_size=size))


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize(("num", "size"), [(23, 3), (24, 3), (12, 1), (5, 4), (4, 2)])
def test_rounds_of_all_processes_are_the_batches_in_order(num: int, size: int, first: int) -> None:
    shares = [Shares(num, 4, first, member(rank, size)) for rank in range(size)]
    rounds = list(zip_longest(*(share.rounds(share.own) for share in shares), fillvalue="missing"))
    assert not any("missing" in each for each in rounds), "a process would wait for ever"
    batches = [batch for each in rounds for batch in each if batch is not None]
    assert [image for batch in batches for image in batch] == list(range(first, num))
    assert all(len(batch) == 4 for batch in batches[:-1])
    ends = [max(b.stop for b in each if b is not None) for each in rounds]
    assert ends == [shares[0].num_done(k + 1) for k in range(len(rounds))]


@pytest.mark.parametrize("hold_one", [False, True])
def test_a_process_draws_its_batches_as_one_process_does(
    run_folder, hold_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deme_cli.sampling.sampler.CHUNK_BYTES", 30_000)  # of four images
    experts = open_ensemble(sorted(run_folder.glob("ft_*.safetensors")))
    config = SampleConfig(num=7, steps=4, batch_size=2, sampler="ddpm", spacing="linspace")
    images = collect_images(experts, config)
    starts = []
    for rank in range(2):
        records = list(
            sample_images(experts, config, first=2, hold_one=hold_one, world=member(rank, 2))
        )
        batches = [record for record in records if isinstance(record, ImageBatch)]
        for batch in batches:
            assert np.array_equal(batch.images, images[batch.start :][: len(batch.images)])
        starts += [batch.start for batch in batches]
        done = [record.done for record in records if isinstance(record, StepProgress)]
        assert done[-1] == 4 * (2 + sum(len(batch.images) for batch in batches))
    assert sorted(starts) == [2, 4, 6]


@pytest.mark.parametrize("name", ["dit", "sdxl"])
def test_a_batch_is_filled_up_with_its_last_image(opened, conditioning_for, name: str) -> None:
    """Images and what the network is told of them alike, so that predictions stay the same."""
    denoiser = opened(name)
    about = {"guidance": 1.0} if name == "dit" else {"guidance": 3.0, "prompts": "text:a red cat"}
    config = SampleConfig(num=3, sampler="ddpm", steps=10, **about)
    conditioning = conditioning_for(denoiser, config)
    scheduler = build_scheduler(denoiser.record.scheduler_config, config)
    at = scheduler.timesteps[0].item(), scheduler.timesteps[0]
    sizes: list[int] = []
    denoiser.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = []
    for size in (0, 5):
        batch = draw_batch(
            range(3), conditioning, torch.empty(0), scheduler=scheduler, config=config, size=size
        )
        denoise(batch, Step(denoiser), at, config)
        assert batch.num == 3
        copies = batch.x_t[2:3].expand_as(batch.x_t[3:])
        torch.testing.assert_close(batch.x_t[3:], copies, rtol=0, atol=1e-4)
        found.append(batch.x_t[:3])
    assert sizes == ([3, 5] if name == "dit" else [6, 10])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
