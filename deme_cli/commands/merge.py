"""`deme merge`: one model from the experts of a base, by given or by searched coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.merge_show import tell_merged, tell_search
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
    flags_of,
    takes_settings,
)
from deme_cli.config import MergeConfig, parse_numbers
from deme_cli.distributed import ALONE, meet, only_first
from deme_cli.errors import ConfigError

_OF_SEARCH = ("objective", "grid", "num", "steps", "seed", "evaluations")
_OF_ROWS = ("objective", "num", "steps")  # what a report alone reads as well


@takes_settings
def merge(
    experts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="EXPERT|VECTOR...", help="Experts or task vectors of one base.",
            show_default=False,
        ),
    ] = None, *,
    given: Annotated[Given, OptionsOf(MergeConfig)],
    coefficients_for: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB=w1,w2,...", show_default=False,
            help="Other coefficients for the tensors whose names match, as in "
            "'mid_block.*=0.5,0,0,1'; may be repeated, the first match counts.",
        ),
    ] = None,
    ema_length: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Method", show_default=False,
            help="The arguments are snapshots of one run's power-function averages: combine them "
            "into the average of this relative length (EDM2, post-hoc EMA).",
        ),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            help="Print and draw the trials of a search, by its journal or merged file, and stop.",
            show_default=False,
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Build a merged file again from its experts, bit for bit, and stop.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help=r"Their base \[default: that of deme.toml, or beside them].", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=r"Artifact to write \[default: merged.safetensors].",
            show_default=False,
        ),
    ] = None,
    config: ConfigPath = None, device: Device = "auto", dtype: Dtype = "fp32",
    force: Force = False, dry_run: DryRun = False, as_json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Merge experts or task vectors into one model of the base's size (Eq. 8).

    With --search, a stopped search goes on when the same command is run again,
    and several processes that run it share the trials, as do those of one
    launch (torchrun, accelerate launch, srun).

    Example: deme merge ft_*.safetensors --search grid
    """
    import deme_cli

    run = begin(config, quiet=quiet)
    world = ALONE  # known before the settings are, so that one process speaks of what is wrong
    wanted = given["search"] or run.tables.get("merge", {}).get("search", MergeConfig.search)
    if wanted == "none" or given["coefficients"] or dry_run or show or replay:
        only_first()
    else:
        world = meet(device)
    if dry_run and (show or replay):
        raise ConfigError("--dry-run goes with a merge, not with --show or --replay")
    if show is not None:
        tell_search(deme_cli.show_search(show), as_json=as_json)
        return
    if replay is not None:
        built = deme_cli.replay(
            replay, output, experts=experts or [], base=base, run=run, force=force
        )
        fingerprint = built.record.fingerprint
        console.note(f"{built.path}: equal to {replay}, fingerprint {fingerprint[:12]}")
        console.result_paths(
            [built.path], as_json=as_json, path=str(built.path), fingerprint=fingerprint,
            coefficients=built.record.coefficients,
        )  # fmt: skip
        return
    if not experts:
        raise ConfigError("nothing to merge: name experts or task vectors, as in ft_*.safetensors")
    settings = run.settings(MergeConfig, **given)
    _require_use(settings, given)
    target = output or Path("merged.safetensors")
    with console.showing() as progress:
        merged = deme_cli.merge(
            experts, settings, coefficients_for=_parse_coefficients_for(coefficients_for or []),
            ema_length=ema_length, base=base, output=target, run=run,
            device=world.device or device, dtype=dtype, force=force, world=world, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip
    if merged.is_written:
        tell_merged(merged, as_json=as_json)
    elif dry_run and as_json:
        console.result_json({"dry_run": True, "paths": [str(target)]})


def _parse_coefficients_for(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """`GLOB=w1,w2` as the coefficients of the tensors that a glob matches."""
    found: dict[str, tuple[float, ...]] = {}
    for text in texts:
        glob, sign, numbers = text.partition("=")
        if not sign or not glob:
            raise ConfigError(
                f"--coefficients-for {text!r}: expected GLOB=w1,w2, as in 'mid_block.*=0.5,0,1'"
            )
        found[glob] = tuple(parse_numbers(numbers, f"--coefficients-for {glob}="))
    return found


def _require_use(settings: MergeConfig, given: Mapping[str, Any]) -> None:
    """Every option that was given, by its setting, has something to act on."""
    searches = settings.search != "none"
    for item in fields(MergeConfig):
        name = item.name
        is_read, what = True, ""
        if name in _OF_SEARCH:
            is_read = searches or (bool(settings.report) and name in _OF_ROWS)
            what = "a search; add --search grid"
        if name == "density":
            is_read, what = settings.method in ("ties", "dare"), "ties and dare; add --method ties"
        if name == "grid" and is_read:
            is_read, what = settings.search == "grid", "a search grid; add --search grid"
        if name == "steps" and is_read:
            is_read = any(name in settings.objective for name in ("kid", "fid"))
            what = "sampling; add --objective fid or kid"
        if given.get(name) is not None and not is_read:
            raise ConfigError(f"{flags_of(item)[0]} belongs to {what}")
