"""Models from outside: a diffusers pipeline folder, a bare unet folder, a hub id, an artifact.

One door for what `deme split` imports and for any MODEL argument. Weights come out under the names
of the installed diffusers (it renames the attention layers of old checkpoints), in the dtypes of
the files (float8 as bfloat16, which holds it); T and the noise schedule are the checkpoint's own.
Pickled weights are read with `weights_only=True` (diffusers' loader does), so that no code in them
runs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deme_cli import console
from deme_cli.artifacts import BaseRecord, fingerprint, read_record
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.backbones.backbone import Backbone
from deme_cli.diffusion.denoiser import (
    GUESSED,
    TORCH_DTYPES,
    Denoiser,
    assemble,
    build_network,
    load_denoiser,
    load_weights_into,
    require_finite,
    stored_in,
    whole_weights,
)
from deme_cli.diffusion.model_files import (
    INDEX,
    WeightSet,
    denoiser_folder,
    digests_of,
    file_names,
    locate_model,
    locate_parts,
    read_json,
    read_scheduler,
    require_same_weights,
    silence_libraries,
    weight_sets,
    weights_of,
)
from deme_cli.diffusion.projection import has_projections
from deme_cli.diffusion.schedule import FLOW_SCHEDULER, read_schedule
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.files import DTYPES, read_header
from deme_cli.run_file import RunFile


@dataclass(frozen=True)
class ImportedModel:
    """A denoiser's weights and their record; `notes` tell what was assumed.

    parts_like: the pipeline with whose configs a single file's other parts are read, if it has any.
    """

    weights: dict[str, Tensor]
    record: BaseRecord
    notes: tuple[str, ...] = ()
    parts_like: Path | None = None


def import_model(
    source: str, pipeline: str | None = None, variant: str | None = None,
    save_dtype: str | None = None, *, takes_two: bool = False,
) -> ImportedModel:  # fmt: skip
    """The model that `digits`, a diffusers folder, a hub id, or a base or merged artifact names.

    pipeline: where its frozen parts are, if not there.   variant: of a folder's weights.
    save_dtype: what to round them to.   takes_two: of a pipeline of two denoisers, take
    `transformer`. Raises MissingError where nothing is there, ArtifactError for what is broken or
    not supported.
    """
    place = locate_model(source, variant, takes_two=takes_two)
    if place.is_dir():
        model = _import_folder(place, source, pipeline, variant)
    else:
        model = _import_artifact(place, source)
    if save_dtype is None:
        return model
    weights = stored_in(model.weights, save_dtype, source)
    return replace(
        model, weights=weights, record=replace(model.record, fingerprint=fingerprint(weights))
    )


def open_denoiser(
    argument: str, *, run: RunFile | None = None, pipeline: str | None = None,
    device: str = "cpu", dtype: str = "fp32",
) -> Denoiser:  # fmt: skip
    """The denoiser that any MODEL argument names: an artifact, a diffusers folder, a hub id.

    pipeline: where its frozen parts and scheduler are, if not there. Raises what `import_model` and
    `load_denoiser` raise.
    """
    place = locate_model(argument)
    if place.is_file():
        return load_denoiser(place, run=run, device=device, dtype=dtype)
    model = _import_folder(place, argument, pipeline)
    for note in model.notes:
        console.note_once(note)
    return assemble(model.record, model.weights, argument, device=device, dtype=dtype)


def read_network(
    place: Path, variant: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and complete config of the network in a folder, alone."""
    chosen = weights_of(place, variant)
    require_same_weights(place, chosen.variant)
    return _load_network(place, backbone_of(read_json(place / "config.json"), str(place)), chosen)


def _import_artifact(path: Path, source: str) -> ImportedModel:
    """A base as it is, with its own source; a merged model as the base of another round."""
    record = read_record(path, "base", "merged")
    weights = whole_weights(path, record)
    if has_projections(weights):
        raise ArtifactError(
            f"{path}: carries block projections, which a plain base cannot hold; "
            f"finetune with --projection fold to go on from its merged model"
        )
    load_weights_into(build_network(record.model_config, source), weights, source)
    if source != "digits" and (isinstance(record, BaseRecord) or record.companions):
        source = record.source  # where its frozen parts still are
    model = imported_model(
        weights, record.model_config, record.scheduler_config, source, record.companions
    )
    if isinstance(record, BaseRecord):
        model = replace(model, record=replace(model.record, training=record.training))
    if record.single_file:
        model = replace(model, record=replace(model.record, single_file=record.single_file))
    return model


def imported_model(
    weights: dict[str, Tensor], model_config: dict[str, Any], scheduler_config: dict[str, Any],
    source: str, companions: dict[str, str], notes: Sequence[str] = (),
) -> ImportedModel:  # fmt: skip
    """Raises ArtifactError where the scheduler config is unusable."""
    record = BaseRecord(
        source=source, model_config=model_config, scheduler_config=scheduler_config,
        num_train_timesteps=read_schedule(scheduler_config, source).num_train_timesteps,
        companions=companions, fingerprint=fingerprint(weights),
    )  # fmt: skip
    return ImportedModel(weights, record, tuple(notes))


