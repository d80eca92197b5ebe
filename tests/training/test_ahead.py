"""Batches made ahead and images that lie on the device: the same ones, in any order."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import TINY_SCHEDULER

from deme_cli.config import FinetuneConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ArtifactError
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import Ahead, Batch, BatchSource
from deme_cli.training.examples import PixelExamples

CONFIG = FinetuneConfig(steps=3, accumulation=2, batch_size=5)
SPAN = TimestepRange(25, 50)
CPU = torch.device("cpu")


def source_of(examples: PixelExamples, **options: object) -> BatchSource:
    return BatchSource(examples, SPAN, read_schedule(TINY_SCHEDULER), CONFIG, flip=True, **options)


@pytest.fixture(scope="module")
def images() -> PixelExamples:
    return PixelExamples(open_images("digits", shape=(1, 8, 8), split="held-out"))


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("x0", "eps", "t"))


def test_batches_made_ahead_are_those_that_are_asked_for(images: PixelExamples) -> None:
    plain, made = source_of(images), []
    making = source_of(images)
    batch = making.batch
    making.batch = lambda step, micro: made.append((step, micro)) or batch(step, micro)
    # an update that begins anew asks for its first batch again
    asked = [(0, 0), (0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    with Ahead(making, CONFIG.steps, CONFIG.accumulation, CPU) as ahead:
        for place in asked:
            assert same(ahead.batch(*place), plain.batch(*place))
            while len(made) < 2:
                time.sleep(0.001)
    assert made[:2] == [(0, 0), (0, 1)]
    assert max(made) == (2, 1)  # nothing after the last update


def test_an_error_in_a_batch_made_ahead_is_raised_where_it_is_asked_for() -> None:
    class Broken:
        def batch(self, step: int, micro: int) -> Batch:
            if step:
                raise ArtifactError("3.png: broken image")
            return Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), {})

    with Ahead(Broken(), 5, 1, CPU) as ahead:
        ahead.batch(0, 0)
        with pytest.raises(ArtifactError, match="broken"):
            ahead.batch(1, 0)


def test_images_on_the_device_are_gathered_mirrored_and_scaled_as_here(
    images: PixelExamples,
) -> None:
    resident = PixelExamples(images.data)
    resident.keep_on(CPU)
    assert resident._resident.dtype == torch.uint8
    for step in range(3):
        assert same(source_of(resident).batch(step, 0), source_of(images).batch(step, 0))


@pytest.mark.gpu
def test_batches_of_a_gpu_have_the_images_and_timesteps_of_a_processor(
    images: PixelExamples,
) -> None:
    gpu, plain = torch.device("cuda:0"), source_of(images)
    resident = PixelExamples(images.data)
    for examples in (images, resident):
        with Ahead(
            source_of(examples, device=gpu), CONFIG.steps, CONFIG.accumulation, gpu
        ) as ahead:
            for place in [(0, 0), (0, 1), (1, 0), (0, 0)]:
                found, wanted = ahead.batch(*place), plain.batch(*place)
                assert found.x0.device == found.eps.device == found.t.device == gpu
                # a GPU multiplies by 1 / 127.5 where a processor divides
                torch.testing.assert_close(found.x0.cpu(), wanted.x0, rtol=0, atol=1e-6)
                assert torch.equal(found.t.cpu(), wanted.t)
                assert found.eps.shape == wanted.eps.shape
        resident.keep_on(gpu)  # for the second round
    assert resident._resident.device == gpu


def test_noise_of_a_device_is_of_the_batch_and_shared_like_it(images: PixelExamples) -> None:
    whole = source_of(images, device=CPU)
    shares = [source_of(images, device=CPU, share=part) for part in (slice(2), slice(2, 5))]
    batch = whole.batch(1, 1)
    parts = [source.batch(1, 1) for source in shares]
    for name in ("x0", "eps", "t"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(p, name) for p in parts]))
    here = source_of(images).batch(1, 1)
    assert torch.equal(batch.x0, here.x0)
    assert torch.equal(batch.t, here.t)
    assert not torch.equal(batch.eps, here.eps)
    assert not torch.equal(batch.eps, whole.batch(1, 0).eps)
    eps = torch.cat([whole.batch(step, 0).eps for step in range(40)])
    assert abs(eps.mean()) < 0.03
    assert abs(eps.std() - 1) < 0.03
