"""The rows of a table of figures: models, ensembles, and images that somebody has drawn.

Experts of one base whose ranges together cover [0, T) once are one row, the ensemble; an expert of
all of [0, T) is a row of its own. `plan_rows` reads headers alone; `open_rows` opens experts to
sample from, or finished images, each with its card. Images have prompts where they were drawn for
some: as drawn for models; for finished images those that came with them, else the ones given.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from deme_cli.artifacts import DenoiserRecord, ExpertRecord, Record, SamplesRecord
from deme_cli.config import EVAL_NUM, EvalConfig, SampleConfig
from deme_cli.console import Progress, silent
from deme_cli.data.image_source import find_files, image_suffixes
from deme_cli.data.prompts import PromptSet, prompt_assets, read_prompts, select_prompts
from deme_cli.diffusion.model_files import locate_model, read_json
from deme_cli.errors import ArtifactError, ConfigError, DemeError, MissingError
from deme_cli.evaluation.protocols import require_one_protocol
from deme_cli.evaluation.references import record_of_file
from deme_cli.fetch import fetch
from deme_cli.run_file import RunFile
from deme_cli.run_folder import CARD_NAME
from deme_cli.sampling.ensemble import open_ensemble, open_single, read_ensemble

if TYPE_CHECKING:
    from deme_cli.data.images import ImageData
    from deme_cli.evaluation.references import FeatureWeights
    from deme_cli.sampling.conditioning import Conditioning
    from deme_cli.sampling.ensemble import SamplingExpert

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class RowPlan:
    """A row to be measured. kind: base, expert, merged, ensemble, samples, or model if unread."""

    name: str
    kind: str
    arguments: tuple[str, ...]


def plan_rows(arguments: Sequence[str]) -> tuple[list[RowPlan], list[str]]:
    """One row per argument, experts that make an ensemble in place of the first; and warnings.

    Raises MissingError for an argument that is not there, ArtifactError for one that cannot be
    measured, ConfigError for one given twice.
    """
    records = {argument: record_of_file(argument) for argument in arguments}
    ensembles = {group[0]: group for group in _ensembles(records)}
    grouped = {argument for group in ensembles.values() for argument in group}
    plans, warnings = [], []
    for argument in arguments:
        record = records[argument]
        if group := ensembles.get(argument):
            name = f"{ENSEMBLE}-{len(group)}" if len(ensembles) > 1 else ENSEMBLE
            plans.append(RowPlan(name, ENSEMBLE, group))
        elif argument not in grouped:
            plans.append(_plan(argument, record))
            if is_partial(record):
                warnings.append(
                    f"{argument}: the expert of timesteps {record.timesteps} will denoise all "
                    f"{record.num_train_timesteps}: it makes no ensemble with the others given"
                )
    names = Counter(plan.name for plan in plans)
    plans = [
        plan if names[plan.name] == 1 else replace(plan, name=", ".join(plan.arguments))
        for plan in plans
    ]
    for name, count in Counter(plan.name for plan in plans).items():
        if count > 1:
            raise ConfigError(f"{name} is given twice")
    return plans, warnings


def folder_models(base: Path) -> list[str]:
    """Base, experts and merged model of a run's folder, whichever are there."""
    folder = base.parent
    found = [base, *sorted(folder.glob("ft_*.safetensors")), folder / "merged.safetensors"]
    return [str(path) for path in found if path.exists()]


def folder_rows(base: Path) -> tuple[list[RowPlan], list[str]]:
    """The rows of a run's folder: base, experts and merged model, whichever are there.

    Experts that do not make an ensemble yet are left out, with a warning.
    """
    plans, warnings = plan_rows(folder_models(base))
    if warnings:
        experts = [plan for plan in plans if plan.kind == "expert"]
        alone = [plan for plan in experts if is_partial(record_of_file(plan.arguments[0]))]
        warnings = [
            f"no row for the ensemble: {', '.join(plan.name for plan in alone)} do not cover all "
            f"timesteps once; name a file to measure it alone"
        ]
        plans = [plan for plan in plans if plan not in alone]
    if not plans:
        raise MissingError(
            f"nothing to measure: no {base.name}, no experts that cover all timesteps, no "
            f"merged.safetensors in {base.parent.resolve()}; name models or samples, or run "
            f"`deme split`"
        )
    return plans, warnings


