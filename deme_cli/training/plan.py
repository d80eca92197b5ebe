"""From a command line to training runs: which ranges, which outputs, what is already done.

Everything here is checked from headers, before torch is imported; `prepare` loads the rest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.artifacts import read_record
from deme_cli.config import NOT_RESULT, DataConfig, FinetuneConfig, SplitConfig
from deme_cli.errors import ConfigError, MissingError, NumericsError
from deme_cli.outputs import require_output, require_space
from deme_cli.records import BaseRecord, ExpertRecord
from deme_cli.run_file import RunFile
from deme_cli.timesteps import RangeChoice, TimestepRange, parse_range
from deme_cli.training.places import checkpoint_path

if TYPE_CHECKING:
    from deme_cli.training.finetune import Run

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
    config_path: Path | None = None

    def arguments(self, range_text: str) -> list[str]:
        """The `deme` command line that trains one range with exactly these settings."""
        words = ["finetune", "--range", range_text, "--base", str(self.base), "--quiet"]
        words += ["--data", self.images.source, "--device", self.device, "--dtype", self.dtype]
        for item in fields(FinetuneConfig):
            value = getattr(self.settings, item.name)
            if item.name == "antithetic":
                words.append("--antithetic" if value else "--independent")
            else:
                words += [f"--{item.name.replace('_', '-')}", str(value)]
        if self.images.horizontal_flip is not None:
            words.append("--flip" if self.images.horizontal_flip else "--no-flip")
        if self.config_path:
            words += ["--config", str(self.config_path)]
        return words + (["--force"] if self.force else [])


@dataclass(frozen=True)
class Plan:
    """One run to come: its range (None for a base from scratch) and its output."""

    job: Job
    range_text: str
    choice: RangeChoice | None
    output: Path
    description: dict[str, Any] | None = None
    is_done: bool = False

    def describe(self) -> str:
        """One line that says what would run."""
        settings = self.job.settings
        span = f"timesteps {self.choice.range}" if self.choice else "all timesteps, from scratch"
        images = settings.steps * settings.batch_size * settings.accumulation
        state = "; done" if self.is_done else ""
        return f"{self.output}: {span}, {settings.steps} updates, {images} images{state}"

    def prepare(self) -> Run:
        """Load the base (or draw its random weights) and open the images.

        With `force`, a kept run of this output is dropped here, and not before.
        """
        from deme_cli.data.images import open_images
        from deme_cli.diffusion.denoiser import choose_device, load_denoiser
        from deme_cli.training.finetune import Run
        from deme_cli.training.scratch import random_denoiser

        job, device = self.job, str(choose_device(self.job.device))
        if self.description is not None:
            denoiser = random_denoiser(self.description, job.settings.seed, device=device)
            total = denoiser.schedule.num_train_timesteps
            choice = RangeChoice(TimestepRange(0, total), 1, 1)
        else:
            assert self.choice is not None
            denoiser, choice = load_denoiser(job.base, device=device), self.choice
            if not all(bool(p.isfinite().all()) for p in denoiser.network.parameters()):
                raise NumericsError(
                    f"{job.base}: holds weights that are not finite; import it anew with "
                    f"`deme split`"
                )
        source, shape = job.images.source, denoiser.sample_shape
        data = open_images(source, shape=shape, split="train")
        flip = job.images.horizontal_flip
        if job.force:
            checkpoint_path(self.output).unlink(missing_ok=True)
        return Run(
            denoiser=denoiser,
            choice=choice,
            data=data,
            held_out=open_images(source, shape=shape, split="held-out"),
            flip=data.can_flip if flip is None else flip,
            config=job.settings,
            output=self.output,
            dtype=job.dtype,
            from_scratch=self.choice is None,
        )


def plan_experts(job: Job, run: RunFile, range_text: str, output: Path | None) -> list[Plan]:
    """A plan for each range that `range_text` names (i/N, start:stop, or all of [split]).

    With `all`, experts that exist with these settings are marked done. Raises ConfigError,
    MissingError or ArtifactError on a range, base or output that cannot be used.
    """
    if not job.base.exists():
        raise MissingError(f"{job.base}: no base there; make one with `deme split`, or use --base")
    record = read_record(job.base, "base")
    assert isinstance(record, BaseRecord)
    split = run.settings(SplitConfig)
    num_ranges = len(split.timestep_ranges) or split.n
    if range_text == "all" and output is not None:
        raise ConfigError("--output names one file, but --range all writes one for each range")
    texts = [range_text]
    if range_text == "all":
        texts = [f"{index}/{num_ranges}" for index in range(1, num_ranges + 1)]
    plans = []
    for text in texts:
        choice = parse_range(text, record.num_train_timesteps, split.timestep_ranges)
        path = output or Path(f"ft_{choice.label}.safetensors")
        done = range_text == "all" and not job.force and path.exists()
        if done:
            _require_same_settings(path, record, job)
        else:
            _require_free(job, path)
            require_space(path, _FILES_BESIDE * job.base.stat().st_size)
        plans.append(Plan(job, text, choice, path, is_done=done))
    return plans


def plan_base(job: Job, description: Path, output: Path) -> Plan:
    """The plan that trains a base from the [model] and [scheduler] in a TOML or JSON file."""
    document = read_description(description)
    _require_free(job, output)
    settings = replace(job.settings, p=0.0, consistency=0.0, projection="none")
    return Plan(replace(job, settings=settings), "base", None, output, document)


def _require_free(job: Job, output: Path) -> None:
    if not job.images.source:
        raise ConfigError("no training images: set [data] source in deme.toml, or use --data")
    require_output(output, force=job.force)


def _require_same_settings(output: Path, base: BaseRecord, job: Job) -> None:
    """Check that the finished expert at `output` is what this command line would make again."""
    record = read_record(output, "expert")
    assert isinstance(record, ExpertRecord)
    wanted = {n: v for n, v in asdict(job.settings).items() if n not in NOT_RESULT}
    found = {name: record.training.get(name) for name in wanted}
    for name, value in {"base": base.fingerprint, **wanted}.items():
        if {"base": record.base, **found}[name] != value:
            raise ConfigError(
                f"{output} exists with another {name}, {found.get(name, record.base)!r} and not "
                f"{value!r}; add --force to train all ranges anew, or move it away"
            )


def read_description(path: Path) -> dict[str, Any]:
    """{model, scheduler}: two diffusers configs from a TOML or JSON file.

    Raises MissingError if there is no such file, ConfigError if it lacks either table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MissingError(
            f"{path}: cannot be read; it should hold [model], [scheduler]"
        ) from error
    try:
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
    return document
