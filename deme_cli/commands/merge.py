"""`deme merge`: one model from the experts of a base, by given or by searched coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, OptionsOf, argument, command, flag, flags_of
from deme_cli.config import MergeConfig, parse_numbers
from deme_cli.distributed import joined, meet, only_first, start_others
from deme_cli.errors import ConfigError
from deme_cli.merging.journal import Trial

_SHOWN = 10  # trials of each stage
LISTED = (  # of the settings, as in finetune
    "coefficients", "method", "density", "lora", "per", "search", "objective", "grid",
    "evaluations", "num", "report",
)  # fmt: skip


@command("base config device dtype save_dtype force dry_run")
def merge(
    given: Annotated[Given, OptionsOf(MergeConfig, listed=LISTED)],
    common: Given,
    experts: Annotated[list[Path] | None, argument(
        "EXPERT|VECTOR...", "Experts or task vectors of one base."
    )] = None,
    coefficients_for: Annotated[list[str] | None, flag(
        "--coefficients-for", "Other coefficients for the tensors whose names match, as in "
        "'mid_block.*=0.5,0,0,1'; may be repeated, the first match counts.",
        metavar="GLOB=w1,w2,...",
    )] = None,
    ema_length: Annotated[float | None, flag(
        "--ema-length", "The arguments are snapshots of one run's power-function averages: combine "
        "them into the average of this relative length (EDM2, post-hoc EMA).", hidden=True,
    )] = None,
    show: Annotated[Path | None, flag(
        "--show", "Print and draw the trials of a search, by its journal or merged file, and stop.",
    )] = None,
    replay: Annotated[Path | None, flag(
        "--replay", "Build a merged file again from its experts, bit for bit, and stop.",
    )] = None,
    jobs: Annotated[
        int, flag("--jobs", "Processes on this machine that share a search's trials.", min=1)
    ] = 1,
    output: Annotated[
        Path | None, flag("--output -o", "Artifact to write [default: merged.safetensors].")
    ] = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Merge experts or task vectors into one model of the base's size (Eq. 8).

    With --search, a stopped search goes on when the same command is run again,
    and several processes that run it share the trials, as do those of one
    launch (torchrun, accelerate launch, srun).

    Example: deme merge ft_*.safetensors --search grid
    """
    run, dry_run = common["run"], common["dry_run"]
    wanted = given["search"] or run.tables.get("merge", {}).get("search", MergeConfig.search)
    if wanted == "none" or given["coefficients"] or dry_run or show or replay:
        if jobs > 1:
            raise ConfigError(
                "--jobs shares the trials of a search, and none is run here; leave it out, or "
                "give --search grid alone"
            )
        only_first()  # known before the settings are, so that one process speaks of what is wrong
    else:
        if jobs > 1:
            start_others(jobs)
        common["device"] = meet(common["device"]).device or common["device"]
    if dry_run and (show or replay):
        raise ConfigError("--dry-run goes with a merge, not with --show or --replay")
    if show is not None:
        _show_search(deme_cli.show_search(show), as_json=as_json)
        return
    if replay is not None:
        of_files = {name: common[name] for name in ("base", "run", "force")}
        built = deme_cli.replay(replay, output, experts=experts or [], **of_files)
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
            ema_length=ema_length, output=target, world=joined(), progress=progress, **common,
        )  # fmt: skip
    if merged.is_written:
        _show_merged(merged, as_json=as_json)
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
    a_search = settings.search != "none", "a search; add --search grid"
    a_row = a_search[0] or bool(settings.report), a_search[1]  # which a report alone reads as well
    samples = any(name in settings.objective for name in ("kid", "fid"))
    needs = {
        "seed": [a_search], "evaluations": [a_search], "objective": [a_row], "num": [a_row],
        "grid": [a_search, (settings.search == "grid", "a search grid; add --search grid")],
        "steps": [a_row, (samples, "sampling; add --objective fid or kid")],
        "density": [(settings.method in ("ties", "dare"), "ties and dare; add --method ties")],
    }  # fmt: skip
    for item in fields(MergeConfig):
        for is_there, what in needs.get(item.name, ()) if given.get(item.name) is not None else ():
            if not is_there:
                raise ConfigError(f"{flags_of(item)[0]} belongs to {what}")


