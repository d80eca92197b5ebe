from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.data.images import open_images, to_unit
from deme_cli.diffusion.companions import Companions
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.schedule import FlowSchedule
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.timesteps import TimestepRange
from deme_cli.training.batches import BatchSource, derived_generator
from deme_cli.training.examples import Examples, PixelExamples, name_companions, open_examples

SPAN = TimestepRange(250, 500)
CONFIG = FinetuneConfig(batch_size=8, p=0.3, caption_dropout=0.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_batch_of_pixels_draws_timesteps_then_flips_then_noise_and_nothing_else(
    base: Callable[..., Denoiser],
) -> None:
    data = open_images("digits", shape=(1, 8, 8))
    schedule = base("sd").schedule
    batch = BatchSource(PixelExamples(data), SPAN, schedule, CONFIG, flip=True).batch(5, 1)

    generator = derived_generator(0, SPAN, 5, 1)
    everywhere = torch.rand(8, generator=generator) < 0.3
    uniform = torch.rand(8, generator=generator, dtype=torch.float64)
    t = torch.where(everywhere, (uniform * 1000).long(), 250 + (uniform * 250).long())
    mirrored = torch.rand(8, generator=generator) < 0.5
    assert torch.equal(batch.t, t)
    assert torch.equal(batch.eps, torch.randn(8, 1, 8, 8, generator=generator))
    order = torch.randperm(len(data), generator=derived_generator(0, SPAN, "epoch", 0))
    x0 = to_unit(data.batch(order[48:56].tolist()))  # accumulation is 1: batch 6 of update 5
    assert torch.equal(batch.x0[mirrored], x0[mirrored].flip(-1))
    assert torch.equal(batch.x0[~mirrored], x0[~mirrored])
    assert batch.conditions == {}


def test_latents_take_their_noise_before_eps_and_captions_are_left_out_after_it(
    base: Callable[..., Denoiser], examples: Callable[..., Examples]
) -> None:
    own, schedule = examples("sd"), base("sd").schedule
    source = BatchSource(own, SPAN, schedule, CONFIG, flip=False)
    batch = source.batch(0, 0)
    generator = derived_generator(0, SPAN, 0, 0)
    torch.rand(8, generator=generator)
    torch.rand(8, generator=generator, dtype=torch.float64)
    indices = source._indices(0, 8)
    x0, conditions = own.draw(indices, flip=None, generator=generator)
    assert torch.equal(batch.x0, x0)
    assert torch.equal(batch.eps, torch.randn(x0.shape, generator=generator))
    dropped = torch.rand(8, generator=generator) < 0.5
    assert 0 < dropped.sum() < 8
    tokens, found = conditions["encoder_hidden_states"], batch.conditions["encoder_hidden_states"]
    assert torch.equal(found[~dropped], tokens[~dropped])
    null = own.null()["encoder_hidden_states"]
    assert torch.equal(found[dropped], null.expand_as(tokens)[dropped])

    never = BatchSource(own, SPAN, schedule, replace(CONFIG, caption_dropout=0.0), flip=False)
    assert torch.equal(never.batch(0, 0).conditions["encoder_hidden_states"], tokens)
    assert torch.equal(never.batch(0, 0).eps, batch.eps)


def test_classes_are_left_out_for_the_null_class(
    base: Callable[..., Denoiser], examples: Callable[..., Examples]
) -> None:
    config = replace(CONFIG, caption_dropout=1.0)
    source = BatchSource(examples("dit"), SPAN, base("dit").schedule, config, flip=False)
    assert source.batch(0, 0).conditions["class_labels"].tolist() == [10] * 8


def test_draws_of_a_flow_have_their_times_in_the_range(
    base: Callable[..., Denoiser], examples: Callable[..., Examples]
) -> None:
    schedule = base("sd3").schedule
    assert isinstance(schedule, FlowSchedule)
    config = replace(CONFIG, p=0.0, batch_size=16)
    source = BatchSource(examples("sd3"), SPAN, schedule, config, flip=False)
    t = source.batch(0, 0).t
    times = schedule.times(t)
    assert ((times >= 250) & (times < 500)).all()
    assert not ((t >= 250) & (t < 500)).all()  # the shift moves draws and times apart


def test_without_a_generator_a_draw_is_the_scaled_mean(
    examples: Callable[..., Examples], companions: Callable[..., Companions], captioned: Path
) -> None:
    x0, _ = examples("sd").draw([1, 4], flip=None, generator=None)
    images = to_unit(open_images(str(captioned), shape=(3, 16, 16)).batch([1, 4]))
    with torch.no_grad():
        mean = companions("sd").pipeline.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(x0, mean * 0.5)


def test_mirrored_examples_are_the_latents_of_mirrored_images(
    examples: Callable[..., Examples], companions: Callable[..., Companions], captioned: Path
) -> None:
    flip = torch.tensor([True, False])
    x0, _ = examples("sd").draw([1, 4], flip=flip, generator=None)
    images = to_unit(open_images(str(captioned), shape=(3, 16, 16)).batch([1, 4]))
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


def test_another_column_is_another_caption_and_another_fingerprint(
    examples: Callable[..., Examples], companions: Callable[..., Companions]
) -> None:
    usual, other = examples("sd"), examples("sd", captions="other")
    assert usual.fingerprint != other.fingerprint
    found = other.draw([3], flip=None, generator=None)[1]
    wanted = companions("sd").conditions(["another caption 3"])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("name", "images", "kind", "word"),
    [
        ("sd", {"captions": "nothing"}, ArtifactError, "no column nothing"),
        ("sd", {"captions": "label"}, ArtifactError, "expected text"),
        ("sd", {"resolution": 17}, ConfigError, "resolution = 17"),
        ("dit", {"captions": "text"}, ArtifactError, "20 classes, this model knows 10"),
    ],
)
def test_images_that_a_model_cannot_learn_from_are_refused(
    examples: Callable[..., Examples], name: str, images: dict, kind: type, word: str
) -> None:
    with pytest.raises(kind, match=word):
        examples(name, **images)


def test_a_missing_or_an_empty_caption_names_its_image(
    captioned: Path, tmp_path: Path, companions: Callable[..., Companions]
) -> None:
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(captioned, folder)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    images = DataConfig(source=str(folder))
    (folder / "metadata.jsonl").write_text("\n".join(lines[:4] + lines[5:]))
    with pytest.raises(ArtifactError, match=r"missing for 1 of 20 images, the first .*04\.png"):
        open_examples(images, companions("sd"), split="train")
    lines[7] = lines[7].replace("a photo of thing number 7", " ")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ArtifactError, match=r"missing for 1 of 20 images, the first .*07\.png"):
        open_examples(images, companions("sd"), split="train")
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="empty"):
        open_examples(images, companions("sd"), split="train")


def test_a_base_imported_without_its_pipeline_gets_its_parts_from_another(
    base: Callable[..., Denoiser], pipelines: Callable[..., Path], tmp_path: Path
) -> None:
    known = base("sd").record
    alone = replace(known, companions={}, source=str(tmp_path))
    assert name_companions(alone, str(pipelines("sd"))).companions == known.companions
    with pytest.raises(MissingError, match="--pipeline"):
        name_companions(alone, None)
