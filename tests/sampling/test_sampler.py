"""Images: equal to diffusers' pipelines, to themselves whatever the batches, and to one model's."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER, collect_images, largest_difference
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor, nn

from deme_cli.artifacts import BaseRecord
from deme_cli.config import SPACINGS, SampleConfig
from deme_cli.diffusion.denoiser import Denoiser, build_network
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.distributed import World
from deme_cli.errors import NumericsError
from deme_cli.sampling import sampler as sampler_module
from deme_cli.sampling.ensemble import SamplingExpert, open_ensemble, single
from deme_cli.sampling.sampler import (
    ImageBatch,
    Shares,
    image_seed,
    sample_images,
)
from deme_cli.sampling.scheduler import build_scheduler
from deme_cli.timesteps import split_uniform


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    network = build_network(TINY_MODEL).eval().requires_grad_(False)
    record = BaseRecord(
        source="", model_config=TINY_MODEL, scheduler_config=TINY_SCHEDULER, num_train_timesteps=100
    )
    return Denoiser(network, read_schedule(TINY_SCHEDULER), record)


def drawn_by(pipeline, config: SampleConfig, **options: float) -> np.ndarray:
    """The images of diffusers' pipeline, from the noise of the images' own generators."""
    seeds = [image_seed(config.seed, index) for index in range(config.num)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        config.num, generator=generators, num_inference_steps=config.steps, **options
    ).images
    return np.stack([np.asarray(image) for image in images])[..., None]


def test_images_are_those_of_diffusers_pipelines(denoiser: Denoiser) -> None:
    for spacing, eta in zip(SPACINGS, (0.0, 0.5, 1.0), strict=True):
        config = SampleConfig(num=2, steps=10, eta=eta, spacing=spacing, seed=3)
        scheduler = DDIMScheduler.from_config(TINY_SCHEDULER, timestep_spacing=spacing)
        theirs = drawn_by(DDIMPipeline(denoiser.network, scheduler), config, eta=eta)
        assert np.array_equal(collect_images(single(denoiser), config), theirs)
    for variance_type in ("fixed_small", "fixed_large"):
        schedule = {**TINY_SCHEDULER, "variance_type": variance_type}
        config = SampleConfig(num=2, sampler="ddpm", steps=10)
        scheduler = DDPMScheduler.from_config(schedule)
        theirs = drawn_by(DDPMPipeline(denoiser.network, scheduler), config)
        model = replace(denoiser, record=replace(denoiser.record, scheduler_config=schedule))
        assert np.array_equal(collect_images(single(model), config), theirs)


@pytest.mark.parametrize("sampler", ["ddpm", "pndm", "heun"])
def test_images_depend_on_neither_batch_size_nor_count(denoiser: Denoiser, sampler: str) -> None:
    config = SampleConfig(num=3, sampler=sampler, steps=4, batch_size=3)
    images = collect_images(single(denoiser), config)
    in_pairs = collect_images(single(denoiser), replace(config, batch_size=2))
    first_two = collect_images(single(denoiser), replace(config, num=2))
    assert images.shape == (3, 8, 8, 1)
    assert largest_difference(images, in_pairs) <= 1
    assert largest_difference(images[:2], first_two) <= 1
    assert largest_difference(images[0], images[1]) > 10
    seeds = {image_seed(seed, index) for seed in range(10) for index in range(1000)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)


class RecordingNetwork(nn.Module):
    """Remembers the timesteps it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        self.timesteps: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.timesteps.append(float(t))
        return (torch.zeros_like(x_t),)


