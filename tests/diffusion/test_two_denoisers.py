"""Wan 2.2 A14B: two transformers that divide the timesteps are a base and two experts of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import collect_images
from tiny_pipelines import BUILDERS, FACTOR, LATENT
from typer.testing import Result

from deme_cli.artifacts import fingerprint, load_tensors, read_record
from deme_cli.config import SampleConfig, SplitConfig
from deme_cli.diffusion.denoiser import build_network
from deme_cli.diffusion.foreign import _below_prefix
from deme_cli.diffusion.model_files import own_ranges
from deme_cli.errors import DemeError
from deme_cli.files import Header, layout_of
from deme_cli.run_file import read_run_file
from deme_cli.sampling import sampler as sampler_module
from deme_cli.sampling.conditioning import conditioning_of
from deme_cli.sampling.ensemble import open_ensemble
from deme_cli.sampling.sampler import Batch, finish_images, seeded_noise
from deme_cli.timesteps import TimestepRange, route

pytestmark = pytest.mark.skipif(
    "wan" not in BUILDERS
    or "transformer_2" not in signature(diffusers.WanPipeline.__init__).parameters,
    reason="diffusers before 0.35",
)
Deme = Callable[..., Result]
EXPERTS = [Path("ft_1of2.safetensors"), Path("ft_2of2.safetensors")]
PUBLISHED = {  # the transformers of Wan-AI/Wan2.2-T2V-A14B-Diffusers
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 40, "attention_head_dim": 128,
    "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824,
    "num_layers": 40,
}  # fmt: skip


@pytest.fixture
def folder(pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Wan 2.2 of its own, beside the current folder."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return Path(shutil.copytree(pipelines("wan", boundary=0.5), tmp_path / "wan22"))


def change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


def weights_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_tensors(folder / part / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("choice", [None, "low", "high", "mean"])
def test_split_makes_a_base_and_two_experts(folder: Path, deme: Deme, choice: str | None) -> None:
    result = deme("split", folder, "--data", "digits", *(["--as-base", choice] if choice else []))
    assert result.exit_code == 0, result.exception
    low, high = (weights_of(folder, part) for part in ("transformer_2", "transformer"))
    mean = {name: (low[name] + high[name]) / 2 for name in low}
    base = read_record(Path("base.safetensors"), "base")
    wanted = {"high": high, "mean": mean}.get(str(choice), low)
    assert base.fingerprint == fingerprint(wanted)
    for path, weights, span in zip(EXPERTS, (low, high), ([0, 500], [500, 1000]), strict=True):
        record = read_record(path, "expert")
        assert record.range == span
        assert (record.base, record.fingerprint) == (base.fingerprint, fingerprint(weights))
    settings = read_run_file(None).settings(SplitConfig)
    assert (settings.n, settings.ranges) == (2, ["0:500", "500:1000"])
    assert (
        deme("import", folder / "transformer", "--range", "2/2", "-o", "x.safetensors").exit_code
        == 0
    )
    assert read_record(Path("x.safetensors")).fingerprint == fingerprint(high)
    assert deme("merge", *EXPERTS, "-w", "0,0").exit_code == 0
    assert read_record(Path("merged.safetensors")).fingerprint == base.fingerprint


def draw(experts: list[Path], config: SampleConfig, monkeypatch: Any) -> tuple[Any, torch.Tensor]:
    """The noise that an ensemble's images begin with, and their latents."""
    kept: list[torch.Tensor] = []

    def keep(batch: Batch, *arguments: Any) -> Any:
        kept.append(batch.x_t)
        return finish_images(batch, *arguments)

    monkeypatch.setattr(sampler_module, "finish_images", keep)
    opened = open_ensemble(experts)
    about = conditioning_of(opened[0].load(), config)
    collect_images(opened, config, conditioning=about)
    return seeded_noise(config.seed, about.latent_shape, range(about.num)), torch.cat(kept)


def theirs(
    folder: Path | str, noise: torch.Tensor, prompts: list[str], **options: Any
) -> torch.Tensor:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    size = LATENT * FACTOR
    return pipeline(
        prompts, latents=noise[:, :, None], num_frames=1, height=size, width=size,
        output_type="latent", **options,
    ).frames[:, :, 0]  # fmt: skip


