from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.companions import Companions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.training.examples import Examples, name_companions
from deme_cli.training.setup import random_denoiser


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_a_generator_a_draw_is_the_scaled_mean_of_images_mirrored_where_asked(
    examples: Callable[..., Examples], companions: Callable[..., Companions], captioned: Path
) -> None:
    images = to_unit(open_images(str(captioned), shape=(3, 16, 16)).batch([1, 4]))
    for flip in (None, torch.tensor([True, False])):
        x0, _ = examples("sd").draw([1, 4], flip=flip, generator=None)
        if flip is not None:
            images[0] = images[0].flip(-1)
        with torch.no_grad():
            mean = companions("sd").pipeline.vae.encode(images).latent_dist.mean
        torch.testing.assert_close(x0, mean * 0.5)


def test_a_random_crop_is_told_to_sdxl_and_a_mirrored_one_from_the_other_side(
    examples: Callable[..., Examples], captioned: Path
) -> None:
    own = examples("sdxl", crop="random")
    crops = torch.rand(4, 2, generator=seeded(3))
    plain = own.draw([0, 1, 2, 3], flip=None, generator=seeded(3))[1]["time_ids"]
    flip = torch.tensor([True, True, False, False])
    mirrored = own.draw([0, 1, 2, 3], flip=flip, generator=seeded(3))[1]["time_ids"]
    for index in range(4):
        with Image.open(captioned / f"{index:02d}.png") as image:
            width, height = image.size
        scale = max(16 / height, 16 / width)
        spare_top, spare_left = height * scale - 16, width * scale - 16
        x, y = crops[index].tolist()
        corner = [round(spare_top * y), round(spare_left * x)]
        assert plain[index].tolist() == [height, width, *corner, 16, 16]
        x = 1 - x if flip[index] else x
        assert mirrored[index].tolist()[2:4] == [corner[0], round(spare_left * x)]


def test_random_crops_are_drawn_from_the_generator_and_not_for_held_out_images(
    examples: Callable[..., Examples],
) -> None:
    own = examples("sd", crop="random")
    first, again, other = (
        own.draw([0, 1, 2], flip=None, generator=seeded(seed))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    held_out = examples("sd", crop="random", split="held-out")
    assert held_out.crop == "centre"
    centre = examples("sd", split="held-out")
    one, two = (each.draw([0], flip=None, generator=None)[0] for each in (held_out, centre))
    assert torch.equal(one, two)


def test_a_column_of_captions_is_chosen_and_one_that_a_model_cannot_learn_from_refused(
    examples: Callable[..., Examples], companions: Callable[..., Companions]
) -> None:
    usual, other = examples("sd"), examples("sd", captions="other")
    assert usual.fingerprint != other.fingerprint
    found = other.draw([3], flip=None, generator=None)[1]
    torch.testing.assert_close(found, companions("sd").conditions(["another caption 3"]))
    for name, captions, word in [
        ("sd", "label", "expected text"),
        ("dit", "text", "20 classes, this model knows 10"),
    ]:
        with pytest.raises(ArtifactError, match=word):
            examples(name, captions=captions)


def test_a_base_imported_without_its_pipeline_gets_its_parts_from_another(
    base: Callable[..., Denoiser], pipelines: Callable[..., Path], tmp_path: Path
) -> None:
    known = base("sd").record
    alone = replace(known, companions={}, source=str(tmp_path))
    assert name_companions(alone, str(pipelines("sd"))).companions == known.companions
    with pytest.raises(MissingError, match="--pipeline"):
        name_companions(alone, None)


def test_a_base_of_ones_own_takes_its_frozen_parts_from_a_pipeline(
    pipelines: Callable[..., Path], base: Callable[..., Denoiser], tmp_path: Path
) -> None:
    known, folder = base("sd").record, tmp_path / "frozen"
    shutil.copytree(pipelines("sd"), folder)
    shutil.rmtree(folder / "unet")  # nobody needs the denoiser of the pipeline
    description = {"model": known.model_config, "scheduler": known.scheduler_config}
    record = random_denoiser(description, 3, device="cpu", pipeline=str(folder)).record
    assert (record.companions, record.source) == (known.companions, str(folder))
    with pytest.raises(ConfigError, match=r"needs vae, text_encoder, tokenizer: .*--pipeline"):
        random_denoiser(description, 0, device="cpu")
    with pytest.raises(MissingError, match="--pipeline"):
        random_denoiser(description, 0, device="cpu", pipeline=str(tmp_path))
