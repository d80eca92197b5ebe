"""One training step of each latent model against the same step written with diffusers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional

from deme_cli.config import DataConfig
from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.training.examples import open_examples
from deme_cli.training.objective import expert_losses

INDICES = [3, 11, 0]
SIZE = 16  # pixels per side of the tiny pipelines' images


def pixels(captioned: Path) -> Tensor:
    data = open_images(str(captioned), shape=(3, SIZE, SIZE), split="train")
    return to_unit(data.batch(INDICES))


def captions(captioned: Path) -> list[str]:
    # the last of twenty images is held out, so train numbers are file numbers
    return [f"a photo of thing number {index}" for index in INDICES]


def encode(vae, images: Tensor, noise: Tensor) -> Tensor:
    """x_0 as diffusers' training scripts have it, with given noise for the posterior."""
    if hasattr(vae.config, "z_dim"):  # Wan's, of videos
        posterior = vae.encode(images[:, :, None]).latent_dist
        stated = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in stated)
        return (posterior.mean[:, :, 0] + posterior.std[:, :, 0] * noise - mean) / std
    posterior = vae.encode(images).latent_dist
    shift = vae.config.shift_factor or 0.0
    return (posterior.mean + posterior.std * noise - shift) * vae.config.scaling_factor


def direct(name: str, folder: Path, network, captioned: Path, noise: Tensor, eps: Tensor):
    """(x_t, t, target, output) of a step, by diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    x0 = encode(pipeline.vae, pixels(captioned), noise)
    draws = torch.tensor([10, 500, 990])
    config, texts = pipeline.scheduler.config, captions(captioned)
    if name in ("sd3", "flux", "wan"):
        if name == "wan":
            config = {"num_train_timesteps": 1000, "shift": config.flow_shift}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        times = scheduler.timesteps.flip(0)[draws]  # rising, as draws are
        x_t, target = scheduler.scale_noise(x0, times, eps), eps - x0
        if name == "wan":
            tokens, _ = pipeline.encode_prompt(texts, max_sequence_length=512)
            output = network(x_t[:, :, None], times, tokens).sample[:, :, 0]
        elif name == "sd3":
            tokens, _, pooled, _ = pipeline.encode_prompt(texts, texts, texts)
            output = network(
                hidden_states=x_t, timestep=times, encoder_hidden_states=tokens,
                pooled_projections=pooled,
            ).sample  # fmt: skip
        else:
            tokens, pooled, text_ids = pipeline.encode_prompt(texts, texts)
            packed = pipeline._pack_latents(x_t, *x_t.shape)
            ids = pipeline._prepare_latent_image_ids(3, 4, 4, x_t.device, x_t.dtype)
            told = torch.full((3,), 3.5) if network.config.guidance_embeds else None
            output = network(
                hidden_states=packed, timestep=times / 1000, guidance=told,
                pooled_projections=pooled, encoder_hidden_states=tokens, txt_ids=text_ids,
                img_ids=ids,
            ).sample  # fmt: skip
            output = pipeline._unpack_latents(output, SIZE, SIZE, 4 // 2)
        return draws, target, output
    scheduler = DDPMScheduler.from_config(config)
    x_t = scheduler.add_noise(x0, eps, draws)
    target = eps
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(x0, eps, draws)
    if name == "dit":
        labels = torch.tensor([index % 5 for index in INDICES])
        output = network(x_t, draws, class_labels=labels).sample[:, :4]
    elif name == "sdxl":
        tokens, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": sizes(captioned)}
        output = network(x_t, draws, tokens, added_cond_kwargs=added).sample
    else:
        tokens, _ = pipeline.encode_prompt(texts, "cpu", 1, False)
        output = network(x_t, draws, tokens).sample
    return draws, target, output


def sizes(captioned: Path) -> Tensor:
    """Original size, corner of the centre crop of the scaled image, target size."""
    from PIL import Image

    rows = []
    for index in INDICES:
        with Image.open(captioned / f"{index:02d}.png") as image:
            width, height = image.size
        scale = max(SIZE / height, SIZE / width)
        corner = [round((side * scale - SIZE) / 2) for side in (height, width)]
        rows.append([height, width, *corner, SIZE, SIZE])
    return torch.tensor(rows).float()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("sd", "sdxl", "dit", "sd3", "wan")),
        ("sd", {"prediction_type": "v_prediction"}),
        *(("flux", {"distilled": distilled}) for distilled in (True, False)),
    ],
)
def test_a_step_has_the_loss_and_the_gradient_of_one_written_with_diffusers(
    name: str, options: dict, pipelines: Callable[..., Path], base: Callable[..., Denoiser],
    captioned: Path, companions: Callable,
) -> None:  # fmt: skip
    denoiser = base(name, **options)
    images = DataConfig(source=str(captioned), resolution=SIZE)
    own = open_examples(images, companions(name, **options), split="train")
    generator = torch.Generator().manual_seed(4)
    x0, conditions = own.draw(INDICES, flip=None, generator=generator)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
    eps = torch.randn(x0.shape, generator=generator)

    folder, network = pipelines(name, **options), denoiser.network
    parameters = [p.requires_grad_(True) for p in network.parameters()]
    try:
        draws, target, output = direct(name, folder, network, captioned, noise, eps)
        expected = functional.mse_loss(output, target)
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
        loss = expert_losses(
            network, None, denoiser.schedule, x0=x0, eps=eps, t=draws, conditions=conditions,
            consistency=0.0,
        )  # fmt: skip
        found = torch.autograd.grad(loss.total.mean(), parameters, allow_unused=True)
    finally:
        network.requires_grad_(False)
    torch.testing.assert_close(loss.total.mean(), expected, rtol=1e-6, atol=1e-6)
    assert sum(gradient is not None for gradient in found) > len(parameters) // 2
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
