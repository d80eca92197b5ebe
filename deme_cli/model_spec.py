"""`modelspec.*`: what a file of weights tells other programs of itself, as kohya's and Civitai do.

sai_model_spec 1.0.0 (Stability AI, https://github.com/Stability-AI/ModelSpec), beside the metadata
`deme`. Artifacts have no date and no hash of all bytes: equal merges are equal files, and a second
hash would cost what the first does. Exports have a date, those of one file also that hash.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deme_cli.artifacts import DenoiserRecord

DIGEST = "modelspec.hash_sha256"  # of all bytes behind the header, as kohya writes it
_FLUX, _STABILITY = "https://github.com/black-forest-labs/flux", "https://github.com/Stability-AI/"
# By class of diffusers: the name of the architecture, and whose names of tensors single files have.
_KNOWN = {
    "SD3Transformer2DModel": ("stable-diffusion-3", f"{_STABILITY}sd3-ref"),
    "FluxTransformer2DModel": ("flux-1-schnell", _FLUX),
    "WanTransformer3DModel": ("wan", "https://github.com/Wan-Video/Wan2.1"),
    "DiTTransformer2DModel": ("dit", "diffusers"),
    "UNet2DModel": ("ddpm", "diffusers"),
}
_UNETS = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}  # by the width of their text
_SIZES = {64: "512x512", 96: "768x768", 128: "1024x1024"}  # of images, by those of latents


def model_spec(
    record: DenoiserRecord, title: str = "", *, artifact: Path | None = None,
    single_file: bool = False,
) -> dict[str, str]:  # fmt: skip
    """The metadata of a file with the weights of a record; without a title it follows from that.

    artifact: what is exported, which has its date.   single_file: under its authors' names.
    """
    config, scheduler = record.model_config, record.scheduler_config
    name = str(config.get("_class_name"))
    architecture, implementation = _KNOWN.get(name, (name, f"{_STABILITY}generative-models"))
    if config.get("guidance_embeds"):
        architecture = "flux-1-dev"
    predicts = {"epsilon": "epsilon", "v_prediction": "v"}.get(
        scheduler.get("prediction_type", "" if "shift" in scheduler else "epsilon")
    )
    size = config.get("sample_size")
    if name == "UNet2DConditionModel":
        architecture = _UNETS.get(config.get("cross_attention_dim", 0), architecture)
        if config.get("addition_embed_type") == "text_time":
            architecture = "stable-diffusion-xl-v1-base"
        if architecture == "stable-diffusion-v2":
            architecture += "-768-v" if predicts == "v" else "-512"
    date = None
    if artifact is not None:
        date = datetime.fromtimestamp(artifact.stat().st_mtime, UTC).isoformat(timespec="seconds")
    told = {
        "sai_model_spec": "1.0.0",
        "architecture": architecture,
        "implementation": implementation if single_file else "diffusers",
        "title": title or f"{_base_name(record)}, merged",
        "date": date,
        "resolution": _SIZES.get(size) if isinstance(size, int) else None,
        "prediction_type": predicts,
        "merged_from": _merged_from(record),
    }
    return {f"modelspec.{key}": value for key, value in told.items() if value}


def _merged_from(record: DenoiserRecord) -> str | None:
    """`base, 0.1 * ft_1of2, 0.4 * ft_2of2`: a merged model's parents with their coefficients."""
    from deme_cli.artifacts import MergedRecord

    if not isinstance(record, MergedRecord):
        return None
    parents = zip(record.coefficients, record.parents, strict=True)
    summands = [f"{w:g} * {_name(parent['path'])}" for w, parent in parents]
    return ", ".join([_base_name(record), *summands])


def _base_name(record: DenoiserRecord) -> str:
    """Of the single file that the base came from, or of its folder or hub id."""
    return _name(record.origin)


def _name(path: str) -> str:
    return Path(path).name.removesuffix(".safetensors")
