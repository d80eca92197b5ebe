"""Images of every backbone are those of diffusers' own pipeline from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import collect_images, largest_difference
from diffusers import DDIMScheduler, FluxPipeline
from PIL import Image
from tiny_pipelines import FACTOR, LATENT
from torch import Tensor

from deme_cli.config import SampleConfig
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.sampling import sampler as sampler_module
from deme_cli.sampling.conditioning import Conditioning
from deme_cli.sampling.ensemble import single
from deme_cli.sampling.sampler import Batch, finish_images, image_seed

PROMPTS = ("a red fox", "two cats on a mat, by night")
SIZE = LATENT * FACTOR  # pixels


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


@dataclass
class Ours:
    """What deme draws: images, and latents before they are decoded."""

    config: SampleConfig
    denoiser: Denoiser
    conditioning: Conditioning
    images: np.ndarray
    latents: Tensor

    @property
    def generators(self) -> list[torch.Generator]:
        """Those of the images' own noise."""
        seeds = [image_seed(self.config.seed, index) for index in range(self.conditioning.num)]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    @property
    def noise(self) -> Tensor:
        """The latents that the images begin with."""
        shape = self.conditioning.latent_shape
        return torch.stack([torch.randn(shape, generator=one) for one in self.generators])


Draw = Callable[..., Ours]


