"""Single files: every name and byte of one comes back, and diffusers reads them as its folders."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file
from single_files import FULL, PREFIX, TINY, write_single_file

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.diffusion.single_file import _backwards, _published, in_diffusers_names
from deme_cli.errors import ArtifactError, DemeError, MissingError
from deme_cli.fetch import sha256_of
from deme_cli.files import Header, TensorSpec, read_header

COUNTS = {  # tensors of the published files, and parameters in diffusers
    "Stable Diffusion 1": (686, 686), "Stable Diffusion 2": (686, 686), "SDXL": (1680, 1680),
    "Stable Diffusion 3 medium": (491, 683), "Stable Diffusion 3.5 medium": (665, 909),
    "Stable Diffusion 3.5 large": (923, 1227), "Flux schnell": (776, 1156),
    "Flux dev": (780, 1160), "Wan 1.3B": (825, 825), "Wan 14B": (1095, 1095),
}  # fmt: skip
QUICK = ("Stable Diffusion 1", "SDXL", "Wan 1.3B")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converter for a Flux that is 16 wide: 3072 is written in its code."""
    entry = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    code = entry["checkpoint_mapping_fn"].__code__
    consts = tuple(16 if one == 3072 else one for one in code.co_consts)
    own = types.FunctionType(
        code.replace(co_consts=consts), entry["checkpoint_mapping_fn"].__globals__
    )
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", own)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS]
)
def test_the_network_of_a_published_file_is_known_and_each_of_its_rows_has_its_place(
    name: str,
) -> None:
    prefix = "" if name.startswith(("Flux", "Wan")) else PREFIX
    specs = {prefix + n: TensorSpec(prefix + n, "BF16", tuple(s)) for n, s in FULL[name]()}
    told = {"modelspec.prediction_type": "epsilon"}
    denoiser, scheduler, notes = _published(Header(Path("file"), specs, told))
    assert (len(specs), len(denoiser.shapes)) == COUNTS[name]
    assert f"configs of {name} as published" in notes[0]
    assert scheduler["num_train_timesteps"] == 1000
    assert _backwards(denoiser, Header(Path("file"), specs, told)).keys() == specs.keys()


