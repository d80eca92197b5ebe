"""`deme analyze trajectory`: the same noise denoised by each model, and which expert acted when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.analysis.config import TrajectoryConfig
from deme_cli.analysis.document import document_bytes
from deme_cli.api.drawing import sample_settings
from deme_cli.api.fetching import fetch
from deme_cli.commands.analysis import Output, check_output, watch, write_analysis
from deme_cli.commands.options import (
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Pipeline,
    Quiet,
    begin,
    option,
)
from deme_cli.commands.sample import (
    BatchSize,
    Classes,
    Eta,
    Guidance,
    PerPrompt,
    Prompt,
    PromptColumn,
    Prompts,
    ResizeTo,
    Resolution,
    Sampler,
    Seed,
    Spacing,
    Steps,
)

if TYPE_CHECKING:
    from deme_cli.analysis.trajectory.measure import TrajectoryAnalysis
    from deme_cli.config import SampleConfig
    from deme_cli.data.prompts import PromptSet

_C = TrajectoryConfig


def trajectory(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help=r"Artifacts, diffusers folders or hub ids; experts that cover all timesteps also "
            r"act together \[default: base, experts and merged of this folder].",
            show_default=False,
        ),
    ] = None,
    num: Annotated[int, option(_C, "num", "-n", "--num")] = _C.num,
    shown: Annotated[int, option(_C, "shown", "--shown")] = _C.shown,
    rows: Annotated[int, option(_C, "rows", "--rows")] = _C.rows,
    prompts: Prompts = None,
    prompt: Prompt = None,
    prompt_column: PromptColumn = None,
    per_prompt: PerPrompt = None,
    classes: Classes = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: Spacing = None,
    resolution: Resolution = None,
    resize_to: ResizeTo = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    output: Output = Path("trajectory.json"),
    pipeline: Pipeline = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Denoise the same noise with every model, side by side; show which expert acted when.

    Example: deme analyze trajectory --steps 20 --rows 2
    """
    run = begin(config, quiet=quiet)
    settings = TrajectoryConfig(num=num, shown=shown, rows=rows)
    options = {
        "num": num, "prompts": prompts, "prompt_column": prompt_column, "per_prompt": per_prompt,
        "classes": classes, "guidance": guidance, "sampler": sampler, "steps": steps, "eta": eta,
        "spacing": spacing, "resolution": resolution, "resize": resize_to,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    sample = sample_settings(run, options, prompt=prompt, protocol=None)
    check_output(output, force=force)
    chosen, sample = _first_prompts(sample, num)

    from deme_cli.analysis.lineup import folder_models, line_up
    from deme_cli.analysis.trajectory.measure import measure_trajectories, open_trajectories

    entrants = line_up(models or folder_models(run.base), device=device, dtype=dtype)
    analysis = open_trajectories(
        entrants, sample, settings, output,
        prompts=chosen, pipeline=run.pipeline(pipeline), device=device, dtype=dtype,
    )  # fmt: skip
    console.note(
        f"{', '.join(entrant.name for entrant in analysis.entrants)}: {analysis.num} images each, "
        f"{analysis.config.sampler}, {len(analysis.timesteps)} forwards an image"
    )
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True)
        return

    from deme_cli.analysis.trajectory.found import document_of, read_trajectories
    from deme_cli.analysis.trajectory.picture import draw_trajectories

    found = watch(
        measure_trajectories(analysis, force=force), "trajectories", analysis.total, "image"
    )
    said, protocol = read_trajectories(found), _protocol(analysis)
    drawn = draw_trajectories(found, foot=_foot(protocol))
    told = document_of(found)
    document = document_bytes("trajectory", said, protocol, **told)
    paths = write_analysis(output, drawn, document, said)
    console.result_paths(paths, as_json=as_json, reading=said, models=told["models"])


def _first_prompts(sample: SampleConfig, num: int) -> tuple[PromptSet | None, SampleConfig]:
    """The first prompts of a set, with all images of each, enough for `num`; all if fewer."""
    if not sample.prompts:
        return None, sample
    from deme_cli.data.prompts import prompt_assets, read_prompts

    fetch(prompt_assets(sample.prompts))
    found = read_prompts(sample.prompts, column=sample.prompt_column)
    if found.cycles:
        return found, sample
    count = -(-num // sample.per_prompt)
    classes = found.classes and found.classes[:count]
    return replace(found, prompts=found.prompts[:count], classes=classes), replace(sample, num=None)


def _protocol(analysis: TrajectoryAnalysis) -> dict[str, Any]:
    models = {entrant.name: entrant.fingerprints for entrant in analysis.entrants}
    return {"models": models, **analysis.protocol}


def _foot(protocol: dict[str, Any]) -> str:
    """How it was drawn, in a line under the picture."""
    told = [f"{protocol['sampler']}, {protocol['steps']} steps"]
    told += [f"{protocol['spacing']} spacing"] if protocol["spacing"] else []
    told += [f"eta {protocol['eta']:g}"] if protocol["eta"] else []
    told += [f"guidance {protocol['guidance']:g}"] if protocol["guidance"] is not None else []
    told += [f"seed {protocol['seed']}"]
    if len(protocol["models"]) == 1:
        return ", ".join(told)
    foot = f"{', '.join(told)}; curves: means over {protocol['num']} images ± one standard error"
    if protocol["prediction_type"] == "epsilon":
        foot += "\n(at high noise a small difference in eps is a large one in $x_0$)"
    return foot
