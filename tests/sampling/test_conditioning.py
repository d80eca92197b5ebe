"""What is drawn: prompts, classes, sizes and guidance; what does not fit a model is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER, collect_images, largest_difference

from deme_cli.artifacts import BaseRecord
from deme_cli.config import SampleConfig
from deme_cli.data.prompts import PromptSet
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.sampling import sampler as sampler_module
from deme_cli.sampling.conditioning import (
    choose_shown,
    conditioning_of,
    open_conditioning,
    protocol_card,
)
from deme_cli.sampling.ensemble import SamplingExpert, single
from deme_cli.sampling.sampler import sample_images
from deme_cli.timesteps import split_uniform

Pipelines = Callable[..., Path]
PIXELS = BaseRecord(
    source="", model_config=TINY_MODEL, scheduler_config=TINY_SCHEDULER, num_train_timesteps=100
)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.csv"
    path.write_text(
        "prompt,class,German\na fox,4,ein Fuchs\na cat,7,eine Katze\na dog,1,ein Hund\n"
    )
    return str(path)


def test_prompts_fix_what_images_show_and_how_many_they_are(prompts: str) -> None:
    num, shown, classes, card = choose_shown("text", None, SampleConfig(prompts=prompts))
    assert (num, shown, classes) == (3, ["a fox", "a cat", "a dog"], [4, 7, 1])
    twice = choose_shown("text", None, SampleConfig(prompts=prompts, per_prompt=2, num=6))
    assert twice[1] == [prompt for prompt in shown for _ in range(2)]
    column = choose_shown("text", None, SampleConfig(prompts=prompts, prompt_column="German"))
    assert column[1] == ["ein Fuchs", "eine Katze", "ein Hund"]
    assert column[3]["prompts_sha256"] != card["prompts_sha256"]
    one = choose_shown("text", None, SampleConfig(prompts="text:a red fox", num=3))
    assert one[1] == ["a red fox"] * 3
    given = PromptSet("captions", ("a", "b"), cycles=True)
    assert choose_shown("text", None, SampleConfig(num=3), given)[1] == ["a", "b", "a"]


def test_image_i_has_class_i_mod_k() -> None:
    found = choose_shown("class", 10, SampleConfig(num=12))
    assert found == (12, None, [*range(10), 0, 1], {"classes": "0-9"})
    assert choose_shown("class", 10, SampleConfig(num=4, classes="7,0-1"))[2] == [7, 0, 1, 7]
    assert choose_shown("class", 10, SampleConfig())[0] == 64
    assert choose_shown("nothing", None, SampleConfig())[0] == 64
    spaced = choose_shown("class", 10, SampleConfig(num=1, classes="3, 0-2"))
    assert spaced[2:] == ([3], {"classes": "3,0-2"})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("text", {}, "--prompts FILE"),
    ("text", {"prompts": "text:a", "classes": "1"}, "classes = '1'"),
    ("class", {"prompts": "text:a"}, "not prompts"),
    ("class", {"per_prompt": 2}, "per_prompt = 2"),
    ("class", {"classes": "0,10"}, "class 10 is not among the 10"),
    ("class", {"classes": "3-1"}, "as in 0,3,7"),
    ("class", {"classes": "fox"}, "as in 0,3,7"),
    ("nothing", {"prompts": "text:a"}, "prompts = 'text:a'"),
    ("nothing", {"classes": "1"}, "classes = '1'"),
    ("nothing", {"prompt_column": "text"}, "prompt_column"),
    ("nothing", {"per_prompt": 3}, "per_prompt = 3"),
    ("nothing", {"guidance": 7.5}, "guidance = 7.5"),
    ("nothing", {"guidance": 0.0}, "guidance = 0"),
]


def test_what_a_model_cannot_follow_is_refused_by_name() -> None:
    for wants, settings, fault in REFUSED:
        with pytest.raises(ConfigError, match=fault):
            choose_shown(wants, 10, SampleConfig(**settings))


def test_a_guidance_of_one_is_no_guidance_for_pixels() -> None:
    conditioning = open_conditioning(PIXELS, SampleConfig(guidance=1.0))
    assert conditioning.guidance is None
    assert conditioning.conditions(0, 4) == {}
    shapes = conditioning.image_shape, conditioning.drawn_shape, conditioning.latent_shape
    assert shapes == ((1, 8, 8),) * 3


@pytest.mark.parametrize(
    ("name", "build", "default", "is_paired"),
    [
        ("sdxl", {}, 5.0, True),
        ("wan", {}, 5.0, True),
        ("dit", {}, 4.0, True),
        ("flux", {}, 3.5, False),
        ("flux", {"distilled": False}, 1.0, False),
    ],
)
def test_the_guidance_is_that_of_the_models_pipeline_unless_given(
    opened: Any, conditioning_for: Any, name: str, build: dict[str, Any], default: float,
    is_paired: bool,
) -> None:  # fmt: skip
    denoiser = opened(name, **build)
    config = SampleConfig(num=2, prompts=None if name == "dit" else "text:a fox")
    conditioning = conditioning_for(denoiser, config)
    assert (conditioning.guidance, conditioning.is_paired) == (default, is_paired)
    card = protocol_card([denoiser.record], config, conditioning=conditioning)
    assert card["guidance"] == default
    assert card["companions"] == denoiser.record.companions
    assert card["resolution"] == conditioning.drawn_shape[1]
    told = conditioning.conditions(0, 2)
    assert {len(value) for value in told.values()} == {4 if is_paired else 2}
    if name != "flux":
        below = conditioning_for(denoiser, replace(config, guidance=0.0))  # as in diffusers: none
        assert (below.guidance, below.is_paired) == (1.0, False)


def test_the_card_tells_what_the_images_show(opened: Any, prompts: str) -> None:
    denoiser = opened("sd")
    config = SampleConfig(prompts=prompts, per_prompt=2, resolution=24, resize=12)
    card = protocol_card([denoiser.record], config)
    assert card["prompts"] == {"source": prompts, "column": None, "n": 3, "template": None}
    assert len(card["prompts_sha256"]) == 64
    assert (card["per_prompt"], card["classes"], card["num"]) == (2, None, 6)
    assert (card["resolution"], card["resize_to"]) == (24, 12)
    assert (card["sampler"], card["forwards"]) == ("pndm", 102)
    assert protocol_card([opened("dit").record], SampleConfig())["classes"] == "0-9"
    flow = protocol_card([opened("sd3").record], SampleConfig(prompts="text:a", steps=5))
    names = ("sampler", "prediction_type", "spacing", "eta", "clip_sample", "forwards")
    assert [flow[name] for name in names] == ["euler", "flow", None, None, None, 10]
    pixels = protocol_card([PIXELS], SampleConfig())
    names = ("guidance", "prompts", "prompts_sha256", "per_prompt", "classes", "resolution")
    assert [pixels[name] for name in (*names, "resize_to", "companions")] == [None] * 8


@pytest.mark.parametrize("name", ["sdxl", "dit"])
def test_images_do_not_depend_on_the_batch_size_and_go_on_from_any_batch(
    opened: Any, conditioning_for: Any, prompts: str, name: str
) -> None:
    denoiser = opened(name)
    shown = {} if name == "dit" else {"prompts": prompts}
    config = SampleConfig(num=3, steps=4, resolution=16, batch_size=2, **shown)
    about = {"conditioning": conditioning_for(denoiser, config)}
    whole = collect_images(single(denoiser), replace(config, batch_size=3), **about)
    in_pairs = collect_images(single(denoiser), config, **about)
    assert largest_difference(whole, in_pairs) <= 1
    rest = collect_images(single(denoiser), config, first=2, **about)
    assert np.array_equal(rest, in_pairs[2:])


@pytest.mark.parametrize(("name", "sampler"), [("sd", "heun"), ("flux", "dpm++")])
def test_identical_experts_draw_the_guided_images_of_one_model(
    opened: Any, conditioning_for: Any, name: str, sampler: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    denoiser = opened(name)
    config = SampleConfig(
        num=2, batch_size=1, steps=5, sampler=sampler, resolution=16, prompts="text:a fox",
    )  # fmt: skip
    conditioning = conditioning_for(denoiser, config)
    one = collect_images(single(denoiser), config, conditioning=conditioning)
    experts = [SamplingExpert(span, lambda: denoiser) for span in split_uniform(3, 1000)]
    monkeypatch.setattr(sampler_module, "fit_in_memory", lambda denoiser, num: False)
    monkeypatch.setattr(sampler_module, "CHUNK_BYTES", 1)
    assert np.array_equal(collect_images(experts, config, conditioning=conditioning), one)


def test_both_evaluations_of_a_step_go_to_the_expert_of_their_time(
    opened: Any, conditioning_for: Any
) -> None:
    denoiser = opened("sd3")
    asked: list[list[float]] = [[] for _ in range(4)]

    def listening(index: int) -> Denoiser:
        copy = open_denoiser(denoiser.record.source)
        copy.network.register_forward_pre_hook(
            lambda _, __, given: asked[index].append(float(given["timestep"][0])), with_kwargs=True
        )
        return copy

    experts = [
        SamplingExpert(span, lambda index=index: listening(index))
        for index, span in enumerate(split_uniform(4, 1000))
    ]
    config = SampleConfig(num=1, steps=8, sampler="heun", prompts="text:a fox")
    collect_images(experts, config, conditioning=conditioning_for(denoiser, config))
    assert asked[3][0] == 1000  # T itself belongs to the last range
    assert sum(map(len, asked)) == 15
    for index, times in enumerate(asked):
        assert {min(int(t) // 250, 3) for t in times} == {index}


def test_images_are_decoded_a_few_at_a_time(
    opened: Any, conditioning_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = opened("sd")
    config = SampleConfig(num=3, steps=2, prompts="text:a fox")
    conditioning = conditioning_for(denoiser, config)
    together = collect_images(single(denoiser), config, conditioning=conditioning)
    sizes: list[int] = []
    decode = type(conditioning.companions).decode

    def count(companions: Any, x0: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x0))
        return decode(companions, x0)

    monkeypatch.setattr(type(conditioning.companions), "decode", count)
    monkeypatch.setattr(sampler_module, "DECODED_PIXELS", 2 * 16 * 16)
    apart = collect_images(single(denoiser), config, conditioning=conditioning)
    assert largest_difference(apart, together) <= 1
    assert sizes == [2, 1]


def test_other_frozen_parts_are_told_before_anything_is_denoised(opened: Any) -> None:
    denoiser = opened("dit")
    other = replace(denoiser, record=replace(denoiser.record, companions={"vae": "0" * 64}))
    config = SampleConfig(num=1, steps=2)
    with pytest.raises(ArtifactError, match="not the vae that the base was imported with"):
        next(iter(sample_images(single(other), config)))
    with pytest.raises(MissingError, match="nowhere"):
        open_conditioning(denoiser.record, config, pipeline="nowhere")


def test_half_precision_draws_nearly_the_same_images(opened: Any, pipelines: Any) -> None:
    config = SampleConfig(num=2, steps=4, prompts="text:a fox")
    images = collect_images(single(opened("sd3")), config)
    half = open_denoiser(str(pipelines("sd3")), dtype="bf16")
    conditioning = conditioning_of(half, config)
    assert conditioning.conditions(0, 1)["encoder_hidden_states"].dtype == torch.bfloat16
    narrow = collect_images(single(half), config, conditioning=conditioning)
    assert np.abs(narrow - images.astype(float)).mean() < 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdxl", "dit", "flux", "wan"])
def test_a_gpu_draws_the_guided_images_of_the_cpu(pipelines: Any, name: str) -> None:
    config = SampleConfig(num=2, steps=4, resolution=16)
    config = config if name == "dit" else replace(config, prompts="text:a fox")
    models = [open_denoiser(str(pipelines(name)), device=device) for device in ("cpu", "cuda")]
    on_cpu, on_gpu = (collect_images(single(model), config) for model in models)
    assert largest_difference(on_gpu, on_cpu) <= 2
