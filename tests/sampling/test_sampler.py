"""Images: equal to diffusers' pipelines, to themselves whatever the batches, and to one model's."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor, nn

from deme_cli.artifacts import BaseRecord
from deme_cli.config import SAMPLERS, SPACINGS, SampleConfig
from deme_cli.diffusion.denoiser import Denoiser, build_network
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import NumericsError
from deme_cli.sampling import sampler as sampler_module
from deme_cli.sampling.ensemble import SamplingExpert, open_ensemble, single
from deme_cli.sampling.sampler import (
    ImageBatch,
    StepProgress,
    collect_images,
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
        source="",
        model_config=TINY_MODEL,
        scheduler_config=TINY_SCHEDULER,
        num_train_timesteps=100,
    )
    return Denoiser(network, read_schedule(TINY_SCHEDULER), record)


def largest_difference(images: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(images.astype(int) - others.astype(int)).max())


def generators(config: SampleConfig) -> list[torch.Generator]:
    return [
        torch.Generator("cpu").manual_seed(image_seed(config.seed, index))
        for index in range(config.num)
    ]


@pytest.mark.parametrize(("spacing", "eta"), list(zip(SPACINGS, (0.0, 0.5, 1.0), strict=True)))
def test_ddim_draws_the_images_of_diffusers_pipeline(
    denoiser: Denoiser, spacing: str, eta: float
) -> None:
    config = SampleConfig(num=4, steps=10, eta=eta, spacing=spacing, seed=3)
    scheduler = DDIMScheduler.from_config(TINY_SCHEDULER, timestep_spacing=spacing)
    pipeline = DDIMPipeline(denoiser.network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(4, generator=generators(config), eta=eta, num_inference_steps=10).images
    ours = collect_images(single(denoiser), config)
    assert np.array_equal(ours[..., 0], np.stack([np.asarray(image) for image in theirs]))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_draws_the_images_of_diffusers_pipeline(
    denoiser: Denoiser, variance_type: str
) -> None:
    schedule = {**TINY_SCHEDULER, "variance_type": variance_type}
    config = SampleConfig(num=3, sampler="ddpm", steps=25)
    pipeline = DDPMPipeline(denoiser.network, DDPMScheduler.from_config(schedule))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(3, generator=generators(config), num_inference_steps=25).images
    model = replace(denoiser, record=replace(denoiser.record, scheduler_config=schedule))
    ours = collect_images(single(model), config)
    assert np.array_equal(ours[..., 0], np.stack([np.asarray(image) for image in theirs]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_depend_on_neither_batch_size_nor_count(denoiser: Denoiser, sampler: str) -> None:
    config = SampleConfig(num=5, sampler=sampler, steps=8, batch_size=5)
    images = collect_images(single(denoiser), config)
    in_pairs = collect_images(single(denoiser), replace(config, batch_size=2))
    first_three = collect_images(single(denoiser), replace(config, num=3))
    assert images.shape == (5, 8, 8, 1)
    assert largest_difference(images, in_pairs) <= 1
    assert largest_difference(images[:3], first_three) <= 1
    assert largest_difference(images[0], images[1]) > 10


@pytest.mark.parametrize(("sampler", "spacing"), list(zip(SAMPLERS, 3 * SPACINGS, strict=True)))
def test_identical_experts_draw_the_images_of_one_model(
    denoiser: Denoiser, sampler: str, spacing: str
) -> None:
    config = SampleConfig(num=2, sampler=sampler, steps=6, spacing=spacing, batch_size=1)
    experts = [SamplingExpert(span, lambda: denoiser) for span in split_uniform(3, 100)]
    one = collect_images(single(denoiser), config)
    assert np.array_equal(collect_images(experts, config, hold_one=True), one)


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
    [(3, "ddim", "leading"), (4, "pndm", "linspace"), (7, "heun", "trailing"),
     (4, "euler", "linspace")],
)  # fmt: skip
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


def test_experts_are_held_one_at_a_time_and_loaded_once_per_chunk(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_ensemble(sorted(run_folder.glob("ft_*.safetensors")))
    config = SampleConfig(num=7, steps=8, batch_size=2)
    together = collect_images(opened, config)
    loads: list[int] = []
    networks: list[weakref.ref] = []

    def load(index: int) -> Denoiser:
        assert not any(network() for network in networks), "another expert is in memory"
        loads.append(index)
        denoiser = opened[index].load()
        networks.append(weakref.ref(denoiser.network))
        return denoiser

    monkeypatch.setattr(sampler_module, "CHUNK_BYTES", 30_000)  # state of four images
    experts = [
        SamplingExpert(expert.range, partial(load, index)) for index, expert in enumerate(opened)
    ]
    assert np.array_equal(collect_images(experts, config, hold_one=True), together)
    assert loads == [3, 2, 1, 0, 3, 2, 1, 0]


def test_progress_counts_every_forward_of_every_image(denoiser: Denoiser) -> None:
    config = SampleConfig(num=5, steps=4, batch_size=2)
    records = list(sample_images(single(denoiser), config))
    shares = [record.done / record.total for record in records if isinstance(record, StepProgress)]
    assert len(shares) == 3 * 4
    assert shares == sorted(shares)
    assert shares[-1] == 1
    batches = [record for record in records if isinstance(record, ImageBatch)]
    assert [(batch.start, len(batch.images)) for batch in batches] == [(0, 2), (2, 2), (4, 1)]


def test_image_seeds_differ_and_fit_an_int64() -> None:
    seeds = [image_seed(seed, index) for seed in range(10) for index in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_images_that_are_not_finite_stop_the_run(denoiser: Denoiser) -> None:
    network = build_network(TINY_MODEL).eval()
    network.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NumericsError, match="images 0 to 1 are not finite"):
        collect_images(single(replace(denoiser, network=network)), SampleConfig(num=2, steps=2))


@pytest.mark.gpu
def test_a_gpu_draws_the_images_of_the_cpu(run_folder: Path) -> None:
    paths = sorted(run_folder.glob("ft_*.safetensors"))
    config = SampleConfig(num=5, steps=10, batch_size=2, eta=1.0)
    on_cpu = collect_images(open_ensemble(paths), config)
    on_gpu = collect_images(open_ensemble(paths, device="cuda"), config, hold_one=True)
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
