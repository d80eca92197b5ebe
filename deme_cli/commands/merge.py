"""`deme merge`: one model from the experts of a base, by given or by searched coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.commands.launching import meet, only_first
from deme_cli.commands.merge_options import (
    parse_coefficients_for,
    require_use,
)
from deme_cli.commands.options import (
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Given,
    Json,
    OptionsOf,
    Quiet,
    begin,
    takes_settings,
)
from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.processes import ALONE

_BY_EXPERT = ("coefficients", "grid", "bounds", "start")  # by the order of the arguments


@takes_settings
def merge(
    parents: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="EXPERT|VECTOR...",
            help="Experts or task vectors of one base.",
            show_default=False,
        ),
    ] = None,
    *,
    given: Annotated[Given, OptionsOf(MergeConfig)],
    coefficients_for: Annotated[
        list[str] | None,
        typer.Option(
            "--coefficients-for",
            metavar="GLOB=w1,w2,...",
            help="Other coefficients for the tensors whose names match, as in "
            "'mid_block.*=0.5,0,0,1'; may be repeated, the first match counts.",
            show_default=False,
        ),
    ] = None,
    ema_length: Annotated[
        float | None,
        typer.Option(
            "--ema-length",
            help="The arguments are snapshots of one run's power-function averages: combine them "
            "into the average of this relative length (EDM2, post-hoc EMA).",
            rich_help_panel="Method",
            show_default=False,
        ),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            "--show",
            help="Print and draw the trials of a search, by its journal or merged file, and stop.",
            show_default=False,
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            help="Build a merged file again from its parents, bit for bit, and stop.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            help=r"Their base \[default: that of deme.toml, or beside them].",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=r"Artifact to write \[default: merged.safetensors].",
            show_default=False,
        ),
    ] = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge experts or task vectors into one model of the base's size (Eq. 8).

    With --search, a stopped search goes on when the same command is run again,
    and several processes that run it share the trials, as do those of one
    launch (torchrun, accelerate launch, srun).

    Example: deme merge ft_*.safetensors --search grid
    """
    run = begin(config, quiet=quiet)
    has_coefficients, search = given["coefficients"] is not None, given["search"]
    wanted = search or run.tables.get("merge", {}).get("search", MergeConfig.search)
    is_search = wanted != "none" and not (has_coefficients or dry_run or show or replay)
    world = ALONE
    if is_search:
        world = meet(device)
    else:
        only_first()
    target = output or Path("merged.safetensors")
    if dry_run and (show or replay):
        raise ConfigError("--dry-run goes with a merge, not with --show or --replay")
    if show is not None:
        from deme_cli.commands.merge_show import show_search

        show_search(show, as_json=as_json)
        return
    if replay is not None:
        from deme_cli.commands.merge_show import replay_merge

        replay_merge(replay, output, parents or [], base, run, force=force, as_json=as_json)
        return
    if not parents:
        raise ConfigError("nothing to merge: name experts or task vectors, as in ft_*.safetensors")
    if has_coefficients and search not in (None, "none"):
        raise ConfigError("-w gives the coefficients and --search looks for them; keep one")
    given_search = "none" if has_coefficients else search
    settings = run.settings(MergeConfig, **{**given, "search": given_search})
    if settings.coefficients and settings.search != "none" and search is None:
        raise ConfigError("[merge] sets both coefficients and search; keep one of them")
    require_use(settings, given)
    from deme_cli.api.merge_job import MergeJob

    job = MergeJob(
        run, settings, parents, parse_coefficients_for(coefficients_for or []), base, target,
        None, world.device or device, dtype, force, ema_length, world=world,
        by_range=frozenset(name for name in _BY_EXPERT if given.get(name) is None),
    )  # fmt: skip
    if dry_run:
        job.say_what_would_run()
        if as_json:
            console.result_json({"dry_run": True, "paths": [str(target)]})
    elif merged := job.run():
        from deme_cli.commands.merge_show import tell

        tell(merged, as_json=as_json)
