"""The files of a model, found before torch is imported: an artifact, a diffusers folder, a hub id.

A pipeline folder has parts (unet, vae, text_encoder, ...): subfolders with configs and weights, as
one file or shards, in several formats and variants. Of each part count the small files and one set
of weights: safetensors where there is a choice, no variants. From the hub, whose cache is asked
first, these alone are fetched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli import console
from deme_cli.artifacts import read_record, record_of
from deme_cli.data.digits import BASE_PATH
from deme_cli.data.prompts import parse_json, read_text
from deme_cli.errors import ArtifactError, MissingError, reading
from deme_cli.fetch import is_hub_id, is_model_cached, offline_reason, sha256_of
from deme_cli.files import PICKLED, read_header
from deme_cli.timesteps import TimestepRange

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")  # the part that is trained
SECOND = "transformer_2"  # beside `transformer`, for the timesteps of low noise
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
_ROOT = (INDEX, "config.json", "scheduler_config.json")
_NOTHING = [None, None]  # a part that a pipeline has not
_SECONDS = 10.0
_WEIGHTS = (
    re.compile(  # the variant stands before the shard, or behind it as diffusers < 0.30 wrote
        r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.]+?))?"
        r"(?:-\d{5}-of-(?P<shards>\d{5}))?(?:\.(?P<behind>[^.]+))?\.(?P<ending>safetensors|bin)"
    )
)


# sets of weights


@dataclass(frozen=True)
class WeightSet:
    """Files that together hold a network once: one file, or shards. `variant` is "" for none."""

    variant: str
    ending: str
    num_shards: int
    files: tuple[str, ...]

    def __str__(self) -> str:
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and its shards"


def weight_sets(names: Iterable[str]) -> list[WeightSet]:
    """The sets of weights among the files of one folder, in the order of their preference."""
    files: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            variant = match["variant"] or match["behind"] or ""
            files[variant, match["ending"], int(match["shards"] or 0)].append(name)
    sets = [WeightSet(*key, tuple(own)) for key, own in files.items()]
    return sorted(sets, key=lambda one: (one.variant, one.ending == "bin", one.num_shards))


def sets_of_variant(names: Iterable[str], variant: str | None = None) -> list[WeightSet]:
    """The sets of one variant: the one named, else those of no variant, else of the only one."""
    sets = weight_sets(names)
    if variant is None:
        variants = {one.variant for one in sets}
        variant = variants.pop() if len(variants) == 1 else ""
    return [one for one in sets if one.variant == variant]


def weights_of(folder: Path, variant: str | None = None) -> WeightSet:
    """The weights in the folder of a network, whole, of the variant asked for.

    Without one, those of no variant, or of the only variant there. Raises ArtifactError where
    several variants lie there and none is chosen, MissingError for what is not there.
    """
    names = file_names(folder)
    sets, chosen = weight_sets(names), sets_of_variant(names, variant)
    if not sets:
        raise MissingError(
            f"{folder}: no weights (diffusion_pytorch_model.safetensors or .bin) beside config.json"
        )
    there = ", ".join(dict.fromkeys(one.variant or "one of no variant" for one in sets))
    if not chosen and variant is not None:
        raise MissingError(f"{folder}: no weights of the variant {variant!r}; there are: {there}")
    if not chosen:
        raise ArtifactError(
            f"{folder}: weights of several variants ({there}); keep one of them there, or choose a "
            f"denoiser's with `deme split MODEL --variant NAME`"
        )
    best = chosen[0]
    if len(best.files) != max(best.num_shards, 1):
        raise MissingError(
            f"{folder}: {len(best.files)} of the {best.num_shards} shards of {best.files[0]} are "
            f"there; get the others, or remove these"
        )
    stem = re.split(r"[.-]", best.files[0])[0]
    kinds = (f"index.{best.variant}", f"{best.variant}.index") if best.variant else ("index",)
    indices = {f"{stem}.{best.ending}.{kind}.json" for kind in kinds}
    if best.num_shards and not indices & {*names}:
        raise MissingError(f"{folder}: {min(indices)} is missing, which tells what is where")
    return best


def require_same_weights(folder: Path, variant: str) -> None:
    """Check that all sets of weights of a variant in one folder hold the same.

    Raises ArtifactError naming the first parameter that differs: which set is meant is not known.
    """
    chosen, *others = sets_of_variant(file_names(folder), variant)
    for other in others:
        import torch
        from diffusers.models.model_loading_utils import load_state_dict

        try:
            first, second = (
                {k: v for name in one.files for k, v in load_state_dict(folder / name).items()}
                for one in (chosen, other)
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"{folder}: {chosen} and {other} cannot be compared, one is broken; move it away"
            ) from error
        for name in sorted(first.keys() & second.keys()) or first:
            a, b = first[name], second.get(name)
            if b is None or a.dtype != b.dtype or not torch.equal(a, b):
                raise ArtifactError(
                    f"{folder}: {chosen} and {other} hold different weights ({name!r}); which is "
                    f"meant is not known: move one of them away"
                )


def file_names(folder: Path) -> list[str]:
    """The names of the files in a folder."""
    return [path.name for path in folder.glob("*") if path.is_file()]


def _needed(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of the files in one folder: configs, and weights in one format and of one variant."""
    names = list(names)
    small = [n for n in names if n.endswith((".json", ".txt", ".model")) and n[0] != "."]
    sets = sets_of_variant(names, variant)
    return small + [name for one in sets if one.ending == sets[0].ending for name in one.files]


