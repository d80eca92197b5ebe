"""What was trained elsewhere becomes an expert of a base, checked, and is taken as any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL, TINY_SCHEDULER, write_tiny_base
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from typer.testing import Result

from deme_cli.artifacts import fingerprint, load_tensors, read_record
from deme_cli.diffusion.denoiser import build_network
from deme_cli.fetch import sha256_of

Deme = Callable[..., Result]
Weights = dict[str, torch.Tensor]
OPTIONS = ("--base", "base.safetensors", "--range", "75:100")


def network() -> torch.nn.Module:
    torch.manual_seed(7)
    return build_network(TINY_MODEL)


@pytest.fixture
def trained(run_folder: Path) -> Weights:
    """Weights for the base of the current folder, from elsewhere."""
    return network().state_dict()


def below(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def checkpoint(path: str, weights: Weights) -> None:
    """As Lightning leaves them, with an optimizer's state and more of a pipeline."""
    more = {"vae.encoder.conv_in.weight": torch.zeros(2), "text_model.x": torch.zeros(1)}
    state = {"state_dict": {**below("module.unet.", weights), **more}, "epoch": 3}
    torch.save({**state, "optimizer_states": [{"lr": 0.1}]}, path)


def average(path: str, weights: Weights) -> None:
    own = network()
    own.load_state_dict(weights)
    torch.save(EMAModel(own.parameters()).state_dict(), path)


def average_folder(path: str, weights: Weights) -> None:
    own = network()
    kind = type(own)
    EMAModel(own.parameters(), model_cls=kind, model_config=own.config).save_pretrained(path)


def pipeline(path: str, weights: Weights) -> None:
    DDPMPipeline(network(), DDPMScheduler.from_config(TINY_SCHEDULER)).save_pretrained(path)


FORMS: dict[str, Callable[[str, Weights], Any]] = {
    "plain.safetensors": lambda path, weights: save_file(weights, path),
    "compiled.safetensors": lambda path, w: save_file(below("_orig_mod.", w), path),
    "checkpoint.ckpt": checkpoint,
    "ema.pt": average,
    "legacy.bin": lambda path, w: torch.save(w, path, _use_new_zipfile_serialization=False),
    "unet": lambda path, weights: network().save_pretrained(path, safe_serialization=False),
    "variant": lambda path, weights: network().save_pretrained(path, variant="non_ema"),
    "unet_ema": average_folder,
    "pipeline": pipeline,
    "alone": lambda path, w: (Path(path).mkdir(), save_file(w, f"{path}/model.safetensors")),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_weights_has_the_fingerprint_that_split_gives(
    form: str, trained: Weights, deme: Deme
) -> None:
    FORMS[form](form, trained)
    result = deme("import", form, *OPTIONS)
    assert result.exit_code == 0, result.exception
    assert result.stdout == "ft_75-100.safetensors\n"
    record = read_record(Path("ft_75-100.safetensors"), "expert")
    pipeline("of-split", trained)
    deme("split", "of-split", "-o", "run", "--data", "digits")
    assert record.fingerprint == read_record(Path("run/base.safetensors")).fingerprint
    assert record.base == read_record(Path("base.safetensors")).fingerprint
    assert (record.p, record.steps, record.seed, record.training) == (None, None, None, {})
    assert record.imported["source"] == form
    if Path(form).is_file():
        assert record.imported["sha256"] == sha256_of(Path(form))


def test_an_imported_expert_is_taken_as_any_other(trained: Weights, deme: Deme) -> None:
    save_file(trained, "theirs.safetensors")
    Path("ft_4of4.safetensors").unlink()
    assert deme("import", "theirs.safetensors", "--range", "4/4").exit_code == 0
    experts = [f"ft_{index}of4.safetensors" for index in range(1, 5)]
    draw = ("-n", 2, "--steps", 2, "--device", "cpu")
    for words in (
        ("task-vector", *experts), ("analyze", "task-vectors"), ("merge", *experts),
        ("inspect", "ft_4of4.safetensors", "tv_4of4.safetensors"),
        ("ensemble-sample", *experts, *draw), ("export", "ft_4of4.safetensors", "exported"),
        ("analyze", "losses", "base.safetensors", *experts, "--data", "digits", "-n", 4,
         "--buckets", 4, "--num", 4),
        ("eval", *experts, "--fid", "digits", "--features", "digits", *draw), ("report",),
    ):  # fmt: skip
        result = deme(*words)
        assert result.exit_code == 0, (words, result.exception, result.output)
    card = Path("exported/README.md").read_text()
    assert "theirs.safetensors" in card
    assert "None" not in card.partition("## Training")[2]
    assert "| p |" not in card
    assert "75:100" in Path("report.html").read_text()
    alone = ("merge", "ft_4of4.safetensors", "-o", "alone.safetensors", "-w")
    assert deme(*alone, "0").exit_code == 0
    merged = fingerprint(load_tensors(Path("alone.safetensors")))
    assert merged == read_record(Path("base.safetensors")).fingerprint
    assert deme(*alone, "1", "--force").exit_code == 0
    assert fingerprint(load_tensors(Path("alone.safetensors"))) == fingerprint(trained)
    train = ("finetune", "--range", "all", "--data", "digits", "--steps", 1)
    shutil.copy("ft_4of4.safetensors", "ft_1of4.safetensors")
    assert "imported and not trained here" in str(deme(*train).exception)


def test_weights_come_in_the_dtype_of_the_base(trained: Weights, deme: Deme) -> None:
    save_file({name: tensor.double() for name, tensor in trained.items()}, "wide.safetensors")
    result = deme("import", "wide.safetensors", *OPTIONS)
    assert "float64 to float32" in result.stderr
    assert fingerprint(load_tensors(Path("ft_75-100.safetensors"))) == fingerprint(trained)
    half = ("--save-dtype", "fp16", "-o", "half.safetensors")
    assert deme("import", "wide.safetensors", *OPTIONS, *half).exit_code == 0
    assert {t.dtype for t in load_tensors(Path("half.safetensors")).values()} == {torch.float16}
    result = deme("import", "base.safetensors", *OPTIONS, "-o", "same.safetensors")
    assert "its task vector is zero" in result.stderr


def test_float8_comes_in_by_way_of_bfloat16(trained: Weights, deme: Deme) -> None:
    kept = {name: one.to(torch.float8_e4m3fn) for name, one in trained.items()}
    save_file(kept, "small.safetensors")
    assert deme("import", "small.safetensors", *OPTIONS).exit_code == 0
    own = load_tensors(Path("ft_75-100.safetensors"))
    assert all(torch.equal(own[name], one.float()) for name, one in kept.items())


def test_the_current_folder_is_a_model(
    trained: Weights, monkeypatch: pytest.MonkeyPatch, deme: Deme
) -> None:
    network().save_pretrained("bare")
    monkeypatch.chdir("bare")
    words = ("--base", "../base.safetensors", "--range", "1/2", "-o", "../own.safetensors")
    assert deme("import", ".", *words).exit_code == 0


def test_a_lora_is_fused_into_the_base(run_folder: Path, deme: Deme) -> None:
    down, up = torch.randn(2, 1, 3, 3), torch.randn(8, 2, 1, 1)
    factors = {"conv_in.lora_A.weight": down, "conv_in.lora_B.weight": up}
    save_file(below("unet.", factors), "lora.safetensors")
    assert deme("import", "lora.safetensors", *OPTIONS).exit_code == 0
    base, expert = map(load_tensors, (Path("base.safetensors"), Path("ft_75-100.safetensors")))
    change = (up.flatten(1) @ down.flatten(1)).view(8, 1, 3, 3)
    assert torch.allclose(expert.pop("conv_in.weight"), base.pop("conv_in.weight") + change)
    assert fingerprint(expert) == fingerprint(base)
    imported = read_record(Path("ft_75-100.safetensors"), "expert").imported
    assert imported["form"] == "LoRA of 1 layers, fused"


def altered(**changes: torch.Tensor | None) -> Callable[[str, Weights], Any]:
    """Write the weights with others in place of some; `__` for a dot, None for none."""
    others = {name.replace("__", "."): tensor for name, tensor in changes.items()}

    def write(path: str, weights: Weights) -> None:
        kept = {**weights, **others}
        save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path)

    return write


