"""`deme analyze activations`: whether finetuning changed channels or places of the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.analysis.config import ActivationConfig
from deme_cli.analysis.document import document_bytes
from deme_cli.commands.analysis import (
    Data,
    Output,
    Split,
    check_images,
    check_output,
    open_images,
    watch,
    write_analysis,
)
from deme_cli.commands.options import (
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Pipeline,
    Quiet,
    begin,
    option,
)
from deme_cli.config import SplitConfig
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.records import DenoiserRecord, ExpertRecord
from deme_cli.timesteps import TimestepRange, parse_range

if TYPE_CHECKING:
    from deme_cli.analysis.activations.measure import ActivationAnalysis
    from deme_cli.run_file import RunFile

_C = ActivationConfig


def activations(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="BASE and EXPERT, or EXPERT alone, whose base is found beside it or by deme.toml: "
            "artifacts, diffusers folders or hub ids.",
            show_default=False,
        ),
    ],
    data: Data = None,
    split: Split = "held-out",
    span: Annotated[
        str | None,
        typer.Option(
            "--range",
            help=r"Timesteps to look at: i/N, start:stop or all \[default: the expert's own].",
            show_default=False,
        ),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(
            "--block",
            help=r"Block to draw maps of, as mid_block \[default: the one that changed most].",
            show_default=False,
        ),
    ] = None,
    num: Annotated[int, option(_C, "num", "--num")] = _C.num,
    batch_size: Annotated[int, option(_C, "batch_size", "--batch-size", "-b")] = _C.batch_size,
    controls: Annotated[int, option(_C, "controls", "--controls")] = _C.controls,
    seed: Annotated[int, option(_C, "seed", "--seed")] = _C.seed,
    output: Output = Path("activations.json"),
    pipeline: Pipeline = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show whether finetuning changed the features' channels or places more than chance would.

    Example: deme analyze activations base.safetensors ft_1of4.safetensors
    """
    run = begin(config, quiet=quiet)
    settings = ActivationConfig(num=num, batch_size=batch_size, controls=controls, seed=seed)
    check_output(output, force=force)
    pair = _pair(run, models)
    chosen = _check_models(run, pair, span)
    images = check_images(run, data)
    names = _names(pair)
    console.note(
        f"{names[1]} against {names[0]}: {num:,} draws of {chosen or 'the timesteps'} from "
        f"{images.source} ({split})"
    )
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True)
        return

    from deme_cli.analysis.activations.block_change import QUANTILES
    from deme_cli.analysis.activations.found import read_activations
    from deme_cli.analysis.activations.measure import (
        ActivationAnalysis,
        measure_activations,
        require_block,
    )
    from deme_cli.analysis.activations.picture import draw_activations
    from deme_cli.analysis.figure import shorten
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device

    place = str(choose_device(device))
    base, expert = (open_denoiser(model, device=place, dtype=dtype) for model in pair)
    _require_same_network(base.record, expert.record, pair)
    require_block(base.network, block, pair[0])
    chosen = chosen or _range(run, expert.record, span)
    beside = Path(pair[0]).parent if Path(pair[0]).is_file() else output.parent
    record, examples = open_images(
        run, base.record, images, split=split, beside=beside, pipeline=pipeline, device=device
    )
    analysis = ActivationAnalysis(
        replace(base, record=record), expert, names, examples, settings, chosen, split, output,
        block,
    )  # fmt: skip
    found = watch(
        measure_activations(analysis, force=force), "activations", analysis.num_comparisons,
        "comparison",
    )  # fmt: skip
    reading = read_activations(names, chosen, found)
    summaries = {**found.summary, "controls": found.control_summaries}
    protocol = _protocol(analysis, pair, dtype)
    drawn = draw_activations(
        found, foot=_foot(analysis),
        title=f"Features changed by finetuning: {shorten(names[1], 28)} against "
        f"{shorten(names[0], 28)}",
    )  # fmt: skip
    document = document_bytes(
        "activations", reading, protocol, summary=found.summary,
        controls=found.control_summaries, quantiles=QUANTILES, blocks=found.rows(),
        drawn=found.drawn.maps(),
    )  # fmt: skip
    paths = write_analysis(output, drawn, document, reading)
    console.result_paths(paths, as_json=as_json, reading=reading, **summaries)


