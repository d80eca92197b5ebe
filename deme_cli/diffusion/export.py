"""`export`: a denoiser as a diffusers pipeline folder, checked against the artifact it came from.

The folder is written beside its place and renamed when it is whole and its outputs are those of the
artifact. Frozen parts (VAE, text encoders, tokenizers) are copied byte for byte from the pipeline
that the base came from. Block projections cannot be folded into a diffusers network (the skips are
taken before them, and every consumer begins with a norm), so such artifacts are refused, never
exported without them. The model card tells only what the artifact's record says; quality is for
`deme eval` to measure. Torch is imported when the arguments are known to be good.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deme_cli import console
from deme_cli.artifacts import (
    DenoiserRecord,
    ExpertRecord,
    MergedRecord,
    add_metadata,
    read_record,
)
from deme_cli.diffusion.model_files import (
    INDEX,
    SECOND,
    read_json,
    read_scheduler,
    silence_libraries,
)
from deme_cli.errors import ArtifactError, ConfigError, NumericsError, writing
from deme_cli.fetch import is_hub_id
from deme_cli.files import read_header, require_output, require_space, whole_folder
from deme_cli.model_spec import model_spec
from deme_cli.run_file import RunFile
from deme_cli.timesteps import require_cover

if TYPE_CHECKING:
    from torch import nn

    from deme_cli.diffusion.companions import Companions
    from deme_cli.diffusion.denoiser import Denoiser, Weights

LARGEST_DIFFERENCE = 1e-5
_LATENT_SIDE = 32  # pixels of x_t for the check, at most: it is the weights that are compared


@dataclass(frozen=True)
class ExportCheck:
    """The largest absolute difference of outputs (float32) over images drawn at `timesteps`."""

    max_difference: float
    timesteps: list[int]


def export(
    artifact: Path | Sequence[Path], folder: Path, *, run: RunFile | None = None,
    pipeline: str | None = None, save_dtype: str | None = None,
    single_file: bool = False, force: bool = False,
) -> ExportCheck:  # fmt: skip
    """Write a diffusers pipeline folder with a model card; load it again and compare.

    artifact: a merged artifact, a base or an expert; or two experts that divide the timesteps, for
    a pipeline that gives each its own (WanPipeline).   pipeline: where the frozen parts of a latent
    model are; None for where it came from.   save_dtype: of the denoiser's weights, None for the
    artifact's own.   single_file: `folder` is a file with its authors' names, for ComfyUI and
    others, and other parts as in the one that the base came from, or that `pipeline` names. Raises
    ArtifactError (block projections, another kind of artifact), ConfigError (the folder exists),
    MissingError, NumericsError if a denoiser, loaded again, does not give the same outputs; then
    nothing is written.
    """
    artifacts = _by_noise([artifact] if isinstance(artifact, Path) else artifact)
    records = [_require_plain(path) for path in artifacts]
    if isinstance(record := records[-1], ExpertRecord) and len(records) == 1:
        console.warn(f"{artifacts[0]} is the expert of timesteps {record.timesteps} only")
    if single_file:
        if len(artifacts) > 1:
            raise ConfigError("a single file holds one network; export each expert on its own")
        require_output(folder, force=force, inputs=artifacts)
        from deme_cli.diffusion.single_file import write_single_file

        for note in write_single_file(artifacts[0], record, folder, run, pipeline, save_dtype):
            console.note_once(f"{folder}: {note}")
        return ExportCheck(0.0, [])
    with writing(folder):
        is_there = folder.exists()
    if is_there and not force:
        raise ConfigError(f"{folder} exists; add --force to replace it, or choose another DIR")
    if is_there and not (folder / INDEX).exists():
        raise ConfigError(
            f"{folder} is no diffusers pipeline and is not replaced; choose another DIR"
        )
    require_space(folder, sum(path.stat().st_size for path in artifacts))

    from deme_cli.diffusion.companions import open_companions
    from deme_cli.diffusion.denoiser import assemble, stored_in, whole_weights

    silence_libraries()
    companions = open_companions(records[0], pipeline=pipeline)
    backbone, checks = companions.backbone, []
    with writing(folder), whole_folder(folder, force=force) as partial:
        for path, record, part in zip(artifacts, records, (backbone.part, SECOND), strict=False):
            weights = stored_in(whole_weights(path, record, run), save_dtype, str(path))
            denoiser = assemble(record, weights, str(path))
            with _in_dtypes_of(weights, denoiser.network):
                if companions.folder is None:
                    _write_pixel_pipeline(denoiser, partial)
                else:
                    cast(Any, denoiser.network).save_pretrained(partial / part)
            for file in (partial / part).glob("*.safetensors"):
                add_metadata(file, model_spec(record, folder.name, artifact=path))
            again = backbone.network_class.from_pretrained(partial / part, local_files_only=True)
            checks.append(compare(denoiser, again))
            if not checks[-1].max_difference <= LARGEST_DIFFERENCE:
                raise NumericsError(
                    f"{folder}: the exported pipeline differs from {path} by "
                    f"{checks[-1].max_difference:.3g}; nothing was written"
                )
        if companions.folder is not None:
            companions.require_same()
            _write_parts(records, companions, companions.folder, partial)
        (partial / "README.md").write_text(model_card(records, artifacts[0]), encoding="utf-8")
    return max(checks, key=lambda check: check.max_difference)


def _by_noise(artifacts: Sequence[Path]) -> list[Path]:
    """One artifact; or the two experts that divide the timesteps, that of the high noise first.

    Raises ArtifactError for others, and where their model's pipeline takes one denoiser alone.
    """
    if len(artifacts) == 1:
        return [*artifacts]
    records = {path: read_record(path, "expert") for path in artifacts}
    one, *others = records.values()
    if len(others) != 1 or one.base != others[0].base or one.companions != others[0].companions:
        raise ArtifactError(
            f"{len(artifacts)} artifacts, {', '.join(map(str, artifacts))}: expected one, or two "
            f"experts of one base"
        )
    require_cover([record.timesteps for record in records.values()], one.num_train_timesteps)

    import diffusers

    from deme_cli.diffusion.backbones import backbone_of

    name = backbone_of(one.model_config).pipeline
    if SECOND not in inspect.signature(getattr(diffusers, name)).parameters:
        raise ArtifactError(
            f"a {name} of diffusers {diffusers.__version__} takes one denoiser; merge the experts "
            f"first, or draw with `deme ensemble-sample`"
        )
    return sorted(records, key=lambda path: records[path].timesteps, reverse=True)


def _require_plain(artifact: Path) -> DenoiserRecord:
    """The record of a denoiser without block projections. Raises ArtifactError."""
    record = read_record(artifact, "base", "expert", "merged")
    if any(name.startswith("channel_projection.") for name in read_header(artifact).tensors):
        raise ArtifactError(
            f"{artifact}: carries block projections, which no diffusers network has and which "
            f"cannot be folded into one (skips are taken before them); finetune with "
            f"--projection fold to export, or use it with `deme sample`"
        )
    return record


def compare(denoiser: Denoiser, network: nn.Module) -> ExportCheck:
    """How far `network` is from `denoiser` at x_t drawn for five timesteps from 0 to T - 1.

    The conditions are standard normal numbers, and class 0: no text encoder is needed.
    """
    import torch

    from deme_cli.diffusion.denoiser import predict

    last, device, largest = denoiser.schedule.num_train_timesteps - 1, denoiser.device, 0.0
    timesteps = sorted({last * part // 4 for part in range(5)})
    generator = torch.Generator().manual_seed(0)
    shape = list(denoiser.sample_shape)
    if denoiser.backbone.wants == "text":  # any size will do
        shape[1:] = (min(side, _LATENT_SIDE) for side in shape[1:])
    shapes = denoiser.backbone.condition_shapes(denoiser.record.model_config)
    given = {
        name: torch.randn(1, *own, generator=generator).to(device)
        if own
        else torch.zeros(1, dtype=torch.long, device=device)
        for name, own in shapes.items()
    }
    networks = (network.to(device).eval(), denoiser.network)
    for t in timesteps:
        x_t = torch.randn(1, *shape, generator=generator).to(device)
        time = denoiser.schedule.times(torch.tensor([t], device=device))
        with torch.inference_mode():
            theirs, ours = (predict(one, x_t, time, given) for one in networks)
        largest = max(largest, (theirs - ours).abs().max().nan_to_num(torch.inf).item())
    return ExportCheck(largest, timesteps)


@contextmanager
def _in_dtypes_of(weights: Weights, network: nn.Module) -> Iterator[None]:
    """Inside, what is stored of the float32 `network` has the dtypes that `weights` have."""
    own = network.state_dict(keep_vars=True)
    for name, tensor in own.items():
        tensor.data = tensor.data.to(weights[name].dtype)
    yield
    for tensor in own.values():
        tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data


def _write_pixel_pipeline(denoiser: Denoiser, target: Path) -> None:
    """DDIMPipeline for a DDIM checkpoint; anything else is sampled by DDPM, as it was trained."""
    from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

    from deme_cli.diffusion.schedule import scheduler_of

    config = denoiser.record.scheduler_config
    kind: Any = DDIMPipeline if config.get("_class_name") == "DDIMScheduler" else DDPMPipeline
    kind(denoiser.network, scheduler_of(config, DDPMScheduler)).save_pretrained(target)
    if config.get("_class_name") in ("DDIMScheduler", "DDPMScheduler"):
        _write_scheduler(config, target)


def _write_scheduler(config: Mapping[str, Any], target: Path) -> None:
    """What the config states and no more: what it leaves open is for each sampler to fill in."""
    folder = target / "scheduler"
    folder.mkdir(exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "scheduler_config.json").write_text(text, encoding="utf-8")


def _write_parts(
    records: Sequence[DenoiserRecord], companions: Companions, source: Path, target: Path
) -> None:
    """The pipeline's index and frozen parts as they are, with these denoisers in their places."""
    from deme_cli.diffusion.schedule import complete_config

    backbone, config = companions.backbone, records[0].scheduler_config
    index = read_json(source / INDEX)
    unusual = companions.networks(index, unusual=True)
    for name, value in index.items():
        listed = isinstance(value, list) and bool(value[0])
        if not listed or name in (backbone.part, SECOND, "scheduler"):
            continue
        if name in unusual:
            unusual[name].save_pretrained(target / name)
        elif (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:  # a safety checker that was not fetched: the pipeline loads without it
            index[name] = [None, None]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    index[backbone.part] = ["diffusers", backbone.class_name]
    index["scheduler"] = ["diffusers", config["_class_name"]]
    high = records[0] if len(records) > 1 else None
    if isinstance(high, ExpertRecord):
        index[SECOND] = index[backbone.part]
        index["boundary_ratio"] = high.range[0] / high.num_train_timesteps
    elif SECOND in index:
        index |= {SECOND: [None, None], "boundary_ratio": None}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    is_same = complete_config(read_scheduler(source)[0]) == complete_config(config)
    if is_same and (source / "scheduler").is_dir():
        shutil.copytree(source / "scheduler", target / "scheduler")
    else:
        _write_scheduler(config, target)


# the model card

_METHOD = """\
Decouple-then-Merge (DeMe): the timesteps [0, T) of a pretrained diffusion model are divided into
ranges, one expert is finetuned per range, and the experts' task vectors are added to the pretrained
weights: theta = theta_base + sum_i w_i (theta_i - theta_base). One network comes out, of the size
and cost of the pretrained one."""

_LICENCE = """\
Unknown: the weights inherit the terms of the model they started from and of the training images.
Fill this in, here and in the lines at the top, before you share it."""

_IMPORTED = (
    "Elsewhere, before `deme import` took the weights; how is not known here. They came from:"
)

_CAVEATS = {
    "merged": """\
- A merged model is not the ensemble of its experts: it may gain less, or lose. No quality is
  claimed here; compare base, ensemble and merged with `deme eval` under one protocol.
- A Fréchet distance depends on the number of images, sampler, steps, resize, features and
  reference; a figure without its protocol is not comparable.
- Coefficients found by a search fit the seeds and data of the search; judge on others.""",
    "expert": """\
- This is one expert, finetuned for a part of the timesteps only. Used alone for all of them it is
  expected to be worse than the model it came from.""",
    "experts": """\
- Each of the two denoisers is for its part of the timesteps only. Together they cost at inference
  what one of them does, and twice the memory.""",
    "base": """\
- This is the starting point of finetuning, not a merged model.""",
}

# By what an image is drawn from: the pipeline's call, and the hub's name of the task.
_CALLS = {
    "nothing": ("", "unconditional-image-generation"),
    "class": ("class_labels=[207]", "unconditional-image-generation"),
    "text": ('"a photo of a church"', "text-to-image"),
}


def model_card(records: Sequence[DenoiserRecord], path: Path) -> str:
    """The README.md of a pipeline made from the artifact at `path`, and another expert if any."""
    from deme_cli.diffusion.backbones import backbone_of
    from deme_cli.diffusion.schedule import alphas_config, flow_config, read_schedule

    record, kind = records[0], "experts" if len(records) > 1 else records[0].kind
    backbone, scheduler = backbone_of(record.model_config), record.scheduler_config
    shown, task = _CALLS[backbone.wants]
    front = [  # what the hub reads
        "---", "library_name: diffusers", "license: unknown", f"pipeline_tag: {task}",
        *([f"base_model: {record.origin}"] if is_hub_id(record.origin) else []),
        "tags:", "- diffusers", "- deme", "- decouple-then-merge",
        *(["- model-merging"] if isinstance(record, MergedRecord) else []), "---",
    ]  # fmt: skip
    is_flow = flow_config(scheduler) is not None  # whose betas, if any, are unused
    facts: dict[str, Any] = {
        "starting point": _public_name(record.origin),
        "network": record.model_config.get("_class_name"),
        "timesteps T": record.num_train_timesteps,
        "beta schedule": None if is_flow else alphas_config(scheduler)["beta_schedule"],
        "predicts": read_schedule(scheduler).prediction_type,
        "fingerprint of the weights": record.fingerprint,
        "written by": record.created_by,
    }
    told: list[str] = []
    if isinstance(record, MergedRecord):
        facts |= {"fingerprint of the base": record.base, "merge": record.method,
                  "projection while finetuning": record.projection}  # fmt: skip
        told = list(_merge_parts(record))
    if isinstance(record, ExpertRecord):
        experts = [one for one in records if isinstance(one, ExpertRecord)]
        facts["fingerprint of the base"] = record.base
        facts["range of timesteps"] = ", ".join(str(one.timesteps) for one in experts)
        told = list(map(_training, experts))
    parts = [
        "\n".join(front),
        f"# {path.stem}",
        f"Exported by `deme` from an artifact of kind `{record.kind}`.",
        "## Method\n\n" + _METHOD,
        "## Model\n\n" + _table(("", ""), facts.items()),
        *told,
        "## Use\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")\n'
        f"image = {backbone.call.format(shown)}\n```",
        "## Caveats\n\n" + _CAVEATS[kind],
        "## Licence\n\n" + _LICENCE,
    ]
    return "\n\n".join(parts) + "\n"