@pytest.mark.parametrize(
    ("num_experts", "sampler", "spacing"),
    [(3, "ddim", "leading"), (4, "pndm", "linspace"), (7, "heun", "trailing")],
)
def test_each_timestep_goes_to_expert_floor_t_n_over_t(
    denoiser: Denoiser, num_experts: int, sampler: str, spacing: str
) -> None:
    config = SampleConfig(num=1, sampler=sampler, steps=12, spacing=spacing)
    networks = [RecordingNetwork() for _ in range(num_experts)]
    experts = [
        SamplingExpert(span, lambda network=network: replace(denoiser, network=network))
        for span, network in zip(split_uniform(num_experts, 100), networks, strict=True)
    ]
    collect_images(experts, config)
    for index, network in enumerate(networks):
        assert network.timesteps
        assert {int(t) * num_experts // 100 for t in network.timesteps} == {index}
    visited = [t for network in reversed(networks) for t in network.timesteps]
    assert visited == build_scheduler(TINY_SCHEDULER, config).timesteps.tolist()


@pytest.mark.parametrize("fit", [True, False])
def test_experts_are_loaded_once_or_where_they_do_not_fit_once_per_chunk(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, fit: bool
) -> None:
    opened = open_ensemble(sorted(run_folder.glob("ft_*.safetensors")))
    config = SampleConfig(num=5, steps=8, batch_size=1)
    together = collect_images(opened, config)
    loads: list[int] = []
    networks: list[weakref.ref] = []

    def load(index: int) -> Denoiser:
        assert fit or not any(network() for network in networks), "another expert is in memory"
        loads.append(index)
        denoiser = opened[index].load()
        networks.append(weakref.ref(denoiser.network))
        return denoiser

    monkeypatch.setattr(sampler_module, "fit_in_memory", lambda denoiser, num: fit)
    monkeypatch.setattr(sampler_module, "CHUNK_BYTES", 20_000)  # state of three images
    experts = [
        SamplingExpert(expert.range, partial(load, index)) for index, expert in enumerate(opened)
    ]
    assert np.array_equal(collect_images(experts, config), together)
    assert loads == [3, 2, 1, 0] * (1 if fit else 2)


def test_progress_counts_every_forward_of_every_image(denoiser: Denoiser) -> None:
    records = list(sample_images(single(denoiser), SampleConfig(num=5, steps=4, batch_size=2)))
    done = [record for record in records if isinstance(record, int)]
    assert done == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 5]
    batches = [record for record in records if isinstance(record, ImageBatch)]
    assert [(batch.start, len(batch.images)) for batch in batches] == [(0, 2), (2, 2), (4, 1)]


def test_images_that_are_not_finite_stop_the_run(denoiser: Denoiser) -> None:
    network = build_network(TINY_MODEL).eval()
    network.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NumericsError, match="images 0 to 1 are not finite"):
        collect_images(single(replace(denoiser, network=network)), SampleConfig(num=2, steps=2))


class Apart(World):
    """A process that has joined nobody: what it would give the first one comes back."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        return [array]


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize(("num", "size"), [(23, 3), (12, 1), (5, 4)])
def test_rounds_of_all_processes_are_the_batches_in_order(num: int, size: int, first: int) -> None:
    def rounds_of(rank: int) -> Iterator[tuple[int, int, list[int]]]:
        shares = Shares(num, 4, first, Apart(rank, size))
        for done, there, parts in shares.gather(shares.own, lambda batch: np.array(batch)):
            yield done, there, [image for part in parts for image in part]

    rounds = list(zip_longest(*map(rounds_of, range(size)), fillvalue="missing"))
    assert not any("missing" in each for each in rounds), "a process would wait for ever"
    images: list[int] = []
    for each in rounds:
        images += [image for _, _, found in each for image in found]
        assert {(done, there) for done, there, _ in each} == {(first + len(images),) * 2}
    assert images == list(range(first, num))


def test_a_process_draws_its_batches_as_one_process_does(denoiser: Denoiser) -> None:
    config = SampleConfig(num=7, steps=2, batch_size=2, sampler="ddpm")
    images = collect_images(single(denoiser), config)
    starts = []
    for rank in range(2):
        records = list(sample_images(single(denoiser), config, first=2, world=Apart(rank, 2)))
        batches = [record for record in records if isinstance(record, ImageBatch)]
        for batch in batches:
            assert np.array_equal(batch.images, images[batch.start :][: len(batch.images)])
        starts += [batch.start for batch in batches]
        done = [record for record in records if isinstance(record, int)]
        assert done[-1] == 2 + sum(len(batch.images) for batch in batches)
    assert sorted(starts) == [2, 4, 6]


@pytest.mark.gpu
def test_a_gpu_draws_the_images_of_the_cpu(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(run_folder.glob("ft_*.safetensors"))
    config = SampleConfig(num=5, steps=10, batch_size=2, eta=1.0)
    on_cpu = collect_images(open_ensemble(paths), config)
    for free in (1 << 40, 1 << 10):  # all are held, then one at a time
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        on_gpu = collect_images(open_ensemble(paths, device="cuda"), config)
        assert largest_difference(on_gpu, on_cpu) <= 2


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(run_folder: Path) -> None:
    paths = sorted(run_folder.glob("ft_*.safetensors"))
    config = SampleConfig(num=4, steps=12, batch_size=2)
    list(sample_images(experts := open_ensemble(paths, device="cuda"), config))  # kernels load
    drawing = sample_images(experts, config)
    for _ in range(10):  # every expert has been loaded
        next(drawing)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(drawing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
