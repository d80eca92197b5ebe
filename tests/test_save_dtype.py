"""A half-precision checkpoint stays one through split, merge and export; sums round once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from deme_cli.artifacts import load_tensors
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.files import cast_specs, read_header

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def dtypes_of(path: Path) -> set[str]:
    return {spec.dtype for spec in read_header(path).tensors.values()}


@pytest.mark.parametrize(("half", "ending"), [("bf16", "safetensors"), ("fp16", "bin")])
def test_a_checkpoint_keeps_its_dtype_from_split_to_export(
    pipelines: Callable, deme: Callable, tmp_path: Path, monkeypatch, half: str, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines("sd"), torch_dtype=dtype)
    pipeline.save_pretrained("half", safe_serialization=ending == "safetensors")
    weights = pipeline.unet.state_dict()
    assert deme("split", "half", "-n", 2).exit_code == 0
    assert dtypes_of(Path("base.safetensors")) == {DTYPES[half]}
    held = load_tensors(Path("base.safetensors"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in held.items())
    done = deme("export", "base.safetensors", "out", "--json")
    assert '"max_difference": 0.0' in done.stdout
    written = load_file("out/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in written.items())
    refused = deme("split", "base.safetensors", "-o", ".", "--save-dtype", "fp32")
    assert isinstance(refused.exception, ConfigError)
    assert deme("split", "half", "-o", "wide", "--save-dtype", "fp32").exit_code == 0
    assert dtypes_of(Path("wide/base.safetensors")) == {"F32"}


def half_run(deme: Callable) -> None:
    """A base of bfloat16, and an expert of it whose differences bfloat16 would not hold."""
    assert deme("split", "base.safetensors", "-n", 2, "-o", "half", "--save-dtype", "bf16")
    quick = ["--data", "digits", "--steps", 2, "--batch-size", 4, "--held-out", 0]
    for index, more in (("1/2", []), ("2/2", ["--save-dtype", "bf16"])):
        path = f"half/ft_{index[0]}of2.safetensors"
        words = ["--range", index, "-o", path, "--base", "half/base.safetensors"]
        done = deme("finetune", *words, *quick, *more)
        assert done.exit_code == 0, done.output


def test_a_base_of_bf16_takes_experts_of_any_float_and_a_merge_rounds_once(
    deme: Callable, run_folder: Path
) -> None:
    half_run(deme)
    base, *experts = (Path("half", f"{n}.safetensors") for n in ("base", "ft_1of2", "ft_2of2"))
    assert [dtypes_of(path) for path in (base, *experts)] == [{"BF16"}, {"F32"}, {"BF16"}]
    w = [0.5, -0.25]
    theta, *thetas = (load_tensors(path) for path in (base, *experts))
    for chosen, more, code in (
        (experts, [], "BF16"), (experts, ["--save-dtype", "fp16"], "F16"), (experts[1:], [], "BF16")
    ):  # fmt: skip
        words = ["-w", ",".join(map(str, w[-len(chosen) :]))]
        done = deme("merge", *chosen, *words, "--force", *more)
        assert done.exit_code == 0, done.output
        assert dtypes_of(Path("merged.safetensors")) == {code}
        for name, result in load_tensors(Path("merged.safetensors")).items():
            x, sum_of = theta[name].double(), zip(w, thetas, strict=True)
            own = [c * (one[name].double() - x) for c, one in sum_of][-len(chosen) :]
            exact = x + sum(own)
            if len(chosen) == 1:  # float32 holds the sum: rounding to bfloat16 is all that is lost
                assert torch.equal(result, exact.to(result.dtype)), name
            sizes = x.abs() + sum(tau.abs() for tau in own)
            bound = 2.0 ** (-8 if code == "BF16" else -11) * exact.abs() + 2.0**-21 * sizes + 2**-25
            assert ((result.double() - exact).abs() <= bound).all(), name
        assert deme("merge", "--replay", "merged.safetensors", "--force").exit_code == 0
    assert deme("task-vector", *experts).exit_code == 0
    vectors = [Path("half", f"tv_{i}of2.safetensors") for i in (1, 2)]
    assert [dtypes_of(path) for path in vectors] == [{"F32"}, {"BF16"}]
    assert deme("task-vector", *experts, "--save-dtype", "fp16", "--force").exit_code == 0
    assert dtypes_of(vectors[0]) == {"F16"}
    assert deme("merge", *vectors, "-w", "1,0", "--force").exit_code == 0
    assert dtypes_of(Path("merged.safetensors")) == {"BF16"}
    assert deme("export", "merged.safetensors", "out", "--save-dtype", "fp16").exit_code == 0
    assert dtypes_of(Path("out/unet/diffusion_pytorch_model.safetensors")) == {"F16"}


def test_what_a_dtype_cannot_hold_is_named_and_so_is_a_dtype_there_is_not(
    deme: Callable, run_folder: Path
) -> None:
    refused = deme("split", "base.safetensors", "-o", "run", "--save-dtype", "fp8")
    assert isinstance(refused.exception, ConfigError)
    with pytest.raises(ConfigError, match="save_dtype 'fp64': expected fp32, bf16, fp16"):
        cast_specs((), "fp64")
    from deme_cli.diffusion.denoiser import stored_in

    with pytest.raises(NumericsError, match="there: 'a' is too large for fp16"):
        stored_in({"a": torch.tensor([7e4])}, "fp16", "there")
