"""The tensors of single files by their authors' names, and tiny single files of real pipelines.

What stands here is how the original code of each family names its modules; deme has no such table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from deme_cli.diffusion.single_file import PREFIX, Match, _backwards, learn_layout
from deme_cli.files import Header, TensorSpec

Named = Iterator[tuple[str, tuple[int, ...]]]


def _layer(name: str, *shape: int) -> Named:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _resnet(name: str, into: int, out: int, time: int) -> Named:
    yield from _layer(f"{name}.in_layers.0", into)
    yield from _layer(f"{name}.in_layers.2", out, into, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", out, time)
    yield from _layer(f"{name}.out_layers.0", out)
    yield from _layer(f"{name}.out_layers.3", out, out, 3, 3)
    if into != out:
        yield from _layer(f"{name}.skip_connection", out, into, 1, 1)


def _attention(name: str, c: int, depth: int, context: int, linear: bool) -> Named:
    proj = (c, c) if linear else (c, c, 1, 1)
    yield from _layer(f"{name}.norm", c)
    yield from _layer(f"{name}.proj_in", *proj)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attn, width in (("attn1", c), ("attn2", context)):
            for part, shape in (("q", (c, c)), ("k", (c, width)), ("v", (c, width))):
                yield f"{block}.{attn}.to_{part}.weight", shape
            yield from _layer(f"{block}.{attn}.to_out.0", c, c)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * c, c)
        yield from _layer(f"{block}.ff.net.2", c, 4 * c)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _layer(f"{block}.{norm}", c)
    yield from _layer(f"{name}.proj_out", *proj)


def ldm_unet(
    channels: Sequence[int], depths: Sequence[int], middle: int, context: int, *,
    linear: bool = False, vector: int = 0, layers: int = 2, latent: int = 4,
) -> Named:  # fmt: skip
    """openaimodel.UNetModel; depths: transformer blocks by level, 0 for none."""
    first, time = channels[0], 4 * channels[0]
    yield from _layer("time_embed.0", time, first)
    yield from _layer("time_embed.2", time, time)
    if vector:
        yield from _layer("label_emb.0.0", time, vector)
        yield from _layer("label_emb.0.2", time, time)
    yield from _layer("input_blocks.0.0", first, latent, 3, 3)
    skips, c, number = [first], first, 0
    for level, (out, depth) in enumerate(zip(channels, depths, strict=True)):
        for _ in range(layers):
            number += 1
            yield from _resnet(f"input_blocks.{number}.0", c, out, time)
            if depth:
                yield from _attention(f"input_blocks.{number}.1", out, depth, context, linear)
            c = out
            skips.append(c)
        if level < len(channels) - 1:
            number += 1
            yield from _layer(f"input_blocks.{number}.0.op", c, c, 3, 3)
            skips.append(c)
    yield from _resnet("middle_block.0", c, c, time)
    yield from _attention("middle_block.1", c, middle, context, linear)
    yield from _resnet("middle_block.2", c, c, time)
    number = -1
    for level in reversed(range(len(channels))):
        out, depth = channels[level], depths[level]
        for layer in range(layers + 1):
            number += 1
            yield from _resnet(f"output_blocks.{number}.0", c + skips.pop(), out, time)
            c = out
            if depth:
                yield from _attention(f"output_blocks.{number}.1", c, depth, context, linear)
            if level and layer == layers:
                yield from _layer(f"output_blocks.{number}.{1 + bool(depth)}.conv", c, c, 3, 3)
    yield from _layer("out.0", c)
    yield from _layer("out.2", latent, c, 3, 3)


def mmdit(
    depth: int, *, width: int, context: int, pooled: int, latent: int, positions: int,
    dual: int = 0, norm: int = 0, mlp: int = 4,
) -> Named:  # fmt: skip
    """SD3's MMDiT; dual: blocks with a second attention; norm: size of its q and k norms."""
    yield "pos_embed", (1, positions, width)
    yield from _layer("x_embedder.proj", width, latent, 2, 2)
    for name, into in (("t", 256), ("y", pooled)):
        yield from _layer(f"{name}_embedder.mlp.0", width, into)
        yield from _layer(f"{name}_embedder.mlp.2", width, width)
    yield from _layer("context_embedder", width, context)
    for i in range(depth):
        for side in ("x_block", "context_block"):
            block, is_last = f"joint_blocks.{i}.{side}", side == "context_block" and i == depth - 1
            attns = ["attn", "attn2"] if side == "x_block" and i < dual else ["attn"]
            for attn in attns:
                yield from _layer(f"{block}.{attn}.qkv", 3 * width, width)
                for part in "qk" if norm else "":
                    yield f"{block}.{attn}.ln_{part}.weight", (norm,)
                if not is_last:
                    yield from _layer(f"{block}.{attn}.proj", width, width)
            if not is_last:
                yield from _layer(f"{block}.mlp.fc1", mlp * width, width)
                yield from _layer(f"{block}.mlp.fc2", width, mlp * width)
            times = 2 if is_last else 6 + 3 * (len(attns) - 1)
            yield from _layer(f"{block}.adaLN_modulation.1", times * width, width)
    yield from _layer("final_layer.adaLN_modulation.1", 2 * width, width)
    yield from _layer("final_layer.linear", 4 * latent, width)


