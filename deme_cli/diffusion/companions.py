"""The frozen parts of a pipeline around its denoiser: VAE, tokenizers, text encoders.

They are not trained and not merged, so artifacts do not hold them: a record names each by the
SHA-256 of its files, and they are read from the folder or hub id that the base came from. A model
that draws pixels from noise alone has none, and then images are their own latents.
B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deme_cli import console
from deme_cli.artifacts import DenoiserRecord
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.backbones.backbone import Config, Shape
from deme_cli.diffusion.conditions import Conditions, to
from deme_cli.diffusion.denoiser import TORCH_DTYPES, cast, choose_device
from deme_cli.diffusion.model_files import (
    SECOND,
    UNUSED_PARTS,
    digest_of_part,
    file_names,
    locate_parts,
    read_index,
    read_json,
    sets_of_variant,
    silence_libraries,
)
from deme_cli.errors import ArtifactError, ConfigError

GEOMETRY = 6  # original height, width, crop top, left, target height, width


class Companions:
    """What turns images into latents and back, and captions or classes into conditions.

    wants: what an image is drawn from, besides noise: `nothing`, `class` or `text`.   factor: image
    pixels per latent pixel, along one side.   folder: of the pipeline, where it has frozen parts.
    Nothing is loaded before it is used, and then checked against the record's digests.
    """

    def __init__(
        self, record: DenoiserRecord, folder: Path | None, *, device: str, dtype: str
    ) -> None:
        self.record, self.folder = record, folder
        self.device, self.dtype = choose_device(device), TORCH_DTYPES[dtype]
        self.backbone = backbone_of(record.model_config)
        self.wants = self.backbone.wants
        self.num_classes = self.backbone.num_classes(record.model_config)
        self.factor, self._vae_config = 1, None
        if folder is not None and "vae" in self.backbone.parts:
            stated = read_json(folder / "vae" / "config.json")
            self._vae_config = self.backbone.vae_config(stated)
            self.factor = 2 ** (len(self._vae_config.get("block_out_channels", [1])) - 1)
            self._require_channels(self._vae_config)

    def _require_channels(self, vae: Config) -> None:
        """Check that the VAE's latents are what the network denoises; raises ArtifactError."""
        own = self.backbone.sample_shape(self.record.model_config)[0]
        shown, encoded = vae.get("out_channels", 3), vae.get("latent_channels", own)
        if shown not in (1, 3):
            raise ArtifactError(f"{self.folder}: a VAE of {shown} image channels, not 1 or 3")
        if encoded != own:
            raise ArtifactError(
                f"{self.folder}: a VAE of {encoded} latent channels, this network denoises {own}; "
                f"give the model's own pipeline with --pipeline"
            )

    @property
    def _whole(self) -> Path:
        assert self.folder is not None, "a model with frozen parts"
        return self.folder

    @functools.cached_property
    def pipeline(self) -> Any:
        """diffusers' pipeline with its frozen parts, without the denoiser.

        The VAE works in float32 (SDXL's overflows in half precision), text encoders in `dtype`.
        """
        import diffusers

        self.require_same()
        silence_libraries()
        kind, index = getattr(diffusers, self.backbone.pipeline), read_index(self._whole)
        left_out = [self.backbone.part]
        left_out += [name for name in (SECOND, *UNUSED_PARTS) if name in index]
        given = {**dict.fromkeys(left_out), **self.networks(index)}
        pipeline = kind.from_pretrained(self._whole, local_files_only=True, **given)
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                dtype = torch.float32 if name == "vae" else self.dtype
                kept = set(getattr(part, "_keep_in_fp32_modules_strict", None) or ())
                if dtype == torch.float16:  # where these overflow: T5's
                    kept |= set(getattr(part, "_keep_in_fp32_modules", None) or ())
                cast(part, dtype, kept)
                part.to(self.device).eval().requires_grad_(False)
        return pipeline

    def networks(self, index: Mapping[str, Any], *, unusual: bool = False) -> dict[str, Any]:
        """VAE and text encoders; those alone whose weights no pipeline looks for: of a variant
        alone, or in pickled shards.

        Raises ArtifactError where a tensor is missing, which libraries make up.
        """
        parts = {}
        for name in self.record.companions:
            sets = sets_of_variant(file_names(self._whole / name))
            if not sets:
                continue
            is_sharded = sets[0].ending == "bin" and sets[0].num_shards
            if unusual and not sets[0].variant and not is_sharded:
                continue
            library, kind = index[name]
            parts[name], told = getattr(importlib.import_module(library), kind).from_pretrained(
                self._whole / name, local_files_only=True, variant=sets[0].variant or None,
                use_safetensors=sets[0].ending == "safetensors", output_loading_info=True,
            )  # fmt: skip
            if lacks := sorted(told["missing_keys"]):
                raise ArtifactError(
                    f"{self._whole / name}: lacks the tensor {lacks[0]!r}; get this {name} "
                    f"({kind}) anew, or give a whole pipeline with --pipeline"
                )
        return parts

    def require_same(self, *parts: str) -> None:
        """Check that `parts` (or all) are those that the record names; raises ArtifactError."""
        for part in parts or self.record.companions:
            if digest_of_part(self._whole, part) != self.record.companions[part]:
                raise ArtifactError(
                    f"{self._whole / part}: not the {part} that the base was imported with; give "
                    f"that pipeline with --pipeline, or import the model anew with `deme split`"
                )

    def release(self) -> None:
        """Let go of the loaded parts; they are loaded again when they are needed."""
        vars(self).pop("pipeline", None)

    def tell_cut(self, texts: Sequence[str], what: str) -> None:
        """Say once how many of `texts` have more tokens than a text encoder of the pipeline takes.

        what: the texts, as in `photos: captions`. The marks at the ends count. A token is a byte
        or more, so short texts are not looked at.
        """
        cut: set[int] = set()
        encoders = []
        for name, tokenizer in self._tokenizers.items():
            limit = self.backbone.max_tokens.get(name, tokenizer.model_max_length)
            long = [i for i, text in enumerate(texts) if len(text.encode()) + 2 > limit]
            tokens = tokenizer([texts[i] for i in long]).input_ids if long else []
            longer = [i for i, row in zip(long, tokens, strict=True) if len(row) > limit]
            if longer:
                kind = type(tokenizer).__name__.partition("Tokenizer")[0]
                encoder = name.replace("tokenizer", "text_encoder")
                encoders.append(f"{len(longer)} in {encoder} ({kind}), which takes {limit} tokens")
            cut.update(longer)
        if cut:
            first = " ".join(texts[min(cut)].split())
            console.note_once(
                f"{what}: {len(cut)} of {len(texts)} are too long and lose their end, "
                f"{', '.join(encoders)}; the first is number {min(cut) + 1}: {first[:50]}…"
            )

    @functools.cached_property
    def _tokenizers(self) -> dict[str, Any]:
        """The pipeline's tokenizers by name, without its other parts."""
        import transformers

        silence_libraries()
        return {
            name: getattr(transformers, value[1]).from_pretrained(
                self._whole / name, local_files_only=True
            )
            for name, value in read_index(self._whole).items()
            if name.startswith("tokenizer") and value[1]
        }

    def image_shape(self, latent_shape: Shape) -> Shape:
        """(C, H, W) of the images whose latents have `latent_shape`."""
        channels, height, width = latent_shape
        if self._vae_config is None:
            return latent_shape
        channels = self._vae_config.get("out_channels", 3)
        return channels, height * self.factor, width * self.factor

    def latent_shape(self, own: Shape, resolution: int | None) -> Shape:
        """(C, h, w) of x_t for square images of `resolution` pixels; None keeps the model's `own`.

        Raises ConfigError where latents cannot have that size.
        """
        if resolution is None:
            return own
        side, rest = divmod(resolution, self.factor)
        reason = f"takes multiples of {self.factor} pixels" if rest else None
        at = (
            f" (in latents of {self.factor} pixels: {side})" if self.factor > 1 and not rest else ""
        )
        if reason := reason or self.backbone.size_refusal(self.record.model_config, side):
            raise ConfigError(f"resolution = {resolution}{at}: this model {reason}")
        return own[0], side, side

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior, unscaled.

        images: (B, C, H, W) in [-1, 1]; pixels of a model without VAE have deviation 0.
        """
        if self._vae_config is None:
            return images, torch.zeros_like(images)
        images = images.to(self.device, torch.float32)
        return self.backbone.encode_images(self.pipeline.vae, images)

    def latents(self, mean: Tensor, deviation: Tensor, noise: Tensor | None) -> Tensor:
        """x_0 = scaled (mean + deviation * noise); without noise, of the mean.  (B, C, h, w)"""
        if self._vae_config is None:
            return mean
        z = mean if noise is None else mean + deviation * noise.to(mean)
        shift, spread = self._scale(z)
        return (z - shift) * spread

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1], of latents x_0."""
        if self._vae_config is None:
            return x0
        x0 = x0.to(self.device, torch.float32)
        shift, spread = self._scale(x0)
        return self.backbone.decode(self.pipeline.vae, x0 / spread + shift)

    def _scale(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """x_0 = (z - shift) * spread: numbers of the VAE's config, or a pair for each channel."""
        config = self._vae_config
        assert config is not None
        spread = config.get("scaling_factor", 0.18215)  # AutoencoderKL's own default
        if config.get("latents_mean") and config.get("latents_std"):
            mean, std = (
                z.new_tensor(config[f"latents_{n}"]).view(1, -1, 1, 1) for n in ("mean", "std")
            )
            return mean, spread / std
        return config.get("shift_factor") or 0.0, spread

    @torch.no_grad()
    def conditions(self, prompts: Sequence[Any], geometry: Tensor | None = None) -> Conditions:
        """What the network is told of captions (str) or class numbers (int), batch len(prompts).

        geometry: (B, 6) sizes of the images, read by SDXL alone; a whole number per entry. Raises
        ArtifactError where the encoders do not speak as the network listens.
        """
        if self.wants == "nothing":
            return {}
        if geometry is None:
            geometry = torch.zeros(len(prompts), GEOMETRY, dtype=torch.long)
        pipeline = self.pipeline if self.wants == "text" else None
        told = self.backbone.encode(pipeline, prompts, geometry)
        for name, shape in self.backbone.condition_shapes(self.record.model_config).items():
            if shape and told[name].shape[-1] != shape[-1]:
                raise ArtifactError(
                    f"{self.folder}: {name} of width {told[name].shape[-1]}, this network takes "
                    f"{shape[-1]}: other text encoders than the model's; give its own --pipeline"
                )
        return to(told, self.device, self.dtype)

    @torch.no_grad()
    def null(self) -> Conditions:
        """The condition of nothing said, of batch 1."""
        if self.wants == "nothing":
            return {}
        pipeline = self.pipeline if self.wants == "text" else None
        return to(self.backbone.null(pipeline, self.record.model_config), self.device, self.dtype)


def open_companions(
    record: DenoiserRecord,
    *,
    pipeline: str | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> Companions:
    """The frozen parts that a denoiser's record asks for.

    pipeline: the folder or hub id that holds them, else where the base came from. Raises
    MissingError naming the part that is not there, ArtifactError for a VAE of another model.
    """
    parts = backbone_of(record.model_config).parts
    folder = locate_parts(pipeline or record.source, parts) if parts else None
    return Companions(record, folder, device=device, dtype=dtype)


def part_in_file(
    file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, pipeline: Path, name: str
) -> Any:
    """A frozen part as diffusers reads it from a single file; None where the file has it not.

    Raises ArtifactError naming the first tensor that is missing, or what else diffusers refuses.
    """
    import diffusers
    import transformers
    from diffusers.loaders import single_file_utils as of_files
    from diffusers.loaders.single_file import load_single_file_sub_model
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    library, kind = read_index(pipeline)[name]
    known: Any = SINGLE_FILE_LOADABLE_CLASSES
    holds = any(one.startswith(tuple(of_files.LDM_VAE_KEYS)) for one in tensors)
    holds &= kind == "AutoencoderKL"
    if library == "transformers" and name.startswith("text_encoder"):
        encoder = getattr(transformers, kind)
        holds = of_files.is_clip_model_in_single_file(encoder, tensors)
        holds |= "T5" in kind and of_files.is_t5_in_single_file(tensors)
    if not holds:
        return None
    lacks = None
    try:
        if kind == "AutoencoderKL":  # of which diffusers does not say what nothing makes
            config = read_json(pipeline / name / "config.json")
            made = known[kind]["checkpoint_mapping_fn"](checkpoint=dict(tensors), config=config)
            with torch.device("meta"):
                whole = diffusers.AutoencoderKL.from_config(config).state_dict()
            lacks = next((one for one in whole if made.get(one) is None), None)
        if lacks is None:
            part: Any = load_single_file_sub_model(
                library, kind, name, dict(tensors), diffusers.pipelines, False, str(pipeline),
                local_files_only=True, torch_dtype=dtype,
            )  # fmt: skip
            if library == "transformers":
                part.tie_weights()  # of T5, one of whose two tables of words files hold
            lacks = next((one for one, held in part.named_parameters() if held.is_meta), None)
        told = f"nothing makes {lacks!r}"
    except (of_files.SingleFileComponentError, ValueError, KeyError, RuntimeError) as error:
        lacks, told = "", str(error).splitlines()[0][:200]
    if lacks is not None:
        raise ArtifactError(
            f"{file}: its {name} is not that of {pipeline / name} ({told}); give a whole file, or "
            f"the pipeline of the same model with --pipeline"
        )
    return part
