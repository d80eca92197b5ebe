"""The draws of training: their order, epochs, the shares of processes, made ahead, and fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_SCHEDULER
from torch import Tensor, nn

from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.conditions import concatenate
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import FlowSchedule, read_schedule
from deme_cli.distributed import World
from deme_cli.errors import ArtifactError
from deme_cli.timesteps import TimestepRange
from deme_cli.training import batches
from deme_cli.training.batches import (
    Batch,
    BatchSource,
    derived_generator,
    draws_of_range,
    made_ahead,
    share_of,
)
from deme_cli.training.examples import Examples, PixelExamples, fill_caches, open_examples

QUARTER = TimestepRange(250, 500)
CONFIG = FinetuneConfig(batch_size=8, p=0.3, caption_dropout=0.5)
STEPS = FinetuneConfig(steps=3, accumulation=2, batch_size=5)
SPAN = TimestepRange(25, 50)
TINY = read_schedule(TINY_SCHEDULER)
CPU = torch.device("cpu")


def source_of(examples: PixelExamples, **options: object) -> BatchSource:
    return BatchSource(examples, SPAN, TINY, STEPS, flip=True, **options)


@pytest.fixture(scope="module")
def images() -> PixelExamples:
    return PixelExamples(open_images("digits", shape=(1, 8, 8), split="held-out"))


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("x0", "eps", "t"))


class Numbered:
    """Seven images that are their own number."""

    fingerprint, crop, shape = "", "centre", (1, 1, 1)

    def __len__(self) -> int:
        return 7

    def draw(self, indices: list[int], **options: object) -> tuple[Tensor, dict]:
        return torch.tensor(indices)[:, None, None, None].float(), {}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (3, 2), (20, 1)])
def test_batches_read_one_epoch_after_the_other_each_a_permutation_of_all_images(
    batch_size: int, accumulation: int
) -> None:
    config = FinetuneConfig(batch_size=batch_size, accumulation=accumulation)
    numbered, again = (BatchSource(Numbered(), SPAN, TINY, config, flip=False) for _ in range(2))
    num_batches = -(-28 // batch_size)  # four epochs
    found = [numbered.batch(*divmod(place, accumulation)) for place in range(num_batches)]
    seen = torch.cat([batch.x0.flatten() for batch in found]).int().tolist()
    assert [len(batch.t) for batch in found] == [batch_size] * num_batches
    epochs = [seen[start : start + 7] for start in range(0, 28, 7)]
    for number, epoch in enumerate(epochs):
        order = torch.randperm(7, generator=derived_generator(0, SPAN, "epoch", number))
        assert epoch == order.tolist()
    assert len(set(map(tuple, epochs))) > 1
    # any batch alone is what it is in its turn
    last = again.batch(*divmod(num_batches - 1, accumulation))
    assert torch.equal(last.x0, found[-1].x0)


def test_every_batch_is_shared_by_the_clusters_evenly(images: PixelExamples) -> None:
    clusters = [TimestepRange(25, 30), TimestepRange(30, 50)]
    config = replace(STEPS, batch_size=6)
    source = BatchSource(images, SPAN, TINY, config, flip=False, clusters=clusters)
    for step in range(20):
        t = source.batch(step, 0).t.tolist()
        assert [sum(draw in cluster for draw in t) for cluster in clusters] == [3, 3]


def test_a_batch_of_pixels_draws_timesteps_then_flips_then_noise_and_nothing_else(
    base: Callable[..., Denoiser],
) -> None:
    data = open_images("digits", shape=(1, 8, 8))
    schedule = base("sd").schedule
    batch = BatchSource(PixelExamples(data), QUARTER, schedule, CONFIG, flip=True).batch(5, 1)

    generator = derived_generator(0, QUARTER, 5, 1)
    everywhere = torch.rand(8, generator=generator) < 0.3
    uniform = torch.rand(8, generator=generator, dtype=torch.float64)
    t = torch.where(everywhere, (uniform * 1000).long(), 250 + (uniform * 250).long())
    mirrored = torch.rand(8, generator=generator) < 0.5
    assert torch.equal(batch.t, t)
    assert torch.equal(batch.eps, torch.randn(8, 1, 8, 8, generator=generator))
    order = torch.randperm(len(data), generator=derived_generator(0, QUARTER, "epoch", 0))
    x0 = to_unit(data.batch(order[48:56].tolist()))  # accumulation is 1: batch 6 of update 5
    assert torch.equal(batch.x0[mirrored], x0[mirrored].flip(-1))
    assert torch.equal(batch.x0[~mirrored], x0[~mirrored])
    assert batch.conditions == {}


def test_latents_take_their_noise_before_eps_and_captions_are_left_out_after_it(
    base: Callable[..., Denoiser], examples: Callable[..., Examples]
) -> None:
    own, schedule = examples("sd"), base("sd").schedule
    source = BatchSource(own, QUARTER, schedule, CONFIG, flip=False)
    batch = source.batch(0, 0)
    generator = derived_generator(0, QUARTER, 0, 0)
    torch.rand(8, generator=generator)
    torch.rand(8, generator=generator, dtype=torch.float64)
    x0, conditions = own.draw(source.indices(0, 8), flip=None, generator=generator)
    assert torch.equal(batch.x0, x0)
    assert torch.equal(batch.eps, torch.randn(x0.shape, generator=generator))
    dropped = torch.rand(8, generator=generator) < 0.5
    assert 0 < dropped.sum() < 8
    tokens, found = conditions["encoder_hidden_states"], batch.conditions["encoder_hidden_states"]
    assert torch.equal(found[~dropped], tokens[~dropped])
    null = own.null()["encoder_hidden_states"]
    assert torch.equal(found[dropped], null.expand_as(tokens)[dropped])
    # classes are left out for the null class
    config = replace(CONFIG, caption_dropout=1.0)
    source = BatchSource(examples("dit"), QUARTER, base("dit").schedule, config, flip=False)
    assert source.batch(0, 0).conditions["class_labels"].tolist() == [10] * 8


def test_draws_differ_between_updates_and_seeds_and_those_of_a_flow_have_times_in_the_range(
    base: Callable[..., Denoiser], examples: Callable[..., Examples]
) -> None:
    schedule = base("sd3").schedule
    assert isinstance(schedule, FlowSchedule)
    config = replace(CONFIG, p=0.0, batch_size=19)  # an epoch: the same images every time

    def batch(seed: int, step: int) -> Batch:
        own = replace(config, seed=seed)
        source = BatchSource(examples("sd3"), QUARTER, schedule, own, flip=False)
        found, order = source.batch(step, 0), torch.tensor(source.indices(step * 19, 19)).argsort()
        return Batch(found.x0[order], found.eps[order], found.t[order], {})

    first = batch(0, 0)
    assert same(first, batch(0, 0))
    for other in (batch(0, 1), batch(1, 0)):  # also the noise of the posterior
        assert not torch.allclose(first.x0, other.x0, atol=1e-3)
        assert not torch.allclose(first.eps, other.eps)
    times = schedule.times(first.t)
    assert ((times >= 250) & (times < 500)).all()
    assert not ((first.t >= 250) & (first.t < 500)).all()  # the shift moves draws and times apart


def test_shares_cover_the_batch_once_and_differ_by_one_at_most() -> None:
    for num, size in [(8, 2), (5, 2), (7, 3), (3, 3)]:
        shares = [range(num)[share_of(num, World(rank, size))] for rank in range(size)]
        assert [image for share in shares for image in share] == list(range(num))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("crop", ["pixels", "centre", "random"])
def test_shares_are_those_of_the_whole_batch_and_no_others_are_decoded(
    base: Callable[..., Denoiser], captioned: Path, tmp_path: Path, crop: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of pixels, of latents in a cache, and of random crops, which go through the VAE."""
    schedule = base("sdxl").schedule
    config = FinetuneConfig(batch_size=7, accumulation=2, caption_dropout=0.5, antithetic=True)
    if crop == "pixels":
        data = open_images(str(captioned), shape=(3, 16, 16), keep=False)
        examples = PixelExamples(data, crop="random")
    else:
        examples = open_examples(
            DataConfig(source=str(captioned), crop=crop), open_companions(base("sdxl").record),
            split="train", flips=True, cache=str(tmp_path / "cache"),
        )  # fmt: skip
        fill_caches(examples)
    whole, *parts = (
        BatchSource(examples, QUARTER, schedule, config, flip=True, share=share)
        for share in (slice(None), *(share_of(7, World(rank, 3)) for rank in range(3)))
    )
    atol = 1e-5 if crop == "random" else 0.0  # convolutions round by the size of a batch
    for step, micro in ((0, 0), (3, 1)):
        wanted, found = whole.batch(step, micro), [part.batch(step, micro) for part in parts]
        x0 = torch.cat([part.x0 for part in found])
        torch.testing.assert_close(x0, wanted.x0, rtol=0, atol=atol)
        assert torch.equal(torch.cat([part.eps for part in found]), wanted.eps)
        assert torch.equal(torch.cat([part.t for part in found]), wanted.t)
        if wanted.conditions:
            conditions = concatenate(*(part.conditions for part in found))
            torch.testing.assert_close(conditions, wanted.conditions, rtol=0, atol=0)
    if crop != "centre":
        seen: list[int] = []
        batch = examples.data.batch
        monkeypatch.setattr(examples.data, "batch", lambda i, c=None: seen.extend(i) or batch(i, c))
        parts[1].batch(0, 0)
        assert seen == parts[1].indices(0, 7)[3:5]


