"""Every backbone gives what diffusers' module gives; projections sit where they should."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import BUILDERS

from deme_cli.diffusion.backbones import KNOWN, backbone_of
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.companions import Companions, open_companions
from deme_cli.diffusion.conditions import Conditions
from deme_cli.diffusion.denoiser import Denoiser, predict
from deme_cli.diffusion.projection import (
    attach_projections,
    backbone_of_network,
    fold_weights,
    sites,
)
from deme_cli.errors import ArtifactError

LATENT = (4, 8, 8)
T = 500


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def opened(request: Any, pipelines: Callable[..., Path]) -> tuple[Denoiser, Companions, Any]:
    """A denoiser, its companions, and diffusers' pipeline from the same folder."""
    folder = pipelines(request.param)
    denoiser = open_denoiser(str(folder))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    return denoiser, open_companions(denoiser.record), pipeline


def given_to(companions: Companions) -> Conditions:
    subjects = [3, 7] if companions.wants == "class" else ["a seven", "a boat"]
    return companions.conditions(subjects, torch.tensor([[20, 24, 1, 0, 16, 16]] * 2))


def noisy(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def straight(pipeline: Any, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The prediction by the pipeline's own modules, written out for each class."""
    prompts, name = ["a seven", "a boat"], type(pipeline).__name__
    if name == "DiTPipeline":
        labels = torch.tensor([3, 7])
        return pipeline.transformer(x_t, timestep=t.expand(2), class_labels=labels).sample[:, :4]
    if name == "StableDiffusionPipeline":
        tokens = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        return pipeline.unet(x_t, t, pipeline.text_encoder(tokens)[0]).sample
    if name == "StableDiffusionXLPipeline":
        tokens, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        sizes = torch.tensor([[20.0, 24, 1, 0, 16, 16]] * 2)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return pipeline.unet(x_t, t, tokens, added_cond_kwargs=added).sample
    if name == "StableDiffusion3Pipeline":
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False
        )
        return pipeline.transformer(x_t, tokens, pooled, t.expand(2)).sample
    if name == "WanPipeline":
        tokens, _ = pipeline.encode_prompt(prompts, max_sequence_length=512)
        return pipeline.transformer(x_t[:, :, None], t.expand(2), tokens).sample[:, :, 0]
    tokens, pooled, text_ids = pipeline.encode_prompt(prompts, None)
    packed = pipeline._pack_latents(x_t, 2, *LATENT)
    image_ids = pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
    output = pipeline.transformer(
        packed, tokens, pooled, t.expand(2) / 1000, image_ids, text_ids, torch.full([2], 3.5)
    ).sample
    return pipeline._unpack_latents(output, 16, 16, 2)


def test_predictions_equal_those_of_diffusers_modules(opened: Any) -> None:
    denoiser, companions, pipeline = opened
    x_t, t = noisy(), denoiser.schedule.times(torch.tensor(T))
    ours = predict(denoiser.network, x_t, t, given_to(companions))
    torch.testing.assert_close(ours, straight(pipeline, x_t, t), rtol=0, atol=1e-6)


def test_latents_are_scaled_and_decoded_as_the_pipeline_does(opened: Any) -> None:
    _, companions, pipeline = opened
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    vae, config, frame = pipeline.vae, pipeline.vae.config, slice(None)
    if is_video := type(pipeline).__name__ == "WanPipeline":
        frame = (slice(None), slice(None), 0)
    with torch.no_grad():
        posterior = vae.encode(images[:, :, None] if is_video else images).latent_dist
        mean, deviation = companions.encode_images(images)
        torch.testing.assert_close((mean, deviation), (posterior.mean[frame], posterior.std[frame]))
        noise = torch.randn(mean.shape)
        z = posterior.mean + posterior.std * noise.view_as(posterior.mean)
        if is_video:
            shift, spread = (torch.tensor(config[f"latents_{n}"]) for n in ("mean", "std"))
            x0 = (z[frame] - shift.view(1, 4, 1, 1)) / spread.view(1, 4, 1, 1)
        else:
            x0 = (z - (config.shift_factor or 0)) * config.scaling_factor
        torch.testing.assert_close(companions.latents(mean, deviation, noise), x0)
        torch.testing.assert_close(companions.decode(x0), vae.decode(z).sample[frame])
    assert companions.image_shape(LATENT) == (3, 16, 16)
    assert companions.latent_shape((4, 4, 4), 16) == LATENT


def test_projections_begin_as_the_identity_and_fold_away(opened: Any) -> None:
    denoiser, companions, _ = opened
    x_t, t, given = noisy(), denoiser.schedule.times(torch.tensor(T)), given_to(companions)
    plain = predict(denoiser.network, x_t, t, given)
    for placement in ("block", "fold"):
        network = copy.deepcopy(denoiser.network)
        attach_projections(network, placement)
        torch.testing.assert_close(predict(network, x_t, t, given), plain, rtol=0, atol=1e-5)
        generator = torch.Generator().manual_seed(1)
        for matrix in network.channel_projection.parameters():
            matrix.data.add_(0.2 * torch.randn(matrix.shape, generator=generator))
        projected = predict(network, x_t, t, given).detach()
        assert (projected - plain).abs().max() > 1e-3, f"{placement} does nothing"
    network_folded = copy.deepcopy(denoiser.network)
    network_folded.load_state_dict(fold_weights(network.state_dict(), network))
    torch.testing.assert_close(predict(network_folded, x_t, t, given), projected, rtol=0, atol=1e-5)


def test_a_backbone_knows_its_network_its_blocks_and_its_conditions(opened: Any) -> None:
    denoiser, companions, _ = opened
    network, config = denoiser.network, denoiser.record.model_config
    (backbone,) = (one for one in KNOWN if one.matches(config))
    assert backbone is backbone_of(config) is backbone_of_network(network)
    assert type(network).__name__ == backbone.class_name
    kinds = ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks")
    listed = [
        f"{name}.{index}"
        for name in (*kinds, "blocks")
        if hasattr(network, name)
        for index in range(len(getattr(network, name)))
    ] + (["mid_block"] if hasattr(network, "mid_block") else [])
    assert sorted(site.path for site in sites(network, "block")) == sorted(listed)
    told = backbone.condition_shapes(config)
    given, null = given_to(companions), companions.null()
    assert set(told) == set(given) >= set(null)
    for name, shape in told.items():
        assert given[name].shape[1:][-1:] == shape[-1:], name
        assert len(given[name]) == 2
    assert all(len(value) == 1 for value in null.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AsymmetricAutoencoderKL"}, "backbone 'AsymmetricAutoencoderKL'"),
        ({"_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 9,
          "out_channels": 4}, "9 input channels .* inpainting"),
        ({"_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4,
          "out_channels": 4, "time_cond_proj_dim": 256}, "LCM"),
        ({"_class_name": "DiTTransformer2DModel", "in_channels": 4, "out_channels": 5}, "5 output"),
        ({"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16,
          "image_dim": 1280, "added_kv_proj_dim": 5120}, "added_kv_proj_dim: an image-to"),
    ],
)  # fmt: skip
def test_a_variant_that_needs_more_is_refused_by_name(config: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"here: .*{message}"):
        backbone_of(config, "here")


def test_a_dit_drops_no_class_by_itself(pipelines: Callable[..., Path]) -> None:
    network = open_denoiser(str(pipelines("dit"))).network.train()
    given = {"class_labels": torch.tensor([1, 2])}
    first = predict(network, noisy(), torch.tensor(T), given)
    assert all(
        torch.equal(first, predict(network, noisy(), torch.tensor(T), given)) for _ in range(20)
    )
