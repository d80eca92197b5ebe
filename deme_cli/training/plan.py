"""From a command line to training runs: which ranges, which outputs, what is already done.

Everything here is checked from headers and file names, before torch is imported; preparation.py
loads the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from deme_cli.artifacts import BaseRecord, DenoiserRecord, read_record
from deme_cli.config import NOT_RESULT, DataConfig, FinetuneConfig, SplitConfig
from deme_cli.errors import ConfigError, MissingError, reading
from deme_cli.files import require_output, require_space
from deme_cli.run_file import RunFile
from deme_cli.timesteps import RangeChoice, parse_range
from deme_cli.training.affinity import read_affinity
from deme_cli.training.places import affinity_path, checkpoint_path, variant_paths

_SWITCHES = {  # options of a setting that is true or false
    "antithetic": ("--antithetic", "--independent"),
    "normalise_weighting": ("--normalise-weighting", "--raw-weighting"),
    "gradient_checkpointing": ("--gradient-checkpointing", "--keep-activations"),
}
_FILES_BESIDE = 5  # of the base's size: a checkpoint (weights, average, two moments), the expert


@dataclass(frozen=True)
class Job:
    """What every range of one command line shares."""

    base: Path
    images: DataConfig
    settings: FinetuneConfig
    device: str = "auto"
    dtype: str = "fp32"
    force: bool = False
    split: SplitConfig = SplitConfig()
    pipeline: str | None = None
    compile: str = "auto"
    shard: bool = False

    def arguments(self, range_text: str, config: Path) -> list[str]:
        """The `deme` command line that trains one range with exactly these settings.

        config: a deme.toml of these ranges, for a setting that is unset here has no option.
        """
        words = ["finetune", "--range", range_text, "--base", str(self.base)]
        words += ["--data", self.images.source, "--device", self.device, "--dtype", self.dtype]
        words += ["--compile", self.compile]
        for item in fields(FinetuneConfig):
            value = getattr(self.settings, item.name)
            if item.name in _SWITCHES:
                words.append(_SWITCHES[item.name][not value])
            elif value is not None:
                shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                words += [f"--{item.name.replace('_', '-')}", shown]
        if self.images.horizontal_flip is not None:
            words.append("--flip" if self.images.horizontal_flip else "--no-flip")
        given = {
            "--captions": self.images.captions,
            "--crop": self.images.crop,
            "--resolution": self.images.resolution,
            "--pipeline": self.pipeline,
            "--config": config,
        }
        for name, value in given.items():
            words += [name, str(value)] if value is not None else []
        return words + (["--force"] if self.force else [])


@dataclass(frozen=True)
class Plan:
    """One run to come: its range and its output.

    A base from scratch has no range, but a `description` of its network and schedule.
    """

    job: Job
    range_text: str
    choice: RangeChoice | None
    output: Path
    description: Mapping[str, Any] = field(default_factory=dict)
    is_done: bool = False
    has_companions: bool = False

    @property
    def outputs(self) -> list[Path]:
        """Every file the run writes, its main one first; of a finished run those still there."""
        more = variant_paths(self.output, self.job.settings)
        return [self.output, *(path for path in more if not self.is_done or path.exists())]

    def describe(self) -> str:
        """One line that says what would run."""
        settings = self.job.settings
        span = f"timesteps {self.choice.range}" if self.choice else "all timesteps, from scratch"
        images = settings.steps * settings.batch_size * settings.accumulation
        num_more = len(variant_paths(self.output, settings))
        more = f", {num_more} more files" if num_more else ""
        state = "; done" if self.is_done else ""
        return f"{self.output}: {span}, {settings.steps} updates, {images} images{more}{state}"


def plan_experts(job: Job, run: RunFile, range_text: str, output: Path | None) -> list[Plan]:
    """A plan for each range that `range_text` names (i/N, start:stop, or all of [split]).

    With `all`, experts that exist with these settings are marked done. Raises ConfigError,
    MissingError or ArtifactError on a range, base or output that cannot be used.
    """
    if not job.base.exists():
        raise MissingError(f"{job.base}: no base there; make one with `deme split`, or use --base")
    record = read_record(job.base, "base")
    split = run.settings(SplitConfig)
    num_ranges = len(split.timestep_ranges) or split.n
    if range_text == "all" and output is not None:
        raise ConfigError("--output names one file, but --range all writes one for each range")
    texts = [range_text]
    if range_text == "all":
        texts = [f"{index}/{num_ranges}" for index in range(1, num_ranges + 1)]
    has = bool(record.companions)
    plans = []
    for text in texts:
        choice = parse_range(text, record.num_train_timesteps, split.timestep_ranges)
        path = output or Path(f"ft_{choice.label}.safetensors")
        done = range_text == "all" and not job.force and path.exists()
        if done:
            _require_same_settings(path, record, job)
        else:
            _require_tasks(job, record, choice)
            _require_free(job, path)
            require_space(path, _files_beside(path, job.settings) * job.base.stat().st_size)
        plans.append(Plan(job, text, choice, path, is_done=done, has_companions=has))
    if not all(plan.is_done for plan in plans):
        require_companions(record, job.pipeline)
    return plans


def plan_base(job: Job, description: Path, output: Path) -> Plan:
    """The plan that trains a base from the [model] and [scheduler] in a TOML or JSON file."""
    document = read_description(description)
    _require_free(job, output)
    from deme_cli.training.scratch import require_known_keys

    require_known_keys(document, description)
    settings = replace(job.settings, p=0.0, consistency=0.0, projection="none")
    if settings.multitask != "none" and settings.cluster_by == "gradient":
        raise ConfigError("cluster_by = 'gradient': a base from scratch has no gradients to go by")
    return Plan(replace(job, settings=settings), "base", None, output, document)


def require_processes(
    settings: FinetuneConfig, world_size: int, *, shard: bool, dtype: str, compile: str
) -> None:
    """Check that `world_size` processes can share an update, and with `shard` the network."""
    if shard:
        _require_dividable(dtype, compile, world_size)
    if world_size == 1:
        return
    if settings.multitask != "none":
        raise ConfigError(
            f"multitask = {settings.multitask!r} needs the gradients of whole batches, and "
            f"{world_size} processes share them; train with one process, or --multitask none"
        )
    if settings.batch_size < world_size:
        raise ConfigError(
            f"batch_size = {settings.batch_size} is for all {world_size} processes together: "
            f"expected one image for each at least"
        )


def _require_dividable(dtype: str, compile: str, world_size: int) -> None:
    if world_size == 1:
        raise ConfigError(
            "--shard divides the network among several processes, and this is one alone: start "
            "one for each GPU (torchrun, accelerate launch, srun), or leave it out"
        )
    if dtype == "fp16":
        raise ConfigError("--shard with --dtype fp16: choose bf16, which needs no loss scale")
    if compile == "on":
        raise ConfigError("--shard with --compile on: what is divided is not compiled; choose one")


def require_companions(record: DenoiserRecord, pipeline: str | None) -> None:
    """Check that a model's frozen parts are there; raises MissingError naming the first."""
    if record.companions:
        from deme_cli.diffusion.model_files import locate_parts

        locate_parts(pipeline or record.source, list(record.companions))


