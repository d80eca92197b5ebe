"""A LoRA file of any trainer, fused, is what diffusers fuses: the whole network is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import save_file

from deme_cli.artifacts import load_tensors
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.lora import adapter_settings, fuse, is_lora, layers_of, low_rank_factors
from deme_cli.errors import ArtifactError

Pipelines = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 2, 3.0


def factors(shapes: dict[str, tuple[int, ...]], sides: tuple[str, str], *, alpha: bool) -> Tensors:
    """Random factors of weights of `shapes`, under name + side, and each layer's alpha."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, (out, *rest) in shapes.items():
        made[name + sides[0]] = torch.randn(RANK, *rest, generator=generator)
        kernel = [1] * (len(rest) - 1)
        made[name + sides[1]] = torch.randn(out, RANK, *kernel, generator=generator)
        if alpha:
            made[f"{name}.alpha"] = torch.tensor(ALPHA)
    return made


PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")


def all_layers(folder: Path) -> dict[str, tuple[int, ...]]:
    return layers_of(open_denoiser(str(folder)).record.model_config)


def of_peft(folder: Path) -> Tensors:
    part = "unet" if (folder / "unet").exists() else "transformer"
    shapes = {f"{part}.{name}": shape for name, shape in all_layers(folder).items()}
    return factors(shapes, PEFT, alpha=False)


def of_kohya(folder: Path) -> Tensors:
    shapes = {
        "lora_unet_" + name.replace(".", "_"): shape
        for name, shape in all_layers(folder).items()
        if "time_embedding" not in name and name not in ("conv_in", "conv_out")
    }
    place = "lora_te_text_model_encoder_layers_0_self_attn"
    text = {f"{place}_q_proj": (16, 16), f"{place}_out_proj": (16, 16)}
    return factors(shapes, KOHYA, alpha=True) | factors(text, KOHYA, alpha=True)


def of_sgm(folder: Path) -> Tensors:
    blocks = {"input_blocks_3_1": 16, "output_blocks_0_1": 16, "middle_block_1": 16}
    shapes: dict[str, tuple[int, ...]] = {
        f"lora_unet_{block}_transformer_blocks_0_{layer}": shape
        for block in blocks
        for layer, shape in {"attn1_to_q": (16, 16), "attn2_to_k": (16, 32),
                             "attn1_to_out_0": (16, 16), "ff_net_0_proj": (128, 16)}.items()
    }  # fmt: skip
    shapes["lora_unet_input_blocks_3_0_in_layers_2"] = (16, 8, 3, 3)
    return factors(shapes, KOHYA, alpha=True)


def of_old_diffusers(folder: Path) -> Tensors:
    place = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor"
    made: Tensors = {}
    for layer in ("to_q", "to_out"):
        sides = (f".{layer}_lora.down.weight", f".{layer}_lora.up.weight")
        made |= factors({place: (16, 16)}, sides, alpha=False)
    return made


def of_flux(folder: Path) -> Tensors:
    shapes = {
        "lora_unet_double_blocks_0_img_attn_qkv": (48, 16),
        "lora_unet_double_blocks_0_txt_mlp_0": (64, 16),
        "lora_unet_single_blocks_0_linear2": (16, 80),
    }
    return factors(shapes, KOHYA, alpha=True)


def of_wan(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    for block in range(2):
        for attention in ("self_attn", "cross_attn"):
            for side in "qkvo":
                yield f"blocks.{block}.{attention}.{side}", (24, 24)
        yield f"blocks.{block}.ffn.0", (32, 24)
        yield f"blocks.{block}.ffn.2", (24, 32)


def of_musubi(folder: Path) -> Tensors:
    shapes = {"lora_unet_" + name.replace(".", "_"): shape for name, shape in of_wan(folder)}
    return factors(shapes, KOHYA, alpha=True)


def of_wan_itself(folder: Path) -> Tensors:
    shapes = {f"diffusion_model.{name}": shape for name, shape in of_wan(folder)}
    return factors(shapes, PEFT, alpha=False)


CASES = {
    "sd": (of_peft, of_kohya, of_old_diffusers),
    "sdxl": (of_peft, of_sgm),
    "sd3": (of_peft,),
    "flux": (of_peft, of_flux),
    "wan": (of_peft, of_musubi, of_wan_itself),
}


def fused_by_diffusers(folder: Path, file: Path) -> Tensors:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    return network.state_dict()


def fused_here(folder: Path, file: Path) -> Tensors:
    denoiser, tensors = open_denoiser(str(folder)), load_tensors(file)
    assert is_lora(tensors)
    settings = adapter_settings(file, denoiser.backbone.part)
    found = low_rank_factors(tensors, denoiser.record.model_config, str(file), settings)
    return fuse(denoiser.network.state_dict(), found)


@pytest.mark.parametrize(
    ("name", "make"), [(name, make) for name, makers in CASES.items() for make in makers]
)
def test_a_lora_of_any_trainer_fuses_as_diffusers_fuses_it(
    name: str, make: Callable[[Path], Tensors], pipelines: Pipelines, tmp_path: Path
) -> None:
    save_file(make(pipelines(name)), tmp_path / "lora.safetensors")
    base = open_denoiser(str(pipelines(name))).network.state_dict()
    theirs = fused_by_diffusers(pipelines(name), tmp_path / "lora.safetensors")
    ours = fused_here(pipelines(name), tmp_path / "lora.safetensors")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(base[name], ours[name]) for name in base)


