"""`deme merge`: one model from the experts of a base, by given or by searched coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.merge_search import Found, Order, find_measure, search_coefficients
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
from deme_cli.outputs import require_output, require_space
from deme_cli.settings import parse_numbers

if TYPE_CHECKING:
    from deme_cli.merging.grid import Grid
    from deme_cli.merging.lineage import Family

_C, _SEARCH = MergeConfig, "Search"


def merge(
    parents: Annotated[
        list[Path],
        typer.Argument(
            metavar="EXPERT|VECTOR",
            help="Experts or task vectors of one base.",
            show_default=False,
        ),
    ],
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
    search: Annotated[str | None, option(_C, "search", "--search", panel=_SEARCH)] = None,
    objective: Annotated[str | None, option(_C, "objective", "--objective", panel=_SEARCH)] = None,
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
    num: Annotated[int | None, option(_C, "num", "--num", "-n", panel=_SEARCH)] = None,
    steps: Annotated[int | None, option(_C, "steps", "--steps", panel=_SEARCH)] = None,
    batch_size: Annotated[
        int | None, option(_C, "batch_size", "--batch-size", "-b", panel=_SEARCH)
    ] = None,
    seed: Annotated[int | None, option(_C, "seed", "--seed", panel=_SEARCH)] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            help=r"Their base \[default: that of deme.toml, or beside them].",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact to write.")] = Path(
        "merged.safetensors"
    ),
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

    With --search, a stopped search goes on when the same command is run again.

    Example: deme merge ft_*.safetensors --search grid
    """
    from deme_cli.merging.grid import parse_grid
    from deme_cli.merging.lineage import find_base, open_family, open_parents

    run = begin(config, quiet=quiet)
    _require_one_choice(coefficients, search)
    settings = run.settings(
        MergeConfig, search=search if coefficients is None else "none", objective=objective,
        grid=None if grid is None else parse_grid(grid), num=num, steps=steps,
        batch_size=batch_size, seed=seed,
        coefficients=None if coefficients is None else parse_numbers(coefficients, "-w"),
    )  # fmt: skip
    _require_use(settings, {
        "--objective": objective, "--grid": grid, "--num": num, "--steps": steps,
        "--batch-size": batch_size, "--seed": seed,
    })  # fmt: skip
    require_output(output, force=force)
    opened = open_parents(parents, "expert", "task-vector")
    family = open_family(find_base(opened, run, base), opened)
    require_space(output, sum(spec.num_bytes for spec in family.base.tensors.values()))
    order = Order(family, settings, output, device, dtype, force)
    if settings.search == "none":
        given = _given(order, by_argument=coefficients is not None)
        if not dry_run:
            _write(order, given, None, as_json=as_json)
            return
        plan = f"coefficients {', '.join(f'{w:g}' for w in given)}"
    else:
        if settings.coefficients and search is None:
            raise ConfigError("[merge] sets both coefficients and search; keep one of them")
        points = _grid(order, by_argument=grid is not None)
        measure = find_measure(run, order, pipeline)
        if not dry_run:
            found = search_coefficients(order, points, measure)
            _write(order, found.coefficients, found, as_json=as_json)
            return
        plan = f"the best of the grid {points} by {settings.objective} on {measure.source}"
    console.note(f"would merge {len(parents)} artifacts into {output}: {plan}")
    if as_json:
        console.result_json({"dry_run": True, "paths": [str(output)]})


def _require_one_choice(coefficients: str | None, search: str | None) -> None:
    """Coefficients are given or searched, not both."""
    if coefficients is not None and search not in (None, "none"):
        raise ConfigError("-w gives the coefficients and --search looks for them; keep one")


def _require_use(settings: MergeConfig, given: Mapping[str, Any]) -> None:
    """Every option of a search that was given has a search to act on."""
    for flag, value in given.items():
        if value is not None and settings.search == "none":
            raise ConfigError(f"{flag} belongs to a search; add --search grid")
    if given["--steps"] is not None and settings.objective != "fid":
        raise ConfigError("--steps are those of sampling; add --objective fid")


def _given(order: Order, *, by_argument: bool) -> list[float]:
    """The coefficients given, else 1/N each."""
    from deme_cli.merging.combine import linear_terms

    values, count = order.settings.coefficients, len(order.family.parents)
    if values is None:
        console.note(f"no coefficients given: 1/{count} each; --search grid looks for better ones")
        return [1 / count] * count
    linear_terms(order.family, values)
    return list(values) if by_argument else _from_ranges(order.family, values)


def _grid(order: Order, *, by_argument: bool) -> Grid:
    """The values tried for each argument."""
    from deme_cli.merging.grid import resolve_grid

    grid = resolve_grid(order.settings.grid, len(order.family.parents))
    return grid if by_argument else tuple(_from_ranges(order.family, grid))


def _from_ranges(family: Family, values: Sequence[Any]) -> list[Any]:
    """Values in the order of the ranges, as deme.toml gives them, put in that of the arguments."""
    placed = dict(zip(family.by_range, values, strict=True))
    return [placed[index] for index in range(len(values))]


def _write(
    order: Order, coefficients: Sequence[float], found: Found | None, *, as_json: bool
) -> None:
    """Merge, and tell what was merged."""
    from deme_cli.merging.combine import merge_family

    family, search = order.family, found.search if found else None
    num_bytes = sum(spec.num_bytes for spec in family.base.tensors.values())
    with console.progress("merging", num_bytes, "byte") as bar:
        record = merge_family(
            family, coefficients, order.output, search=search, advance=bar.advance
        )
    if found:
        found.log.finish(record.fingerprint)
    console.table(
        f"Merged into {order.output}",
        ["timesteps", "coefficient", "from"],
        [
            [str(family.parents[i].record.timesteps), f"{coefficients[i]:g}",
             str(family.parents[i].path)]
            for i in family.by_range
        ],
    )  # fmt: skip
    console.result_paths(
        [order.output, *([found.picture, found.log.path] if found else [])],
        as_json=as_json,
        path=str(order.output),
        fingerprint=record.fingerprint,
        parents=record.parents,
        coefficients=record.coefficients,
        objective=found.objective if found else None,
        evaluations=search["evaluations"] if search else 0,
        search=search,
    )
