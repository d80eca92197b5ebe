"""Tiny diffusers pipelines of every class that deme takes: real networks, random weights.

CLIP's vocabulary is the beginning of the one that ships with open_clip, as its whole of 49408
words takes most of the time that a tiny pipeline is read in; T5's is a unigram model of letters.
Each builder writes a folder as `save_pretrained` does and gives it back.
"""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

LATENT = 8  # latent pixels per side
FACTOR = 2  # image pixels per latent pixel
NUM_CLASSES = 10
NUM_MERGES = 510  # CLIP's first ones; with 256 letters, at a word's end or not, and two marks
VOCABULARY = 2 * 256 + NUM_MERGES + 2
_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer with the first `NUM_MERGES` merges of the vocabulary in open_clip."""
    packed = Path(find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(packed, "rt", encoding="utf-8") as file:
        next(file)  # the version
        merges = [next(file).strip() for _ in range(NUM_MERGES)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def clip_text(
    *, width: int = 16, projected: bool = False, seed: int = 0
) -> transformers.CLIPTextModel:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, projection_dim=width, vocab_size=VOCABULARY,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(
        config
    ).eval()


def t5_tokenizer() -> transformers.T5TokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return transformers.T5TokenizerFast(
        tokenizer_object=tokenizer, extra_ids=0, model_max_length=77
    )


def t5_encoder(
    kind: type = transformers.T5EncoderModel,
) -> transformers.T5EncoderModel | transformers.UMT5EncoderModel:
    torch.manual_seed(3)
    config = kind.config_class(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return kind(config).eval()


def vae(*, channels: int = 4, shift: float | None = None) -> diffusers.AutoencoderKL:
    torch.manual_seed(4)
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        scaling_factor=0.5, shift_factor=shift, use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    ).eval()  # fmt: skip


def _unet(**changes: object) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(5)
    config = {
        "sample_size": LATENT, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": [8, 16], "norm_num_groups": 4, "cross_attention_dim": 16,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 2,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**config, **changes}).eval()


def stable_diffusion(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Stable Diffusion 1.x (eps) or 2.x (v_prediction): PNDM, one CLIP text encoder."""
    scheduler = diffusers.PNDMScheduler(
        **_LINEAR, skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type
    )
    diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(folder / "tokenizer"),
        unet=_unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def stable_diffusion_xl(folder: Path) -> Path:
    """SDXL: two text encoders, pooled embedding and size conditions added to the timestep's."""
    unet = _unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=1,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip_text(), text_encoder_2=clip_text(projected=True, seed=1),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2"),
        unet=unet, scheduler=diffusers.DDIMScheduler(**_LINEAR, clip_sample=False),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def dit(folder: Path, *, num_classes: int = NUM_CLASSES, learned_variance: bool = True) -> Path:
    """Class-conditional DiT, with the learned variance of the published ones."""
    torch.manual_seed(6)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=8 if learned_variance else 4, num_layers=2, sample_size=LATENT, patch_size=2,
        num_embeds_ada_norm=num_classes,
    )  # fmt: skip
    for parameter in transformer.parameters():  # adaLN-zero starts at 0: blocks would do nothing
        torch.nn.init.normal_(parameter, std=0.05)
    diffusers.DiTPipeline(
        transformer=transformer.eval(),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    ).save_pretrained(folder)
    return folder


def stable_diffusion_3(folder: Path, *, shift: float = 3.0) -> Path:
    """SD3: flow matching, two CLIP encoders and T5."""
    torch.manual_seed(7)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENT, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae(shift=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=clip_text(projected=True), text_encoder_2=clip_text(projected=True, seed=1),
        text_encoder_3=t5_encoder(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2"), tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def flux(folder: Path, *, distilled: bool = True) -> Path:
    """Flux: packed latents, dynamic shifting; `distilled` takes guidance as an input (dev)."""
    torch.manual_seed(8)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        axes_dims_rope=[2, 2, 4], guidance_embeds=distilled,
    )  # fmt: skip
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=distilled)
    diffusers.FluxPipeline(
        transformer=transformer.eval(), vae=vae(shift=0.1), scheduler=flow,
        text_encoder=clip_text(), tokenizer=clip_tokenizer(folder / "tokenizer"),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def wan(folder: Path, *, scheduler: str = "unipc", boundary: float | None = None) -> Path:
    """Wan 2.1: a video transformer and its VAE, UniPC on a shifted flow as published, or Euler.

    With a boundary_ratio Wan 2.2: another transformer for the times below.
    """
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    factors = {"scale_factor_temporal": 2, "scale_factor_spatial": FACTOR}
    if "scale_factor_spatial" not in signature(AutoencoderKLWan.__init__).parameters:
        factors = {}  # in diffusers 0.33 they follow from the levels

    def transformer(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=64,
        ).eval()  # fmt: skip

    second = {"transformer_2": transformer(10), "boundary_ratio": boundary} if boundary else {}
    WanPipeline(
        transformer=transformer(9), **second,
        text_encoder=t5_encoder(transformers.UMT5EncoderModel),
        tokenizer=t5_tokenizer(),
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[0.5, 0.8, 1.1, 0.6], **factors,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if scheduler == "euler"
        else diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


BUILDERS = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "dit": dit,
    "sd3": stable_diffusion_3,
    "flux": flux,
}
if hasattr(diffusers, "WanPipeline"):  # since 0.33
    BUILDERS["wan"] = wan
