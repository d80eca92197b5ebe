"""Which files of a model repository are needed, told from their names alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

DENOISERS = ("unet", "transformer")  # the part that is trained
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ROOT = ("model_index.json", "config.json", "scheduler_config.json")
_SMALL = (".json", ".txt", ".model")


def needed_of_part(names: Iterable[str]) -> list[str]:
    """Of the files in one folder: configs, and weights in one format, without variants."""
    names = list(names)
    small = [name for name in names if name.endswith(_SMALL) and not name.startswith(".")]
    whole = [name for name in names if _is_weights(name)]
    safe = [name for name in whole if name.endswith(".safetensors")]
    return small + (safe or whole)


def _is_weights(name: str) -> bool:
    """A weight file of no variant: `model.safetensors`, `model-00001-of-00002.safetensors`."""
    stem, dot, ending = name.partition(".")
    return stem.split("-")[0] in _STEMS and ending in ("safetensors", "bin") and bool(dot)


def wanted_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files: what makes a pipeline, or, without its index, a denoiser."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        by_folder[folder].append(file)
    root = by_folder.pop("", [])
    chosen = [name for name in _ROOT if name in root]
    part = next((name for name in DENOISERS if "config.json" in by_folder[name]), None)
    if part is None:
        chosen += [name for name in needed_of_part(root) if _is_weights(name)]
    is_pipeline = "model_index.json" in root
    keep = set(by_folder) - set(UNUSED_PARTS) if is_pipeline else {part, "scheduler"}
    for folder, files in sorted(by_folder.items()):
        if folder in keep and "/" not in folder:
            chosen += [f"{folder}/{name}" for name in sorted(needed_of_part(files))]
    return chosen
