"""`deme export`: an artifact as a diffusers pipeline folder, or its difference as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import deme_cli
from deme_cli import console
from deme_cli.artifacts import read_record
from deme_cli.commands.options import Given, argument, command, flag
from deme_cli.errors import ConfigError

if TYPE_CHECKING:
    from deme_cli.merging.low_rank import LoraExport

_SHOWN = 3  # names of tensors that a LoRA cannot hold


@command("base pipeline config save_dtype force")
def export(
    artifacts: Annotated[list[Path], argument(
        "MERGED", "A merged artifact; a base, an expert, or two (WanPipeline)."
    )],
    output: Annotated[Path, argument("DIR|FILE", "The pipeline folder, or the file.")],
    common: Given,
    single_file: Annotated[bool, flag(
        "--single-file", "Write one file with its authors' names, for ComfyUI and others.",
    )] = False,
    lora: Annotated[int | None, flag(
        "--lora", "Write the difference to the base as a LoRA of this rank.", "LoRA",
        metavar="RANK",
    )] = None,
    explained: Annotated[float | None, flag(
        "--explained", "Instead, the least ranks that keep this share of each layer's squared "
        "difference, as 0.95.", "LoRA", metavar="SHARE",
    )] = None,
    lora_format: Annotated[str, flag(
        "--lora-format", "Whose names: diffusers (also PEFT's), or kohya for U-Nets.", "LoRA",
    )] = "diffusers",
    as_json: bool = False,
) -> None:  # fmt: skip
    """Write a diffusers pipeline folder with a model card, and check it against the artifact; or
    what it changed of its base as a LoRA.

    A single file has the names and the other parts of the one that the base came
    from, or of that given with --pipeline.

    Example: deme export merged.safetensors my-ddpm
    """
    merged = artifacts[0]
    run, base, pipeline = (common.pop(name) for name in ("run", "base", "pipeline"))
    if lora is not None or explained is not None:
        if single_file:
            raise ConfigError("--single-file writes a whole model, --lora a difference; choose one")
        if pipeline:
            raise ConfigError("--pipeline names frozen parts, which a LoRA has not; leave it out")
        if len(artifacts) > 1:
            raise ConfigError("a LoRA is the difference of one model; name one, or merge them")
        with console.showing() as progress:
            made = deme_cli.export_lora(
                merged, output, rank=lora, explained=explained, format=lora_format, base=base,
                run=run, progress=progress, **common,
            )  # fmt: skip
        _show(made, merged)
        console.result_paths(
            [output], as_json=as_json, kept=made.kept, ranks=made.ranks, left_out=made.left_out,
            left_out_share=made.left_out_share,
        )  # fmt: skip
        return
    if base or lora_format != "diffusers":
        given = "--base" if base else "--lora-format"
        raise ConfigError(f"{given} is for a LoRA; add --lora RANK or --explained SHARE")
    parts = pipeline if single_file else run.pipeline(pipeline)  # a file, or a folder
    check = deme_cli.export(
        artifacts, output, run=run, pipeline=parts, single_file=single_file, **common
    )
    if not single_file:
        console.note(
            f"check: the pipeline, loaded again, differs from {', '.join(map(str, artifacts))} by "
            f"at most {check.max_difference:.3g} at timesteps "
            f"{', '.join(map(str, check.timesteps))} (float32)"
        )
        console.note(f"fill in the licence in {output / 'README.md'} before you share it")
    console.result_paths(
        [output], as_json=as_json, max_difference=check.max_difference, timesteps=check.timesteps,
        fingerprint=read_record(merged).fingerprint,
        **({"experts": list(map(str, artifacts))} if len(artifacts) > 1 else {}),
    )  # fmt: skip


def _show(made: LoraExport, merged: Path) -> None:
    """The share that is kept by block, and what has no factors."""
    console.table(
        "Squared difference to the base that the LoRA keeps", ["block", "kept"],
        [[block, f"{share:.2%}"] for block, share in made.kept.items()],
    )  # fmt: skip
    if made.left_out:
        names = ", ".join(made.left_out[:_SHOWN]) + (", …" if len(made.left_out) > _SHOWN else "")
        console.note(
            f"{merged}: {len(made.left_out)} tensors changed that have no factors (norms, biases), "
            f"{made.left_out_share:.2%} of the squared difference: {names}"
        )
