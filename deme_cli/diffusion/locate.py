"""What a MODEL argument names: found, and fetched from the hub, before torch is imported.

The hub's cache is asked first, so that a model once fetched needs no network again. Fetched are
configs and one set of weights of every part, safetensors where there is a choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme_cli import console
from deme_cli.artifacts import read_record, record_of
from deme_cli.data.digits import BASE_PATH
from deme_cli.diffusion.model_files import (
    DENOISERS,
    UNUSED_PARTS,
    WeightSet,
    sets_of_variant,
    wanted_files,
    weight_sets,
)
from deme_cli.errors import ArtifactError, MissingError, reading
from deme_cli.hub import is_hub_id, is_model_cached, offline_reason
from deme_cli.tensor_file import read_header

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")
_NOTHING = [None, None]  # a part that a pipeline has not
_SECONDS = 10.0


def locate_model(source: str, variant: str | None = None) -> Path:
    """The artifact (base, expert or merged) or diffusers folder that a MODEL argument names.

    variant: of a folder's weights. Raises MissingError where nothing is there, within seconds where
    the hub is out of reach; ArtifactError for a file or folder that holds no model.
    """
    if source == "digits":
        if not BASE_PATH.exists():
            raise MissingError(f"{BASE_PATH}: the embedded base is missing; install deme again")
        return BASE_PATH
    path = Path(source).expanduser()
    with reading(path):
        is_file = path.is_file()
    if is_file:
        read_record(path, "base", "expert", "merged")
        return path
    folder = find_folder(source, variant)
    weights_of(denoiser_folder(folder), variant)
    return folder


def find_folder(source: str, variant: str | None = None) -> Path:
    """The folder that a path or a hub id names, fetched where it must be.

    Raises MissingError where nothing is there.
    """
    path = Path(source).expanduser()
    return path if path.is_dir() else _from_hub(source, variant)


def denoiser_folder(folder: Path) -> Path:
    """Where a model folder keeps its denoiser's config.json: `unet/`, `transformer/`, or itself.

    Raises MissingError where it has none of them, and what `read_index` raises.
    """
    if (folder / INDEX).exists():
        read_index(folder)
    for place in (*(folder / part for part in DENOISERS), folder):
        if (place / "config.json").exists():
            if place != folder:
                _tell_average(place)
            return place
    for file in sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", *PICKLED)):
        record_of(read_header(file))  # that says so of a LoRA or a single-file checkpoint
    raise MissingError(
        f"{folder}: not a diffusers model: it has no unet/config.json, transformer/config.json or "
        f"config.json"
    )


def weights_of(place: Path, variant: str | None = None) -> list[WeightSet]:
    """The sets of weights in the folder of a network, of the variant asked for, best first.

    Without one, those of no variant, or of the only variant there. Raises ArtifactError where
    several variants lie there and none is chosen, MissingError for what is not there.
    """
    names = [path.name for path in place.glob("*")]
    sets, chosen = weight_sets(names), sets_of_variant(names, variant)
    if not sets:
        raise MissingError(
            f"{place}: no weights (diffusion_pytorch_model.safetensors or .bin) beside config.json"
        )
    if not chosen:
        there = ", ".join(dict.fromkeys(one.variant or "one of no variant" for one in sets))
        if variant is not None:
            raise MissingError(
                f"{place}: no weights of the variant {variant!r}; there are: {there}"
            )
        raise ArtifactError(
            f"{place}: weights of several variants ({there}); keep one of them there, or choose a "
            f"denoiser's with `deme split MODEL --variant NAME`"
        )
    for one in chosen:
        if not one.is_whole:
            raise MissingError(
                f"{place}: {len(one.files)} of the {one.num_shards} shards of {one.files[0]} are "
                f"there; get the others, or remove these"
            )
        if one.num_shards and one.indices.isdisjoint(names):
            raise MissingError(f"{place}: {min(one.indices)} is missing, which tells what is where")
    return chosen


def _tell_average(place: Path) -> None:
    """Say that averaged weights lie beside the network that was taken."""
    average = place.with_name(f"{place.name}_ema")
    if place.name in DENOISERS and (average / "config.json").exists():
        console.note_once(
            f"{place}: taken, not the average beside it; to take that, name {average}"
        )


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
    if reason := _refusal(index):
        raise ArtifactError(f"{folder}: {reason}")
    return index


def _refusal(index: Mapping[str, Any]) -> str | None:
    """Why deme does not take a pipeline of this index, whatever its networks; or None."""
    if index.get("requires_aesthetics_score"):
        return (
            "the SDXL refiner, which goes on from what another model drew; deme takes SDXL's base"
        )
    if "vqvae" in index:
        return "a pipeline with 'vqvae'; deme takes pixels and VAE latents"
    instead = "deme takes Wan 2.1, as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    two = [n for n in ("transformer_2", "boundary_ratio") if index.get(n) not in (None, _NOTHING)]
    if two:
        return f"a pipeline of two denoisers ({', '.join(two)}), as Wan 2.2 A14B; {instead}"
    if index.get("expand_timesteps"):
        return f"a pipeline with a time for each token (expand_timesteps), Wan 2.2 5B; {instead}"
    return None


def _is_of_libraries(part: list[Any], folder: Path) -> bool:
    """Whether a part's [library, class] is nothing, or a class that diffusers or transformers has.

    diffusers prefers a file of the library's name in the part's folder, and takes a `None.py` for
    the pipeline's class; Auto classes look for code by their config.
    """
    if part == _NOTHING:
        return True
    if len(part) != 2 or part[0] not in _LIBRARIES or not isinstance(part[1], str):
        return False
    finds_code = part[1].startswith("Auto") and not part[1].startswith("Autoencoder")
    return not finds_code and not (folder / f"{part[0]}.py").exists()


def scheduler_file(folder: Path, pipeline: str | None = None) -> Path | None:
    """The scheduler config of a model folder: its own, else of `pipeline`, else of its run.

    Training scripts write out/checkpoint-500/unet_ema, and out/scheduler at the end.
    """
    tops = [folder, *([find_folder(pipeline)] if pipeline else ()), *folder.resolve().parents[:2]]
    names = ("scheduler/scheduler_config.json", "scheduler_config.json")
    places = (top / name for top in tops for name in names)
    return next((place for place in places if place.exists()), None)


def read_scheduler(folder: Path, pipeline: str | None = None) -> dict[str, Any]:
    """What a model's scheduler config states, of the class that its pipeline gives it; {} for none.

    Raises what `read_json` raises.
    """
    path = scheduler_file(folder, pipeline)
    if path is None:
        return {}
    top = path.parent.parent if path.parent.name == "scheduler" else path.parent
    listed = read_json(top / INDEX).get("scheduler") if (top / INDEX).exists() else None
    stated = read_json(path)
    if isinstance(listed, list) and len(listed) == 2 and listed[0] == "diffusers":
        stated["_class_name"] = listed[1]  # as diffusers does
    return stated


def peek_timesteps(place: Path, pipeline: str | None = None) -> int | None:
    """T of a located model, where its files say so without torch."""
    if place.is_file():
        return read_record(place, "base", "expert", "merged").num_train_timesteps
    number = read_scheduler(place, pipeline).get("num_train_timesteps")
    return number if type(number) is int else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table. Raises ArtifactError if it is none, MissingError if it cannot be read."""
    try:
        with reading(path):
            document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of UTF-8, and of thousands of digits
        raise ArtifactError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ArtifactError(
            f"{path}: expected a table of settings, found {type(document).__name__}"
        )
    return document


