"""`finetune`: experts of timestep ranges (Eq. 3-6), or a base from scratch.

A run leaves one artifact, and those that `ema_lengths` and `snapshot_every` add. Beside it, hidden,
lies the checkpoint from which the same call continues; `metrics.jsonl` beside it keeps the curve.
Several processes train one expert together (sharding.py). How one run goes is told in train.py.
What heads, names and settings tell is checked before torch is imported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from deme_cli import console
from deme_cli.config import CONFIG_NAME, DataConfig, FinetuneConfig, ModelConfig, SplitConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ConfigError, MissingError
from deme_cli.jobs import RangeProcess, run_jobs
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


def finetune(
    range: str = "", settings: FinetuneConfig | None = None, *, from_scratch: Path | None = None,
    images: DataConfig | None = None, base: Path | None = None, output: Path | None = None,
    run: RunFile | None = None, jobs: int = 1, pipeline: str | None = None, device: str = "auto",
    dtype: str = "fp32", compile: str = "auto", shard: bool = False, save_dtype: str | None = None,
    force: bool = False, resume: bool = False, dry_run: bool = False, world: World = ALONE,
    progress: Progress = silent,
) -> list[Path]:  # fmt: skip
    """Train the expert of a range; a stopped run goes on when the same is asked again.

    range: `i/N`, `start:stop`, `1/1` (the plain control), or `all` of the run's ranges, of which
    `jobs` are trained at a time, each in a process of its own.   from_scratch: in place of a range,
    a TOML or JSON file with the diffusers configs [model] and [scheduler]: a base is trained from
    random weights, over all timesteps.   settings, images, base: those of `run` if None.   output:
    None for ft_{i}of{N}.safetensors.   shard: divide the network among the processes of `world`.
    save_dtype: of what is written; None for float32, in which is trained.   resume: fail where no
    run is kept.   dry_run: check, and say what would run.

    Returns every file that was written or was done before: experts, averages, snapshots. Raises
    ConfigError, MissingError or ArtifactError before anything is loaded; MissingError (memory,
    disk), NumericsError and Stopped from training, with the last checkpoint kept.
    """
    run = run or RunFile()
    for is_refused, why in (
        (bool(range) == bool(from_scratch),
         "finetune takes either --range (as in 2/4, or all) or --from-scratch FILE"),
        (resume and force, "--resume continues a kept run, --force starts anew; give one of them"),
        (jobs > 1 and not world.is_alone,
         f"--jobs {jobs} starts processes of its own; the {world.size} of this launch train one "
         f"range after another: leave it out"),
    ):  # fmt: skip
        if is_refused:
            raise ConfigError(why)
    plan = Plan(
        base or run.base, images or run.settings(DataConfig),
        settings or run.settings(FinetuneConfig), device=world.device or device, dtype=dtype,
        compile=compile, shard=shard, save_dtype=save_dtype, pipeline=run.pipeline(pipeline),
        force=force,
    )  # fmt: skip
    require_processes(plan, world.size)
    split = run.settings(SplitConfig)
    if from_scratch:
        plans = [plan_base(plan, from_scratch, output or Path(ModelConfig.base))]
    else:
        plans = plan_experts(plan, split, range, output)
    waiting = [plan for plan in plans if not plan.is_done]
    for plan in waiting:
        if resume and not checkpoint_path(plan.output).exists():
            raise MissingError(f"{plan.output}: no unfinished run is kept here; leave out --resume")
    if dry_run:
        image_shape: tuple[int, ...] = ()
        if waiting and waiting[0].has_companions:  # whether images and captions can be opened
            image_shape = open_plan_examples(waiting[0])[1].image_shape
        for plan in plans:
            progress(Step(note=plan.describe(image_shape)))
        return []
    if jobs > 1 and len(waiting) > 1:
        _train_side_by_side(waiting, split, jobs, progress)
    else:
        _train_in_turn(waiting, world, progress)
    return [path for plan in plans for path in plan.outputs]


def _train_in_turn(plans: Sequence[Plan], world: World, progress: Progress) -> None:
    """Train each run, in this process or with the others of its launch."""
    for plan in plans:
        progress(Step(label="loading the libraries and the network"))
        from deme_cli.training.examples import fill_caches
        from deme_cli.training.train import train

        run, steps = prepare(plan), plan.config.steps
        progress(Step(note=plan.describe(run.examples.image_shape)))
        fill_caches(run.examples, run.held_out, world=world, progress=progress)
        label = f"expert {plan.range_text}" if plan.choice else "base"
        progress(Step(0, steps, label, "update"))
        for record in train(run, world):
            if record.halved_to:
                console.warn(
                    f"out of memory: {record.halved_to} images at a time from here on, as with "
                    f"--micro-batch {record.halved_to} (the same batches, more slowly)"
                )
            progress(Step(record.step, steps, label, "update", detail=f"loss {record.loss:.4g}"))


def _train_side_by_side(
    plans: Sequence[Plan], split: SplitConfig, num_processes: int, progress: Progress
) -> None:
    """Train each run in a process of its own: `deme finetune`, settings in a file of theirs."""
    plan, steps = plans[0], plans[0].config.steps
    if plan.has_companions:  # once for all of them, rather than each a part unseen
        from deme_cli.training.examples import fill_caches

        _, *examples = open_plan_examples(plan)
        fill_caches(*examples, progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        live = {
            name: {key: value for key, value in asdict(table).items() if value is not None}
            for name, table in (("split", split), ("data", plan.images), ("finetune", plan.config))
        }
        config = Path(folder, CONFIG_NAME)
        config.write_text(render_run_file(live), encoding="utf-8")
        words = ["--base", str(plan.base), "--config", str(config), "--device", plan.device]
        words += ["--dtype", plan.dtype, "--compile", plan.compile]
        words += ["--pipeline", plan.pipeline] if plan.pipeline else []
        words += ["--save-dtype", plan.save_dtype] if plan.save_dtype else []
        words += ["--force"] if plan.force else []
        children = [
            RangeProcess(
                one.range_text, ["finetune", "--range", one.range_text, *words],
                [metrics_path(one.output)],
            )
            for one in plans
        ]  # fmt: skip
        for done in run_jobs(children, at_once=num_processes):
            running = "  ".join(f"{k}: {n}" for k, n in done.items() if n < steps)
            total, label = steps * len(plans), f"{len(plans)} experts"
            progress(Step(sum(done.values()), total, label, "update", detail=running))
