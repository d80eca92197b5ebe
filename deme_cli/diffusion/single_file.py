"""Single files: a model in one safetensors file under its authors' names, or its denoiser alone.

So ComfyUI, A1111 and Civitai have them. What a tensor of theirs is in diffusers, diffusers' own
converters know. One is run on tags in place of weights: each row of each tensor (along the first
axis, the only one along which they cut, join and swap) has a number, and where the numbers come out
is the layout. Read forwards it makes a network of the file, backwards a file of the network, byte
for byte; no table of names is ours. What is in the file besides (VAE, text encoders) is read by
diffusers with the configs of a pipeline, and goes into the next file as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deme_cli import console
from deme_cli.artifacts import (
    BaseRecord,
    DenoiserRecord,
    export_metadata,
    header_bytes,
    load_tensors,
)
from deme_cli.diffusion.backbones import KNOWN, backbone_of
from deme_cli.diffusion.backbones.backbone import Config
from deme_cli.diffusion.checkpoints import (
    ImportedModel,
    imported_model,
    kept_dtype,
    scheduler_config_of,
)
from deme_cli.diffusion.companions import part_in_file
from deme_cli.diffusion.denoiser import Weights, require_finite, stored_in, whole_weights
from deme_cli.diffusion.model_files import (
    INDEX,
    UNUSED_PARTS,
    denoiser_folder,
    digests_of,
    find_folder,
    read_index,
    read_json,
    require_parts,
    silence_libraries,
)
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.fetch import sha256_of
from deme_cli.files import (
    DTYPE_BYTES,
    DTYPES,
    Header,
    cast_specs,
    foreign_kind,
    layout_of,
    read_header,
    require_space,
    tensor_bytes,
    whole_folder,
    write_whole,
)
from deme_cli.model_spec import model_spec
from deme_cli.run_file import RunFile

PREFIX = "model.diffusion_model."  # before the denoiser's names, where other parts are there
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "num_train_timesteps": 1000, "steps_offset": 1}  # fmt: skip
_PNDM = {**_BETAS, "_class_name": "PNDMScheduler", "skip_prk_steps": True,
         "set_alpha_to_one": False}  # fmt: skip
_EULER = {**_BETAS, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_SHIFTED = {**_FLOW, "shift": 3.0}
_UNIPC = {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000,
          "prediction_type": "flow_prediction", "use_flow_sigmas": True}  # fmt: skip
_SD = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "layers_per_block": 2}
_SD3 = {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24,
        "pooled_projection_dim": 2048, "caption_projection_dim": 1536}  # fmt: skip
_XL = {
    **_SD, "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
# Published networks, as far as they differ from their class in diffusers, and their schedulers.
# Whether a Stable Diffusion 2 predicts the noise or v, its shapes do not tell.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Stable Diffusion 1": ({**_SD, "cross_attention_dim": 768}, _PNDM),
    "Stable Diffusion 2": (
        {**_SD, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
         "use_linear_projection": True}, {}),
    "SDXL": (_XL, _EULER),
    "Stable Diffusion 3 medium": ({**_SD3, "pos_embed_max_size": 192}, _SHIFTED),
    "Stable Diffusion 3.5 medium": (
        {**_SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
         "dual_attention_layers": [*range(13)]}, _SHIFTED),
    "Stable Diffusion 3.5 large": (
        {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, _SHIFTED),
    "Flux schnell": ({"_class_name": "FluxTransformer2DModel"}, {**_FLOW, "shift": 1.0}),
    "Flux dev": ({"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
                 {**_SHIFTED, "use_dynamic_shifting": True}),
    "Wan 1.3B": ({"_class_name": "WanTransformer3DModel", "num_attention_heads": 12,
                  "ffn_dim": 8960, "num_layers": 30}, {**_UNIPC, "flow_shift": 3.0}),
    "Wan 14B": ({"_class_name": "WanTransformer3DModel"}, {**_UNIPC, "flow_shift": 5.0}),
}  # fmt: skip


# layouts


class Span(NamedTuple):
    """Rows start ... stop - 1 of a file's tensor, or elements of a parameter."""

    name: str
    start: int
    stop: int


Shapes = Mapping[str, Sequence[int]]
Layout = dict[str, list[Span]]  # by a parameter's name: the rows that make it, in their order