def flux(
    double: int, single: int, *, guidance: bool, width: int = 3072, head: int = 128,
    latent: int = 64, text: int = 4096, pooled: int = 768,
) -> Named:  # fmt: skip
    """FLUX.1, of whose width diffusers' converter knows."""
    inputs = {"time": 256, "vector": pooled, **({"guidance": 256} if guidance else {})}
    for name, into in inputs.items():
        yield from _layer(f"{name}_in.in_layer", width, into)
        yield from _layer(f"{name}_in.out_layer", width, width)
    yield from _layer("img_in", width, latent)
    yield from _layer("txt_in", width, text)
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            yield from _layer(f"{block}_mod.lin", 6 * width, width)
            yield from _layer(f"{block}_attn.qkv", 3 * width, width)
            yield from _layer(f"{block}_attn.proj", width, width)
            yield from _layer(f"{block}_mlp.0", 4 * width, width)
            yield from _layer(f"{block}_mlp.2", width, 4 * width)
            for part in ("query", "key"):
                yield f"{block}_attn.norm.{part}_norm.scale", (head,)
    for i in range(single):
        yield from _layer(f"single_blocks.{i}.modulation.lin", 3 * width, width)
        yield from _layer(f"single_blocks.{i}.linear1", 7 * width, width)
        yield from _layer(f"single_blocks.{i}.linear2", width, 5 * width)
        for part in ("query", "key"):
            yield f"single_blocks.{i}.norm.{part}_norm.scale", (head,)
    yield from _layer("final_layer.adaLN_modulation.1", 2 * width, width)
    yield from _layer("final_layer.linear", latent, width)


def wan(
    depth: int, *, width: int, ffn: int, text: int = 4096, latent: int = 16, freq: int = 256
) -> Named:
    """Wan 2.1's WanModel, text to video."""
    yield from _layer("patch_embedding", width, latent, 1, 2, 2)
    for name, into in (("text", text), ("time", freq)):
        yield from _layer(f"{name}_embedding.0", width, into)
        yield from _layer(f"{name}_embedding.2", width, width)
    yield from _layer("time_projection.1", 6 * width, width)
    for i in range(depth):
        for attn in ("self_attn", "cross_attn"):
            for part in "qkvo":
                yield from _layer(f"blocks.{i}.{attn}.{part}", width, width)
            for part in "qk":
                yield f"blocks.{i}.{attn}.norm_{part}.weight", (width,)
        yield from _layer(f"blocks.{i}.norm3", width)
        yield from _layer(f"blocks.{i}.ffn.0", ffn, width)
        yield from _layer(f"blocks.{i}.ffn.2", width, ffn)
        yield f"blocks.{i}.modulation", (1, 6, width)
    yield from _layer("head.head", 4 * latent, width)
    yield "head.modulation", (1, 2, width)