def _from_hub(hub_id: str, variant: str | None) -> Path:
    """The folder of a hub model's configs and weights, from the cache or fetched into it."""
    if not is_hub_id(hub_id) or Path(hub_id).suffix in (".safetensors", *PICKLED):
        raise MissingError(
            f"{hub_id}: no such file or folder; a model is an artifact, a diffusers folder, "
            f"a hub id (owner/name) or digits"
        )
    if cached := _cached(hub_id, variant):
        return cached
    if reason := offline_reason():
        raise MissingError(
            f"{hub_id}: no such folder, not in the hub's cache, and {reason}; connect to the "
            f"network, or give the folder of a downloaded diffusers model"
        )
    return _download(hub_id, variant)


def _cached(hub_id: str, variant: str | None) -> Path | None:
    """The cached snapshot, if it holds a model's config and weights."""
    if not is_model_cached(hub_id):
        return None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        weights_of(denoiser_folder(folder), variant)
    except (OSError, MissingError):  # the hub library's errors for a part of a model are OSErrors
        return None
    return folder


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
        folder = snapshot_download(hub_id, allow_patterns=names, etag_timeout=_SECONDS)
    except GatedRepoError as error:
        raise MissingError(
            f"{hub_id}: this model is gated; accept its terms on its page, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingError(
            f"{hub_id}: no such folder, and no such model on the hub (a private one needs "
            f"`hf auth login`)"
        ) from error
    except OSError as error:
        raise MissingError(f"{hub_id}: could not be fetched from the hub: {error}") from error
    return Path(folder)
