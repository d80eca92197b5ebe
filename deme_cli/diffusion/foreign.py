"""`import_expert`: weights that were trained elsewhere, as an expert of a base.

They come as a diffusers folder, or as a state dict in one file (safetensors; a pickle is read with
`weights_only=True`, so no code in it runs), below whatever prefix a trainer put before the names.
Nothing is taken on trust: each parameter of the base has to be there in its shape, and no other; a
config beside the weights has to be that of the base. How they were trained is not known, and
nothing of it is invented: the record tells what file they came from.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deme_cli import console
from deme_cli.artifacts import (
    BaseRecord,
    ExpertRecord,
    fingerprint,
    load_tensors,
    read_record,
    write_artifact,
)
from deme_cli.config import SplitConfig
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.checkpoints import ImportedModel, import_model, read_network
from deme_cli.diffusion.denoiser import build_network, require_finite, stored_in
from deme_cli.diffusion.lora import adapter_settings, fuse, is_lora, low_rank_factors
from deme_cli.diffusion.model_files import (
    SECOND,
    denoiser_folder,
    digest_of_part,
    find_folder,
    own_ranges,
    read_scheduler,
)
from deme_cli.diffusion.schedule import NoiseSchedule, read_schedule
from deme_cli.diffusion.single_file import PREFIX, in_diffusers_names
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError
from deme_cli.fetch import sha256_of
from deme_cli.files import (
    DTYPES,
    PICKLED,
    Header,
    cast_specs,
    foreign_kind,
    read_header,
    require_output,
    require_space,
)
from deme_cli.run_file import RunFile
from deme_cli.timesteps import RangeChoice, parse_range

_ADAPTERS = ("adapter_model", "pytorch_lora_weights")  # as PEFT and diffusers name their files
_FREE = ("sample_size", "upcast_attention")  # in which the configs of one network may differ


def import_expert(
    source: str | Path, range: str, *, base: Path | None = None, output: Path | None = None,
    run: RunFile | None = None, variant: str | None = None, save_dtype: str | None = None,
    force: bool = False,
) -> Path:  # fmt: skip
    """Write weights that were trained elsewhere as the expert of a range of `base`; returns where.

    source: a file with a state dict or a LoRA, or a diffusers folder or hub id.   range: `i/N`,
    `start:stop`, or `1/1` for all timesteps.   base: None for that of `run`.   output: None for
    ft_{i}of{N}.safetensors.   variant: of a folder's weights, as fp16.   save_dtype: of
    floating-point tensors; None for the base's.

    Raises ConfigError for a range that the base has not, MissingError, ArtifactError naming the
    first parameter that is not the base's, NumericsError for one that is not finite.
    """
    run = run or RunFile()
    if not (base or run.base).exists():
        raise MissingError(
            f"{base or run.base}: no base there; make one with `deme split`, or use --base"
        )
    header = read_header(base or run.base)
    record = read_record(header.path, "base")
    if range == "all":
        raise ConfigError("--range all: weights are the expert of one range; 1/1 for all timesteps")
    choice = parse_range(
        range, record.num_train_timesteps, run.settings(SplitConfig).timestep_ranges
    )
    output = output or Path(f"ft_{choice.label}.safetensors")
    require_output(output, force=force, inputs=(Path(source), header.path))
    require_space(output, sum(spec.num_bytes for spec in header.tensors.values()))
    weights, imported = _read(str(source), header, record, variant)
    weights = _fitted(weights, header, save_dtype, str(source))
    require_finite(weights, str(source))
    written = write_artifact(output, weights, _expert_of(record, choice, imported))
    if written.fingerprint == record.fingerprint:
        console.warn(f"{source}: the very weights of {header.path}; its task vector is zero")
    return output


def _expert_of(record: BaseRecord, choice: RangeChoice, imported: dict[str, Any]) -> ExpertRecord:
    return ExpertRecord(
        source=record.source, model_config=record.model_config,
        scheduler_config=record.scheduler_config, num_train_timesteps=record.num_train_timesteps,
        companions=record.companions, single_file=record.single_file,
        range=[choice.range.start, choice.range.stop], index=choice.index, of=choice.of,
        base=record.fingerprint, imported=imported,
    )  # fmt: skip


def read_pair(
    source: str, as_base: str, pipeline: str | None = None, variant: str | None = None,
    save_dtype: str | None = None,
) -> tuple[ImportedModel, list[tuple[dict[str, Tensor], ExpertRecord]]]:  # fmt: skip
    """A base of the two denoisers of a pipeline, and each of them as an expert of it.

    as_base: which becomes the base: `low`, `high`, or the `mean` of the two. The experts are those
    of low and of high noise. Raises what `import_model` raises, ArtifactError where the two are
    not of one network.
    """
    high = import_model(source, pipeline, variant, save_dtype, takes_two=True)
    folder = find_folder(source, variant)
    weights, config = read_network(folder / SECOND, variant)
    _require_same_config(config, high.record, folder / SECOND)
    low = stored_in(weights, save_dtype, str(folder / SECOND))
    weights = {"low": low, "high": high.weights}.get(as_base) or {
        name: (low[name].float() + high.weights[name].float()).div(2).to(low[name].dtype)
        for name in low
    }
    record = replace(high.record, fingerprint=fingerprint(weights))
    experts = []
    for index, (own, part) in enumerate(((low, SECOND), (high.weights, "transformer"))):
        told = {"source": source, "form": f"{part} of a pipeline of two"}
        told["sha256"] = digest_of_part(folder, part)
        choice = RangeChoice(own_ranges(folder)[index], index + 1, 2)
        experts.append((own, _expert_of(record, choice, told)))
    return replace(high, weights=weights, record=record), experts


def _read(
    source: str, base: Header, record: BaseRecord, variant: str | None
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The weights that `source` names, and what the record is to tell of where they are from."""
    path = Path(source).expanduser()
    if path.is_dir() and not [*path.glob("config.json"), *path.glob("*/config.json")]:
        files = [file for file in path.glob("*") if file.suffix in (".safetensors", *PICKLED)]
        named = [file for file in files if file.stem in _ADAPTERS]  # beside an optimizer's state
        path = one[0] if len(one := named or files) == 1 else path  # all that a trainer left
    if not path.is_file():
        return _read_folder(find_folder(source, variant), source, record, variant)
    if variant is not None:
        raise ConfigError(f"--variant {variant}: {source} is a file, not a folder; leave it out")
    _require_no_other_base(path, record)
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        for name, tensor in read_state_dict(path, record).items()
    }  # as `import_model` keeps float8
    told = adapter_settings(path, backbone_of(record.model_config).part)
    what, _ = foreign_kind(tensors)
    if what.startswith("a single-file"):  # in a checkpoint of Lightning below state_dict
        tensors = {name[max(name.find(PREFIX), 0) :]: one for name, one in tensors.items()}
        weights = in_diffusers_names(tensors, record.model_config, str(path))
        return weights, {"source": source, "form": "single file", "sha256": sha256_of(path)}
    if told or is_lora(tensors) or what.startswith(("a LoRA", "an adapter")):
        factors = low_rank_factors(tensors, record.model_config, str(path), told)
        weights = fuse(stored_in(load_tensors(base.path), "fp32", str(base.path)), factors)
        form = f"LoRA of {len(factors)} layers, fused"
        return weights, {"source": source, "form": form, "sha256": sha256_of(path)}
    weights, prefix = _below_prefix(tensors, base, path)
    form = f"state dict, below {prefix!r}" if prefix else "state dict"
    return weights, {"source": source, "form": form, "sha256": sha256_of(path)}


