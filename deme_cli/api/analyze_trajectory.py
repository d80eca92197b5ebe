"""`analyze_trajectory`: the same noise denoised by each model, and which expert acted when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.analysis_config import TrajectoryConfig
from deme_cli.api import analyzing
from deme_cli.api.fetching import fetch
from deme_cli.config import SampleConfig
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.data.prompts import PromptSet


def analyze_trajectory(
    models: Sequence[str | Path] = (),
    settings: TrajectoryConfig | None = None,
    *,
    sampling: SampleConfig | None = None,
    output: Path = Path("trajectory.json"),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    dtype: str = "fp32", force: bool = False, dry_run: bool = False,
) -> analyzing.Analysis:  # fmt: skip
    """Denoise the same noise with every model, side by side; measure where their ways part.

    models: as for `analyze_losses`.   sampling: those of `run` if None; how many images there are
    `settings` say, of a set of prompts the first ones.

    The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or TrajectoryConfig()
    analyzing.check_output(output, force=force)
    sampling = replace(sampling or run.settings(SampleConfig), num=settings.num)
    prompts, sampling = _first_prompts(sampling, settings.num)

    from deme_cli.analysis.lineup import folder_models, line_up
    from deme_cli.analysis.trajectory.measure import measure_trajectories, open_trajectories

    named = [str(model) for model in models] or folder_models(run.base)
    analysis = open_trajectories(
        line_up(named, device=device, dtype=dtype), sampling, settings, output, prompts=prompts,
        pipeline=run.pipeline(pipeline), device=device, dtype=dtype,
    )  # fmt: skip
    console.note(
        f"{', '.join(entrant.name for entrant in analysis.entrants)}: {analysis.num} images each, "
        f"{analysis.config.sampler}, {len(analysis.timesteps)} forwards an image"
    )
    if dry_run:
        return analyzing.nothing_written(output, dry_run=True)

    from deme_cli.analysis.trajectory.found import document_of, foot_of
    from deme_cli.analysis.trajectory.picture import draw_trajectories

    steps = measure_trajectories(analysis, force=force)
    found = analyzing.watch(steps, "trajectories", analysis.total, "image")
    fingerprints = {entrant.name: entrant.fingerprints for entrant in analysis.entrants}
    protocol = {"models": fingerprints, **analysis.protocol}
    drawn, document = draw_trajectories(found, foot=foot_of(protocol)), document_of(found, protocol)
    return analyzing.write_analysis(output, drawn, document, ("reading", "models"))


def _first_prompts(sampling: SampleConfig, num: int) -> tuple[PromptSet | None, SampleConfig]:
    """The first prompts of a set, with all images of each, enough for `num`; all if fewer."""
    if not sampling.prompts:
        return None, sampling
    from deme_cli.data.prompts import prompt_assets, read_prompts

    fetch(prompt_assets(sampling.prompts))
    found = read_prompts(sampling.prompts, column=sampling.prompt_column)
    if found.cycles:
        return found, sampling
    count = -(-num // sampling.per_prompt)
    classes = found.classes and found.classes[:count]
    found = replace(found, prompts=found.prompts[:count], classes=classes)
    return found, replace(sampling, num=None)
