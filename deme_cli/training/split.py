"""`split`: a pretrained model as a base artifact, its timesteps divided, and a deme.toml.

What can be told from options and headers is checked before a heavy library is imported.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.artifacts import read_record, write_artifact
from deme_cli.config import AFFINITY_NAME, CONFIG_NAME, ModelConfig, SampleConfig, SplitConfig
from deme_cli.data.digits import DIGITS_REMARK, DIGITS_SETTINGS
from deme_cli.data.image_source import KNOWN_DATASETS, find_image_source
from deme_cli.diffusion.model_files import (
    is_single_file,
    locate_model,
    own_ranges,
    peek_timesteps,
)
from deme_cli.errors import ArtifactError, ConfigError, DemeError, writing
from deme_cli.files import require_output, write_whole
from deme_cli.run_file import RunFile, read_run_file, render_run_file
from deme_cli.timesteps import TimestepRange, require_cover, split_uniform

if TYPE_CHECKING:
    from torch import Tensor

    from deme_cli.artifacts import BaseRecord, ExpertRecord
    from deme_cli.diffusion.checkpoints import ImportedModel
    from deme_cli.diffusion.schedule import Schedule

AS_BASE = ("low", "high", "mean")  # of the denoisers of low and of high noise
PARTS_NAME = "base.pipeline"  # beside the base: the frozen parts of the single file it came from
# Training data guessed from a model's name, by a word in it.
_DATA_BY_NAME = {
    "digits": "digits", "cifar10": "cifar10", "cifar-10": "cifar10", "church": "lsun-church",
    "bedroom": "lsun-bedroom",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One range: the timesteps training draws in it, and the SNR at its ends in dB."""

    range: TimestepRange
    num_draws: int
    snr_first: float
    snr_last: float


@dataclass(frozen=True)
class SplitResult:
    """A base and the ranges of its timesteps. `facts`: what `deme split --json` tells of them."""

    base: Path
    config: Path
    record: BaseRecord
    parts: list[Part]
    facts: dict[str, Any]
    experts: list[Path]  # of a model that has them already

    @property
    def run(self) -> RunFile:
        """The settings that were written, for the functions that come next."""
        return read_run_file(self.config)


