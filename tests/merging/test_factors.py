"""A merge of adapters as one LoRA: stacked factors, or the best of a rank by QR and a small SVD."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch
from conftest import write_adapter_expert, write_tiny_base, write_tiny_expert
from typer.testing import Result

from deme_cli.artifacts import load_tensors, read_record, write_artifact
from deme_cli.config import MergeConfig
from deme_cli.diffusion.denoiser import load_denoiser
from deme_cli.diffusion.lora import low_rank_factors
from deme_cli.errors import ArtifactError, ConfigError, DemeError, NumericsError
from deme_cli.merging.candidates import Workbench
from deme_cli.merging.factors import truncated
from deme_cli.merging.plan import REPORT, open_plan
from deme_cli.merging.search import Stage
from deme_cli.run_file import RunFile
from deme_cli.sampling.ensemble import single

Deme = Callable[..., Result]
ADAPTERS = ("a_1of2.safetensors", "a_2of2.safetensors")
FINER = ("--coefficients-for", "mid_block.*=1.5,0", "--coefficients-for", "*.to_k.*=0,-0.5")
FEW_DRAWS = ("-n", 16, "--seed", 5, "--evaluations", 3, "--no-report")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experts of adapters of different ranks, one with fewer layers."""
    monkeypatch.chdir(tmp_path)
    write_tiny_base(Path("base.safetensors"))
    for index, rank, targets in ((1, 2, "all"), (2, 3, "linear")):
        path = Path(ADAPTERS[index - 1])
        write_adapter_expert(path, Path("base.safetensors"), index=index, of=2, rank=rank,
                             targets=targets)  # fmt: skip
    return tmp_path


def whole(path: str) -> dict[str, torch.Tensor]:
    return load_denoiser(Path(path)).network.state_dict()


def merged(deme: Deme, *words: object) -> dict:
    result = deme("merge", *ADAPTERS, "--force", "--json", *words)
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


@pytest.mark.parametrize("shapes", [(12, 5, 4), (5, 12, 9), (6, 7, 2)])
def test_the_best_factors_of_a_rank_are_the_first_singular_values(
    shapes: tuple[int, int, int],
) -> None:
    out, width, rank = shapes
    random = np.random.default_rng(0)
    down, up = random.standard_normal((rank, width)), random.standard_normal((out, rank))
    u, s, v = np.linalg.svd(up @ down, full_matrices=False)
    kept = (s**2).cumsum() / (s**2).sum()
    for r in (1, 2, 100):
        a, b = truncated(down, up, rank=r)
        assert len(a) == b.shape[1] == min(r, rank, out, width)
        np.testing.assert_allclose(b @ a, (u[:, :r] * s[:r]) @ v[:r], atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0))
    for share in (0.5, 0.9, 1.0):
        r = len(truncated(down, up, explained=share)[0])
        assert kept[r - 1] >= share - 1e-12
        assert r == 1 or kept[r - 2] < share


def test_a_product_of_nothing_stays_nothing() -> None:
    a, b = truncated(np.ones((2, 3)), np.zeros((4, 2)), rank=1)
    assert (a.shape, b.shape) == ((1, 3), (4, 1))
    assert not (b @ a).any()


@pytest.mark.parametrize("words", [("-w", "0.3,0.7"), ("-w", "-0.5,0", *FINER), ("-w", "0,0")])
def test_stacked_factors_are_the_dense_merge_exactly(
    words: tuple[str, ...], folder: Path, deme: Deme
) -> None:
    merged(deme, *words)
    dense = whole("merged.safetensors")
    told = merged(deme, *words, "--lora", 5)
    record = read_record(Path("merged.safetensors"), "merged")
    assert (record.holds, record.adapter) == ("adapter", {"rank": 5, "kept": 1.0})
    assert told["adapter"]["kept"] == 1.0
    torch.testing.assert_close(whole("merged.safetensors"), dense, rtol=0, atol=1e-6)
    held = load_tensors(Path("merged.safetensors"))
    ranks = {len(side) for name, side in held.items() if ".lora_A." in name}
    assert ranks == ({2, 5} if words[1] == "0.3,0.7" else {2, 3} if FINER[0] in words else {2})
    result = deme("merge", "--replay", "merged.safetensors", "-o", "again.safetensors")
    assert result.exit_code == 0, result.exception
    assert Path("again.safetensors").read_bytes() == Path("merged.safetensors").read_bytes()


def test_a_rank_below_keeps_the_best_share_and_says_how_much(folder: Path, deme: Deme) -> None:
    merged(deme, "-w", "0.3,0.7")
    dense, base = whole("merged.safetensors"), load_tensors(Path("base.safetensors"))
    result = deme("merge", *ADAPTERS, "-w", "0.3,0.7", "--lora", 2, "--force")
    record = read_record(Path("merged.safetensors"), "merged")
    ours, total, lost, best = whole("merged.safetensors"), 0.0, 0.0, 0.0
    for name, theta in base.items():
        change = (dense[name] - theta).double()
        total += float(change.square().sum())
        lost += float((dense[name] - ours[name]).double().square().sum())
        if change.any():
            best += float(torch.linalg.svdvals(change.flatten(1))[2:].square().sum())
    assert record.adapter["kept"] == pytest.approx(1 - lost / total, abs=1e-6)
    assert lost == pytest.approx(best, rel=1e-4)
    assert f"keeps {record.adapter['kept']:.2%} of the squared" in " ".join(result.stderr.split())
    assert deme("merge", "--replay", "merged.safetensors").exit_code == 0


