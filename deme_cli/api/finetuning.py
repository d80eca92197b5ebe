"""`finetune` and `train_base`: experts of timestep ranges (Eq. 3-6), and a base from scratch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.api.caching import fill_with_bar
from deme_cli.config import CONFIG_NAME, DataConfig, FinetuneConfig, ModelConfig, SplitConfig
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ConfigError, MissingError
from deme_cli.run_file import RunFile, render_run_file

if TYPE_CHECKING:
    from deme_cli.training.plan import Job, Plan


def finetune(
    range: str,
    settings: FinetuneConfig | None = None,
    *,
    images: DataConfig | None = None,
    base: Path | None = None,
    output: Path | None = None,
    run: RunFile | None = None,
    jobs: int = 1,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    compile: str = "auto",
    shard: bool = False,
    force: bool = False,
    world: World = ALONE,
) -> list[Path]:
    """Train the expert of a range; a stopped run goes on when the same is asked again.

    range: `i/N`, `start:stop`, `1/1` (the plain control), or `all` of the run's ranges, of which
    `jobs` are trained at a time, each in a process of its own.   settings, images, base: those of
    `run` if None.   output: None for ft_{i}of{N}.safetensors.   shard: divide the network among the
    processes of `world`.

    Returns every file that was written or was done before: experts, averages, snapshots. Raises
    ConfigError, MissingError or ArtifactError before anything is loaded; MissingError (memory,
    disk), NumericsError and Stopped from training, with the last checkpoint kept.
    """
    run = run or RunFile()
    job = open_job(
        settings or run.settings(FinetuneConfig), images or run.settings(DataConfig),
        base or run.base, run, pipeline, device=device, dtype=dtype, compile=compile, shard=shard,
        force=force, jobs=jobs, world=world,
    )  # fmt: skip
    return train_all(plan_ranges(job, run, range, output), jobs=jobs, world=world)


def train_base(
    description: Path,
    settings: FinetuneConfig | None = None,
    *,
    images: DataConfig | None = None,
    output: Path = Path(ModelConfig.base),
    run: RunFile | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    compile: str = "auto",
    shard: bool = False,
    force: bool = False,
    world: World = ALONE,
) -> list[Path]:
    """Train a base from random weights, over all timesteps; the rest is as for `finetune`.

    description: a TOML or JSON file with the diffusers configs [model] and [scheduler].
    """
    run = run or RunFile()
    job = open_job(
        settings or run.settings(FinetuneConfig), images or run.settings(DataConfig), run.base, run,
        None, device=device, dtype=dtype, compile=compile, shard=shard, force=force, world=world,
    )  # fmt: skip
    return train_all(plan_from_scratch(job, description, output), world=world)


def open_job(
    settings: FinetuneConfig,
    images: DataConfig,
    base: Path,
    run: RunFile,
    pipeline: str | None,
    *,
    device: str,
    dtype: str,
    compile: str,
    shard: bool,
    force: bool,
    jobs: int = 1,
    world: World,
) -> Job:
    """What all ranges of one call share, checked to suit the processes of `world`."""
    if jobs > 1 and not world.is_alone:
        raise ConfigError(
            f"--jobs {jobs} starts processes of its own; the {world.size} of this launch train one "
            f"range after another: leave it out"
        )
    from deme_cli.training.plan import Job, require_processes

    require_processes(settings, world.size, shard=shard, dtype=dtype, compile=compile)
    return Job(
        base=base, images=images, settings=settings, device=world.device or device, dtype=dtype,
        compile=compile, shard=shard, force=force, split=run.settings(SplitConfig),
        pipeline=run.pipeline(pipeline),
    )  # fmt: skip


def plan_ranges(job: Job, run: RunFile, range: str, output: Path | None) -> list[Plan]:
    """A plan for each range that is named; of `all`, those that exist are marked done."""
    from deme_cli.training.plan import plan_experts

    return plan_experts(job, run, range, output)


def plan_from_scratch(job: Job, description: Path, output: Path) -> list[Plan]:
    """The plan of a base: random weights, all timesteps, no consistency with another."""
    from deme_cli.training.plan import plan_base

    return [plan_base(job, description, output)]


def require_kept_runs(plans: Sequence[Plan]) -> None:
    """Check that every run that is not done has a checkpoint. Raises MissingError."""
    from deme_cli.training.places import checkpoint_path

    for plan in plans:
        if not plan.is_done and not checkpoint_path(plan.output).exists():
            raise MissingError(f"{plan.output}: no unfinished run is kept here; leave out --resume")


def check_images(plans: Sequence[Plan]) -> None:
    """Check, of a model that reads captions, that images and captions can be opened."""
    waiting = [plan for plan in plans if not plan.is_done]
    if waiting and waiting[0].has_companions:
        from deme_cli.training.preparation import open_plan_examples

        open_plan_examples(waiting[0])


def train_all(plans: Sequence[Plan], *, jobs: int = 1, world: World = ALONE) -> list[Path]:
    """Train what is not done yet, `jobs` at a time; returns the files of all."""
    waiting = [plan for plan in plans if not plan.is_done]
    if len(waiting) > 1 and jobs > 1:
        _train_side_by_side(waiting, jobs)
    else:
        for plan in waiting:
            _train(plan, world)
    return [path for plan in plans for path in plan.outputs]


def _train(plan: Plan, world: World) -> None:
    """Train one run, in this process or with the others of its launch, with a progress bar."""
    with console.waiting("loading the libraries and the network"):
        from deme_cli.training.finetune import train
        from deme_cli.training.preparation import prepare

        run = prepare(plan)
    fill_with_bar(run.examples, run.held_out, world=world)
    label = f"expert {plan.range_text}" if plan.choice else "base"
    with console.progress(label, run.config.steps, "update") as bar:
        for record in train(run, world):
            if record.halved_to:
                console.warn(
                    f"out of memory: {record.halved_to} images at a time from here on, as with "
                    f"--micro-batch {record.halved_to} (the same batches, more slowly)"
                )
            bar.advance(record.step, f"loss {record.loss:.4g}")


def _train_side_by_side(plans: list[Plan], num_processes: int) -> None:
    """Train each run in a process of its own, and show their joint progress."""
    from deme_cli.training.jobs import RangeProcess, run_jobs
    from deme_cli.training.places import metrics_path

    job = plans[0].job
    if plans[0].has_companions:  # once for all of them, rather than each a part unseen
        from deme_cli.training.preparation import open_plan_examples

        fill_with_bar(*open_plan_examples(plans[0]))
    total = job.settings.steps * len(plans)
    with (
        tempfile.TemporaryDirectory() as folder,
        console.progress(f"{len(plans)} experts", total, "update") as bar,
    ):
        config = Path(folder, CONFIG_NAME)
        ranges = {name: value for name, value in asdict(job.split).items() if value is not None}
        config.write_text(render_run_file({"split": ranges}), encoding="utf-8")
        children = [
            RangeProcess(
                plan.range_text, job.arguments(plan.range_text, config), [metrics_path(plan.output)]
            )
            for plan in plans
        ]
        for steps in run_jobs(children, at_once=num_processes):
            running = [f"{k}: {n}" for k, n in steps.items() if n < job.settings.steps]
            bar.advance(sum(steps.values()), "  ".join(running))