def split(
    model: str | None = None, settings: SplitConfig | None = None, *, data: str | None = None,
    gradients: Path | None = None, pipeline: str | None = None, variant: str | None = None,
    as_base: str | None = None, save_dtype: str | None = None, output: Path = Path("."),
    force: bool = False, dry_run: bool = False,
) -> SplitResult:  # fmt: skip
    """Import a pretrained model and divide its timesteps [0, T) into ranges, one expert each.

    model: digits (also if None), a diffusers folder, a hub id, a single file of the model's authors
    (ComfyUI's, A1111's), or a base or merged artifact.
    data: where its training images are; None for a guess from the model's name.   gradients: for
    by = gradient, what `deme analyze gradients` wrote.   variant: of a folder's weights, as fp16.
    as_base: of a pipeline of two denoisers, which becomes the base, low (also if None), high, or
    the mean; both are written as its experts, of their own ranges.   save_dtype: of the weights;
    None for the model's own.   output: the folder of base.safetensors and deme.toml; a base that
    lies there already is kept as it is. With `dry_run` all is checked and nothing is written.

    Raises MissingError, ArtifactError or ConfigError; then neither file appears.
    """
    settings, model = settings or SplitConfig(), model or _default_model(data, pipeline)
    base, config = output / ModelConfig.base, output / CONFIG_NAME
    with writing(base):  # whether the base that is to be written is the one that is read
        path = Path(model).expanduser()
        is_in_place = base.is_file() and path.is_file() and base.samefile(path)
    is_in_place = is_in_place and read_record(base).kind == "base" and save_dtype is None
    is_single = is_single_file(model)
    place = path if is_single else locate_model(model, variant, takes_two=True)
    settings = _with_own_ranges(settings, own := own_ranges(place), model, as_base)
    experts = [output / f"ft_{index}of{len(own)}.safetensors" for index in range(1, len(own) + 1)]
    for file in (config, *experts) if is_in_place else (base, config, *experts):
        require_output(file, force=force)
    if not is_single and (num_timesteps := peek_timesteps(place, pipeline)):
        split_uniform(settings.n, num_timesteps)
    measured = gradients or output / AFFINITY_NAME
    command = _require_gradients(settings, gradients, measured, model, data)

    from deme_cli.diffusion.backbones import backbone_of
    from deme_cli.diffusion.companions import open_companions
    from deme_cli.diffusion.schedule import read_schedule
    from deme_cli.diffusion.single_file import place_frozen_parts

    imported, halves = _read(model, own, as_base, pipeline, variant, save_dtype)
    record = imported.record
    backbone, schedule = backbone_of(record.model_config), read_schedule(record.scheduler_config)
    ranges = _divide(settings, schedule, record, measured, command)
    images = _choose_data(data, record.source)
    usual = {**backbone.settings}
    if images == "digits" and not record.companions:
        usual |= DIGITS_SETTINGS
    if imported.parts_like and not dry_run:
        record, pipeline = place_frozen_parts(imported, output.resolve() / PARTS_NAME), None
    text = _run_file_text(record, usual, settings, ranges, images, output, pipeline)
    image_shape = sample_shape = backbone.sample_shape(record.model_config)
    if record.companions:
        image_shape = open_companions(record, pipeline=pipeline).image_shape(sample_shape)
    facts = {
        "source": record.origin, "data": images, "fingerprint": record.fingerprint,
        "parameters": sum(tensor.numel() for tensor in imported.weights.values()),
        "num_train_timesteps": record.num_train_timesteps,
        "prediction_type": schedule.prediction_type, "wants": backbone.wants,
        "image_shape": list(image_shape), "sample_shape": list(sample_shape),
        "companions": record.companions, "ranges": [str(span) for span in ranges],
        "notes": list(imported.notes),
    }  # fmt: skip
    if not dry_run:
        if not is_in_place:
            record = write_artifact(base, imported.weights, record)
        for path, (weights, expert) in zip(experts, halves, strict=True):
            write_artifact(path, weights, expert)
        write_whole(config, [text.encode()])
    decibels = (10 * schedule.snr.log10()).tolist()
    parts = [
        Part(span, len(drawn), decibels[drawn.start], decibels[drawn.stop - 1])
        for span, drawn in zip(ranges, map(schedule.indices, ranges), strict=True)
    ]
    return SplitResult(base, config, record, parts, facts, experts)


def _read(
    model: str, own: Sequence[TimestepRange], as_base: str | None, pipeline: str | None,
    variant: str | None, save_dtype: str | None,
) -> tuple[ImportedModel, list[tuple[dict[str, Tensor], ExpertRecord]]]:  # fmt: skip
    """The base, and the experts that come with it where the model's denoisers have ranges."""
    if own:
        from deme_cli.diffusion.foreign import read_pair

        return read_pair(model, as_base or AS_BASE[0], pipeline, variant, save_dtype)
    if is_single_file(model):
        from deme_cli.diffusion.single_file import import_single_file

        return import_single_file(model, pipeline, save_dtype), []
    from deme_cli.diffusion.checkpoints import import_model

    return import_model(model, pipeline, variant, save_dtype), []


def _default_model(data: str | None, pipeline: str | None) -> str:
    """The embedded digits; raises ConfigError where other images show that MODEL was forgotten."""
    if data not in (None, "digits") or pipeline:
        option = f"--pipeline {pipeline}" if pipeline else f"--data {data}"
        raise ConfigError(
            f"{option} without MODEL: name the model to start from, as in `deme split MODEL "
            f"{option}` (digits for the embedded one, of grey 8 x 8 images)"
        )
    return "digits"


def _require_gradients(
    settings: SplitConfig, given: Path | None, measured: Path, model: str, data: str | None
) -> str:
    """Check that --by gradient has what it goes by; gives the command that measures it."""
    words = ["deme", "analyze", "gradients", model, "--data", data or _guess_data(model) or "DATA"]
    words += [] if measured == Path(AFFINITY_NAME) else ["-o", str(measured)]
    if settings.by == "gradient":
        from deme_cli.training.clusters import read_affinity

        read_affinity(measured, None, command=shlex.join(words))
    elif given is not None:
        raise ConfigError(f"--gradients {given} is read by --by gradient alone")
    return shlex.join(words)