def wanted_files(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of a repository's files: what makes a pipeline, or, without its index, a denoiser.

    variant: of the denoiser's weights.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        by_folder[folder].append(file)
    root = by_folder.pop("", [])
    chosen = [name for name in _ROOT if name in root]
    part = next((name for name in DENOISERS if "config.json" in by_folder[name]), None)
    if part is None:
        chosen += [name for name in _needed(root, variant) if name not in _ROOT]
    keep = set(by_folder) - set(UNUSED_PARTS) if INDEX in root else {part, "scheduler"}
    for folder, files in sorted(by_folder.items()):
        if folder in keep and "/" not in folder:
            needed = _needed(files, variant if folder in (part, SECOND) else None)
            chosen += [f"{folder}/{name}" for name in sorted(needed)]
    return chosen


# models


def locate_model(source: str, variant: str | None = None, *, takes_two: bool = False) -> Path:
    """The artifact (base, expert or merged) or diffusers folder that a MODEL argument names.

    variant: of a folder's weights.   takes_two: whether it may be a pipeline of two denoisers.
    Raises MissingError where nothing is there, within seconds where the hub is out of reach;
    ArtifactError for a file or folder that holds no model.
    """
    if source == "digits":
        return BASE_PATH
    path = Path(source).expanduser()
    with reading(path):
        is_file = path.is_file()
    if is_file:
        read_record(path, "base", "expert", "merged")
        return path
    folder = find_folder(source, variant)
    if own_ranges(folder) and not takes_two:
        raise ArtifactError(
            f"{source}: a pipeline of two denoisers, each for its part of the timesteps; "
            f"`deme split` makes a base and two experts of it"
        )
    weights_of(denoiser_folder(folder), variant)
    return folder


def is_single_file(source: str) -> bool:
    """Whether a MODEL argument is a safetensors file that deme did not write."""
    path = Path(source).expanduser()
    with reading(path):
        return path.is_file() and "deme" not in read_header(path).metadata


def find_folder(source: str, variant: str | None = None) -> Path:
    """The folder that a path or a hub id names, fetched where it must be.

    Raises MissingError where nothing is there.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return (
            path.resolve() if path.name in ("", "..") else path
        )  # what lies beside it is named after it
    if not is_hub_id(source) or path.suffix in (".safetensors", *PICKLED):
        raise MissingError(
            f"{source}: no such file or folder; a model is an artifact, a diffusers folder, "
            f"a hub id (owner/name) or digits"
        )
    from huggingface_hub import snapshot_download

    if is_model_cached(source):
        try:
            folder = Path(snapshot_download(source, local_files_only=True))
            weights_of(denoiser_folder(folder), variant)
            return folder
        except (OSError, MissingError):  # the library's errors for a part of a model are OSErrors
            pass
    if reason := offline_reason():
        raise MissingError(
            f"{source}: no such folder, not in the hub's cache, and {reason}; connect to the "
            f"network, or give the folder of a downloaded diffusers model"
        )
    return _download(source, variant)


def denoiser_folder(folder: Path) -> Path:
    """Where a model folder keeps its denoiser's config.json: `unet/`, `transformer/`, or itself.

    Raises MissingError where it has none of them, and what `read_index` raises.
    """
    if (folder / INDEX).exists():
        read_index(folder)
    for place in (*(folder / part for part in DENOISERS), folder):
        average = place.with_name(f"{place.name}_ema")
        if (place / "config.json").exists():
            if place != folder and average.exists():
                console.note_once(f"{place}: taken, not the average; to take that, name {average}")
            return place
    for file in sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", *PICKLED)):
        record_of(read_header(file))  # that says so of a LoRA or a single-file checkpoint
    raise MissingError(
        f"{folder}: not a diffusers model: it has no unet/config.json, transformer/config.json or "
        f"config.json"
    )


def read_scheduler(folder: Path, pipeline: str | None = None) -> tuple[dict[str, Any], Path | None]:
    """What a model's scheduler config states, of the class that its pipeline gives it, and where.

    Its own, else of `pipeline`, else of its run: training scripts write
    out/checkpoint-500/unet_ema, and out/scheduler at the end. {} and None where there is none.
    Raises what `read_json` raises.
    """
    tops = [folder, *([find_folder(pipeline)] if pipeline else ()), *folder.resolve().parents[:2]]
    names = ("scheduler/scheduler_config.json", "scheduler_config.json")
    path = next((top / name for top in tops for name in names if (top / name).exists()), None)
    if path is None:
        return {}, None
    top = path.parent.parent if path.parent.name == "scheduler" else path.parent
    listed = read_json(top / INDEX).get("scheduler") if (top / INDEX).exists() else None
    stated = read_json(path)
    if isinstance(listed, list) and len(listed) == 2 and listed[0] == "diffusers":
        stated["_class_name"] = listed[1]  # as diffusers does
    return stated, path


def peek_timesteps(place: Path, pipeline: str | None = None) -> int | None:
    """T of a located model, where its files say so without torch."""
    if place.is_file():
        return read_record(place, "base", "expert", "merged").num_train_timesteps
    number = read_scheduler(place, pipeline)[0].get("num_train_timesteps")
    return number if type(number) is int else None


def own_ranges(folder: Path) -> list[TimestepRange]:
    """The timesteps of `transformer_2` and of `transformer`, where a pipeline has both; else [].

    WanPipeline gives `transformer` those at and above boundary_ratio * T, the high noise. Raises
    ArtifactError for a boundary that is between two timesteps.
    """
    if not (folder / INDEX).is_file() or not _has(read_index(folder), SECOND):
        return []
    total, ratio = peek_timesteps(folder) or 1000, read_json(folder / INDEX)["boundary_ratio"]
    boundary = round(ratio * total) if type(ratio) is float else 0
    if not 0 < boundary < total or abs(boundary - ratio * total) > 1e-6:
        raise ArtifactError(
            f"{folder / INDEX}: boundary_ratio = {ratio!r}: expected a share of the {total} "
            f"timesteps that falls on one of them, as 0.875"
        )
    return [TimestepRange(0, boundary), TimestepRange(boundary, total)]


def _has(index: Mapping[str, Any], part: str) -> bool:
    return index.get(part) not in (None, _NOTHING)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table. Raises ArtifactError if it is none, MissingError if it cannot be read."""
    document = parse_json(read_text(path), f"{path}:")
    if not isinstance(document, dict):
        raise ArtifactError(
            f"{path}: expected a table of settings, found {type(document).__name__}"
        )
    return document


# pipelines


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's model_index.json: which class of which library each part is.

    Raises ArtifactError where a part, or the pipeline itself, would be of code that lies in the
    folder or of another library than diffusers and transformers, and for pipelines that deme does
    not take.
    """
    index = read_json(folder / INDEX)
    for name, value in index.items():
        if name == "_class_name":
            is_known = isinstance(value, str) and not (folder / "None.py").exists()
        else:  # a part, a setting, or a safety checker, which is never loaded
            is_part = isinstance(value, list) and name not in UNUSED_PARTS
            is_known = not is_part or _is_of_libraries(value, folder / name)
        if not is_known:
            raise ArtifactError(
                f"{folder / INDEX}: {name} = {json.dumps(value)} may be code that comes with the "
                f"pipeline, which deme does not run; expected a class of diffusers or transformers"
            )
    kind, two, ratio = index.get("_class_name"), _has(index, SECOND), index.get("boundary_ratio")
    refused = {
        "the SDXL refiner, which goes on from what another model drew; deme takes SDXL's base":
            index.get("requires_aesthetics_score"),
        "a pipeline with 'vqvae'; deme takes pixels and VAE latents": "vqvae" in index,
        f"a {kind} of two denoisers; deme takes those of WanPipeline, as Wan 2.2 T2V A14B":
            two and kind != "WanPipeline",
        f"one of {SECOND} and boundary_ratio without the other; both say who denoises what":
            two != (ratio is not None),
        "a pipeline with a time for each token (expand_timesteps), Wan 2.2 5B; deme takes Wan 2.1 "
        "and Wan 2.2 T2V A14B": index.get("expand_timesteps"),
    }  # fmt: skip
    for reason, holds in refused.items():
        if holds:
            raise ArtifactError(f"{folder}: {reason}")
    return index


def _is_of_libraries(part: list[Any], folder: Path) -> bool:
    """Whether a part's [library, class] is nothing, or a class that diffusers or transformers has.

    diffusers prefers a file of the library's name in the part's folder, and takes a `None.py` for
    the pipeline's class; Auto classes look for code by their config.
    """
    if part == _NOTHING:
        return True
    if len(part) != 2 or part[0] not in ("diffusers", "transformers") or type(part[1]) is not str:
        return False
    finds_code = part[1].startswith("Auto") and not part[1].startswith("Autoencoder")
    return not finds_code and not (folder / f"{part[0]}.py").exists()


def locate_parts(source: str, parts: Sequence[str]) -> Path:
    """The pipeline folder that `source` (a folder or hub id) names, with all of `parts` in it.

    Raises MissingError naming the first part that is missing, ArtifactError for foreign code.
    """
    todo = f"{', '.join(parts)}: give the folder or hub id of its whole pipeline with --pipeline"
    if not (Path(source).expanduser().is_dir() or is_hub_id(source)):
        raise MissingError(f"{source}: no such folder; this model needs {todo}")
    folder = find_folder(source)
    if not (folder / INDEX).exists():
        raise MissingError(f"{folder}: a denoiser alone; it needs {todo}")
    read_index(folder)
    require_parts(folder, parts)
    return folder


def require_parts(folder: Path, parts: Iterable[str]) -> None:
    """Check that a pipeline folder holds these parts; raises MissingError naming the first."""
    for part in parts:
        if not file_names(folder / part):
            raise MissingError(
                f"{folder / part}: the {part} is missing; get the whole pipeline, or give another "
                f"folder that has it with --pipeline"
            )
        if not part.startswith("tokenizer"):
            weights_of(folder / part)


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every part of a pipeline folder that is neither trained nor replaced."""
    left_out = {"scheduler", *DENOISERS, SECOND, *UNUSED_PARTS}
    listed = {n for n, value in read_index(folder).items() if isinstance(value, list) and value[0]}
    parts = sorted(listed - left_out)
    for part in parts:
        if sets := sets_of_variant(file_names(folder / part)):
            require_same_weights(folder / part, sets[0].variant)
    return {part: digest_of_part(folder, part) for part in parts}


def digest_of_part(folder: Path, part: str) -> str:
    """SHA-256 over the names and bytes of a part's files. Raises MissingError where it has none."""
    names = _needed(file_names(folder / part))
    if not names:
        raise MissingError(f"{folder / part}: the {part} is missing; get the whole pipeline")
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\0{sha256_of(folder / part / name)}\n".encode())
    return total.hexdigest()


# the hub


def _download(hub_id: str, variant: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        info = HfApi().model_info(hub_id, timeout=_SECONDS)
        held = [sibling.rfilename for sibling in info.siblings or []]
        names = wanted_files(held, variant)
        if INDEX in names:  # so that what is refused is, before gigabytes are fetched
            read_index(Path(hf_hub_download(hub_id, INDEX, etag_timeout=_SECONDS)).parent)
        if not any(name.rpartition("/")[2] == "config.json" for name in names):
            weights = [name for name in held if name.endswith((".safetensors", *PICKLED))]
            raise MissingError(
                f"{hub_id}: holds no diffusers model (unet/config.json, transformer/config.json or "
                f"config.json), but {', '.join(weights[:3]) or 'no weights'}; take the repository "
                f"of a whole model"
            )
        return Path(snapshot_download(hub_id, allow_patterns=names, etag_timeout=_SECONDS))
    except GatedRepoError as error:
        what = "this model is gated; accept its terms on its page, then `hf auth login`"
        raise MissingError(f"{hub_id}: {what}") from error
    except RepositoryNotFoundError as error:
        what = "no such folder, nor model on the hub (a private one needs `hf auth login`)"
        raise MissingError(f"{hub_id}: {what}") from error
    except OSError as error:
        raise MissingError(f"{hub_id}: could not be fetched from the hub: {error}") from error


def silence_libraries() -> None:
    """Keep the libraries' bars and remarks off the terminal."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for remarks in (of_diffusers, of_transformers):
        remarks.set_verbosity(logging.CRITICAL)
        remarks.disable_progress_bar()
