"""`analyze_losses`: where on [0, T) each model gained on the first one, and where it lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli import console
from deme_cli.analysis_config import LossConfig, bucket_ranges
from deme_cli.api import analyzing
from deme_cli.config import DataConfig, SplitConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, split_uniform

if TYPE_CHECKING:
    from deme_cli.analysis.lineup import Entrant


def analyze_losses(
    models: Sequence[str | Path] = (),
    settings: LossConfig | None = None,
    *,
    images: DataConfig | None = None,
    split: str = "held-out",
    num_ranges: int | None = None,
    output: Path = Path("losses.json"),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    dtype: str = "fp32", force: bool = False, dry_run: bool = False,
) -> analyzing.Analysis:  # fmt: skip
    """Measure the denoising loss of each model against the timestep, all on the same draws.

    models: artifacts, diffusers folders or hub ids; the others are compared with the first, experts
    that cover all timesteps also act together. None: base, experts and merged of the run's folder.
    images: those of `run` if None.   split: train or held-out.   num_ranges: equal ranges to sum up
    over; None for those of the experts, else of `run`.

    Writes `output` and the pictures beside it, .png and .svg. With `dry_run` all is checked and
    told, and nothing is measured. Raises ConfigError, MissingError or ArtifactError before anything
    is measured, NumericsError, Stopped after a signal; then what was measured is kept.
    """
    run, settings = run or RunFile(), settings or LossConfig()
    analyzing.check_output(output, force=force)
    images = analyzing.check_images(images, run, split=split)

    from deme_cli.analysis.lineup import folder_models, line_up

    named = [str(model) for model in models] or folder_models(run.base)
    entrants = line_up(named, device=device, dtype=dtype)
    record = entrants[0].records[0]
    bucket_ranges(settings.buckets, record.num_train_timesteps)
    ranges = _ranges(run, entrants, num_ranges, record.num_train_timesteps)
    console.note(
        f"{', '.join(entrant.name for entrant in entrants)}: "
        f"{settings.buckets * settings.num:,} draws each from {images.source} ({split})"
    )
    if dry_run:
        return analyzing.nothing_written(output, dry_run=True)

    from deme_cli.analysis.losses.measure import LossAnalysis, measure_losses
    from deme_cli.analysis.losses.picture import draw_losses
    from deme_cli.analysis.losses.reading import document_of, foot_of
    from deme_cli.diffusion.schedule import read_schedule

    record, examples = analyzing.open_images(
        record, images, run, split=split, beside=output.parent, pipeline=pipeline, device=device
    )
    schedule = read_schedule(record.scheduler_config)
    analysis = LossAnalysis(
        entrants, examples, schedule, settings, ranges, split, output, dtype
    )  # fmt: skip
    steps = measure_losses(analysis, force=force)
    found = analyzing.watch(steps, "losses", analysis.total, "draw")
    title = "Where each model gained, and where it lost"
    drawn = draw_losses(found, title=title, foot=foot_of(analysis, found))
    document = document_of(analysis, found)
    return analyzing.write_analysis(output, drawn, document, ("reading", "models"))


def _ranges(
    run: RunFile, entrants: Sequence[Entrant], n: int | None, num_train_timesteps: int
) -> list[TimestepRange]:
    """`n` equal ranges, else the ensemble's, else those of deme.toml.

    Raises ConfigError where those of deme.toml are of another number of timesteps.
    """
    from deme_cli.analysis.losses.measure import own_ranges

    if n is not None:
        return split_uniform(n, num_train_timesteps)
    if own := own_ranges(entrants):
        return own
    split = run.settings(SplitConfig)
    ranges = split.timestep_ranges
    if ranges and (stop := max(span.stop for span in ranges)) != num_train_timesteps:
        raise ConfigError(
            f"[split] ranges: they end at {stop}, but this model has {num_train_timesteps} "
            f"timesteps; correct deme.toml, or give -n"
        )
    return ranges or split_uniform(split.n, num_train_timesteps)