@pytest.mark.parametrize(("scheduler", "guidance"), [("unipc", 5.0), ("euler", 1.0)])
def test_an_ensemble_draws_what_the_pipeline_draws(
    folder: Path, deme: Deme, monkeypatch: Any, scheduler: str, guidance: float
) -> None:
    if scheduler == "euler":
        own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        own.save_pretrained(folder / "scheduler")
        change_index(folder, scheduler=["diffusers", type(own).__name__])
    else:
        own = diffusers.UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    own.set_timesteps(6)
    boundary = int(own.timesteps[3])  # a time at the boundary itself is of the high noise
    change_index(folder, boundary_ratio=boundary / 1000)
    assert deme("split", folder, "--data", "digits").exit_code == 0
    prompts = ["a red fox", "two cats"]
    Path("prompts.txt").write_text("\n".join(prompts))
    config = SampleConfig(
        prompts="prompts.txt", steps=6, seed=3, guidance=guidance, sampler=scheduler,
        resolution=LATENT * FACTOR,
    )  # fmt: skip
    noise, ours = draw(EXPERTS, config, monkeypatch)
    told = {"num_inference_steps": 6, "guidance_scale": guidance}
    expected = theirs(folder, noise, prompts, **told)
    assert ours.std() > 0.5
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5)
    one = shutil.copytree(folder, "one")
    change_index(Path(one), transformer_2=[None, None], boundary_ratio=None)
    assert not torch.allclose(ours, theirs(Path(one), noise, prompts, **told), atol=1e-3)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "between two": ("boundary_ratio = 0.5005: expected a share", {"boundary_ratio": 0.5005}),
    "none": ("boundary_ratio = 1.5: expected a share", {"boundary_ratio": 1.5}),
    "no boundary": ("one of transformer_2 and boundary_ratio without", {"boundary_ratio": None}),
    "one alone": ("one of transformer_2 and boundary_ratio without", {"transformer_2": [None] * 2}),
    "other": ("a WanImageToVideoPipeline of two", {"_class_name": "WanImageToVideoPipeline"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_pipelines_of_two_are_refused(folder: Path, deme: Deme, name: str) -> None:
    words, changes = REFUSED[name]
    change_index(folder, **changes)
    error = deme("split", folder).exception
    assert isinstance(error, DemeError), repr(error)
    assert (error.exit_code, list(Path().iterdir())) == (4, [])
    assert words in str(error)


@pytest.mark.parametrize(
    ("exit_code", "words", "arguments"),
    [
        (4, "`deme split` makes a base and two experts", ("sample", "../wan22", "-n", 1)),
        (4, "../wan22/transformer or ../wan22/tr", ("import", "../wan22", "--range", "1/3")),
        (2, "divide the timesteps, 0:500, 500:1000", ("split", "../wan22", "-n", 3)),
        (2, "--as-base both: expected low, high, mean", ("split", "../wan22", "--as-base", "both")),
        (2, "has one", ("split", "digits", "--as-base", "low")),
    ],
)  # fmt: skip
def test_what_one_model_is_wanted_for_says_what_two_are_for(
    folder: Path, deme: Deme, exit_code: int, words: str, arguments: tuple
) -> None:
    if arguments[0] == "import":
        deme("split", folder, "--data", "digits")
    error = deme(*arguments).exception
    assert isinstance(error, DemeError), repr(error)
    assert error.exit_code == exit_code, error
    assert words in str(error)


def test_transformers_of_another_network_are_refused(folder: Path, deme: Deme) -> None:
    config = json.loads((folder / "transformer_2/config.json").read_text())
    build_network({**config, "num_layers": 1}).save_pretrained(folder / "transformer_2")
    error = deme("split", folder).exception
    assert "transformer_2/config.json: num_layers = 1, the base has 2" in str(error)


def test_the_published_sizes_fit(tmp_path: Path) -> None:
    with torch.device("meta"):
        weights = build_network(PUBLISHED).state_dict()
    assert sum(tensor.numel() for tensor in weights.values()) == 14_288_491_584
    specs = {spec.name: spec for spec in layout_of(weights)}
    below = {f"model.{name}": tensor for name, tensor in weights.items()}
    found, prefix = _below_prefix(below, Header(Path("base"), specs, {}), Path("x"))
    assert (found.keys(), prefix) == (weights.keys(), "model.")
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875,
             "transformer_2": ["diffusers", "WanTransformer3DModel"]}  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    ranges = own_ranges(tmp_path)
    assert ranges == [TimestepRange(0, 875), TimestepRange(875, 1000)]
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0
    )
    scheduler.set_timesteps(40)
    for t in scheduler.timesteps:
        assert route(t.item(), ranges) == int(t >= 0.875 * 1000)