def alone(**tensors: torch.Tensor) -> Callable[[str, Weights], Any]:
    return lambda path, weights: altered(**tensors)(path, {})


def told_alphas(**settings: Any) -> Callable[[str, Weights], Any]:
    told = json.dumps({f"unet.{name}": value for name, value in settings.items()})
    sides = {f"conv_in.lora_{side}.weight": ONE.clone() for side in "AB"}
    return lambda path, weights: save_file(sides, path, {"lora_adapter_metadata": told})


def other_schedule(path: str, weights: Weights) -> None:
    scheduler = DDPMScheduler.from_config(TINY_SCHEDULER, prediction_type="v_prediction")
    DDPMPipeline(network(), scheduler).save_pretrained(path)


ONE, EIGHT = torch.ones(1, 1), torch.ones(8)
REFUSED: dict[str, tuple[int, str, Callable[[str, Weights], Any]]] = {
    "lacks.safetensors": (4, "lacks 'conv_in.bias', which base.safetensors has; the nearest name "
                          "there: 'conv_in.biass'",
                          altered(conv_in__bias=None, conv_in__biass=EIGHT)),
    "partial.safetensors": (4, "lacks 'conv_in.bias', which base", altered(conv_in__bias=None)),
    "more.safetensors": (4, "has 'conv_out.bia', which base.safetensors lacks; the nearest name of "
                         "it: 'conv_out.bias'", altered(conv_out__bia=EIGHT)),
    "shape.safetensors": (4, "'conv_in.bias' has shape [1, 1], base.safetensors has [8]",
                          altered(conv_in__bias=ONE)),
    "kind.safetensors": (4, "'conv_in.bias' is torch.int64", altered(conv_in__bias=EIGHT.long())),
    "nan.safetensors": (5, "'conv_in.bias' holds numbers that are not finite",
                        altered(conv_in__bias=EIGHT * torch.nan)),
    "twice.pt": (4, "more than once, below 'model.', 'ema.'",
                 lambda path, weights: torch.save({"model": weights, "ema": weights}, path)),
    "wan.safetensors": (4, "the weights of a WanTransformer3DModel alone; none of its tensors is",
                        alone(condition_embedder__x=ONE)),
    "lora.safetensors": (4, "conv_im' is no linear layer",
                         alone(conv_im__lora_A__weight=ONE, conv_im__lora_B__weight=ONE.clone())),
    "alpha.safetensors": (4, "'conv_im.alpha' scales no factors that are there",
                          alone(conv_in__lora_A__weight=ONE, conv_in__lora_B__weight=ONE.clone(),
                                conv_im__alpha=torch.tensor(1.0))),
    "average.pt": (4, "has 'shadow_params.", lambda path, weights: torch.save(
        {"shadow_params": [*weights.values(), EIGHT]}, path)),
    "whole.safetensors": (4, "is torch.int64 [1, 1]: no factor",
                          alone(conv_in__lora_A__weight=ONE.long(), conv_in__lora_B__weight=ONE)),
    "none.safetensors": (4, "expected a number", told_alphas(lora_alpha=None)),
    "text.safetensors": (4, "expected a number", told_alphas(alpha_pattern={"conv": "x"})),
    "pattern.safetensors": (4, "unterminated", told_alphas(alpha_pattern={"(": 1})),
    "list.safetensors": (4, "expected a number", told_alphas(alpha_pattern=[1])),
    "code.pt": (4, "a pickle of more than tensors (nothing in it was run)",
                lambda path, weights: torch.save({**weights, "config": Path("x")}, path)),
    "text.bin": (4, "the weights cannot be read", lambda path, w: Path(path).write_text("none")),
    "heads": (4, "attention_head_dim = 4, the base has 8", lambda path, weights: build_network(
        {**TINY_MODEL, "attention_head_dim": 4}).save_pretrained(path)),
    "velocity": (4, "another noise schedule or prediction than the base's", other_schedule),
    "nowhere": (3, "no such file or folder", lambda path, weights: None),
    "empty": (3, "not a diffusers model", lambda path, weights: Path(path).mkdir()),
}  # fmt: skip


