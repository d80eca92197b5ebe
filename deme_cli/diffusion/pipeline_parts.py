"""The files of a diffusers pipeline folder, part by part, and the digests that name frozen parts.

A part is a subfolder (vae, text_encoder, tokenizer, ...). Of its files count the small ones
(configs, vocabularies) and one set of weights: safetensors where there is a choice, no variants.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from deme_cli.assets import sha256_of
from deme_cli.diffusion.locate import INDEX, find_folder, read_index
from deme_cli.diffusion.pipeline_files import DENOISERS, UNUSED_PARTS, needed_of_part
from deme_cli.errors import MissingError
from deme_cli.hub import is_hub_id


def locate_parts(source: str, parts: Sequence[str]) -> Path:
    """The pipeline folder that `source` (a folder or hub id) names, with all of `parts` in it.

    Raises MissingError naming the first part that is missing, ArtifactError for foreign code.
    """
    if not (Path(source).expanduser().is_dir() or is_hub_id(source)):
        raise MissingError(
            f"{source}: no such folder; this model's {', '.join(parts)} are read from there: give "
            f"the folder or hub id of its pipeline with --pipeline"
        )
    folder = find_folder(source)
    if not (folder / INDEX).exists():
        raise MissingError(
            f"{folder}: a denoiser alone; it needs {', '.join(parts)}: give the folder or hub id "
            f"of its whole pipeline with --pipeline"
        )
    read_index(folder)
    require_parts(folder, parts)
    return folder


def require_parts(folder: Path, parts: Iterable[str]) -> None:
    """Check that a pipeline folder holds these parts; raises MissingError naming the first."""
    for part in parts:
        files = [path for path in (folder / part).glob("*") if path.is_file()]
        has_weights = part.startswith("tokenizer") or any(
            path.suffix in (".safetensors", ".bin") for path in files
        )
        if not files or not has_weights:
            raise MissingError(
                f"{folder / part}: the {part} is missing; get the whole pipeline, or give another "
                f"folder that has it with --pipeline"
            )


def frozen_parts(folder: Path) -> list[str]:
    """The parts of a pipeline folder that are neither trained nor replaced, by its index."""
    index = read_index(folder)
    listed = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    left_out = {"scheduler", *DENOISERS, *UNUSED_PARTS}
    return sorted(name for name in listed if name not in left_out)


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every frozen part of a pipeline folder."""
    return {part: digest_of_part(folder, part) for part in frozen_parts(folder)}


def digest_of_part(folder: Path, part: str) -> str:
    """SHA-256 over the names and bytes of a part's files. Raises MissingError where it has none."""
    names = needed_of_part(path.name for path in (folder / part).glob("*") if path.is_file())
    if not names:
        raise MissingError(f"{folder / part}: the {part} is missing; get the whole pipeline")
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\0{sha256_of(folder / part / name)}\n".encode())
    return total.hexdigest()
