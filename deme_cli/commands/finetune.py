"""`deme finetune`: train one expert, all of them, the plain control, or a base from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, OptionsOf, command, flag
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.distributed import joined

LISTED = (  # of the settings; the others are options as well, and have their sentence in deme.toml
    "p", "steps", "batch_size", "accumulation", "lr", "lr_schedule", "consistency",
    "projection", "lora", "loss_weighting", "log_with",
    "gradient_checkpointing", "seed", "source", "resolution",
)  # fmt: skip


@command("pipeline config device dtype save_dtype compile force dry_run", meets=True)
def finetune(
    range: Annotated[
        str, flag("--range", "i/N, start:stop, 1/1 (the plain control), or all.")
    ] = "",
    *,
    given: Annotated[Given, OptionsOf(FinetuneConfig, listed=LISTED)],
    of_images: Annotated[Given, OptionsOf(DataConfig, listed=LISTED)],
    common: Given,
    base: Annotated[Path | None, flag("--base", "The base [default: that of deme.toml].")] = None,
    from_scratch: Annotated[Path | None, flag(
        "--from-scratch", "Train a base of your own: TOML or JSON with [model] and [scheduler]."
    )] = None,
    jobs: Annotated[int, flag("--jobs", "Processes for --range all.", min=1)] = 1,
    resume: Annotated[
        bool, flag("--resume", "Insist on continuing: fail where no run is kept.")
    ] = False,
    shard: Annotated[bool, flag(
        "--shard", "Divide the network among the processes of a launch: the same result.",
        "Memory", hidden=True,
    )] = False,
    output: Annotated[
        Path | None, flag("--output -o", "Artifact to write [default: ft_{i}of{N}.safetensors].")
    ] = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Train the expert of one timestep range (Eq. 3-6); run the same command again to continue.

    Processes of one launch (torchrun, accelerate launch, srun) share each batch. Every other
    key of deme.toml's tables finetune and data is an option, too, as --caption-dropout 0.2.

    Example: deme finetune --range 2/4 --p 0.1
    """
    run = common["run"]
    with console.showing() as progress:
        paths = deme_cli.finetune(
            range, run.settings(FinetuneConfig, **given), from_scratch=from_scratch,
            images=run.settings(DataConfig, **of_images), base=base, output=output, jobs=jobs,
            shard=shard, resume=resume, world=joined(), **common, progress=progress,
        )  # fmt: skip
    if not common["dry_run"]:
        console.result_paths(paths, as_json=as_json)