def _pair(run: RunFile, models: Sequence[str]) -> tuple[str, str]:
    """BASE and EXPERT as given; the base of a single expert is looked for."""
    from deme_cli.merging.lineage import find_base, open_parents

    if len(models) > 2:
        raise ConfigError(f"{len(models)} models given: expected [BASE] EXPERT")
    if len(models) == 2:
        return models[0], models[1]
    expert = Path(models[0]).expanduser()
    if not expert.is_file():
        raise MissingError(f"{expert}: no such file; name BASE and EXPERT")
    try:
        base = find_base(open_parents([expert], "expert"), run, None)
    except (ArtifactError, MissingError) as error:
        advice = f"name both: deme analyze activations BASE {expert}"
        raise type(error)(f"{str(error).rpartition(';')[0] or error}; {advice}") from error
    return str(base), str(expert)


def _check_models(run: RunFile, pair: tuple[str, str], span: str | None) -> TimestepRange | None:
    """What can be told before torch is imported; the range, where the files tell it."""
    from deme_cli.artifacts import read_record
    from deme_cli.diffusion.locate import locate_model, peek_timesteps

    places = [locate_model(model) for model in pair]
    records = [read_record(place) if place.is_file() else None for place in places]
    base, expert = records
    if isinstance(base, DenoiserRecord) and isinstance(expert, DenoiserRecord):
        _require_same_network(base, expert, pair)
    if isinstance(expert, DenoiserRecord):
        return _range(run, expert, span)
    timesteps = peek_timesteps(places[1])
    return _parse(run, span or "all", timesteps) if timesteps else None


def _range(run: RunFile, record: DenoiserRecord, span: str | None) -> TimestepRange:
    """As given, else the one the expert was finetuned on, else all of [0, T)."""
    if span is None and isinstance(record, ExpertRecord):
        return record.timesteps
    return _parse(run, span or "all", record.num_train_timesteps)


def _parse(run: RunFile, span: str, num_train_timesteps: int) -> TimestepRange:
    if span == "all":
        return TimestepRange(0, num_train_timesteps)
    return parse_range(span, num_train_timesteps, run.settings(SplitConfig).timestep_ranges).range


def _require_same_network(
    base: DenoiserRecord, expert: DenoiserRecord, names: tuple[str, str]
) -> None:
    """Check that two models are one network with other weights, block projections aside.

    Raises ArtifactError naming the first setting that differs, or that the weights are the same.
    """
    if base.fingerprint and base.fingerprint == expert.fingerprint:
        raise ArtifactError(
            f"{names[0]} and {names[1]} have the same weights; give a base and what was "
            f"finetuned from it"
        )
    for what in ("model_config", "scheduler_config"):
        ours, theirs = getattr(base, what), getattr(expert, what)
        for key in sorted(ours.keys() | theirs.keys()):
            kept = not key.startswith("_") or key == "_class_name"  # the rest says who wrote it
            if kept and ours.get(key) != theirs.get(key):
                raise ArtifactError(
                    f"{names[1]}: {key} of its {what} is {theirs.get(key)!r}, {names[0]} has "
                    f"{ours.get(key)!r}; give a base and what was finetuned from it"
                )


def _names(pair: tuple[str, str]) -> tuple[str, str]:
    """The models as the picture calls them: by their files, or as given where those agree."""

    def name(model: str) -> str:
        path = Path(model)
        return path.name.removesuffix(".safetensors") if path.expanduser().exists() else model

    short = (name(pair[0]), name(pair[1]))
    return pair if short[0] == short[1] else short


def _protocol(analysis: ActivationAnalysis, pair: tuple[str, str], dtype: str) -> dict[str, Any]:
    examples, config = analysis.examples, analysis.config
    return {
        "base": {"source": pair[0], "fingerprint": analysis.base.record.fingerprint},
        "expert": {"source": pair[1], "fingerprint": analysis.expert.record.fingerprint,
                   "projection": getattr(analysis.expert.record, "projection", None)},
        "data": {"source": examples.source, "fingerprint": examples.fingerprint,
                 "split": analysis.split},
        "range": str(analysis.span), "num": config.num, "seed": config.seed,
        "controls": config.controls, "dtype": dtype,
    }  # fmt: skip


def _foot(analysis: ActivationAnalysis) -> str:
    from deme_cli.analysis.figure import shorten

    projection = getattr(analysis.expert.record, "projection", "block")
    told = {
        "fold": "; the expert's projections were folded into other layers, none is left to look at",
        "none": "; the expert was finetuned without projections",
    }
    return (
        f"{analysis.config.num:,} draws (image, t, noise) of timesteps {analysis.span} from "
        f"{shorten(analysis.examples.source, 40)} ({analysis.split}), the same for every model"
        f"{told.get(projection, '')}"
    )