def test_batches_made_ahead_are_those_that_are_asked_for(images: PixelExamples) -> None:
    plain, making, made = source_of(images), source_of(images), []

    def draw(step: int, micro: int) -> Batch:
        made.append((step, micro))
        return making.batch(step, micro)

    # an update that begins anew asks for its first batch again
    asked = [(0, 0), (0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    with made_ahead(draw, STEPS, CPU) as ahead:
        for place in asked:
            assert same(ahead(*place), plain.batch(*place))
    first, anew = [(0, 0), (0, 1)], [(1, 0), (1, 1), (2, 0)]  # nothing after the last update
    assert made == [*first, *first, *anew, *anew, (2, 1)]


def test_an_error_in_a_batch_made_ahead_is_raised_where_it_is_asked_for() -> None:
    def draw(step: int, micro: int) -> Batch:
        if micro:
            raise ArtifactError("3.png: broken image")
        return Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), {})

    with made_ahead(draw, STEPS, CPU) as ahead:
        ahead(0, 0)
        with pytest.raises(ArtifactError, match="broken"):
            ahead(0, 1)


def test_noise_of_a_device_is_of_the_batch_and_shared_like_it(images: PixelExamples) -> None:
    whole = source_of(images, device=CPU)
    shares = [source_of(images, device=CPU, share=part) for part in (slice(2), slice(2, 5))]
    batch, parts = whole.batch(1, 1), [source.batch(1, 1) for source in shares]
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