def _plan(argument: str, record: Record | None) -> RowPlan:
    path = Path(argument).expanduser()
    if record is None:
        parts = ("model_index.json", "config.json", "unet")
        is_model = any((path / part).exists() for part in parts)
        files = find_files(path) if path.is_dir() and not is_model else ()
        if any(file.suffix.lower() in image_suffixes() for file in files):
            return RowPlan(path.resolve().name, "samples", (argument,))
        if path.suffix in (".npz", ".zip") and path.is_file():
            return RowPlan(path.stem, "samples", (argument,))
        locate_model(argument)
        return RowPlan(path.name, "model", (argument,))
    if record.kind not in ("base", "expert", "merged", "samples"):
        raise ArtifactError(
            f"{argument}: an artifact of kind {record.kind!r} cannot be measured; "
            f"expected a base, expert or merged model, or samples"
        )
    return RowPlan(path.stem, record.kind, (argument,))


def is_partial(record: Record | None) -> TypeGuard[ExpertRecord]:
    """Whether it is of an expert of a part of [0, T)."""
    return isinstance(record, ExpertRecord) and len(record.timesteps) < record.num_train_timesteps


def _ensembles(records: Mapping[str, Record | None]) -> Iterator[tuple[str, ...]]:
    """Groups of arguments whose experts cover [0, T) once: of one base, then of one N."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for argument, record in records.items():
        if is_partial(record):
            for key in ((record.base,), (record.base, record.of)):
                groups.setdefault(key, []).append(argument)
    whole = set()
    for key, group in sorted(groups.items(), key=lambda one: len(one[0])):
        if key[:1] not in whole:
            with suppress(DemeError):
                read_ensemble([Path(argument).expanduser() for argument in group])
                whole.add(key)
                yield tuple(group)


@dataclass(frozen=True)
class Row:
    """A row that can be measured: `experts` to sample from, or `finished` images.

    `card` tells how the images are, or were, drawn; `prompts` holds one per image.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]  # (C, H, W)
    card: dict[str, Any]
    experts: Sequence[SamplingExpert] = ()
    conditioning: Conditioning | None = None
    finished: ImageData | None = None
    prompts: Sequence[str] | None = None

    def num_images(self, config: EvalConfig) -> int:
        """Images of one repeat: as many as asked, or as there are."""
        assert config.num is not None, "known once the prompts are"
        return config.num if self.finished is None else min(config.num, len(self.finished))


def find_prompts(
    run: RunFile, config: EvalConfig, sample: SampleConfig, progress: Progress = silent
) -> tuple[PromptSet | None, EvalConfig, SampleConfig]:
    """The prompts that are asked for, and the settings with the number of images there will be.

    Raises ConfigError where the number that is set does not match the prompts.
    """
    if sample.prompts is None:
        count = EVAL_NUM if config.num is None else config.num
        return None, replace(config, num=count), replace(sample, num=count)
    source = run.seen(sample.prompts)
    fetch(prompt_assets(source), progress)
    prompts = read_prompts(source, column=sample.prompt_column)
    asked = EVAL_NUM if config.num is None and prompts.cycles else config.num
    count = len(select_prompts(prompts, num=asked, per_prompt=sample.per_prompt))
    sample = replace(sample, prompts=source, num=count)
    return prompts, replace(config, num=count), sample


def open_rows(
    plans: Sequence[RowPlan], sample: SampleConfig, *, prompts: PromptSet | None = None,
    needs_prompts: bool = False, run: RunFile | None = None, pipeline: str | None = None,
    device: str = "cpu", dtype: str = "fp32",
) -> list[Row]:  # fmt: skip
    """What the plans need to be measured. Models in artifacts are loaded when sampled.

    Models of one base share a conditioning, so that its text encoders are loaded once. Raises
    ArtifactError where images differ in size, ConfigError where a row lacks prompts it needs.
    """
    conditionings: dict[str, Conditioning] = {}
    rows: list[Row] = []
    for plan in plans:
        if plan.kind == "samples":
            row = _open_samples(plan, prompts, sample, needs_prompts=needs_prompts)
        else:
            row = _open_model(plan, sample, conditionings, run, pipeline, device, dtype)
        rows.append(row)
        if row.shape[1:] != rows[0].shape[1:]:
            own, first = (f"{r.shape[2]}x{r.shape[1]}" for r in (row, rows[0]))
            told = f"{row.name} has {own} images, {rows[0].name} {first}"
            raise ArtifactError(f"{told}; measure them in separate runs")
        if needs_prompts and row.prompts is None:
            raise ConfigError(
                f"{row.name}: the prompts of its images are not known, --clip-score needs them; "
                f"give them with --prompts FILE"
            )
    return rows


