"""What a `deme eval` is about: options, features, references and rows, found without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deme_cli import console
from deme_cli.commands.fetching import fetch
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.evaluation.references import Reference, find_reference, reference_assets
from deme_cli.evaluation.row_plans import Rows, folder_rows, plan_rows
from deme_cli.evaluation.weights import (
    FeatureWeights,
    choose_features,
    find_weights,
    weights_assets,
)
from deme_cli.outputs import require_output
from deme_cli.run_file import RunFile


@dataclass(frozen=True)
class Request:
    """Everything a run needs, checked before anything heavy is loaded."""

    config: EvalConfig
    sample: SampleConfig
    weights: FeatureWeights
    references: dict[str, Reference]  # by metric
    rows: Rows
    device: str
    dtype: str


def check_options(
    settings: EvalConfig, max_fid: float | None, output: Path | None, *, force: bool
) -> None:
    """What the command line alone can get wrong."""
    if not (settings.fid or settings.kid):
        raise ConfigError(
            "nothing to measure against: add --fid REF or --kid REF, as in --fid digits"
        )
    if max_fid is not None and not settings.fid:
        raise ConfigError("--max-fid needs --fid")
    if output is not None:
        require_output(output, force=force)


def prepare(
    run: RunFile,
    settings: EvalConfig,
    sample: SampleConfig,
    weights_path: Path | None,
    models: list[str],
    *,
    device: str,
    dtype: str,
) -> Request:
    """Find the features, the references and the rows; no torch is imported for it."""
    fid, kid = (_seen_from(run, source) for source in (settings.fid, settings.kid))
    features = choose_features(settings.features, [source for source in (fid, kid) if source])
    resize = settings.resize
    for source in (fid, kid):
        if source and Path(source).exists():  # a wrong file is told before missing weights
            find_reference(source, features, resize)
    assets = weights_assets(features, resize, weights_path)
    if fid:
        assets += reference_assets(fid, features, resize)
    fetch(assets)
    weights = find_weights(features, resize, weights_path)
    references = {}
    if fid:
        references[weights.metric_name] = find_reference(fid, features, resize, weights=weights)
    if kid:
        references[weights.kernel_name] = find_reference(
            kid, features, resize, weights=weights, kernel=True
        )
    rows = plan_rows(models) if models else folder_rows(run.base)
    return Request(settings, sample, weights, references, rows, device, dtype)


def _seen_from(run: RunFile, source: str | None) -> str | None:
    """A reference as given, or, where nothing of that name is here, beside the deme.toml."""
    if source and not Path(source).exists() and run.resolve(source).exists():
        return str(run.resolve(source))
    return source


def say_what_would_run(request: Request, *, as_json: bool) -> None:
    config, sample = request.config, request.sample
    names = [plan.name for plan in request.rows.plans]
    console.note(
        f"would measure {', '.join(request.references)} of {', '.join(names)} against "
        f"{', '.join(reference.source for reference in request.references.values())}: "
        f"{config.num} images, {config.repeats} repeats, {sample.sampler} {sample.steps} steps"
    )
    if as_json:
        console.result_json({"dry_run": True, "rows": [{"name": name} for name in names]})