def test_unets_of_pixels_and_dits_which_have_no_loader_are_fused_as_peft_fuses_them(
    pipelines: Pipelines,
) -> None:
    denoiser = open_denoiser(str(pipelines("dit")))
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["to_k", "proj_out_2"],
                             init_lora_weights=False)  # fmt: skip
    before = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}
    model = peft.get_peft_model(denoiser.network, config)
    layers = peft.get_peft_model_state_dict(model)
    found = low_rank_factors(layers, denoiser.record.model_config, "lora")
    expected = model.merge_and_unload().state_dict()
    torch.testing.assert_close(fuse(before, found), expected, rtol=1e-5, atol=1e-5)


def test_a_bf16_base_takes_the_sum_rounded_once(pipelines: Pipelines) -> None:
    denoiser = open_denoiser(str(pipelines("sd3")))
    found = low_rank_factors(of_peft(pipelines("sd3")), denoiser.record.model_config, "lora")
    base = {name: tensor.bfloat16() for name, tensor in denoiser.network.state_dict().items()}
    for name, tensor in fuse(base, found).items():
        layer = name.removesuffix(".weight")
        change = found[layer].change().double() if layer in found and layer != name else 0
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(
            tensor.double(), base[name].double() + change, rtol=2**-8, atol=1e-6
        )


SDXL = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 128,
    "layers_per_block": 2, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
FULL_SIZE: list[tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]] = [
    (SDXL, {
        "input_blocks_8_1_transformer_blocks_9_attn2_to_v":
            ((1280, 2048), "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v"),
        "output_blocks_2_2_conv": ((1280, 1280, 3, 3), "up_blocks.0.upsamplers.0.conv"),
        "input_blocks_3_0_op": ((320, 320, 3, 3), "down_blocks.0.downsamplers.0.conv"),
        "output_blocks_3_0_skip_connection":
            ((640, 1920, 1, 1), "up_blocks.1.resnets.0.conv_shortcut"),
        "input_blocks_4_0_emb_layers_1": ((640, 1280), "down_blocks.1.resnets.0.time_emb_proj"),
        "out_2": ((4, 320, 3, 3), "conv_out"),
        "label_emb_0_0": ((1280, 2816), "add_embedding.linear_1"),
    }),
    (FLUX, {
        "single_blocks_37_linear2": ((3072, 15360), "single_transformer_blocks.37.proj_out"),
        "double_blocks_18_img_mod_lin": ((18432, 3072), "transformer_blocks.18.norm1.linear"),
        "final_layer_linear": ((64, 3072), "proj_out"),
        "time_in_in_layer": ((3072, 256), "time_text_embed.timestep_embedder.linear_1"),
    }),
]  # fmt: skip


@pytest.mark.parametrize(("config", "layers"), FULL_SIZE, ids=["sdxl", "flux"])
@pytest.mark.slow
def test_the_names_of_networks_of_full_size_are_found_and_alpha_counts_in_all(
    config: dict[str, Any], layers: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    tensors = factors(
        {f"lora_unet_{name}": shape for name, (shape, _) in layers.items()}, KOHYA, alpha=True
    )
    found = low_rank_factors(tensors, config, "kohya")
    for name, (shape, layer) in layers.items():
        down, up = (tensors[f"lora_unet_{name}{side}"].flatten(1) for side in KOHYA)
        change = (ALPHA / RANK * (up @ down)).view(shape)
        torch.testing.assert_close(found[layer].change(), change, rtol=1e-4, atol=1e-4)
    assert len(found) == len(layers)


def test_flux_s_fused_projections_come_apart() -> None:
    shape = {"lora_unet_single_blocks_0_linear1": (21504, 3072)}
    tensors = factors(shape, KOHYA, alpha=True)
    found = low_rank_factors(tensors, {**FLUX, "num_layers": 1, "num_single_layers": 1}, "kohya")
    down, up = (tensors[f"lora_unet_single_blocks_0_linear1{side}"] for side in KOHYA)
    rows = {"attn.to_q": (0, 3072), "attn.to_v": (6144, 9216), "proj_mlp": (9216, 21504)}
    for layer, (start, stop) in rows.items():
        change = ALPHA / RANK * (up[start:stop] @ down)
        ours = found[f"single_transformer_blocks.0.{layer}"].change()
        torch.testing.assert_close(ours, change, rtol=1e-4, atol=1e-4)


PLACE = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SQUARE = {f"{PLACE}.lora_A.weight": (2, 16), f"{PLACE}.lora_B.weight": (16, 2)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({f"{PLACE}.lora_A.weight": (2, 16)}, "has one of its two factors"),
        ({f"{PLACE}.lora_A.weight": (0, 16), f"{PLACE}.lora_B.weight": (16, 0)}, "no factor"),
        ({k.replace("to_q", "to_qq"): v for k, v in SQUARE.items()}, "the nearest name: 'down_"),
        ({k: (2 * v[0], *v[1:]) for k, v in SQUARE.items()}, r"\[4, 16\] and \[32, 2\]"),
        ({k.replace("unet.", ""): v for k, v in SQUARE.items()} | SQUARE, "once more"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (2, 2)}, "no low-rank"),
        ({k.replace(PLACE, "lora_unet_joint_blocks_0_x"): v for k, v in SQUARE.items()}, "lora_un"),
    ],
)
def test_what_is_no_pair_of_factors_of_this_network_is_refused_by_name(
    shapes: dict[str, tuple[int, ...]], message: str, pipelines: Pipelines
) -> None:
    config = open_denoiser(str(pipelines("sd"))).record.model_config
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ArtifactError, match=message):
        low_rank_factors(tensors, config, "lora.safetensors")