def _open_model(
    plan: RowPlan, sample: SampleConfig, conditionings: dict[str, Conditioning],
    run: RunFile | None, pipeline: str | None, device: str, dtype: str,
) -> Row:  # fmt: skip
    from deme_cli.sampling.conditioning import open_conditioning, protocol_card

    records: list[DenoiserRecord]
    if plan.kind == ENSEMBLE:
        paths = [Path(argument).expanduser() for argument in plan.arguments]
        records = [member.record for member in read_ensemble(paths)]
        experts = open_ensemble(paths, run=run, device=device, dtype=dtype)
    else:
        experts, record = open_single(
            plan.arguments[0], run=run, pipeline=pipeline, device=device, dtype=dtype
        )
        records = [record]
    first = records[0]
    key = json.dumps([first.source, first.model_config, first.companions], sort_keys=True)
    if key not in conditionings:
        conditionings[key] = open_conditioning(
            first, sample, pipeline=pipeline, device=device, dtype=dtype
        )
    about = conditionings[key]
    card = protocol_card(records, sample, conditioning=about, dtype=dtype)
    kind = card["model"] if plan.kind == "model" else plan.kind
    return Row(plan.name, kind, about.image_shape, card, experts, about, prompts=about.prompts)


def _open_samples(
    plan: RowPlan, given: PromptSet | None, sample: SampleConfig, *, needs_prompts: bool
) -> Row:
    from deme_cli.data.captions import NoAnnotations
    from deme_cli.data.images import open_images

    argument = plan.arguments[0]
    data = open_images(argument, shape=None, split="all")
    record = record_of_file(argument)
    prompts: Sequence[str] | None = None
    if isinstance(record, SamplesRecord):
        card, prompts = record.protocol, record.prompts
        if prompts is not None and list(map(type, prompts)) != [str] * len(data):
            expected = f"expected {len(data)} prompts, one for each image"
            raise ArtifactError(f"{argument}: {expected}, found {len(prompts)}")
    else:
        path = Path(argument).expanduser() / CARD_NAME
        card = read_json(path).get("protocol", {}) if path.is_file() else {}
        if not isinstance(card, dict):
            raise ArtifactError(f"{path}: expected a table under protocol, found {card!r:.40}")
        if needs_prompts:
            with suppress(NoAnnotations):
                told = open_images(argument, shape=None, split="all", wants="text", keep=False)
                prompts = told.captions(range(len(told)))
    if needs_prompts and given is not None and prompts is None:
        data, prompts = pair(data, given, per_prompt=sample.per_prompt)
        card = {**card, "prompts_sha256": given.sha256}
    card = {**card, "images": data.fingerprint}
    return Row(plan.name, plan.kind, data.shape, card, finished=data, prompts=prompts)


def pair(data: ImageData, given: PromptSet, *, per_prompt: int) -> tuple[ImageData, list[str]]:
    """The images that prompts are for, and the prompt of each.

    By the names of files, where the prompts have any, else in order: of images the first ones.
    Raises ArtifactError where an image has no prompt, ConfigError for fewer images than prompts.
    """
    names = data.file_names()
    if given.files is not None and names is not None:
        by_name = dict(zip(given.files, given.prompts, strict=True))
        if absent := [name for name in names if name not in by_name]:
            raise ArtifactError(
                f"{given.source}: its column file_name lacks {len(absent)} of the {len(names)} "
                f"images of {data.source}, as {absent[0]}; give a prompt for each"
            )
        return data, [by_name[name] for name in names]
    total = len(data) if given.cycles else len(given) * per_prompt
    if len(data) < total:
        raise ConfigError(
            f"{data.source} has {len(data)} images, {given.source} prompts for {total}, and "
            f"nothing tells which belong together; give the prompts of these images, or a table "
            f"with a column file_name"
        )
    chosen = select_prompts(given, num=total, per_prompt=per_prompt)
    return data, [prompt for prompt, _ in chosen]


def compare_rows(
    rows: Sequence[Row], config: EvalConfig, features: FeatureWeights | None
) -> list[str]:
    """What makes figures hard to compare, told before the work; raises what must not be."""
    told = []
    if features is not None and features.published is False:
        told.append(
            f"{features.path}: not the published {features.name} weights (sha256 "
            f"{features.sha256[:12]}); figures cannot be compared with others'"
        )
    counts, cards = (
        {row.name: row.num_images(config) for row in rows},
        {r.name: r.card for r in rows},
    )
    for row in rows:
        num = counts[row.name]
        if features is not None and num != config.num:
            fewer = f"{row.name} has {num} images, not {config.num}"
            told.append(f"{fewer}: fewer images make a distance larger")
        if row.finished is not None and num < len(row.finished):
            told.append(
                f"{row.name}: the first {num} of its {len(row.finished)} images are taken, "
                f"{row.finished.name(0)} to {row.finished.name(num - 1)}"
            )
    return told + require_one_protocol(cards, counts, mixed=config.mixed)