@pytest.mark.gpu
def test_batches_of_a_gpu_have_the_images_and_timesteps_of_a_processor(
    images: PixelExamples,
) -> None:
    gpu, plain = torch.device("cuda:0"), source_of(images)
    with made_ahead(source_of(images, device=gpu).batch, STEPS, gpu) as ahead:
        for place in [(0, 0), (0, 1), (1, 0), (0, 0)]:
            found, wanted = ahead(*place), plain.batch(*place)
            assert found.x0.device == found.eps.device == found.t.device == gpu
            assert torch.equal(found.x0.cpu(), wanted.x0)
            assert torch.equal(found.t.cpu(), wanted.t)
            assert found.eps.shape == wanted.eps.shape


class Scaled(nn.Module):
    """A denoiser that says theta x_t."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.5))


def test_fixed_draws_have_the_loss_and_its_gradient_written_out_by_hand(
    images: PixelExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "predict", lambda network, x_t, t, told: network.theta * x_t)
    fixed, network = draws_of_range(images, SPAN, TINY, 50), Scaled()
    assert sorted(fixed.t.tolist()) == [t for t in range(25, 50) for _ in range(2)]
    numbers = torch.arange(50)
    assert fixed.images.tolist() == (numbers % len(images)).tolist()
    x0, eps = to_unit(images.data.batch(fixed.images.tolist())), fixed.noise(numbers)
    x_t = TINY.add_noise(x0, eps, fixed.t)
    errors = (0.5 * x_t - eps).square().flatten(1).mean(1)
    for draws in (fixed, replace(fixed, batch_size=7)):
        torch.testing.assert_close(draws.errors(network).float(), errors)
        torch.testing.assert_close(draws.errors(network, chosen=numbers[3:9]).float(), errors[3:9])
        torch.testing.assert_close(draws.outputs(network, numbers[3:9]), 0.5 * x_t[3:9])
        assert draws.loss(network) == pytest.approx(errors.mean().item(), rel=1e-5)
        loss = draws.loss_and_gradient(network, lambda: None)
        assert loss == pytest.approx(errors.mean().item(), rel=1e-5)
        expected = (2 * (0.5 * x_t - eps) * x_t).mean()
        torch.testing.assert_close(network.theta.grad, expected, rtol=1e-4, atol=1e-6)
    own = replace(fixed, targets=torch.zeros_like(x0))
    torch.testing.assert_close(own.errors(network).float(), (0.5 * x_t).square().flatten(1).mean(1))