def test_export_and_split_take_a_merged_lora_as_it_is(folder: Path, deme: Deme) -> None:
    merged(deme, "-w", "0.3,0.7", "--lora", 9)
    ours, base = whole("merged.safetensors"), load_tensors(Path("base.safetensors"))
    Path("base.safetensors").rename("elsewhere.safetensors")  # of a LoRA, no weights are needed
    for words, atol in ((("--lora", 5), 1e-6), (("--explained", 0.8), None),
                        (("--lora", 5, "--lora-format", "kohya"), 1e-6)):  # fmt: skip
        result = deme("export", "merged.safetensors", "x.safetensors", *words, "--force", "--json")
        assert result.exit_code == 0, result.exception
        config = read_record(Path("merged.safetensors"), "merged").model_config
        factors = low_rank_factors(load_tensors(Path("x.safetensors")), config, "x")
        gone = total = 0.0
        for layer, pair in factors.items():
            change = ours[f"{layer}.weight"] - base[f"{layer}.weight"]
            apart = pair.change().view_as(change) - change
            gone, total = gone + apart.square().sum().item(), total + change.square().sum().item()
            assert atol is None or apart.abs().max() < atol
        kept = json.loads(result.stdout)["kept"]["total"]
        assert kept == pytest.approx(1 - gone / total, abs=1e-5)
        assert kept >= 0.8 - 1e-6
    Path("elsewhere.safetensors").rename("base.safetensors")
    result = deme("split", "merged.safetensors", "-n", 2, "-o", "next")
    assert result.exit_code == 0, result.exception
    torch.testing.assert_close(load_tensors(Path("next/base.safetensors")), ours)


def test_an_expert_of_adapters_is_exported_under_the_names_of_kohya(
    folder: Path, deme: Deme
) -> None:
    words = ("export", ADAPTERS[0], "x.safetensors", "--lora", 2, "--lora-format", "kohya")
    assert deme(*words).exit_code == 0
    config = read_record(Path(ADAPTERS[0]), "expert").model_config
    ours, theirs = (low_rank_factors(load_tensors(Path(path)), config, path)
                    for path in (ADAPTERS[0], "x.safetensors"))  # fmt: skip
    for layer, pair in ours.items():
        torch.testing.assert_close(pair.change(), theirs[layer].change(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_plain_diffusers_loads_the_merged_lora(
    name: str, pipelines: Callable[..., Path], deme: Deme, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert deme("split", pipelines(name)).exit_code == 0
    for index, targets in ((1, "attention"), (2, "all")):
        path = Path(ADAPTERS[index - 1])
        write_adapter_expert(path, Path("base.safetensors"), index=index, of=2, targets=targets)
    merged(deme, "-w", "0.4,0.9")
    dense = whole("merged.safetensors")
    for words in (("--lora", 4), ("--lora", 4, "--save-dtype", "bf16")):
        merged(deme, "-w", "0.4,0.9", *words)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines(name))
        pipeline.load_lora_weights("merged.safetensors")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        theirs = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        atol = 1e-6 if len(words) == 2 else 0.02
        torch.testing.assert_close(theirs.state_dict(), dense, rtol=0, atol=atol)


def test_pefts_own_weighted_sums_are_others(folder: Path, deme: Deme) -> None:
    """`linear` sums A and B apart, and takes equal ranks alone; `cat` stacks, as is right."""
    base, held = load_denoiser(Path("base.safetensors")), load_tensors(Path(ADAPTERS[0]))
    layer = "down_blocks.1.attentions.0.to_q"
    sides = [f"unet.{layer}.lora_{side}.weight" for side in "AB"]
    write_adapter_expert(Path("c.safetensors"), Path("base.safetensors"), index=2, of=2)
    other = load_tensors(Path("c.safetensors"))
    record = read_record(Path("c.safetensors"), "expert")
    write_artifact(Path(ADAPTERS[1]), other, record)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=[layer])
    model = peft.get_peft_model(base.network, config, adapter_name="1")
    model.add_adapter("2", config)
    for number, tensors in zip("12", (held, other), strict=True):
        for side, name in zip("AB", sides, strict=True):
            place = f"base_model.model.{layer}.lora_{side}.{number}.weight"
            model.get_parameter(place).data = tensors[name]
    theta = load_tensors(Path("base.safetensors"))[f"{layer}.weight"]
    for w in ((0.3, 0.7), (0.5, -0.5)):
        exact = sum(c * (one[sides[1]].double() @ one[sides[0]].double())
                    for c, one in zip(w, (held, other), strict=True))  # fmt: skip
        merged(deme, "-w", ",".join(map(str, w)), "--lora", 4)
        ours = whole("merged.safetensors")[f"{layer}.weight"] - theta
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6)
        for kind in ("linear", "cat"):
            name = f"{kind}{w[1]}".replace(".", "_")
            model.add_weighted_adapter(["1", "2"], list(w), name, combination_type=kind)
            theirs = model.get_submodule(f"base_model.model.{layer}").get_delta_weight(name)
            is_right = bool((theirs - exact).abs().max() < 1e-6)
            assert is_right == (kind == "cat"), (kind, w)