def num_rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def learn_layout(held: Shapes, config: Config) -> Layout:
    """Where diffusers takes each parameter of a network from; {} where the file holds no such one.

    held: the file's tensors.   config: the network's. Raises ArtifactError where a converter does
    more than to cut and join rows.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kind, own = config["_class_name"], [name for name in held if name.startswith(PREFIX)]
    known: Any = SINGLE_FILE_LOADABLE_CLASSES
    if kind not in known:
        return {}
    before = PREFIX if not own and kind.startswith("UNet") else ""  # as their converter insists
    names, tags, starts, row = own or list(held), {}, [], 0
    for name in names:
        shape = [num_rows(held[name]), *(min(size, 2) for size in held[name][1:2])]
        columns = torch.arange(math.prod(shape[1:]))
        numbers = 2 * torch.arange(row, row + shape[0])[:, None] + columns
        tags[before + name] = numbers.view(*shape, *[1] * (len(held[name]) - 2))
        starts.append(row)
        row += shape[0]
    try:
        found = known[kind]["checkpoint_mapping_fn"](checkpoint=tags, config=dict(config))
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError, AttributeError):
        return {}
    first, layout = torch.tensor(starts), Layout()
    for name, tag in found.items():
        table = tag.reshape(tag.shape[0], -1)
        if not torch.equal(table, table[:, :1] + torch.arange(table.shape[1])):
            raise ArtifactError(
                f"{name}: diffusers' converter moves columns, which deme cannot write back; export "
                f"a folder"
            )
        rows_of = table[:, 0] // 2
        is_cut = (rows_of.diff() != 1) | torch.isin(rows_of[1:], first)
        ends = [0, *(is_cut.nonzero()[:, 0] + 1).tolist(), len(rows_of)]
        layout[name] = []
        for start, stop in pairwise(ends):
            place = int(torch.searchsorted(first, rows_of[start], right=True)) - 1
            begin = int(rows_of[start]) - starts[place]
            layout[name].append(Span(names[place], begin, begin + stop - start))
    return layout


@dataclass(frozen=True)
class Match:
    """A network in a file: the `shapes` of its parameters, the tensors `taken` for them."""

    model_config: dict[str, Any]
    shapes: Shapes
    layout: Layout
    taken: frozenset[str]


def match(held: Shapes, config: Config, where: str) -> Match:
    """The denoiser that tensors of these shapes hold, by its config.

    Raises ArtifactError naming the first parameter that is not there, or in another shape.
    """
    backbone = backbone_of(config, where)
    with torch.device("meta"):
        network: Any = backbone.build(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if held.keys() == shapes.keys():  # diffusers' names already
        layout = {name: [Span(name, 0, num_rows(shape))] for name, shape in shapes.items()}
    else:
        layout = learn_layout(held, {**network.config, **config})
    for name in sorted(layout.keys() ^ shapes.keys()):
        what = "has the unknown parameter" if name in layout else "lacks what makes"
        raise ArtifactError(f"{where}: {what} {name!r} of a {backbone.class_name} of this config")
    for name, shape in shapes.items():
        parts = [(rows, held[rows.name]) for rows in layout[name]]
        found = sum((r.stop - r.start) * math.prod(s) // num_rows(s) for r, s in parts)
        if found != math.prod(shape):
            told = ", ".join(f"{rows.name} {list(size)}" for rows, size in parts)
            raise ArtifactError(
                f"{where}: {told} should make {name!r} of shape {list(shape)}: a network of "
                f"another size than its config says"
            )
    taken = {rows.name for spans in layout.values() for rows in spans}
    own = [name for name in held if name.startswith(PREFIX)] or held
    if left := sorted(name for name in own if name not in taken):
        raise ArtifactError(
            f"{where}: has {left[0]!r}, which no {backbone.class_name} has: weights scaled for "
            f"float8, or more than one network; take the file of the plain weights"
        )
    kept = {k: v for k, v in backbone.corrected(network.config).items() if not k.startswith("_")}
    whole = json.loads(json.dumps({"_class_name": backbone.class_name, **kept}))
    return Match(whole, shapes, layout, frozenset(taken))


def take(tensors: Weights, denoiser: Match) -> dict[str, Tensor]:
    """The denoiser's parameters by their names in diffusers."""
    weights = {}
    for name, shape in denoiser.shapes.items():
        parts = [
            tensors[one.name].reshape(num_rows(tensors[one.name].shape), -1)[one.start : one.stop]
            for one in denoiser.layout[name]
        ]
        weights[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(*shape)
    return weights


def in_diffusers_names(tensors: Weights, config: Config, where: str) -> dict[str, Tensor]:
    """The parameters of the network of `config` in a single file's tensors; raises as `match`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return take(tensors, match(shapes, config, where))


# in


def import_single_file(
    source: str, pipeline: str | None = None, save_dtype: str | None = None
) -> ImportedModel:
    """A single file's denoiser.

    pipeline: the folder or hub id of a pipeline of the same network, of which the configs are read,
    and what the file has not; None for a published network. Raises MissingError where the network
    or what it predicts cannot be known without one, ArtifactError for another network.
    """
    path = Path(source).expanduser().resolve()
    header = read_header(path)
    folder = find_folder(pipeline) if pipeline else None
    if folder is None:
        denoiser, scheduler, notes = _published(header)
    else:
        if not (folder / INDEX).exists():
            raise MissingError(f"{folder}: no pipeline (model_index.json); --pipeline takes one")
        read_index(folder)
        stated = read_json(denoiser_folder(folder) / "config.json")
        denoiser, notes = match(_shapes_of(header), stated, str(path)), []
        scheduler = scheduler_config_of(folder, source, None, backbone_of(stated, source))
        if _predicts_v(header) and scheduler.get("prediction_type") != "v_prediction":
            raise ArtifactError(
                f"{path}: says that it predicts v, {folder / 'scheduler'} does not; give the "
                f"pipeline of a model that does"
            )
    weights = take(load_tensors(path), denoiser)
    stored = {tensor.dtype for tensor in weights.values()}
    for dtype in stored - {kept_dtype(dtype) for dtype in stored}:
        notes.append(f"{path}: {dtype} is kept as {kept_dtype(dtype)}")
    weights = {name: tensor.to(kept_dtype(tensor.dtype)) for name, tensor in weights.items()}
    require_finite(weights, str(path))
    weights = stored_in(weights, save_dtype, str(path))
    backbone, companions = backbone_of(denoiser.model_config), {}
    has_parts = any(map(_is_of_part, header.tensors.keys() - denoiser.taken))
    if folder is None:
        too = ", its own too" if has_parts else ""
        notes.append(
            f"{path}: the denoiser alone is read; for VAE and text encoders{too}, give a pipeline "
            f"with --pipeline"
        )
    elif not has_parts:
        require_parts(folder, backbone.parts)
        companions = digests_of(folder)
    model = imported_model(weights, denoiser.model_config, scheduler, str(path), companions, notes)
    record = replace(model.record, single_file={"path": str(path), "sha256": sha256_of(path)})
    return replace(model, record=record, parts_like=folder if has_parts else None)


def _published(header: Header) -> tuple[Match, dict[str, Any], list[str]]:
    """The published network that a file holds, its scheduler, and what was assumed."""
    path, held, known = header.path, _shapes_of(header), {one.class_name for one in KNOWN}
    for name, (config, scheduler) in PUBLISHED.items():
        if config["_class_name"] in known and learn_layout(held, config):
            try:
                denoiser = match(held, config, str(path))
            except ArtifactError:
                continue
            told = header.metadata.get("modelspec.prediction_type")
            if not scheduler and told is None:
                raise MissingError(
                    f"{path}: {name}, of which some predict the noise and others v, and nothing in "
                    f"the file says which; give a pipeline with its scheduler with --pipeline"
                )
            scheduler = {**(scheduler or _PNDM)}
            if _predicts_v(header):
                scheduler |= {"prediction_type": "v_prediction"}
            if "ztsnr" in held:
                scheduler |= {"rescale_betas_zero_snr": True}
            note = f"{path}: took the configs of {name} as published; --pipeline DIR takes others"
            return denoiser, scheduler, [note]
    what, todo = foreign_kind(held)
    if "single-file" not in what:
        raise ArtifactError(f"{path}: {what}; {todo}")
    raise MissingError(
        f"{path}: {what}, of no published size; give the folder or hub id of a pipeline of the "
        f"same network, whose configs tell what it is, with --pipeline"
    )


def _shapes_of(header: Header) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in header.tensors.items()}


def _predicts_v(header: Header) -> bool:
    """By the mark that ComfyUI reads, or by the metadata."""
    is_told = header.metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
    return is_told or "v_pred" in header.tensors


def _is_of_part(name: str) -> bool:
    """Whether a tensor beside the denoiser's is one of another network (model_ema is its own)."""
    return "." in name and not name.startswith(("model_ema.", PREFIX))


def place_frozen_parts(model: ImportedModel, target: Path) -> BaseRecord:
    """Write the frozen parts of a single file as a pipeline folder; the record that names it.

    The configs of the pipeline that was given say how to read them, and what the file has not is
    taken from there. Raises ArtifactError for a part of another size, MissingError for one that
    neither has.
    """
    record, pipeline = model.record, model.parts_like
    assert pipeline is not None
    assert record.single_file is not None
    file, denoiser = Path(record.single_file["path"]), backbone_of(record.model_config).part
    index, tensors = read_index(pipeline), load_tensors(file)
    stored = {t.dtype for n, t in tensors.items() if _is_of_part(n) and t.is_floating_point()}
    dtype = kept_dtype(max(stored, key=lambda one: one.itemsize))
    silence_libraries()
    with whole_folder(target, force=target.exists()) as partial:
        for name, listed in index.items():
            if not isinstance(listed, list) or not listed[0] or name == denoiser:
                continue
            if name in UNUSED_PARTS:
                index[name] = [None, None]
                continue
            part = part_in_file(file, tensors, dtype, pipeline, name)
            if part is not None:
                part.save_pretrained(partial / name)
                continue
            if name.startswith(("vae", "text_encoder")):
                require_parts(pipeline, [name])
                console.note_once(f"{file}: has no {name} of its own; took that of {pipeline}")
            shutil.copytree(pipeline / name, partial / name)
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return replace(record, source=str(target), companions=digests_of(target))


# out


def write_single_file(
    artifact: Path, record: DenoiserRecord, output: Path, run: RunFile | None = None,
    like: str | None = None, save_dtype: str | None = None,
) -> list[str]:  # fmt: skip
    """Write an artifact as a single file; returns what is to be said of it.

    like: the single file whose names and other tensors are taken; None for the one that the base
    came from. Raises MissingError where there is none, ArtifactError where it is another one or of
    another network.
    """
    source = record.single_file or {}
    if like is None and not source:
        raise MissingError(
            f"{artifact}: its base did not come from a single file; name one of the same network "
            f"with --pipeline FILE: its names and its other parts are taken"
        )
    header = read_header(Path(like or source["path"]))
    if source and sha256_of(header.path) != source["sha256"]:
        raise ArtifactError(
            f"{header.path}: not the file that the base came from (its SHA-256 is another); give "
            f"that with --pipeline FILE"
        )
    denoiser = match(_shapes_of(header), record.model_config, str(header.path))
    pieces = _backwards(denoiser, header)
    weights = whole_weights(artifact, record, run)
    stored = {one.name: one for one in cast_specs(layout_of(weights), save_dtype)}
    specs = []
    for spec in sorted(header.tensors.values(), key=lambda one: one.begin):
        codes = [stored[piece.name].dtype for piece in pieces.get(spec.name, [])] or [spec.dtype]
        specs.append(replace(spec, dtype=max(codes, key=lambda code: DTYPE_BYTES[code])))
    require_space(output, sum(spec.num_bytes for spec in specs))
    others = load_tensors(header.path)

    def content() -> Iterator[Any]:
        for spec in specs:
            flat = [weights[name].reshape(-1)[i:j] for name, i, j in pieces.get(spec.name, [])]
            if flat:
                kept = stored_in({spec.name: torch.cat(flat)}, save_dtype, str(artifact))[spec.name]
                yield tensor_bytes(kept.to(getattr(torch, DTYPES[spec.dtype][1])))
            else:
                yield tensor_bytes(others[spec.name])

    total = hashlib.sha256()
    for part in content():
        total.update(part)
    told = model_spec(record, output.stem, artifact=artifact, single_file=True)
    told = export_metadata(record, {**header.metadata, **told}, total.hexdigest())
    write_whole(output, chain([header_bytes(specs, told)], content()))
    left = sorted(header.tensors.keys() - denoiser.taken)
    notes = [f"the denoiser alone, as in {header.path}"]
    if left:
        notes = [f"{len(left)} other tensors are those of {header.path}, as {left[0]}"]
    if any(name.startswith("model_ema.") for name in left):
        notes.append("its model_ema are the original's averages, which most programs leave out")
    return notes


def _backwards(denoiser: Match, header: Header) -> dict[str, list[Span]]:
    """By a tensor's name in the file: the elements of parameters that make it, in their order.

    Raises ArtifactError where some of its rows are in no parameter, or in two.
    """
    found: dict[str, list[tuple[Span, Span]]] = defaultdict(list)
    for name, layout in denoiser.layout.items():
        element = 0
        for rows in layout:
            spec = header.tensors[rows.name]
            size = (rows.stop - rows.start) * spec.num_elements // num_rows(spec.shape)
            found[rows.name].append((rows, Span(name, element, element + size)))
            element += size
    for name, pairs in found.items():
        pairs.sort()
        ends = [0, *(rows.stop for rows, _ in pairs)]
        if [*(rows.start for rows, _ in pairs), num_rows(header.tensors[name].shape)] != ends:
            raise ArtifactError(
                f"{header.path}: diffusers leaves out or doubles rows of {name!r}, which deme "
                f"cannot write back; export a folder"
            )
    return {name: [piece for _, piece in pairs] for name, pairs in found.items()}
