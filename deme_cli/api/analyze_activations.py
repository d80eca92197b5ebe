"""`analyze_activations`: whether finetuning changed channels or places of the features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.analysis_config import ActivationConfig
from deme_cli.api import analyzing
from deme_cli.config import DataConfig, SplitConfig
from deme_cli.errors import ArtifactError, MissingError
from deme_cli.records import DenoiserRecord, ExpertRecord
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, parse_range

if TYPE_CHECKING:
    from deme_cli.analysis.activations.measure import ActivationAnalysis

Pair = tuple[str, str]  # base and expert


def analyze_activations(
    expert: str | Path,
    settings: ActivationConfig | None = None,
    *,
    base: str | Path | None = None,
    images: DataConfig | None = None,
    split: str = "held-out",
    range: str | None = None,
    block: str | None = None,
    output: Path = Path("activations.json"),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    dtype: str = "fp32", force: bool = False, dry_run: bool = False,
) -> analyzing.Analysis:  # fmt: skip
    """Measure whether finetuning changed the features' channels or places, beyond chance or not.

    expert: any model finetuned from `base`, which is found by `run` or beside it if None.   range:
    `i/N`, `start:stop` or `all`; None for the expert's own.   block: the one that is drawn; None
    for the one that changed most.

    The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or ActivationConfig()
    analyzing.check_output(output, force=force)
    pair = _find_base(run, str(expert)) if base is None else (str(base), str(expert))
    chosen = _check_models(run, pair, range)
    images = analyzing.check_images(images, run, split=split)
    names = _names(pair)
    console.note(
        f"{names[1]} against {names[0]}: {settings.num:,} draws of {chosen or 'the timesteps'} "
        f"from {images.source} ({split})"
    )
    if dry_run:
        return analyzing.nothing_written(output, dry_run=True)

    from deme_cli.analysis.activations.measure import ActivationAnalysis, require_block
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device

    place = str(choose_device(device))
    frozen = run.pipeline(pipeline)
    before, after = (
        open_denoiser(model, pipeline=frozen, device=place, dtype=dtype) for model in pair
    )
    _require_same_network(before.record, after.record, pair)
    require_block(before.network, block, pair[0])
    chosen = chosen or _range(run, after.record, range)
    record, examples = analyzing.open_images(
        before.record, images, run, split=split, beside=analyzing.cache_folder(pair[0], output),
        pipeline=pipeline, device=device,
    )  # fmt: skip
    analysis = ActivationAnalysis(
        replace(before, record=record), after, names, examples, settings, chosen, split, output,
        block,
    )  # fmt: skip
    return _measure(analysis, _protocol(analysis, pair, dtype), force=force)


def _find_base(run: RunFile, model: str) -> Pair:
    """The base of a single expert, and it."""
    from deme_cli.merging.lineage import find_base, open_parents

    expert = Path(model).expanduser()
    if not expert.is_file():
        raise MissingError(f"{expert}: no such file; name BASE and EXPERT")
    try:
        base = find_base(open_parents([expert], "expert"), run, None)
    except (ArtifactError, MissingError) as error:
        advice = f"name both: deme analyze activations BASE {expert}"
        raise type(error)(f"{str(error).rpartition(';')[0] or error}; {advice}") from error
    return str(base), str(expert)


def _check_models(run: RunFile, pair: Pair, span: str | None) -> TimestepRange | None:
    """What can be told before torch is imported; the range, where the files tell it."""
    from deme_cli.artifacts import read_record
    from deme_cli.diffusion.locate import locate_model, peek_timesteps

    places = [locate_model(model) for model in pair]
    base, expert = (read_record(place) if place.is_file() else None for place in places)
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


def _require_same_network(base: DenoiserRecord, expert: DenoiserRecord, names: Pair) -> None:
    """Check that two models are one network with other weights, block projections aside.

    Raises ArtifactError naming the first setting that differs, or that the weights are the same.
    """
    from deme_cli.diffusion.schedule import complete_config

    if base.fingerprint and base.fingerprint == expert.fingerprint:
        raise ArtifactError(
            f"{names[0]} and {names[1]} have the same weights; give a base and what was "
            f"finetuned from it"
        )
    configs = {
        "model_config": (base.model_config, expert.model_config),
        "scheduler_config": tuple(complete_config(one.scheduler_config) for one in (base, expert)),
    }
    for what, (ours, theirs) in configs.items():
        for key in sorted(ours.keys() | theirs.keys()):
            kept = not key.startswith("_") or key == "_class_name"  # the rest says who wrote it
            if kept and ours.get(key) != theirs.get(key):
                raise ArtifactError(
                    f"{names[1]}: {key} of its {what} is {theirs.get(key)!r}, {names[0]} has "
                    f"{ours.get(key)!r}; give a base and what was finetuned from it"
                )


def _names(pair: Pair) -> Pair:
    """The models as the picture calls them: by their files, or as given where those agree."""

    def name(model: str) -> str:
        path = Path(model)
        return path.name.removesuffix(".safetensors") if path.expanduser().exists() else model

    short = (name(pair[0]), name(pair[1]))
    return pair if short[0] == short[1] else short


def _protocol(analysis: ActivationAnalysis, pair: Pair, dtype: str) -> dict[str, Any]:
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


def _measure(
    analysis: ActivationAnalysis, protocol: dict[str, Any], *, force: bool
) -> analyzing.Analysis:
    from deme_cli.analysis.activations.found import document_of, foot_of
    from deme_cli.analysis.activations.measure import measure_activations
    from deme_cli.analysis.activations.picture import draw_activations
    from deme_cli.analysis.figure import shorten

    steps, total = measure_activations(analysis, force=force), analysis.num_comparisons
    found = analyzing.watch(steps, "activations", total, "comparison")
    before, after = (shorten(name, 28) for name in analysis.names)
    title = f"Features changed by finetuning: {after} against {before}"
    drawn = draw_activations(found, title=title, foot=foot_of(protocol))
    document = document_of(found, analysis.names, analysis.span, protocol)
    return analyzing.write_analysis(
        analysis.output, drawn, document, ("reading",), **found.summary,
        controls=found.control_summaries,
    )  # fmt: skip