def _require_no_other_base(path: Path, record: BaseRecord) -> None:
    """Of a file that deme wrote: check that it holds weights, and none of another base."""
    if path.suffix in PICKLED or "deme" not in read_header(path).metadata:
        return
    own = read_record(path, "base", "expert", "merged")
    theirs = getattr(own, "base", record.fingerprint)
    if theirs != record.fingerprint:
        raise ArtifactError(
            f"{path}: was finetuned from base {theirs[:12]}, this is {record.fingerprint[:12]}"
        )


def _read_folder(
    folder: Path, source: str, record: BaseRecord, variant: str | None
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """A pipeline's folder, or that of a network alone."""
    place = denoiser_folder(folder)
    if own_ranges(folder):
        raise ArtifactError(
            f"{folder}: a pipeline of two denoisers; name one of them, {place} or {folder / SECOND}"
        )
    weights, config = read_network(place, variant)
    _require_same_config(config, record, place)
    stated, where = read_scheduler(folder)
    if stated:
        theirs, own = read_schedule(stated, str(where)), read_schedule(record.scheduler_config)
        is_same = theirs.prediction_type == own.prediction_type
        is_same &= theirs.num_train_timesteps == own.num_train_timesteps
        if is_same and isinstance(theirs, NoiseSchedule) and isinstance(own, NoiseSchedule):
            is_same = torch.allclose(theirs.alphas_cumprod, own.alphas_cumprod, rtol=1e-4)
        if not is_same:
            raise ArtifactError(
                f"{where}: another noise schedule or prediction than the base's "
                f"({theirs.prediction_type}, T = {theirs.num_train_timesteps}; the base "
                f"{own.prediction_type}, T = {own.num_train_timesteps}): an expert of another base"
            )
    digest = digest_of_part(place.parent, place.name)
    return weights, {"source": source, "form": "diffusers folder", "sha256": digest}


def _require_same_config(config: Mapping[str, Any], record: BaseRecord, place: Path) -> None:
    for name, value in record.model_config.items():
        if name in config and name not in _FREE and config[name] != value:
            raise ArtifactError(
                f"{place / 'config.json'}: {name} = {config[name]!r}, the base has {value!r}: "
                f"another network"
            )


def read_state_dict(path: Path, record: BaseRecord) -> dict[str, Tensor]:
    """All tensors of a safetensors file or a pickle, those of tables in it under `table.name`.

    The `shadow_params` of diffusers' EMAModel have no names: theirs are those of the network of
    `record`, in its order. Raises ArtifactError for a pickle of more than tensors and numbers.
    """
    if path.suffix not in PICKLED:
        return load_tensors(path)
    from diffusers.models.model_loading_utils import load_state_dict

    try:
        document = load_state_dict(str(path))  # by torch, with weights_only=True
    except (OSError, ValueError) as error:  # which it makes of whatever is wrong
        raise ArtifactError(
            f"{path}: the weights cannot be read: they are broken, or a pickle of more than "
            f"tensors (nothing in it was run); save the state dict as .safetensors"
        ) from error
    if isinstance(document, dict) and isinstance(document.get("shadow_params"), list):
        with torch.device("meta"):
            network = build_network(record.model_config)
        names = [name for name, _ in network.named_parameters()]
        shadows = document["shadow_params"]
        names += [f"shadow_params.{index}" for index in range(len(names), len(shadows))]
        document = dict(zip(names, shadows, strict=False))
    return dict(_flat(document))


def _flat(document: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in document.items() if isinstance(document, Mapping) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach()
        else:
            yield from _flat(value, f"{prefix}{name}.")


def _below_prefix(
    tensors: Mapping[str, Tensor], base: Header, path: Path
) -> tuple[dict[str, Tensor], str]:
    """The tensors below the prefix that most of the base's names stand behind, and the prefix.

    Raises ArtifactError where nothing is the base's, or the whole of it is there more than once.
    """
    counts: Counter[str] = Counter()
    for name in tensors:
        starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        counts.update(name[:start] for start in starts if name[start:] in base.tensors)
    if not counts:
        what, _ = foreign_kind(tensors)
        raise ArtifactError(f"{path}: {what}; none of its tensors is one of {base.path}")
    most = max(counts.values())
    chosen = [prefix for prefix, count in counts.items() if count == most]
    if len(chosen) > 1:
        raise ArtifactError(
            f"{path}: holds the network more than once, below {', '.join(map(repr, chosen))}; "
            f"save the one that is meant in a file of its own"
        )
    (prefix,) = chosen
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if len(weights) < len(tensors):
        left = next(name for name in tensors if not name.startswith(prefix))
        console.note(f"{path}: {len(tensors) - len(weights)} other tensors left out, as {left}")
    return weights, prefix


def _fitted(
    weights: Mapping[str, Tensor], base: Header, save_dtype: str | None, where: str
) -> dict[str, Tensor]:
    """The weights in the dtypes of the base or in `save_dtype`.

    Raises ArtifactError for the first that is not the base's.
    """
    for name in sorted(base.tensors.keys() ^ weights.keys()):
        lacks = name in base.tensors
        others = weights.keys() - base.tensors.keys() if lacks else base.tensors.keys()
        near = difflib.get_close_matches(name, others, n=1)
        hint = "".join(f"; the nearest name {'there' if lacks else 'of it'}: {n!r}" for n in near)
        raise ArtifactError(
            f"{where}: {'lacks' if lacks else 'has'} {name!r}, which {base.path} "
            f"{'has' if lacks else 'lacks'}{hint}"
        )
    fitted, rounded = {}, set()
    for spec in cast_specs(base.tensors.values(), save_dtype):
        name, tensor = spec.name, weights[spec.name]
        dtype = getattr(torch, DTYPES[spec.dtype][1])
        if tuple(tensor.shape) != spec.shape:
            raise ArtifactError(
                f"{where}: {name!r} has shape {list(tensor.shape)}, {base.path} has "
                f"{list(spec.shape)}"
            )
        if tensor.is_floating_point() != dtype.is_floating_point:
            raise ArtifactError(f"{where}: {name!r} is {tensor.dtype}, {base.path} has {dtype}")
        if torch.promote_types(tensor.dtype, dtype) != dtype:
            rounded.add(f"{tensor.dtype} to {dtype}".replace("torch.", ""))
        fitted[name] = tensor.to(dtype).contiguous()
        if not fitted[name].isfinite().all() and tensor.isfinite().all():
            raise NumericsError(
                f"{where}: {name!r} is too large for {dtype}; choose another --save-dtype"
            )
    if rounded:
        console.note(f"{where}: rounded, {', '.join(sorted(rounded))}")
    return fitted
