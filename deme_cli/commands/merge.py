"""`deme merge`: one model from the experts of a base, by given or by searched coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deme_cli import console
from deme_cli.commands.launching import meet, only_first
from deme_cli.commands.merge_options import (
    looks_for,
    parse_coefficients_for,
    parse_lists,
    require_use,
)
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
from deme_cli.config import MergeConfig
from deme_cli.errors import ConfigError
from deme_cli.processes import ALONE
from deme_cli.settings import parse_numbers

_C, _METHOD, _SEARCH, _REPORT = MergeConfig, "Method", "Search", "Report"


def merge(
    parents: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="EXPERT|VECTOR...",
            help="Experts or task vectors of one base.",
            show_default=False,
        ),
    ] = None,
    coefficients: Annotated[
        str | None,
        typer.Option(
            "--coefficients",
            "-w",
            help="w_i in the order of the arguments, as in 0.1,0.1,0.2,0.5; those of deme.toml are "
            r"in the order of the ranges \[default: 1/N each].",
            show_default=False,
        ),
    ] = None,
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
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    method: Annotated[str | None, option(_C, "method", "--method", panel=_METHOD)] = None,
    density: Annotated[float | None, option(_C, "density", "--density", panel=_METHOD)] = None,
    trim: Annotated[str | None, option(_C, "trim", "--trim", panel=_METHOD)] = None,
    mask_seed: Annotated[int | None, option(_C, "mask_seed", "--mask-seed", panel=_METHOD)] = None,
    search: Annotated[str | None, option(_C, "search", "--search", panel=_SEARCH)] = None,
    objective: Annotated[str | None, option(_C, "objective", "--objective", panel=_SEARCH)] = None,
    loss_range: Annotated[
        str | None, option(_C, "loss_range", "--loss-range", panel=_SEARCH)
    ] = None,
    per: Annotated[str | None, option(_C, "per", "--per", panel=_SEARCH)] = None,
    per_block: Annotated[
        bool,
        typer.Option("--per-block", help="Short for --per block.", rich_help_panel=_SEARCH),
    ] = False,
    grid: Annotated[
        str | None,
        typer.Option(
            "--grid",
            help="Values tried: 0,0.5,1 for every expert, or a list for each argument as in "
            r"'0,0.5;0,1' \[default: 0,0.5,1 for up to 4 experts, 0,1 for up to 8].",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    bounds: Annotated[
        str | None,
        typer.Option(
            "--bounds",
            help="Lowest and highest coefficient, for every expert or for each argument as in "
            r"'0,1;0,2' \[default: -0.5,1.5].",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            help=r"Where the search begins, as in 0.2,0.2,0.5,0.5 \[default: 1/N each].",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[str | None, option(_C, "optimizer", "--optimizer", panel=_SEARCH)] = None,
    evaluations: Annotated[
        int | None, option(_C, "evaluations", "--evaluations", panel=_SEARCH)
    ] = None,
    time: Annotated[str | None, option(_C, "time", "--time", panel=_SEARCH)] = None,
    num: Annotated[int | None, option(_C, "num", "--num", "-n", panel=_SEARCH)] = None,
    steps: Annotated[int | None, option(_C, "steps", "--steps", panel=_SEARCH)] = None,
    batch_size: Annotated[
        int | None, option(_C, "batch_size", "--batch-size", "-b", panel=_SEARCH)
    ] = None,
    seed: Annotated[int | None, option(_C, "seed", "--seed", panel=_SEARCH)] = None,
    report: Annotated[
        bool | None,
        typer.Option(
            "--report/--no-report",
            help="Measure the merged model beside base, ensemble, means and single experts, on "
            r"other seeds and images \[default: after a search].",
            rich_help_panel=_REPORT,
            show_default=False,
        ),
    ] = None,
    report_num: Annotated[
        int | None, option(_C, "report_num", "--report-num", panel=_REPORT)
    ] = None,
    report_repeats: Annotated[
        int | None, option(_C, "report_repeats", "--report-repeats", panel=_REPORT)
    ] = None,
    report_seed: Annotated[
        int | None, option(_C, "report_seed", "--report-seed", panel=_REPORT)
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
    pipeline: Pipeline = None,
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
    is_search = (
        coefficients is None
        and not (dry_run or show or replay)
        and looks_for(run.tables.get("merge", {}), method=method, search=search)
    )
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

        replay_merge(replay, output, parents or [], base, run, device, force=force, as_json=as_json)
        return
    if not parents:
        raise ConfigError("nothing to merge: name experts or task vectors, as in ft_*.safetensors")
    if coefficients is not None and search not in (None, "none"):
        raise ConfigError("-w gives the coefficients and --search looks for them; keep one")
    if per_block and per not in (None, "block"):
        raise ConfigError(f"--per-block and --per {per}; keep one")
    settings = run.settings(
        MergeConfig, search=search if coefficients is None else "none", objective=objective,
        method=method, density=density, trim=trim, mask_seed=mask_seed,
        per="block" if per_block else per,
        grid=None if grid is None else parse_lists(grid, "--grid"),
        bounds=None if bounds is None else parse_lists(bounds, "--bounds"),
        start=None if start is None else parse_numbers(start, "--start"),
        optimizer=optimizer, evaluations=evaluations, time=time, num=num, steps=steps,
        batch_size=batch_size, seed=seed, loss_range=loss_range, report=report,
        report_num=report_num, report_repeats=report_repeats, report_seed=report_seed,
        coefficients=None if coefficients is None else parse_numbers(coefficients, "-w"),
    )  # fmt: skip
    if coefficients is not None and settings.method == "greedy":
        raise ConfigError("-w gives the coefficients and method greedy looks for them; keep one")
    if settings.coefficients and settings.search != "none" and search is None:
        raise ConfigError("[merge] sets both coefficients and search; keep one of them")
    of_search = {
        "--objective": objective, "--grid": grid, "--num": num, "--steps": steps,
        "--batch-size": batch_size, "--seed": seed, "--bounds": bounds, "--start": start,
        "--evaluations": evaluations, "--time": time, "--optimizer": optimizer,
        "--loss-range": loss_range,
    }  # fmt: skip
    of_report = {
        "--report-num": report_num, "--report-repeats": report_repeats,
        "--report-seed": report_seed,
    }  # fmt: skip
    of_method = {"--density": density, "--trim": trim, "--mask-seed": mask_seed}
    require_use(settings, {**of_search, **of_method, **of_report}, list(of_search))
    from deme_cli.api.merge_job import MergeJob

    on_command_line = {
        "coefficients": coefficients, "grid": grid, "bounds": bounds, "start": start,
    }  # fmt: skip
    job = MergeJob(
        run, settings, parents, parse_coefficients_for(coefficients_for or []), base, target,
        pipeline, world.device or device, dtype, force, ema_length, world=world,
        by_range=frozenset(name for name, given in on_command_line.items() if given is None),
    )  # fmt: skip
    if dry_run:
        job.say_what_would_run()
        if as_json:
            console.result_json({"dry_run": True, "paths": [str(target)]})
    elif merged := job.run():
        from deme_cli.commands.merge_show import tell

        tell(merged, as_json=as_json)
