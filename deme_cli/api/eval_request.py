"""What a `deme eval` is about: what measures, against what, which rows; found without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deme_cli import console
from deme_cli.api.fetching import fetch, fetch_clip
from deme_cli.config import EVAL_NUM, EvalConfig, SampleConfig
from deme_cli.data.prompts import PromptSet, prompt_assets, read_prompts, select_prompts
from deme_cli.errors import ConfigError
from deme_cli.evaluation.protocol import Means
from deme_cli.evaluation.protocols import (
    Protocol,
    apply_protocol,
    find_protocol,
    require_reference,
)
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
class Order:
    """What is asked: the settings, and the protocol that has fixed some of them.

    weights: the file of the features, where somebody names it.
    """

    run: RunFile
    settings: EvalConfig
    sampling: SampleConfig
    weights: Path | None
    protocol: Protocol | None


def resolve_order(
    run: RunFile, options: Mapping[str, Any], of_sampling: Mapping[str, Any], weights: Path | None
) -> Order:
    """An order from options, None where not given, over those of `run`.

    Raises ConfigError for an option that says something else than the protocol that is named.
    """
    named = find_protocol(run.settings(EvalConfig, protocol=options["protocol"]).protocol)
    given = apply_protocol(named, EvalConfig, options)
    settings = run.settings(EvalConfig, **given)
    counts = {"num": settings.num, "seed": settings.seed}
    sampling = run.settings(
        SampleConfig, **apply_protocol(named, SampleConfig, {**of_sampling, **counts})
    )
    return Order(run, settings, sampling, weights, named)


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

    def say_what_would_run(self) -> None:
        """One line about the rows and what would be measured of them."""
        config, sample, means = self.config, self.sample, self.means
        names = [plan.name for plan in self.rows.plans]
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


def find_request(
    order: Order,
    models: Sequence[str],
    pipeline: str | None,
    device: str,
    dtype: str,
    compile: str,
) -> Request:
    """Find the rows that are named, or those of the run's folder, and what measures them.

    Raises ConfigError where nothing is to be measured, MissingError or ArtifactError for what is
    not there or cannot be used.
    """
    settings, run = order.settings, order.run
    require_reference(order.protocol, settings.fid)
    if not (settings.fid or settings.kid or settings.clip_score or settings.accuracy):
        raise ConfigError(
            "nothing to measure: add --fid REF or --kid REF, as in --fid digits, --clip-score or "
            "--accuracy CLASSIFIER"
        )
    if order.weights is not None and not (settings.fid or settings.kid):
        raise ConfigError("--weights goes with --fid or --kid; those of CLIP are --clip-weights")
    if order.protocol is not None:
        console.note(f"protocol {order.protocol.name}: {order.protocol.source}")
        console.note(f"not told there: {order.protocol.open}")
    prompts, settings, sampling = find_prompts(run, settings, order.sampling)
    rows = plan_rows(models) if models else folder_rows(run.base)
    means = find_means(run, settings, order.weights, order.protocol)
    return Request(settings, sampling, means, rows, prompts, pipeline, device, dtype, compile)


def find_prompts(
    run: RunFile, config: EvalConfig, sample: SampleConfig
) -> tuple[PromptSet | None, EvalConfig, SampleConfig]:
    """The prompts that are asked for, and the settings with the number of images there will be.

    Raises ConfigError where the number that is set does not match the prompts.
    """
    if sample.prompts is None:
        count = EVAL_NUM if config.num is None else config.num
        return None, replace(config, num=count), replace(sample, num=count)
    source = run.seen(sample.prompts)
    fetch(prompt_assets(source))
    prompts = read_prompts(source, column=sample.prompt_column)
    asked = EVAL_NUM if config.num is None and prompts.cycles else config.num
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
        from deme_cli.evaluation.clip_weights import activation_told, find_clip

        chosen = run.seen(settings.clip_weights)
        fetch_clip(settings.clip_model, chosen)
        clip = find_clip(settings.clip_model, chosen)
        if told := activation_told(clip):
            console.warn(told)
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
        if source and (Path(source).exists() or not reference_assets(source, features, resize)):
            # what cannot be a reference is told before missing weights
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