def _training(record: ExpertRecord) -> str:
    """How an expert came about, as far as its record tells."""
    title = f"## Training, timesteps {record.timesteps}"
    if record.imported:
        source = _public_name(str(record.imported["source"]))
        return f"{title}\n\n{_IMPORTED}\n\n{_block({**record.imported, 'source': source})}"
    facts = {"p": record.p, "updates": record.steps, "seed": record.seed,
             "projection": record.projection}  # fmt: skip
    return f"{title}\n\n{_block({**facts, **record.training, 'data': record.data})}"


def _merge_parts(record: MergedRecord) -> Iterator[str]:
    """What was merged, how, and what was measured; training where the record tells of it."""
    ranges = [f"{parent['range'][0]}:{parent['range'][1]}" for parent in record.parents]
    told = [n for n in ("p", "steps", "seed") if all(n in parent for parent in record.parents)]
    rows = [
        (span, f"{w:g}", *(parent[n] for n in told), parent["kind"], parent["fingerprint"][:16],
         _public_name(parent["path"]))
        for span, parent, w in zip(ranges, record.parents, record.coefficients, strict=True)
    ]  # fmt: skip
    columns = ("timesteps", "coefficient", *told, "kind", "fingerprint", "file")
    yield "## Parents and coefficients\n\n" + _table(columns, rows)
    if record.coefficients_for:
        finer = [(f"`{glob}`", *(f"{w:g}" for w in values))
                 for glob, values in record.coefficients_for.items()]  # fmt: skip
        sentence = (
            "These hold for the tensors that none of the following patterns matches; of those"
        )
        table = _table(("tensors", *ranges), finer)
        yield f"{sentence} that match a name, the first decides:\n\n{table}"
    if record.method != "linear":
        settings = dict(record.settings)
        if "data" in settings:
            settings["data"] = _public_name(settings["data"])
        sentence = f"The method `{record.method}` takes the place of the plain sum above"
        yield f"{sentence}, with these settings:\n\n{_block(settings)}"
    if record.search:
        yield "## Search of the coefficients\n\n" + _block(record.search)
    if record.report:  # ranges of timesteps left out
        metrics = [n for n in record.report["rows"][0]["metrics"] if " " not in n]
        values = [[row["metrics"][name]["value"] for name in metrics]
                  for row in record.report["rows"]]  # fmt: skip
        measured = [
            (row["name"], *("not finite" if v is None else f"{v:.5g}" for v in own))
            for row, own in zip(record.report["rows"], values, strict=True)
        ]
        yield "## Measured on other seeds and images\n\n" + _table(("model", *metrics), measured)


def _public_name(source: str) -> str:
    """A hub id as it is; of a path on somebody's machine only the last part."""
    return source if is_hub_id(source) else Path(source).name


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(document: Mapping[str, Any]) -> str:
    """A record as JSON; long lists are cut, and say so."""
    cut = {
        name: [*value[:20], f"... {len(value) - 20} more in the artifact"]
        if isinstance(value, list) and len(value) > 20
        else value
        for name, value in document.items()
    }
    return f"```json\n{json.dumps(cut, indent=2)}\n```"