def test_what_is_not_of_the_base_is_refused_by_name(
    trained: Weights, refuse: Callable[..., str], subtests: pytest.Subtests
) -> None:
    for name, (exit_code, words, write) in REFUSED.items():
        write(name, trained)
        with subtests.test(name):
            assert name in refuse(exit_code, words, "import", name, *OPTIONS)


MISPLACED = [
    (2, "50:200 needs 0 <= start < stop <= 100", ("--range", "50:200")),
    (2, "--range all: weights are the expert of one range", ("--range", "all")),
    (2, "ft_4of4.safetensors exists; add --force", ("--range", "4/4")),
    (3, "none.safetensors: no base there", ("--range", "1/2", "--base", "none.safetensors")),
    (2, "base.safetensors is read,", ("--range", "1/2", "-o", "base.safetensors", "--force")),
    (2, "theirs.safetensors is a file", ("--range", "1/2", "--variant", "fp16")),
    (4, "'base', found 'expert'", ("--range", "1/2", "--base", "ft_1of4.safetensors")),
    (4, "expected an artifact of kind", ("tv_1of4.safetensors", "--range", "1/2")),
    (4, "was finetuned from base",
     ("ft_1of4.safetensors", "--range", "1/2", "--base", "other.safetensors")),
    (4, "which other.safetensors lacks", ("--range", "1/2", "--base", "other.safetensors")),
]  # fmt: skip


def test_a_range_or_a_base_that_does_not_fit_is_told(
    trained: Weights, deme: Deme, refuse: Callable[..., str], subtests: pytest.Subtests
) -> None:
    write_tiny_base(Path("other.safetensors"), block_out_channels=[16, 16])
    save_file(trained, "theirs.safetensors")
    deme("task-vector", "ft_1of4.safetensors")
    for exit_code, words, options in MISPLACED:
        source = () if options[0].endswith(".safetensors") else ("theirs.safetensors",)
        with subtests.test(words):
            refuse(exit_code, words, "import", *source, *options)


def test_inspect_tells_what_a_foreign_file_is(trained: Weights, deme: Deme) -> None:
    save_file(trained, "theirs.safetensors", {"modelspec.title": "a fox"})
    torch.save({"lora_up.weight": torch.zeros(1)}, "lora.pt")
    result = deme("inspect", "theirs.safetensors", "lora.pt", "base.safetensors")
    assert result.exit_code == 0, result.exception
    for words in ("a UNet2DModel alone", "F32 = ", "a fox", "deme import", "a LoRA, not a whole"):
        assert words in result.stdout
    result = deme("inspect", "--json", "theirs.safetensors", "lora.pt")
    ours, lora = json.loads(result.stdout)["artifacts"]
    assert (ours["kind"], ours["tensors"]) == ("foreign", len(trained))
    assert (lora["kind"], lora["fingerprint"]) == ("foreign", None)
