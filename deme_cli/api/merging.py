"""`merge` and `search`: one network of the base's size from the experts of its ranges (Eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deme_cli.api.merge_job import MergeJob, MergeResult
from deme_cli.api.merge_order import LISTS
from deme_cli.api.merge_settings import searches
from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.run_file import RunFile

MERGED_NAME = "merged.safetensors"


def merge(
    parents: Sequence[Path],
    settings: MergeConfig | None = None,
    *,
    coefficients_for: Mapping[str, Sequence[float]] | None = None,
    ema_length: float | None = None,
    base: Path | None = None,
    output: Path = Path(MERGED_NAME),
    run: RunFile | None = None,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    force: bool = False,
) -> MergeResult:
    """theta + sum_i w_i tau_i of experts or task vectors of one base, as one artifact (Eq. 8).

    settings: coefficients in the order of `parents` (None: 1/N each), the method of combining, the
    search; those of `run` if None. (Lists in a deme.toml are in the order of the ranges: with
    `run.settings(MergeConfig, ...)` give `parents` in that order.)
    coefficients_for: other coefficients by glob of tensor names.
    ema_length: take `parents` as snapshots of one run and make the average of that length (EDM2).
    base: None for that of `run`, or the one beside the parents.   run: the settings of a deme.toml,
    of which a search reads images and sampling; the defaults without.

    Raises ConfigError, MissingError, ArtifactError, NumericsError; then no output appears.
    """
    run = run or RunFile()
    fixed = {glob: tuple(values) for glob, values in (coefficients_for or {}).items()}
    result = MergeJob(
        run, settings or run.settings(MergeConfig), parents, fixed, base, output, pipeline, device,
        dtype, force, ema_length, frozenset() if settings else LISTS,
    ).run()  # fmt: skip
    assert result is not None, "a process that is alone is the first"
    return result


def search(
    parents: Sequence[Path],
    settings: MergeConfig | None = None,
    *,
    coefficients_for: Mapping[str, Sequence[float]] | None = None,
    base: Path | None = None,
    output: Path = Path(MERGED_NAME),
    run: RunFile | None = None,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    force: bool = False,
) -> MergeResult:
    """Merge with the coefficients that a search finds; a stopped one goes on when called again.

    settings: None for a grid by held-out loss.   coefficients_for: kept as they are given, by glob.
    The coefficients are chosen on one set of seeds and images and, unless `settings.report` is
    False, reported on another: `record.search`, `record.report`. The rest is as for `merge`.
    """
    settings = settings or MergeConfig(search="grid")
    if not searches(settings):
        raise ConfigError("search = 'none' looks for nothing; name one, as in search = 'grid'")
    return merge(
        parents, settings, coefficients_for=coefficients_for, base=base, output=output, run=run,
        pipeline=pipeline, device=device, dtype=dtype, force=force,
    )  # fmt: skip
