"""What a `deme eval` is about: what measures, against what, which rows; found without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from deme_cli import console
from deme_cli.commands.fetching import fetch, fetch_clip
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.data.prompts import PromptSet, prompt_assets, read_prompts, select_prompts
from deme_cli.errors import ConfigError
from deme_cli.evaluation.protocol import Means
from deme_cli.evaluation.protocols import Protocol, require_reference
from deme_cli.evaluation.references import Reference, find_reference, reference_assets
from deme_cli.evaluation.row_plans import Rows, folder_rows, plan_rows
from deme_cli.evaluation.weights import (
    FeatureWeights,
    choose_features,
    find_classifier,
    find_weights,
    weights_assets,
)
from deme_cli.run_file import RunFile


@dataclass(frozen=True)
class Request:
    """Everything a run needs, checked before anything heavy is loaded."""

    config: EvalConfig
    sample: SampleConfig
    means: Means
    rows: Rows
    prompts: PromptSet | None
    pipeline: str | None
    device: str
    dtype: str
    compile: str


def check_options(
    settings: EvalConfig,
    protocol: Protocol | None,
    *,
    max_fid: float | None,
    weights: Path | None,
) -> None:
    """What the command line alone can get wrong."""
    require_reference(protocol, settings.fid)
    if not (settings.fid or settings.kid or settings.clip_score or settings.accuracy):
        raise ConfigError(
            "nothing to measure: add --fid REF or --kid REF, as in --fid digits, --clip-score or "
            "--accuracy CLASSIFIER"
        )
    if max_fid is not None and not settings.fid:
        raise ConfigError("--max-fid needs --fid")
    if weights is not None and not (settings.fid or settings.kid):
        raise ConfigError("--weights goes with --fid or --kid; those of CLIP are --clip-weights")


def find_prompts(
    run: RunFile, config: EvalConfig, sample: SampleConfig, num: int | None
) -> tuple[PromptSet | None, EvalConfig, SampleConfig]:
    """The prompts that are asked for, and the settings with the number of images they fix.

    num: as given on the command line or by a protocol. Raises ConfigError where it, or else that of
    deme.toml, does not match the prompts.
    """
    if sample.prompts is None:
        return None, config, sample
    source = run.seen(sample.prompts)
    fetch(prompt_assets(source))
    prompts = read_prompts(source, column=sample.prompt_column)
    asked = run.tables.get("eval", {}).get("num") if num is None else num
    if asked is None and prompts.cycles:
        asked = config.num
    count = len(select_prompts(prompts, num=asked, per_prompt=sample.per_prompt))
    sample = replace(sample, prompts=source, num=count)
    return prompts, replace(config, num=count), sample


def find_means(
    run: RunFile, settings: EvalConfig, weights_path: Path | None, protocol: Protocol | None
) -> Means:
    """Find the features, the references, CLIP and the classifier; no torch is needed for it.

    CLIP alone is looked up in open_clip, which loads torch: it comes last.
    """
    features, references = _find_features(run, settings, weights_path)
    classifier = find_classifier(run.seen(settings.accuracy)) if settings.accuracy else None
    clip = None
    if settings.clip_score:
        from deme_cli.evaluation.clip_weights import find_clip

        chosen = run.seen(settings.clip_weights)
        fetch_clip(settings.clip_model, chosen)
        clip = find_clip(settings.clip_model, chosen)
    return Means(features, references, clip, classifier, protocol.name if protocol else None)


def _find_features(
    run: RunFile, settings: EvalConfig, weights_path: Path | None
) -> tuple[FeatureWeights | None, dict[str, Reference]]:
    fid, kid = (source and run.seen(source) for source in (settings.fid, settings.kid))
    if not (fid or kid):
        return None, {}
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
    return weights, references


def find_rows(run: RunFile, models: list[str]) -> Rows:
    """The rows that are named, or those of the run's folder."""
    return plan_rows(models) if models else folder_rows(run.base)


def say_what_would_run(request: Request, *, as_json: bool) -> None:
    config, sample, means = request.config, request.sample, request.means
    names = [plan.name for plan in request.rows.plans]
    against = ", ".join(reference.source for reference in means.references.values())
    metrics = [*means.references]
    metrics += ["clip_score"] if means.clip else []
    metrics += ["accuracy"] if means.classifier else []
    sampler = f"{sample.sampler} " if sample.sampler else ""
    console.note(
        f"would measure {', '.join(metrics)} of {', '.join(names)}"
        f"{f' against {against}' if against else ''}: {config.num} images, "
        f"{config.repeats} repeats, {sampler}{sample.steps} steps"
    )
    if as_json:
        rows = [{"name": name} for name in names]
        console.result_json({"dry_run": True, "rows": rows, "protocol": means.protocol})
