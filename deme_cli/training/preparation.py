"""From a checked plan to a run: the images and what belongs to them, then the weights."""

from __future__ import annotations

from dataclasses import replace

from deme_cli.artifacts import DenoiserRecord, read_record
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, choose_device, load_denoiser
from deme_cli.timesteps import RangeChoice, TimestepRange
from deme_cli.training.affinity import read_affinity
from deme_cli.training.clusters import cluster_draws
from deme_cli.training.examples import Examples
from deme_cli.training.materials import name_companions, open_examples
from deme_cli.training.places import affinity_path, checkpoint_path
from deme_cli.training.plan import Job, Plan
from deme_cli.training.run import Run
from deme_cli.training.scratch import random_denoiser


def prepare(plan: Plan) -> Run:
    """Open the images and load the base (or draw its random weights).

    The caches behind the examples may still have to be filled. With `force`, a kept run of this
    output is dropped here, and not before.
    """
    job = plan.job
    device = "cpu" if job.shard else str(choose_device(job.device))  # to be divided from there
    if plan.choice is None:
        denoiser = random_denoiser(
            plan.description, job.settings.seed, device=device, pipeline=job.pipeline
        )
        choice = RangeChoice(TimestepRange(0, denoiser.schedule.num_train_timesteps), 1, 1)
        examples, held_out = _open(plan, denoiser.record)
    else:
        record, choice = _base_record(job), plan.choice
        examples, held_out = _open(plan, record)
        denoiser = replace(load_denoiser(job.base, device=device), record=record)
    flip = job.images.horizontal_flip
    if job.force:
        checkpoint_path(plan.output).unlink(missing_ok=True)
    return Run(
        clusters=_clusters(job, denoiser, choice.range),
        denoiser=denoiser,
        choice=choice,
        examples=examples,
        held_out=held_out,
        flip=examples.can_flip if flip is None else flip,
        config=job.settings,
        output=plan.output,
        dtype=job.dtype,
        from_scratch=plan.choice is None,
        compile=job.compile,
        shard=job.shard,
    )


def _clusters(job: Job, denoiser: Denoiser, span: TimestepRange) -> list[TimestepRange]:
    """The draws of `span` in clusters, where the losses of clusters are balanced."""
    settings, schedule, affinity = job.settings, denoiser.schedule, None
    if settings.multitask == "none":
        return []
    if settings.cluster_by == "gradient":
        affinity = read_affinity(affinity_path(job.base), denoiser.record.fingerprint)
    return cluster_draws(
        schedule.indices(span), settings.clusters, settings.cluster_by, schedule, affinity
    )


def open_plan_examples(plan: Plan) -> tuple[Examples, Examples | None]:
    """The training and the held-out examples of an expert to come, without its base's weights."""
    return _open(plan, _base_record(plan.job))


def _base_record(job: Job) -> DenoiserRecord:
    """The base's record, its frozen parts named."""
    return name_companions(read_record(job.base, "base"), job.pipeline)


def _open(plan: Plan, record: DenoiserRecord) -> tuple[Examples, Examples | None]:
    """The training and the held-out examples of a plan, for a denoiser with `record`."""
    job, settings = plan.job, plan.job.settings
    beside = (plan.output if plan.choice is None else job.base).parent
    companions = open_companions(record, pipeline=job.pipeline, device=job.device, dtype=job.dtype)
    train = open_examples(
        job.images, companions, split="train", flips=job.images.horizontal_flip,
        cache=settings.cache, beside=beside,
    )  # fmt: skip
    if not settings.held_out:
        return train, None
    return train, open_examples(
        job.images, companions, split="held-out", cache=settings.cache, beside=beside,
        num_needed=settings.held_out,
    )  # fmt: skip
