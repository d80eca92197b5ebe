"""`deme merge`: one model from the experts of a base, by given or by searched coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.launching import meet, only_first
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
from deme_cli.distributed import ALONE
from deme_cli.errors import ConfigError
from deme_cli.ladder import parse_ladder
from deme_cli.settings import flags_of, parse_numbers

if TYPE_CHECKING:
    from deme_cli.api.merging import MergeResult, ShownSearch
    from deme_cli.merging.search.trials import Trial

_OF_SEARCH = ("objective", "grid", "num", "steps", "seed", "evaluations")
_OF_ROWS = ("objective", "num", "steps")  # what a report alone reads as well
_SHOWN = 10  # of each rung


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
    world = ALONE  # known before the settings are, so that one process speaks of what is wrong
    wanted = given["search"] or run.tables.get("merge", {}).get("search", MergeConfig.search)
    if wanted == "none" or given["coefficients"] or dry_run or show or replay:
        only_first()
    else:
        world = meet(device)
    if dry_run and (show or replay):
        raise ConfigError("--dry-run goes with a merge, not with --show or --replay")
    from deme_cli.api import merging

    if show is not None:
        _show_search(merging.show_search(show), as_json=as_json)
        return
    if replay is not None:
        built = merging.replay(
            replay, output, parents=parents or [], base=base, run=run, force=force
        )
        fingerprint = built.record.fingerprint
        console.note(f"{built.path}: equal to {replay}, fingerprint {fingerprint[:12]}")
        console.result_paths(
            [built.path], as_json=as_json, path=str(built.path), fingerprint=fingerprint,
            coefficients=built.record.coefficients,
        )  # fmt: skip
        return
    if not parents:
        raise ConfigError("nothing to merge: name experts or task vectors, as in ft_*.safetensors")
    settings = run.settings(MergeConfig, **given)
    _require_use(settings, given)
    target = output or Path(merging.MERGED_NAME)
    merged = merging.merge_together(
        parents, settings, coefficients_for=_parse_coefficients_for(coefficients_for or []),
        ema_length=ema_length, base=base, output=target, run=run, device=world.device or device,
        dtype=dtype, force=force, world=world, dry_run=dry_run,
    )  # fmt: skip
    if dry_run and as_json:
        console.result_json({"dry_run": True, "paths": [str(target)]})
    elif merged is not None:
        _tell(merged, as_json=as_json)


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
    searches, report = settings.search != "none", bool(settings.report)
    rungs = parse_ladder(settings.objective, num=settings.num)
    rules = {
        name: (searches or (report and name in _OF_ROWS), "a search; add --search grid")
        for name in _OF_SEARCH
    }
    rules["density"] = (settings.method in ("ties", "dare"), "ties and dare; add --method ties")
    rules["grid"] = (settings.search == "grid", "a search grid; add --search grid")
    for item in fields(MergeConfig):
        is_read, what = rules.get(item.name, (True, ""))
        if given.get(item.name) is not None and not is_read:
            raise ConfigError(f"{flags_of(item)[0]} belongs to {what}")
    if given.get("steps") is not None and not any(rung.is_distance for rung in rungs):
        raise ConfigError("--steps are those of sampling; add --objective fid or kid")


def _show_search(found: ShownSearch, *, as_json: bool) -> None:
    """Print the trials of a search, and the best so far."""
    from deme_cli.api.merge_report import show_trials

    done = [trial for trial in found.trials if trial.is_done]
    console.note(
        f"{found.journal}: search {found.search['method']} by {' > '.join(found.objectives)}, "
        f"{'finished' if found.is_finished else 'not finished'}: {len(done)} trials, "
        f"{len(found.trials) - len(done)} running"
    )
    groups = len(found.search["groups"])
    suffix = f" {found.search['groups'][0]}"
    experts = [label.removesuffix(suffix) for label in found.labels[: len(found.labels) // groups]]
    for rung, name in enumerate(found.objectives):
        if own := found.best_of_rung(rung):
            show_trials(
                f"{name}: the best of {len(own)}", own,
                lambda w: [sum(w[i :: len(experts)]) / groups for i in range(len(experts))],
                experts, name, shown=_SHOWN,
            )  # fmt: skip
    documents = [_document(trial, found.labels) for trial in done]
    if found.picture is None or found.best is None:
        console.result_paths([], as_json=as_json, trials=documents, finished=False)
    else:
        console.result_paths(
            [found.picture], as_json=as_json, finished=found.is_finished,
            best=_document(found.best, found.labels), trials=documents,
        )  # fmt: skip


def _document(trial: Trial, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "index": trial.index, "rung": trial.rung, "name": trial.name,
        "coefficients": dict(zip(labels, trial.point, strict=True)),
        "objective": trial.value if math.isfinite(trial.value) else None,
        "seconds": round(trial.seconds, 3),
    }  # fmt: skip


def _tell(merged: MergeResult, *, as_json: bool) -> None:
    """The merged file, what it was made of, the files beside it, and what it is worth."""
    record, search = merged.record, merged.record.search
    what = "coefficient (other tensors)" if record.coefficients_for else "coefficient"
    rows = sorted(zip(record.parents, record.coefficients, strict=True), key=_range_of)
    places = max(console.decimals(record.coefficients, 3), 2)
    console.table(
        f"Merged into {merged.path} ({record.method})",
        ["timesteps", what, "from"],
        [
            [":".join(map(str, parent["range"])), f"{w:.{places}f}", parent["path"]]
            for parent, w in rows
        ],
    )
    if record.report:
        console.note(f"{merged.path}: {record.report['verdict']}")
    elif search and search["evaluations"]:
        base, best = search["values"]["base"], search["best"]
        console.note(
            f"{merged.path}: {search['objective']} {best:.5g}, the base "
            f"{'not finite' if base is None else format(base, '.5g')}, on the seeds and images "
            f"that chose the coefficients; leave out --no-report to see it on others"
        )
    console.result_paths(
        [merged.path, *merged.files], as_json=as_json, path=str(merged.path),
        fingerprint=record.fingerprint, parents=record.parents, method=record.method,
        coefficients=record.coefficients, coefficients_for=record.coefficients_for,
        objective=search["best"] if search else None,
        evaluations=search["evaluations"] if search else 0, search=search, report=record.report,
    )  # fmt: skip


def _range_of(row: tuple[dict[str, Any], float]) -> list[int]:
    return row[0]["range"]
