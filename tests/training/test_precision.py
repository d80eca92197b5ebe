"""Half precision, the order of channels, and moving averages: faster, and the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from deme_cli.artifacts import fingerprint, fingerprint_file, load_tensors, read_record
from deme_cli.config import FinetuneConfig
from deme_cli.data.images import open_images
from deme_cli.diffusion.denoiser import Denoiser, load_denoiser, predict
from deme_cli.training.batches import Batch, BatchSource
from deme_cli.training.clusters import cluster_draws
from deme_cli.training.examples import Examples, PixelExamples
from deme_cli.training.setup import Run
from deme_cli.training.state import (
    TrainingState,
    hold_in,
    keep_in_float32,
    open_networks,
)
from deme_cli.training.train import Gradients, train
from deme_cli.training.weighting import Reduction

SHORT = FinetuneConfig(steps=4, batch_size=6, lr=1e-3, checkpoint_every=2, held_out=0)
BACKBONES = ["sd", "sdxl", "sd3", "dit", "flux", "wan"]


@pytest.fixture
def run(digits_run: Callable[..., Run]) -> Run:
    return digits_run(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_base_held_in_half_says_what_autocast_makes_of_it(
    base: Callable[..., Denoiser], examples: Callable[..., Examples], name: str, half: torch.dtype
) -> None:
    denoiser = base(name)
    x0, conditions = examples(name).draw([0, 1, 2], flip=None, generator=None)
    t = denoiser.schedule.times(torch.tensor([1, 400, 900]))
    held = hold_in(copy.deepcopy(denoiser.network), half)
    assert any(parameter.dtype == half for parameter in held.parameters())
    with torch.no_grad(), torch.autocast("cpu", half):
        outputs = [predict(n, x0.float(), t, conditions) for n in (denoiser.network, held)]
    assert torch.equal(*outputs)


def test_what_diffusers_keeps_in_float32_is_computed_so_in_training(
    base: Callable[..., Denoiser],
) -> None:
    network = base("wan").network
    embedder = network.condition_embedder.time_embedder
    x = torch.randn(2, embedder.linear_1.in_features)
    expected = embedder(x)
    keep_in_float32(network)
    held = hold_in(copy.deepcopy(network), torch.bfloat16).condition_embedder
    assert held.time_embedder.linear_1.weight.dtype == torch.float32
    assert held.time_proj.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedder(x), expected)
        assert network.condition_embedder.time_proj(expected).dtype == torch.bfloat16


def test_half_precision_leaves_the_base_and_asks_one_of_the_same_outputs(run: Run) -> None:
    half, network = replace(run, dtype="bf16"), run.denoiser.network
    list(train(half))
    assert fingerprint(network.state_dict()) == run.denoiser.record.fingerprint
    assert load_tensors(half.output)["conv_in.weight"].dtype == torch.float32
    base = open_networks(half)[1]
    assert base.conv_in.weight.dtype == torch.bfloat16
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 80])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predict(network, x_t, t), predict(base, x_t, t))
    alone = replace(half, config=replace(SHORT, consistency=0.0))  # which never runs the base
    assert open_networks(alone)[1] is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_gpu_trains_in_half_precision_about_as_in_float32(
    digits_base: Path, run: Run, dtype: str
) -> None:
    losses = []
    held_out = PixelExamples(open_images("digits", shape=(1, 8, 8), split="held-out"))
    config = replace(SHORT, held_out=10, ema_lengths=[0.1])
    for name in ("fp32", dtype):
        denoiser = load_denoiser(digits_base, device="cuda")  # in half precision it leaves the GPU
        one = replace(run, denoiser=denoiser, held_out=held_out, config=config, dtype=name)
        losses.append([(record.loss, record.held_out) for record in train(one)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.1, atol=0)
    assert load_tensors(run.output)["conv_in.weight"].dtype == torch.float32


def plain_state(network: nn.Module, run: Run, config: FinetuneConfig) -> TrainingState:
    reduction = Reduction(config, run.denoiser.schedule)
    return TrainingState(network, reduction, config, scale_loss=False)


def test_channels_last_changes_no_file(run: Run, tmp_path: Path) -> None:
    def state_of(layout: torch.memory_format) -> TrainingState:
        torch.manual_seed(0)
        network = open_networks(run)[0].to(memory_format=layout)
        state = plain_state(network, run, replace(SHORT, ema_lengths=[0.1]))
        for _ in range(2):
            for parameter in network.parameters():
                drawn = torch.randn(parameter.shape)
                parameter.grad = torch.empty_like(parameter).copy_(drawn)
            state.update()
        return state

    paths = [tmp_path / "plain", tmp_path / "last"]
    states = [state_of(layout) for layout in (torch.contiguous_format, torch.channels_last)]
    for state, path in zip(states, paths, strict=True):
        state.save(path, run.identity)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    own = states[1].optimizer.state
    states[1].restore(paths[0], run.identity, run.output)
    for parameter in states[1].network.parameters():
        assert own[parameter]["exp_avg"].stride() == parameter.stride()
    states[1].save(tmp_path / "again", run.identity)
    assert (tmp_path / "again").read_bytes() == paths[0].read_bytes()


def test_the_moving_average_is_that_of_diffusers(run: Run) -> None:
    network = nn.Linear(30, 40)
    state = plain_state(network, run, replace(SHORT, ema_decay=0.99, steps=300))
    theirs = EMAModel(network.parameters(), decay=0.99, use_ema_warmup=True, power=0.75)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.update()
        theirs.step(network.parameters())
    for one, other in zip(state.averages[None].values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_training_gives_the_same_expert_under_the_same_names(run: Run) -> None:
    """Also stopped and continued plainly, with a held-out loss and in parts."""
    held_out = PixelExamples(open_images("digits", shape=(1, 8, 8), split="held-out"))
    config = replace(SHORT, held_out=10, micro_batch=3)
    plain = replace(run, held_out=held_out, config=replace(config, projection="block"))
    compiled = replace(plain, compile="on", output=run.output.with_name("compiled.safetensors"))
    wanted = list(train(plain))
    for record in train(compiled):
        if record.step == 2:
            break
    found = list(train(replace(compiled, compile="off")))
    assert found[-1].held_out == pytest.approx(wanted[-1].held_out, rel=1e-4)
    one, other = load_tensors(plain.output), load_tensors(compiled.output)
    assert one.keys() == other.keys()
    names = [name for name in one if not name.endswith("to_k.bias")]  # see test_data_parallel.py
    apart = torch.cat([(one[name] - other[name]).flatten() for name in names])
    assert apart.abs().max() <= SHORT.lr  # where a gradient is rounding alone, Adam makes a step
    assert apart.square().mean().sqrt() <= 1e-5
    records = [read_record(path) for path in (plain.output, compiled.output)]
    assert records[0].training == records[1].training
    assert records[1].fingerprint == fingerprint_file(compiled.output)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_weighting": "p2"}, {"loss_weighting": "uncertainty"}, {"multitask": "uw"}],
)
def test_an_update_asks_the_device_nothing(run: Run, settings: dict) -> None:
    """Tensors without numbers refuse whatever would make a processor wait for a GPU's."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    config = replace(SHORT, clusters=2, p=0.0, ema_lengths=[0.1], **settings)
    schedule, span = run.denoiser.schedule, run.choice.range
    clusters = cluster_draws(span, 2, "uniform", schedule, None) if config.multitask == "uw" else ()
    run = replace(run, config=config, clusters=clusters)
    source = BatchSource(run.examples, span, schedule, config, flip=False, clusters=clusters)
    drawn = source.batch(0, 0)
    network, base = open_networks(run)
    reduction = Reduction(config, schedule, clusters)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor
        state = TrainingState(network, reduction, config, scale_loss=False, base=base)
        (losses,) = Gradients(
            run, state, lambda *_: Batch(*map(fake, (drawn.x0, drawn.eps, drawn.t)), {})
        ).of_update()
        state.update()
        with pytest.raises(DataDependentOutputException):
            losses.sum().item()