@pytest.mark.slow
def test_searches_find_their_coefficients_and_write_one_lora(
    digits_adapters: list[Path], deme: Deme
) -> None:
    for words in (
        ("--search", "gradient", "--per", "layer"),
        ("--search", "cmaes", "--per", "block"),
    ):
        outputs = []
        for lora in ((), ("--lora", 4)):
            told = json.loads(deme("merge", *digits_adapters, *words, *FEW_DRAWS, *lora, "--force",
                                   "--json").stdout)  # fmt: skip
            outputs.append((told["coefficients_for"], whole("merged.safetensors")))
        assert outputs[0][0] == outputs[1][0]
        assert len(outputs[0][0]) > 3
        torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=0, atol=1e-6)


def test_a_report_measures_the_lora_that_is_written(
    digits_adapters: list[Path], deme: Deme
) -> None:
    found = {}
    for rank in (1, 4):
        words = ("-w", "1.5,-2", "--lora", rank, "--report", "-n", 32, "--force", "--json")
        told = deme("merge", *digits_adapters, *words)
        assert told.exit_code == 0, told.exception
        row = json.loads(told.stdout)["report"]["rows"][-1]
        plan = open_plan(
            digits_adapters, MergeConfig(num=32), output=Path("other.safetensors"),
            run=RunFile(tables={"data": {"source": "digits"}}),
        )  # fmt: skip
        config = replace(plan.settings, seed=plan.settings.report_seed)
        objective = Workbench(plan).open(Stage("loss", 32, 1), config, REPORT)
        held = objective(single(load_denoiser(Path("merged.safetensors"))), lambda *done: None)
        found[rank] = row["metrics"]["loss"]["values"][0]
        assert found[rank] == pytest.approx(held, rel=1e-5)
    assert found[1] != pytest.approx(found[4], rel=1e-3)


@pytest.fixture
def digits_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    write_tiny_base(Path("base.safetensors"))
    for index, path in enumerate(map(Path, ADAPTERS), 1):
        write_adapter_expert(path, Path("base.safetensors"), index=index, of=2)
        record = read_record(path, "expert")
        held = {name: 0.1 * side for name, side in load_tensors(path).items()}
        write_artifact(path, held, replace(record, data={"source": "digits", "fingerprint": ""}))
    return [*map(Path, ADAPTERS)]


@pytest.mark.parametrize(
    ("words", "kind", "word"),
    [
        ("--method ties --lora 4", ConfigError, "what ties makes has none"),
        ("--method slerp -w 0.5,0.5 --lora 4", ConfigError, "what slerp makes has none"),
        ("--lora 0", ConfigError, "lora = 0: expected a number above 0"),
        ("--lora -1", ConfigError, "lora = -1: expected a number above 0"),
        ("full --lora 4", ConfigError, "full.safetensors: holds no adapters"),
        ("-w 1e308,1e308 --lora 4", NumericsError, "would not be finite; take smaller"),
        ("--lora 4 -o a_1of2.safetensors --force", ConfigError, "a_1of2.safetensors is read"),
        ("nan --lora 4", NumericsError, "lora_A.weight' is not finite"),
        ("-w 1e6,1e6 --lora 9 --save-dtype fp16", NumericsError, "would not be finite in F16"),
    ],
)
def test_what_makes_no_lora_is_refused_and_nothing_is_written(
    words: str, kind: type[DemeError], word: str, folder: Path, deme: Deme
) -> None:
    paths = [*ADAPTERS]
    if words.startswith("full"):
        write_tiny_expert(Path("full.safetensors"), Path("base.safetensors"), index=2, of=2)
        paths[1] = "full.safetensors"
    if words.startswith("nan"):
        held, record = load_tensors(Path(paths[0])), read_record(Path(paths[0]), "expert")
        held[next(name for name in held if ".lora_A." in name)][0, 0] = torch.nan
        write_artifact(Path(paths[0]), held, record)
    options = words.removeprefix("full ").removeprefix("nan ").split()
    error = deme("merge", *paths, *options).exception
    assert isinstance(error, kind), error
    assert word in str(error)
    assert not Path("merged.safetensors").exists()


def test_a_merged_lora_without_its_base_says_so(folder: Path, deme: Deme) -> None:
    merged(deme, "--lora", 4)
    write_tiny_base(Path("base.safetensors"), seed=7)
    error = deme("sample", "merged.safetensors", "-n", 1, "--steps", 1).exception
    assert isinstance(error, ArtifactError)
    assert "put the right one beside it" in str(error)