def _show_search(search: deme_cli.ShownSearch, *, as_json: bool) -> None:
    """The trials of a search, and the best so far: `--show`."""
    done = [trial for trial in search.trials if trial.is_done]
    console.note(
        f"{search.journal}: search {search.search['method']} by {' > '.join(search.objectives)}, "
        f"{'finished' if search.is_finished else 'not finished'}: {len(done)} trials, "
        f"{len(search.trials) - len(done)} running"
    )
    for stage in range(len(search.objectives)):
        _show_stage(search, stage)

    def told(trial: Trial) -> dict[str, Any]:
        return {
            "index": trial.index, "rung": trial.stage, "name": trial.name,
            "coefficients": dict(zip(search.labels, trial.point, strict=True)),
            "objective": trial.value if math.isfinite(trial.value) else None,
            "seconds": round(trial.seconds, 3),
        }  # fmt: skip

    best = {} if search.best is None else {"best": told(search.best)}
    console.result_paths(
        [search.picture] if search.picture else [], as_json=as_json, finished=search.is_finished,
        **best, trials=[told(trial) for trial in done],
    )  # fmt: skip


def _show_stage(search: deme_cli.ShownSearch, stage: int) -> None:
    """The best trials of a stage as a table, below them the base and the mean with their places; of
    groups their mean."""
    groups = search.search["groups"]
    count = len(search.labels) // len(groups)
    names = [label.removesuffix(f" {groups[0]}") for label in search.labels[:count]]
    own = [trial for trial in search.trials if trial.is_done and trial.stage == stage]
    own.sort(key=lambda t: (t.value, math.hypot(*t.point), t.index))
    kept = [(i, t) for i, t in enumerate(own, 1) if i <= _SHOWN or t.name in ("base", "1/N each")]
    places = console.decimals([trial.value for _, trial in kept], 5)
    label = search.objectives[stage]
    if kept:
        console.table(
            f"{label}: the best of {len(own)}",
            ["place", *(f"{'mean w' if len(groups) > 1 else 'w'} {name}" for name in names),
             label, "seconds"],
            [[f"{place} {trial.name}".strip(),
              *(f"{sum(trial.point[i::count]) / len(groups):.3f}" for i in range(count)),
              console.fixed(trial.value, places), f"{trial.seconds:.1f}"]
             for place, trial in kept],
        )  # fmt: skip


def _show_merged(merged: deme_cli.MergeResult, *, as_json: bool) -> None:
    """The merged file, what it was made of, the files beside it, and what it is worth."""
    record, search = merged.record, merged.record.search
    if merged.search:
        _show_stage(merged.search, len(merged.search.objectives) - 1)
    if record.report:
        _show_report(record.report)
    places = max(console.decimals(record.coefficients, 3), 2)
    pairs = zip(record.parents, record.coefficients, strict=True)
    console.table(
        f"Merged into {merged.path} ({record.method})",
        ["timesteps", "coefficient (other tensors)" if record.coefficients_for else "coefficient",
         "from"],
        [[":".join(map(str, parent["range"])), f"{w:.{places}f}", parent["path"]]
         for parent, w in sorted(pairs, key=lambda pair: pair[0]["range"])],
    )  # fmt: skip
    if record.adapter:
        console.note(
            f"{merged.path}: one LoRA of rank {record.adapter['rank']} at most, which keeps "
            f"{record.adapter['kept']:.2%} of the squared change"
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
        adapter=record.adapter,
    )  # fmt: skip


def _show_report(report: dict[str, Any]) -> None:
    """A table for each metric: value, difference to the base with its interval, gain kept; and
    where the models gained and lost, in per cent of the base's loss."""
    rows = report["rows"]
    for protocol in report["protocols"]:
        own = [(row["name"], row["metrics"][protocol["name"]]) for row in rows]
        halves = [_half(metric) for _, metric in own if _half(metric)]
        places = console.decimals(halves, 2) if halves else 4
        table = []
        for name, metric in own:
            shown, apart, kept = "not finite", "", metric["gain_kept"]
            if metric["value"] is not None:
                shown = f"{metric['value']:.{places}f}"
                apart = f"{metric['difference']:+.{places}f} ± {_half(metric):.{places}f}"
            share = "" if kept is None else f"{100 * kept:.0f} %"
            table.append([name, shown, "" if metric is own[0][1] else apart, share])
        console.table(
            f"{protocol['name']}: {protocol['num']} for each of {protocol['seeds']} report seeds",
            ["model", "value", "minus base (95 %)", "gain kept"],
            table,
        )
    loss, base = report["protocols"][0]["name"], rows[0]["metrics"]
    if spans := [metric for metric in base if metric.startswith(f"{loss} ")]:
        console.table(
            "Loss by range of timesteps, change against the base in %",
            ["model", *(span.removeprefix(f"{loss} ") for span in spans)],
            [[row["name"],
              *(f"{100 * row['metrics'][span]['difference'] / base[span]['value']:+.2f}"
                for span in spans)]
             for row in rows[1:] if row["metrics"][loss]["value"] is not None],
        )  # fmt: skip


def _half(metric: dict[str, Any]) -> float:
    """Half the width of the interval, 0 where there is none."""
    low, high = metric["interval"]
    return 0.0 if low is None else (high - low) / 2