def _with_own_ranges(
    settings: SplitConfig, own: list[TimestepRange], model: str, as_base: str | None
) -> SplitConfig:
    """The settings with the ranges that a model's denoisers have already, if any."""
    if as_base not in (None, *AS_BASE):
        raise ConfigError(f"--as-base {as_base}: expected {', '.join(AS_BASE)}")
    if not own:
        if as_base:
            raise ConfigError(f"--as-base is for pipelines of two denoisers, {model} has one")
        return settings
    told = ", ".join(map(str, own))
    if settings.n not in (SplitConfig.n, len(own)) or settings.by != SplitConfig.by:
        raise ConfigError(
            f"{model}: its denoisers divide the timesteps, {told}; leave out -n, --by"
        )
    return replace(settings, n=len(own), ranges=list(map(str, own)))


def _divide(
    settings: SplitConfig, schedule: Schedule, record: BaseRecord, measured: Path, command: str
) -> list[TimestepRange]:
    """The ranges of [0, T): those of the settings, else by --by, as by the gradients `measured`."""
    ranges, total = settings.timestep_ranges, schedule.num_train_timesteps
    if not ranges:
        from deme_cli.training.clusters import read_affinity, split_times

        affinity = None
        if settings.by == "gradient":
            affinity = read_affinity(measured, record.fingerprint, command=command)
        return split_times(settings.n, settings.by, schedule, affinity)
    if settings.n != len(ranges):
        raise ConfigError(f"n = {settings.n}, but ranges has {len(ranges)}: set both alike")
    try:
        require_cover(ranges, total)
    except ArtifactError as error:
        told = ", ".join(map(str, ranges))
        raise ConfigError(f"ranges {told}: expected each of the {total} timesteps once") from error
    return ranges


def _guess_data(name: str) -> str:
    """Training data by a word in a model's name; nothing where none is known."""
    words = name.lower()
    return next((known for word, known in _DATA_BY_NAME.items() if word in words), "")


def _choose_data(data: str | None, model: str) -> str:
    """The data as given, else the guess from the model's name; warns where nothing can be found."""
    chosen = _guess_data(model) if data is None else data
    if not chosen:
        console.warn("no --data given: set source under [data] before `deme finetune`")
        return chosen
    try:
        find_image_source(chosen)
    except DemeError as error:
        console.warn(f"the training images are not there yet: {error}")
    return chosen


def _run_file_text(
    record: BaseRecord, usual: dict[str, Any], settings: SplitConfig, ranges: list[TimestepRange],
    images: str, output: Path, pipeline: str | None,
) -> str:  # fmt: skip
    """deme.toml for this run. Local image paths become absolute where the file lies elsewhere."""
    from deme_cli.sampling.scheduler import name_sampler

    if output.resolve() != Path.cwd():
        images, pipeline = _absolute(images), pipeline and _absolute(pipeline)
    live: dict[str, dict[str, Any]] = {
        "model": {"source": record.origin, "base": ModelConfig.base},
        "data": {"source": images},
        "split": {"n": settings.n, "by": settings.by, "ranges": [str(span) for span in ranges]},
        "sample": {},
        **{name: dict(own) for name, own in usual.items()},
    }
    if pipeline:
        live["model"]["pipeline"] = pipeline
    sample = SampleConfig(**live["sample"])
    live["sample"]["sampler"] = name_sampler(record, sample).sampler
    is_digits = images == "digits" and not record.companions
    return render_run_file(live, remarks={"finetune": DIGITS_REMARK} if is_digits else {})


def _absolute(path: str) -> str:
    """A path that is there as an absolute one; a known name or anything else as it is."""
    here = Path(path).expanduser()
    is_path = path and path not in ("digits", *KNOWN_DATASETS) and here.exists()
    return str(here.resolve()) if is_path else path