FULL = {  # by the name in single_file.PUBLISHED
    "Stable Diffusion 1": lambda: ldm_unet([320, 640, 1280, 1280], [1, 1, 1, 0], 1, 768),
    "Stable Diffusion 2": lambda: ldm_unet(
        [320, 640, 1280, 1280], [1, 1, 1, 0], 1, 1024, linear=True
    ),
    "SDXL": lambda: ldm_unet([320, 640, 1280], [0, 2, 10], 10, 2048, linear=True, vector=2816),
    "Stable Diffusion 3 medium": lambda: mmdit(
        24, width=1536, context=4096, pooled=2048, latent=16, positions=192**2
    ),
    "Stable Diffusion 3.5 medium": lambda: mmdit(
        24, width=1536, context=4096, pooled=2048, latent=16, positions=384**2, dual=13, norm=64
    ),
    "Stable Diffusion 3.5 large": lambda: mmdit(
        38, width=2432, context=4096, pooled=2048, latent=16, positions=192**2, norm=64
    ),
    "Flux schnell": lambda: flux(19, 38, guidance=False),
    "Flux dev": lambda: flux(19, 38, guidance=True),
    "Wan 1.3B": lambda: wan(30, width=1536, ffn=8960),
    "Wan 14B": lambda: wan(40, width=5120, ffn=13824),
}
TINY = {  # of tiny_pipelines
    "sd": lambda: ldm_unet([8, 16], [0, 1], 1, 16, layers=1),
    "sdxl": lambda: ldm_unet([8, 16], [0, 1], 1, 32, layers=1, vector=6 * 8 + 16),
    "sd3": lambda: mmdit(2, width=16, context=32, pooled=32, latent=4, positions=16**2),
    "flux": lambda: flux(1, 1, guidance=True, width=16, head=8, latent=16, text=32, pooled=16),
    "wan": lambda: wan(2, width=24, ffn=32, text=32, latent=4, freq=16),
}


def vae_names(channels: Sequence[int], latent: int) -> Named:
    """AutoencoderKL of latent-diffusion, with as many blocks by level as the tiny one."""
    for side, into, out in (("encoder", 3, 2 * latent), ("decoder", latent, 3)):
        last, c = channels[-1], channels[0]
        yield from _layer(f"{side}.conv_in", c if side == "encoder" else last, into, 3, 3)
        for name in ("block_1", "block_2"):
            for part in ("norm1", "norm2"):
                yield from _layer(f"{side}.mid.{name}.{part}", last)
            for part in ("conv1", "conv2"):
                yield from _layer(f"{side}.mid.{name}.{part}", last, last, 3, 3)
        yield from _layer(f"{side}.mid.attn_1.norm", last)
        for part in ("q", "k", "v", "proj_out"):
            yield from _layer(f"{side}.mid.attn_1.{part}", last, last, 1, 1)
        is_down = side == "encoder"
        for level in range(len(channels)):
            where = f"{side}.{'down' if is_down else 'up'}.{level}"
            for block in range(1 if is_down else 2):
                for part in ("norm1", "norm2"):
                    yield from _layer(f"{where}.block.{block}.{part}", c)
                for part in ("conv1", "conv2"):
                    yield from _layer(f"{where}.block.{block}.{part}", c, c, 3, 3)
            if is_down and level < len(channels) - 1:
                yield from _layer(f"{where}.downsample.conv", c, c, 3, 3)
            if not is_down and level:
                yield from _layer(f"{where}.upsample.conv", c, c, 3, 3)
        yield from _layer(f"{side}.norm_out", c if side == "decoder" else last)
        yield from _layer(f"{side}.conv_out", out, c, 3, 3)
    yield from _layer("quant_conv", 2 * latent, 2 * latent, 1, 1)
    yield from _layer("post_quant_conv", latent, latent, 1, 1)


def renamed(network: torch.nn.Module, held: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The weights of a diffusers network under the names of `held`, its authors'."""
    header = Header(Path("held"), {n: TensorSpec(n, "F32", s) for n, s in held.items()}, {})
    config = {**network.config, "_class_name": type(network).__name__}
    layout = learn_layout(held, config)
    weights = network.state_dict()
    denoiser = Match(config, {n: tuple(t.shape) for n, t in weights.items()}, layout, frozenset())
    return {
        name: torch.cat([weights[one.name].reshape(-1)[one.start : one.stop] for one in pieces])
        .reshape(held[name]).clone()
        for name, pieces in _backwards(denoiser, header).items()
    }  # fmt: skip


def write_single_file(folder: Path, name: str, path: Path, *, whole: bool = False) -> Path:
    """A tiny pipeline as a single file of bfloat16, its norms of float32; whole: of every part."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    prefix = PREFIX if whole or name not in ("flux", "wan") else ""
    tensors = renamed(network, {f"{prefix}{n}": tuple(s) for n, s in TINY[name]()})
    if whole:
        vae = {f"first_stage_model.{n}": s for n, s in vae_names([8, 8], 4)}
        tensors |= renamed(pipeline.vae, vae)
        text = pipeline.text_encoder.state_dict()
        before = "cond_stage_model.transformer.text_model."  # transformers 5 leaves out the last
        tensors |= {before + n.removeprefix("text_model."): t.clone() for n, t in text.items()}
    tensors = {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", "author": "somebody"})
    return path
