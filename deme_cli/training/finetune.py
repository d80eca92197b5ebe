"""`finetune` and `train_base`: experts of timestep ranges (Eq. 3-6), and a base from scratch.

One training run is told from start to end by `train`. It yields a `TrainStep` now and then and
leaves one artifact, and those that `ema_lengths` and `snapshot_every` add. Beside it, hidden, lies
the checkpoint from which the same call continues; `metrics.jsonl` beside it keeps the curve.
Several processes train one expert together (sharding.py); the first of them writes (results.py).
What heads, names and settings tell is checked before torch is imported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.config import CONFIG_NAME, DataConfig, FinetuneConfig, ModelConfig, SplitConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.distributed import ALONE, JointStopRequests, World
from deme_cli.errors import ConfigError, MissingError, out_of_memory_as
from deme_cli.jobs import RangeProcess, claim, run_jobs
from deme_cli.run_file import RunFile, render_run_file
from deme_cli.training.setup import (
    Plan,
    checkpoint_path,
    metrics_path,
    open_plan_examples,
    plan_base,
    plan_experts,
    prepare,
    require_processes,
)

if TYPE_CHECKING:
    from deme_cli.training.examples import Examples
    from deme_cli.training.results import TrainStep
    from deme_cli.training.setup import Run

_REPORT_EVERY = 10  # updates; reading a loss makes a GPU wait


def finetune(
    range: str, settings: FinetuneConfig | None = None, *, images: DataConfig | None = None,
    base: Path | None = None, output: Path | None = None, run: RunFile | None = None,
    jobs: int = 1, pipeline: str | None = None, device: str = "auto", dtype: str = "fp32",
    compile: str = "auto", shard: bool = False, force: bool = False, resume: bool = False,
    dry_run: bool = False, world: World = ALONE, progress: Progress = silent,
) -> list[Path]:  # fmt: skip
    """Train the expert of a range; a stopped run goes on when the same is asked again.

    range: `i/N`, `start:stop`, `1/1` (the plain control), or `all` of the run's ranges, of which
    `jobs` are trained at a time, each in a process of its own.   settings, images, base: those of
    `run` if None.   output: None for ft_{i}of{N}.safetensors.   shard: divide the network among the
    processes of `world`.   resume: fail where no run is kept.   dry_run: check, and say what would
    run.

    Returns every file that was written or was done before: experts, averages, snapshots. Raises
    ConfigError, MissingError or ArtifactError before anything is loaded; MissingError (memory,
    disk), NumericsError and Stopped from training, with the last checkpoint kept.
    """
    run = run or RunFile()
    if jobs > 1 and not world.is_alone:
        raise ConfigError(
            f"--jobs {jobs} starts processes of its own; the {world.size} of this launch train one "
            f"range after another: leave it out"
        )
    plan = Plan(
        base or run.base, images or run.settings(DataConfig),
        settings or run.settings(FinetuneConfig), device=world.device or device, dtype=dtype,
        compile=compile, shard=shard, pipeline=run.pipeline(pipeline), force=force,
    )  # fmt: skip
    require_processes(plan, world.size)
    split = run.settings(SplitConfig)
    plans = plan_experts(plan, split, range, output)
    return _carry_out(
        plans, split, jobs=jobs, resume=resume, dry_run=dry_run, world=world, progress=progress
    )


def train_base(
    description: Path, settings: FinetuneConfig | None = None, *,
    images: DataConfig | None = None, output: Path | None = None, run: RunFile | None = None,
    pipeline: str | None = None, device: str = "auto", dtype: str = "fp32", compile: str = "auto",
    shard: bool = False, force: bool = False, resume: bool = False, dry_run: bool = False,
    world: World = ALONE, progress: Progress = silent,
) -> list[Path]:  # fmt: skip
    """Train a base from random weights, over all timesteps; the rest is as for `finetune`.

    description: a TOML or JSON file with the diffusers configs [model] and [scheduler].
    """
    run = run or RunFile()
    plan = Plan(
        run.base, images or run.settings(DataConfig), settings or run.settings(FinetuneConfig),
        device=world.device or device, dtype=dtype, compile=compile, shard=shard,
        pipeline=run.pipeline(pipeline), force=force,
    )  # fmt: skip
    require_processes(plan, world.size)
    plans = [plan_base(plan, description, output or Path(ModelConfig.base))]
    split = run.settings(SplitConfig)
    return _carry_out(plans, split, resume=resume, dry_run=dry_run, world=world, progress=progress)


def _carry_out(
    plans: Sequence[Plan], split: SplitConfig, *, jobs: int = 1, resume: bool, dry_run: bool,
    world: World, progress: Progress,
) -> list[Path]:  # fmt: skip
    """Train what is not done yet, `jobs` at a time; returns the files of all."""
    waiting = [plan for plan in plans if not plan.is_done]
    for plan in waiting if resume else ():
        if not checkpoint_path(plan.output).exists():
            raise MissingError(f"{plan.output}: no unfinished run is kept here; leave out --resume")
    if dry_run:
        if waiting and waiting[0].has_companions:  # whether images and captions can be opened
            open_plan_examples(waiting[0])
        for plan in plans:
            progress(Step(note=plan.describe()))
        return []
    if len(waiting) > 1 and jobs > 1:
        _train_side_by_side(waiting, split, jobs, progress)
    else:
        for plan in waiting:
            _train_here(plan, world, progress)
    return [path for plan in plans for path in plan.outputs]


def _train_here(plan: Plan, world: World, progress: Progress) -> None:
    """Train one run, in this process or with the others of its launch."""
    progress(Step(label="loading the libraries and the network"))
    run = prepare(plan)
    _fill_caches(run.examples, run.held_out, world=world, progress=progress)
    label = f"expert {plan.range_text}" if plan.choice else "base"
    progress(Step(0, run.config.steps, label, "update"))
    for record in train(run, world):
        if record.halved_to:
            console.warn(
                f"out of memory: {record.halved_to} images at a time from here on, as with "
                f"--micro-batch {record.halved_to} (the same batches, more slowly)"
            )
        detail = f"loss {record.loss:.4g}"
        progress(Step(record.step, run.config.steps, label, "update", detail=detail))


def _train_side_by_side(
    plans: Sequence[Plan], split: SplitConfig, num_processes: int, progress: Progress
) -> None:
    """Train each run in a process of its own: `deme finetune`, settings in a file of theirs."""
    plan, (label, steps) = plans[0], (f"{len(plans)} experts", plans[0].config.steps)
    if plan.has_companions:  # once for all of them, rather than each a part unseen
        _fill_caches(*open_plan_examples(plan), world=ALONE, progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        tables = {"split": split, "data": plan.images, "finetune": plan.config}
        live = {
            name: {key: value for key, value in asdict(table).items() if value is not None}
            for name, table in tables.items()
        }
        config = Path(folder, CONFIG_NAME)
        config.write_text(render_run_file(live), encoding="utf-8")
        words = ["--base", plan.base, "--config", config, "--device", plan.device]
        words += ["--dtype", plan.dtype, "--compile", plan.compile]
        words += ["--pipeline", plan.pipeline] if plan.pipeline else []
        words += ["--force"] if plan.force else []
        children = [
            RangeProcess(
                one.range_text, ["finetune", "--range", one.range_text, *map(str, words)],
                [metrics_path(one.output)],
            )
            for one in plans
        ]  # fmt: skip
        for done in run_jobs(children, at_once=num_processes):
            running = "  ".join(f"{k}: {n}" for k, n in done.items() if n < steps)
            total = steps * len(plans)
            progress(Step(sum(done.values()), total, label, "update", detail=running))


def _fill_caches(*examples: Examples | None, world: World, progress: Progress) -> None:
    """Make what the caches of latents behind these examples lack, if they have any."""
    from deme_cli.training.examples import cache_size, fill_caches

    total = cache_size(*examples)
    for done in fill_caches(*examples, world=world):
        progress(Step(done, total, "caching latents", "image"))


def train(run: Run, world: World = ALONE) -> Iterator[TrainStep]:
    """Train `run` to its end and write its artifact, continuing from a checkpoint if one is kept.

    Raises NumericsError on a loss that is not finite (the last good checkpoint stays), Stopped
    after a signal once the state is saved, ConfigError if the kept run has other settings or
    another process writes the same output, Lost where a process of `world` has ended. Caches that
    are not full yet are filled first.
    """
    from deme_cli.diffusion.threads import using_threads
    from deme_cli.training.batches import open_batches
    from deme_cli.training.gradients import Gradients, fitting_threads, too_many_weights
    from deme_cli.training.results import LossWindow, RunFiles, is_checkpoint, is_snapshot
    from deme_cli.training.sharding import add_up_gradients
    from deme_cli.training.state import compile_networks, open_state

    config = run.config
    _fill_caches(run.examples, run.held_out, world=world, progress=silent)
    with ExitStack() as stack:
        world.require_same({**run.identity, "output": str(run.output), "shard": run.shard})
        if world.is_first:
            stack.enter_context(claim(metrics_path(run.output)))
        requests = stack.enter_context(JointStopRequests(world))
        world.wait()  # the output is ours, and what --force drops is gone
        stack.enter_context(using_threads(fitting_threads(run)))
        with out_of_memory_as(too_many_weights(run)):
            state, base = open_state(run, world)
        world.require_same({"updates done": state.step})
        files = stack.enter_context(RunFiles(run, state.step, world))
        source = stack.enter_context(open_batches(run, world, state.device))
        compile_networks(run, [state.network, base], state.step)
        gradients = Gradients(run, state, base, source, world)
        window = LossWindow(gradients)
        while state.step < config.steps:
            if is_snapshot(state.step, config):  # its state is saved: a resumed run comes here too
                files.write_snapshots(state)
            for losses in gradients.of_update():
                window.add(losses)
            requests.exchange()
            with out_of_memory_as(too_many_weights(run)):
                add_up_gradients([parameter for _, parameter in state.trained()], world)
                state.update()
            at_checkpoint = is_checkpoint(state.step, config)
            if state.step % _REPORT_EVERY == 0 or at_checkpoint or state.step == config.steps:
                record = window.close()
                if at_checkpoint:
                    record = files.keep(state, record, at_once=gradients.at_once)
                files.log(record)
                yield record
            if requests.is_agreed:
                files.save(state)
                raise requests.stopped(
                    f"stopped at update {state.step} of {config.steps}; "
                    f"run the same command again to continue"
                )
        files.write_results(state)