def _import_folder(
    folder: Path, source: str, pipeline: str | None = None, variant: str | None = None
) -> ImportedModel:
    """A pipeline folder (model_index.json) or a bare denoiser's folder (config.json)."""
    place = denoiser_folder(folder)
    backbone = backbone_of(read_json(place / "config.json"), source)
    companions: dict[str, str] = {}
    notes = []
    if backbone.parts:
        if pipeline or (folder / INDEX).exists():
            companions = digests_of(locate_parts(pipeline or str(folder), backbone.parts))
        else:
            notes = [f"{source}: a denoiser alone; give the folder of its pipeline: --pipeline"]
        source = str(folder.resolve()) if Path(source).expanduser().is_dir() else source
    scheduler_config = scheduler_config_of(folder, source, pipeline, backbone)
    chosen = weights_of(place, variant)
    require_same_weights(place, chosen.variant)
    weights, model_config = _load_network(place, backbone, chosen)
    others = [one for one in weight_sets(file_names(place)) if one != chosen]
    if others or chosen.variant:
        told = [f"{one} holds the same weights" for one in others if one.variant == chosen.variant]
        left = dict.fromkeys(
            one.variant or "none" for one in others if one.variant != chosen.variant
        )
        told += [f"variants beside it: {', '.join(left)} (--variant)"] if left else []
        notes.append("; ".join([f"{place}: read {chosen}", *told]))
    if not scheduler_config:
        notes.append(f"{source}: {GUESSED}")
    return imported_model(weights, model_config, scheduler_config, source, companions, notes)


def scheduler_config_of(
    folder: Path, source: str, pipeline: str | None, backbone: Backbone
) -> dict[str, Any]:
    """What the scheduler config beside a model, or else of its pipeline, states; {} for none.

    Raises MissingError where there is none and none can be guessed.
    """
    import diffusers

    config, where = read_scheduler(folder, pipeline)
    if not config:
        if backbone.parts:
            raise MissingError(
                f"{source}: a {backbone.class_name} without scheduler_config.json, which says what "
                f"it predicts of which noise; give the folder or hub id of its pipeline: --pipeline"
            )
        return config
    name = config.get("_class_name")
    kind: Any = getattr(diffusers, str(name), None)
    by_betas = inspect.isclass(kind) and "beta_schedule" in inspect.signature(kind).parameters
    if not by_betas and name != FLOW_SCHEDULER:
        raise ArtifactError(
            f"{where}: scheduler {name!r} has neither discrete betas nor a flow; deme takes the "
            f"DDPM family and FlowMatchEulerDiscreteScheduler"
        )
    try:
        kind.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: unusable scheduler config: {error}") from error
    read_schedule(config, source)
    return config


def _load_network(
    folder: Path, backbone: Backbone, chosen: WeightSet
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and complete config through diffusers; all parameters must be there, and no other."""
    is_safe = chosen.ending == "safetensors"
    for name in chosen.files if is_safe else ():
        read_header(folder / name)
    silence_libraries()
    kind = backbone.network_class
    try:
        network, report = kind.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True,
            variant=chosen.variant or None, use_safetensors=is_safe,
            low_cpu_mem_usage=bool(kind._keep_in_fp32_modules),  # such classes insist
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        signs = ("mismatch", "expected shape")
        lines = [line for line in str(error).splitlines() if any(sign in line for sign in signs)]
        if lines or isinstance(error, RuntimeError):
            mismatch = lines[0].strip() if lines else error
            raise ArtifactError(f"{folder}: weights of another network: {mismatch}") from error
        raise ArtifactError(
            f"{folder / chosen.files[0]}: the weights cannot be read: they are broken, or a pickle "
            f"of more than tensors (nothing in it was run); get a .safetensors file instead"
        ) from error
    for kind, what in (("missing_keys", "lack"), ("unexpected_keys", "hold the unknown parameter")):
        if report[kind]:
            raise ArtifactError(f"{folder}: the weights {what} {sorted(report[kind])[0]!r}")
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    require_finite(weights, str(folder / chosen.files[0]))
    weights = _as_stored(weights, folder, chosen)
    config = {k: v for k, v in backbone.corrected(network.config).items() if not k.startswith("_")}
    return weights, json.loads(json.dumps({"_class_name": backbone.class_name, **config}))


def _as_stored(weights: dict[str, Tensor], folder: Path, chosen: WeightSet) -> dict[str, Tensor]:
    """float32 weights in the dtypes of their files again, those renamed in the widest of these."""
    kinds: dict[str, torch.dtype] = {}
    for name in chosen.files:
        if chosen.ending == "safetensors":
            specs = read_header(folder / name).tensors.values()
            kinds |= {spec.name: getattr(torch, DTYPES[spec.dtype][1]) for spec in specs}
        else:
            pickled = torch.load(folder / name, map_location="meta", weights_only=True)
            kinds |= {name: tensor.dtype for name, tensor in pickled.items()}
    floats = [kind for kind in kinds.values() if kind.is_floating_point]
    widest = max(floats, key=lambda kind: kind.itemsize, default=torch.float32)
    return {
        name: tensor.to(kept_dtype(kinds.get(name, widest))) for name, tensor in weights.items()
    }


def kept_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype that weights stored in another are kept in: one that merges compute with."""
    if stored.itemsize == 1:
        return torch.bfloat16
    return stored if stored in TORCH_DTYPES.values() else torch.float32