@pytest.fixture
def ours(opened: Any, conditioning_for: Any, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draw with the tiny pipeline of a name; `build` goes to its builder."""

    def draw(name: str, build: dict[str, Any] | None = None, **settings: Any) -> Ours:
        kept: list[Tensor] = []

        def keep(batch: Batch, *arguments: Any) -> np.ndarray:
            kept.append(batch.x_t)
            return finish_images(batch, *arguments)

        monkeypatch.setattr(sampler_module, "finish_images", keep)
        config = SampleConfig(**{"steps": 4, "seed": 3, **settings})
        denoiser = opened(name, **(build or {}))
        conditioning = conditioning_for(denoiser, config)
        images = collect_images(single(denoiser), config, conditioning=conditioning)
        return Ours(config, denoiser, conditioning, images, torch.cat(kept))

    return draw


def require_same(found: Ours, pipeline: Any, **options: Any) -> None:
    """Check the pipeline's latents and images, drawn from the same noise, against deme's."""
    noise, size = found.noise, found.conditioning.drawn_shape[1]
    is_packed = isinstance(pipeline, FluxPipeline)
    if is_packed:
        noise = pipeline._pack_latents(noise, *noise.shape)
    is_video = type(pipeline).__name__ == "WanPipeline"
    if is_video:
        noise, options = noise[:, :, None], {"num_frames": 1, **options}
    settings = {
        "prompt": list(PROMPTS), "num_inference_steps": found.config.steps, "latents": noise,
        "height": size, "width": size, **options,
    }  # fmt: skip
    latents, images = (pipeline(**settings, output_type=kind)[0] for kind in ("latent", "pil"))
    if is_video:
        latents, images = latents[:, :, 0], [frames[0] for frames in images]
    if is_packed:
        latents = pipeline._unpack_latents(latents, size, size, pipeline.vae_scale_factor)
    images = np.stack([np.asarray(image) for image in images])
    assert latents.std() > 0.5
    assert torch.allclose(found.latents, latents, rtol=0, atol=1e-5)
    assert largest_difference(found.images, images) <= 1


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sd": ("sd", {}, {"sampler": "pndm"}, {"guidance_scale": 7.5}),
    "sdxl larger": ("sdxl", {}, {"resolution": 24, "guidance": 9.0}, {"guidance_scale": 9.0}),
    "sd3": ("sd3", {}, {}, {"guidance_scale": 7.0}),
    "sd3 unguided": ("sd3", {}, {"guidance": 1.0}, {"guidance_scale": 1.0}),
    "flux dev": ("flux", {}, {"guidance": 0.5, "resolution": 24}, {"guidance_scale": 0.5}),
    "flux schnell": ("flux", {"distilled": False}, {"resolution": SIZE}, {}),
    "flux schnell guided": (
        "flux", {"distilled": False}, {"resolution": SIZE, "guidance": 2.0},
        {"true_cfg_scale": 2.0, "negative_prompt": ""},
    ),
    "wan": ("wan", {}, {"sampler": "unipc", "resolution": SIZE}, {"guidance_scale": 5.0}),
    "wan unguided": (
        "wan", {"scheduler": "euler"}, {"resolution": SIZE, "guidance": 1.0},
        {"guidance_scale": 1.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_latents_and_images_are_those_of_the_pipeline(
    name: str, ours: Draw, their_pipeline: Any, prompts: str
) -> None:
    kind, build, settings, options = CASES[name]
    found = ours(kind, build, prompts=prompts, **settings)
    require_same(found, their_pipeline(found.denoiser), **options)


FLOW_SCHEDULERS = {
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"flow_shift": 3.0}),
    "unipc": ("UniPCMultistepScheduler", {"flow_shift": 3.0}),
}


@pytest.mark.parametrize("sampler", FLOW_SCHEDULERS)
def test_every_flow_sampler_draws_what_the_pipeline_draws_with_that_scheduler(
    sampler: str, ours: Draw, their_pipeline: Any, prompts: str
) -> None:
    found = ours("sd3", prompts=prompts, sampler=sampler)
    pipeline = their_pipeline(found.denoiser)
    name, changes = FLOW_SCHEDULERS[sampler]
    if changes:
        changes = {**changes, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes)
    require_same(found, pipeline, guidance_scale=7.0)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_images_of_classes_are_those_of_the_dit_pipeline(
    ours: Draw, their_pipeline: Any, guidance: float
) -> None:
    # diffusers' null class is 1000, whatever the number of classes
    found = ours("dit", {"num_classes": 1000}, num=3, classes="207,360", guidance=guidance)
    assert found.conditioning.classes == [207, 360, 207]
    images = their_pipeline(found.denoiser)(
        class_labels=[207, 360, 207], guidance_scale=guidance, generator=found.generators,
        num_inference_steps=found.config.steps,
    ).images  # fmt: skip
    images = np.stack([np.asarray(image) for image in images])
    assert largest_difference(found.images, images) <= 1


def test_guidance_with_ten_classes_is_the_formula_with_null_class_ten(ours: Draw) -> None:
    found = ours("dit", num=3, guidance=20.0)
    scheduler = DDIMScheduler.from_config(found.denoiser.record.scheduler_config)
    scheduler.set_timesteps(found.config.steps)
    network, x_t = found.denoiser.network, found.noise
    labels, null = torch.tensor([0, 1, 2]), torch.tensor([10, 10, 10])
    for t in scheduler.timesteps:
        given, silent = (
            network(x_t, t.expand(3), class_labels=chosen).sample[:, :4]
            for chosen in (labels, null)
        )
        x_t = scheduler.step(silent + 20.0 * (given - silent), t, x_t).prev_sample
    assert torch.allclose(found.latents, x_t, rtol=1e-4, atol=1e-4)  # latents of 50 and more
    assert (found.latents - ours("dit", num=3, guidance=1.0).latents).abs().max() > 1e-2


def test_images_are_resized_as_pillow_does(ours: Draw, prompts: str) -> None:
    whole, small = (ours("sd", prompts=prompts, resize=size) for size in (None, 6))
    assert small.conditioning.image_shape == (3, 6, 6)
    expected = [np.asarray(Image.fromarray(image).resize((6, 6))) for image in whole.images]
    assert np.array_equal(small.images, np.stack(expected))


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_prompts_that_lose_their_end_are_counted_by_encoder(
    opened: Any, conditioning_for: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Of one that is too long for every encoder, the end changes nothing."""
    limits = {"text_encoder (T5)": 512}
    if name == "sd3":
        limits = {"text_encoder (CLIP)": 77, "text_encoder_2 (CLIP)": 77,
                  "text_encoder_3 (T5)": 256}  # fmt: skip
    companions = conditioning_for(opened(name), SampleConfig(prompts="digits")).companions
    tokenizers = companions._tokenizers.values()
    for tokenizer, (encoder, limit) in zip(tokenizers, limits.items(), strict=True):
        fits, cut = (
            next(t for n in range(600) if len(tokenizer(t := "q" * n).input_ids) == most)
            for most in (limit, limit + 1)
        )
        companions.tell_cut(["a", fits], f"{name} {encoder} fits")
        assert f"{encoder}, which" not in capsys.readouterr().err
        companions.tell_cut(["a", cut, cut], f"{name} {encoder} cut")
        told = capsys.readouterr().err
        assert "2 of 3 are too long and lose their end, " in told
        assert f"2 in {encoder}, which takes {limit} tokens" in told
        assert "the first is number 2: q" in told
    one, other = (companions.conditions(["q" * 600 + end]) for end in ("", "rst"))
    assert all(torch.equal(one[key], other[key]) for key in one)