def test_exported_pipelines_draw_what_deme_draws(
    folder: Path, deme: Deme, monkeypatch: Any
) -> None:
    assert deme("split", folder, "--data", "digits").exit_code == 0
    assert deme("merge", *EXPERTS, "-w", "0.5,0.5").exit_code == 0
    Path("prompts.txt").write_text("a red fox")
    config = SampleConfig(prompts="prompts.txt", steps=4, sampler="unipc", resolution=16)
    noise, ours = draw(EXPERTS, config, monkeypatch)
    result = deme("export", *reversed(EXPERTS), "two")
    assert result.exit_code == 0, result.exception
    assert "only" not in result.stderr
    assert deme("export", "merged.safetensors", "one").exit_code == 0
    told = {"num_inference_steps": 4, "guidance_scale": 5.0}
    assert torch.equal(*(theirs(place, noise, ["a red fox"], **told) for place in (folder, "two")))
    assert torch.allclose(theirs("two", noise, ["a red fox"], **told), ours, rtol=0, atol=1e-5)
    one = diffusers.DiffusionPipeline.from_pretrained("one")
    assert (one.transformer_2, one.config.boundary_ratio) == (None, None)
    merged = fingerprint(load_tensors(Path("merged.safetensors")))
    assert fingerprint(one.transformer.state_dict()) == merged
    card = Path("two/README.md").read_text()
    assert "## Training, timesteps 0:500" in card
    assert "| range of timesteps | 500:1000, 0:500 |" in card
    assert str(folder) not in card


def test_two_experts_of_a_wan_2_1_become_a_pipeline_of_two(
    pipelines: Callable[..., Path], folder: Path, deme: Deme
) -> None:
    assert deme("split", pipelines("wan"), "-n", 2, "--data", "digits").exit_code == 0
    for part, span in (("transformer_2", "0:300"), ("transformer", "300:1000")):
        path = f"{part}.safetensors"
        assert deme("import", folder / part, "--range", span, "-o", path).exit_code == 0
    ours = ("transformer.safetensors", "transformer_2.safetensors")
    assert deme("export", *ours, "two").exit_code == 0
    pipeline = diffusers.DiffusionPipeline.from_pretrained("two")
    assert pipeline.config.boundary_ratio == 0.3
    for part in ("transformer", "transformer_2"):
        own = getattr(pipeline, part).state_dict()
        assert fingerprint(own) == fingerprint(weights_of(folder, part))
    deme("import", folder / "transformer", "--range", "1/2")
    for words, arguments in (
        ("two experts cover timesteps 0:300", (ours[1], EXPERTS[0])),
        ("expected one, or two experts of one base", (*ours, EXPERTS[0])),
        ("a LoRA is the difference of one model", (*ours, "--lora", 2)),
    ):
        assert words in str(deme("export", *arguments, "out").exception)


def test_experts_of_other_models_are_not_a_pipeline_of_two(run_folder: Path, deme: Deme) -> None:
    weights = {"base.safetensors": "0:50", "ft_1of4.safetensors": "50:100"}
    for index, (path, span) in enumerate(weights.items()):
        deme("import", path, "--range", span, "-o", f"{index}.safetensors")
    error = deme("export", "0.safetensors", "1.safetensors", "out").exception
    assert "a DDPMPipeline of diffusers" in str(error)


def test_what_only_the_pipeline_can_do_says_so(deme: Deme) -> None:
    for option, words in (("--num-frames", "one frame"), ("--guidance-scale-2", "all experts")):
        error = str(deme("ensemble-sample", *EXPERTS, option, 3).exception)
        assert f"no option {option}" in error
        assert words in error