@pytest.mark.parametrize("name", TINY)
def test_a_file_goes_in_and_comes_out_byte_for_byte(
    name: str, pipelines: Callable, deme: Callable, narrow_flux: None
) -> None:
    source = pipelines(name)
    file = write_single_file(source, name, Path("model.safetensors"))
    done = deme("split", file, "--pipeline", source, "-n", 2)
    assert done.exit_code == 0, done.output
    record = read_record(Path("base.safetensors"), "base")
    assert record.single_file == {"path": str(file.resolve()), "sha256": sha256_of(file)}
    folder = source / ("unet" if "sd" in name[:4] and name != "sd3" else "transformer")
    theirs = load_file(folder / "diffusion_pytorch_model.safetensors")
    own = load_tensors(Path("base.safetensors"))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n].to(t.dtype)) for n, t in own.items())
    done = deme("export", "base.safetensors", "out.safetensors", "--single-file")
    assert done.exit_code == 0, done.output
    before, after = load_file(file), load_file("out.safetensors")
    assert list(before) == list(after)
    assert all(t.dtype == after[n].dtype and torch.equal(t, after[n]) for n, t in before.items())
    told = read_header(Path("out.safetensors")).metadata
    assert told["author"] == "somebody"
    header_size = int.from_bytes(Path("out.safetensors").read_bytes()[:8], "little") + 8
    tensors = Path("out.safetensors").read_bytes()[header_size:]
    assert told["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert deme("inspect", "--verify", "out.safetensors").exit_code == 0
    kind = getattr(diffusers, record.model_config["_class_name"])
    network = kind.from_single_file("out.safetensors", config=str(folder), local_files_only=True)
    assert all(torch.equal(t.float(), own[n].float()) for n, t in network.state_dict().items())


def test_frozen_parts_are_those_of_the_file_and_a_merge_changes_the_denoiser_alone(
    pipelines: Callable, deme: Callable
) -> None:
    source = pipelines("sd")
    file = write_single_file(source, "sd", Path("whole.safetensors"), whole=True)
    done = deme("split", file, "--pipeline", source, "-n", 2)
    assert done.exit_code == 0, done.output
    base = read_record(Path("base.safetensors"), "base")
    assert base.source == str(Path("base.pipeline").resolve())
    assert f"{file.resolve()}: UNet2DConditionModel" in done.stderr
    shown = " ".join(deme("inspect", "base.safetensors").stdout.split())
    assert f" source {file.resolve()} " in shown
    assert f" frozen parts {base.source} " in shown
    for part in ("vae", "text_encoder"):
        held = load_file(next(Path("base.pipeline", part).glob("*.safetensors")))
        theirs = load_file(next((source / part).glob("*.safetensors")))
        for name, tensor in held.items():
            rounded = theirs[name] if "norm" in name else theirs[name].to(torch.bfloat16)
            assert torch.equal(tensor, rounded.to(tensor.dtype)), (part, name)
    moved = {n: t + 0.01 for n, t in load_tensors(Path("base.safetensors")).items()}
    write_artifact(Path("moved.safetensors"), moved, base)
    assert deme("export", "moved.safetensors", "out.safetensors", "--single-file").exit_code == 0
    before, after = load_file(file), load_file("out.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith(PREFIX), name
    assert deme("export", "moved.safetensors", "folder").exit_code == 0
    assert "| starting point | whole.safetensors |" in Path("folder/README.md").read_text()
    whole = diffusers.DiffusionPipeline.from_pretrained("folder")
    single = diffusers.StableDiffusionPipeline.from_single_file(
        "out.safetensors", config="folder", local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(whole, part).state_dict()
        for name, tensor in getattr(single, part).state_dict().items():
            assert torch.equal(tensor.float(), expected[name].float()), (part, name)


def test_an_expert_comes_from_a_single_file_as_from_its_folder(
    pipelines: Callable, deme: Callable
) -> None:
    source = pipelines("sd")
    file = write_single_file(source, "sd", Path("f.safetensors"), whole=True)
    assert deme("split", source, "-n", 2, "--save-dtype", "bf16").exit_code == 0
    done = deme("import", file, "--range", "1/2")
    assert done.exit_code == 0, done.output
    expert, base = (read_record(Path(f"{n}.safetensors")) for n in ("ft_1of2", "base"))
    assert expert.fingerprint == base.fingerprint
    assert expert.imported["form"] == "single file"
    tensors = load_file(file)
    torch.save({"state_dict": tensors, "global_step": 3}, "f.ckpt")
    assert deme("import", "f.ckpt", "--range", "2/2").exit_code == 0
    assert read_record(Path("ft_2of2.safetensors")).fingerprint == base.fingerprint
    unet = diffusers.UNet2DConditionModel.from_pretrained(source / "unet")
    weights = in_diffusers_names(tensors, {**unet.config, "_class_name": type(unet).__name__}, "f")
    assert all(
        torch.equal(weights[n], t.to(weights[n].dtype)) for n, t in unet.state_dict().items()
    )


def test_float8_is_kept_as_bfloat16_and_refused_where_it_is_scaled(
    pipelines: Callable, deme: Callable
) -> None:
    source = pipelines("wan")
    tensors = load_file(write_single_file(source, "wan", Path("f.safetensors")))
    small = {n: t if "norm" in n else t.to(torch.float8_e4m3fn) for n, t in tensors.items()}
    save_file(small, "f8.safetensors")
    done = deme("split", "f8.safetensors", "--pipeline", source)
    assert "float8_e4m3fn is kept as torch.bfloat16" in done.stderr
    assert deme("export", "base.safetensors", "out.safetensors", "--single-file").exit_code == 0
    after = load_file("out.safetensors")
    assert all(torch.equal(t.to(after[n].dtype), after[n]) for n, t in small.items())
    save_file({**small, "scaled_fp8": torch.zeros(2)}, "scaled.safetensors")
    error = deme("split", "scaled.safetensors", "--pipeline", source, "-o", "a").exception
    assert isinstance(error, ArtifactError)
    assert "scaled_fp8" in str(error)


def test_what_cannot_be_known_or_does_not_fit_is_told(pipelines: Callable, deme: Callable) -> None:
    source = pipelines("sd")
    file = write_single_file(source, "sd", Path("f.safetensors"))
    tensors = load_file(file)
    first = f"{PREFIX}input_blocks.1.0.in_layers.2.weight"
    save_file({n: t for n, t in tensors.items() if n != first}, "lacks.safetensors")
    save_file({**tensors, "v_pred": torch.ones(1)}, "v.safetensors")
    whole = load_file(write_single_file(source, "sd", Path("whole.safetensors"), whole=True))
    words = next(name for name in whole if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({n: t for n, t in whole.items() if n != words}, "words.safetensors")
    norm = "first_stage_model.decoder.norm_out.weight"
    save_file({n: t for n, t in whole.items() if n != norm}, "vae.safetensors")
    two = {PREFIX + n: torch.zeros(1).expand(s) for n, s in FULL["Stable Diffusion 2"]()}
    assert deme("split", file, "--pipeline", source).exit_code == 0
    Path("deme.toml").unlink()
    for words, kind, message in (
        (["split", file, "-o", "a"], MissingError, "of no published size; give the folder or hub"),
        (["split", "lacks.safetensors", "--pipeline", source, "-o", "a"], ArtifactError,
         "lacks what makes 'down_blocks.0.resnets.0.conv1.weight'"),
        (["split", file, "--pipeline", pipelines("sdxl"), "-o", "a"], ArtifactError,
         "lacks what makes 'add_embedding.linear_1.bias'"),
        (["split", "words.safetensors", "--pipeline", source, "-o", "a"], ArtifactError,
         "layers.1.mlp.fc1.weight"),
        (["split", "vae.safetensors", "--pipeline", source, "-o", "a"], ArtifactError,
         "nothing makes 'decoder.conv_norm_out.weight'"),
        (["split", "v.safetensors", "--pipeline", source, "-o", "a"], ArtifactError,
         "says that it predicts v"),
        (["sample", file, "-n", 1], ArtifactError, "`deme split FILE` starts from one"),
        (["export", "base.safetensors", "f.safetensors", "--single-file"], DemeError, "--force"),
        (["export", "base.safetensors", "out.safetensors", "--single-file", "--pipeline",
          "v.safetensors"], ArtifactError, "not the file that the base came from"),
    ):  # fmt: skip
        error = deme(*words).exception
        assert isinstance(error, kind), repr(error)
        assert message in str(error)
        assert not Path("a").exists() or not list(Path("a").iterdir())
    assert not Path("out.safetensors").exists()
    header = Header(
        Path("2"), {n: TensorSpec(n, "F16", tuple(t.shape)) for n, t in two.items()}, {}
    )
    with pytest.raises(MissingError, match="some predict the noise and others v"):
        _published(header)
    deme("split", source, "-o", "folder", "--save-dtype", "bf16")
    words = ["export", "folder/base.safetensors", "out.safetensors", "--single-file"]
    assert "did not come from a single file" in str(deme(*words).exception)
    assert deme(*words, "--pipeline", file).exit_code == 0
    after = load_file("out.safetensors")
    assert all(torch.equal(t.to(after[n].dtype), after[n]) for n, t in tensors.items())