def _require_tasks(job: Job, record: BaseRecord, choice: RangeChoice) -> None:
    """What clusters of timesteps need: draws from the range alone, and gradients to go by."""
    settings = job.settings
    if settings.multitask == "none":
        return
    if settings.p > 0 and len(choice.range) < record.num_train_timesteps:
        raise ConfigError(
            f"multitask = {settings.multitask!r} divides range {choice.range} into clusters, and "
            f"p = {settings.p} draws outside them; use --p 0 or --range 1/1"
        )
    if settings.cluster_by == "gradient":
        read_affinity(affinity_path(job.base), record.fingerprint)


def _require_free(job: Job, output: Path) -> None:
    if not job.images.source:
        raise ConfigError("no training images: set [data] source in deme.toml, or use --data")
    require_output(output, force=job.force)
    is_kept = checkpoint_path(output).exists()  # then its snapshots so far are its own
    for path in variant_paths(output, job.settings):
        if path.parent.exists():  # else nothing is there, and a dry run leaves it so
            require_output(path, force=job.force or is_kept)


def _files_beside(output: Path, settings: FinetuneConfig) -> int:
    """How many times the base's size a run still takes up on disk."""
    more = [path for path in variant_paths(output, settings) if not path.exists()]
    return _FILES_BESIDE + len(settings.ema_lengths or []) + len(more)


def _require_same_settings(output: Path, base: BaseRecord, job: Job) -> None:
    """Check that the finished expert at `output` is what this command line would make again."""
    record = read_record(output, "expert")
    wanted = {n: v for n, v in asdict(job.settings).items() if n not in NOT_RESULT}
    wanted |= {"base": base.fingerprint, "crop": job.images.crop}
    if job.images.source != record.data.get("source"):
        raise ConfigError(
            f"{output} exists, trained on {record.data.get('source')!r} and not "
            f"{job.images.source!r}; add --force to train all ranges anew, or move it away"
        )
    if _fingerprint_of(job.images, base) != record.data.get("fingerprint"):
        raise ConfigError(
            f"{output} exists, trained on other images or captions than those in "
            f"{job.images.source} now (or by an earlier deme, which did not compare every byte); "
            f"add --force to train all ranges anew, or move it away"
        )
    wanted["dtype"] = job.dtype
    if job.images.horizontal_flip is not None:
        wanted["flip"] = job.images.horizontal_flip
    if job.images.resolution:
        wanted["resolution"] = [job.images.resolution] * 2
    unset = asdict(FinetuneConfig())  # records leave out what is unset, old ones what was not there
    found = {**unset, **record.training, "base": record.base}
    for name, value in wanted.items():
        if name in found and found[name] != value:
            raise ConfigError(
                f"{output} exists with another {name}, {found[name]!r} and not {value!r}; "
                f"add --force to train all ranges anew, or move it away"
            )


def _fingerprint_of(images: DataConfig, base: BaseRecord) -> str:
    """That of the training images and of what they show, as an expert of `base` records it."""
    from deme_cli.data.images import open_images
    from deme_cli.diffusion.backbones.known import backbone_of

    return open_images(
        images.source, shape=(3, 8, 8), split="train", wants=backbone_of(base.model_config).wants,
        captions=images.captions, keep=False,
    ).fingerprint  # fmt: skip


def read_description(path: Path) -> dict[str, Any]:
    """{model, scheduler}: two diffusers configs from a TOML or JSON file.

    Raises MissingError if there is no such file, ConfigError if it lacks either table or has more.
    """
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            document = json.loads(text)
        else:
            import tomli

            document = tomli.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: neither valid TOML nor JSON: {error}") from error
    for name in ("model", "scheduler"):
        if not isinstance(document.get(name), dict):
            raise ConfigError(f"{path}: lacks the table [{name}], a diffusers config")
    for name in document:
        if name not in ("model", "scheduler"):
            raise ConfigError(f"{path}: unknown table [{name}]; expected [model] and [scheduler]")
    return document
