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
from deme_cli.diffusion.model_files import INDEX, find_folder, read_index, weights_of
from deme_cli.diffusion.model_files import (
    DENOISERS,
    UNUSED_PARTS,
    WeightSet,
    needed_of_part,
    sets_of_variant,
)
from deme_cli.errors import ArtifactError, MissingError
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
        files = file_names(folder / part)
        has_weights = part.startswith("tokenizer") or any(
            name.endswith((".safetensors", ".bin")) for name in files
        )
        if not files or not has_weights:
            raise MissingError(
                f"{folder / part}: the {part} is missing; get the whole pipeline, or give another "
                f"folder that has it with --pipeline"
            )
        if not part.startswith("tokenizer"):
            weights_of(folder / part)


def require_same_weights(folder: Path, one: WeightSet, other: WeightSet) -> None:
    """Check that two sets of weights in one folder hold the same.

    Raises ArtifactError naming the first parameter that differs: which set is meant is not known.
    """
    import torch
    from diffusers.models.model_loading_utils import load_state_dict

    try:
        first, second = (
            {k: v for name in each.files for k, v in load_state_dict(folder / name).items()}
            for each in (one, other)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder}: {one} and {other} cannot be compared, one is broken; move it away"
        ) from error
    common = sorted(first.keys() & second.keys())
    for name in common:
        a, b = first[name], second[name]
        if a.dtype != b.dtype or not torch.equal(a, b):
            break
    else:
        if common:
            return
        name = next(iter(first))
    raise ArtifactError(
        f"{folder}: {one} and {other} hold different weights ({name!r}); which is meant is not "
        f"known: move one of them away"
    )


def frozen_parts(folder: Path) -> list[str]:
    """The parts of a pipeline folder that are neither trained nor replaced, by its index."""
    index = read_index(folder)
    listed = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    left_out = {"scheduler", *DENOISERS, *UNUSED_PARTS}
    return sorted(name for name in listed if name not in left_out)


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every frozen part of a pipeline folder."""
    digests = {}
    for part in frozen_parts(folder):
        sets = sets_of_variant(file_names(folder / part))
        for other in sets[1:]:
            require_same_weights(folder / part, sets[0], other)
        digests[part] = digest_of_part(folder, part)
    return digests


def digest_of_part(folder: Path, part: str) -> str:
    """SHA-256 over the names and bytes of a part's files. Raises MissingError where it has none."""
    names = needed_of_part(file_names(folder / part))
    if not names:
        raise MissingError(f"{folder / part}: the {part} is missing; get the whole pipeline")
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\0{sha256_of(folder / part / name)}\n".encode())
    return total.hexdigest()


def file_names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*") if path.is_file()]
