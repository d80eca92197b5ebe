"""`deme eval`: one table of figures, a row per model, ensemble or set of samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, OptionsOf, argument, command, flag
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.distributed import joined
from deme_cli.errors import ConfigError
from deme_cli.evaluation.protocols import describe_cards, settings_under_protocol
from deme_cli.files import require_output, write_whole


@command("pipeline config device dtype compile force dry_run", meets=True)
def evaluate(
    given: Annotated[Given, OptionsOf(EvalConfig, without=("batch_size",))],
    of_sampling: Annotated[Given, OptionsOf(SampleConfig, without=("num", "batch_size", "seed"))],
    common: Given,
    models: Annotated[list[str] | None, argument(
        "MODEL|EXPERT|SAMPLES",
        "Artifacts, diffusers folders, hub ids, folders of images. Experts that cover all "
        "timesteps are one row. Without any: base, experts and merged of this folder.",
    )] = None,
    weights: Annotated[
        Path | None, flag("--weights", "File of the Inception or CLIP features.")
    ] = None,
    max_fid: Annotated[float | None, flag(
        "--max-fid", "Largest distance allowed; exit code 6 if a row has more.",
    )] = None,
    batch_size: Annotated[int | None, flag(
        "--batch-size -b",
        "Images denoised, and images looked at, per forward; does not change the images.",
    )] = None,
    output: Annotated[
        Path | None, flag("--output -o", "Write the JSON document to a file, too.")
    ] = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Measure images of models: distances to reference images, CLIP score.

    Rows of one repeat start from the same noise; differences to the first row
    are paired. Processes of one launch (torchrun, accelerate launch, srun)
    share the images.

    Example: deme eval base.safetensors merged.safetensors --fid digits -n 2000 --repeats 3
    """
    run, force, dry_run = common["run"], common.pop("force"), common["dry_run"]
    size = {"batch_size": batch_size}
    settings, sampling = settings_under_protocol(run, {**given, **size}, {**of_sampling, **size})
    if max_fid is not None and not settings.fid:
        raise ConfigError("--max-fid needs --fid")
    if output is not None and joined().is_first:
        require_output(output, force=force)
    with console.showing() as progress:
        measured = deme_cli.evaluate(
            models or (), settings, sampling=sampling, weights=weights, progress=progress, **common
        )
    if dry_run and measured is not None and as_json:
        rows = [{"name": name} for name in measured.kinds]
        console.result_json({"dry_run": True, "rows": rows, "protocol": settings.protocol})
    elif not dry_run and measured is not None:
        _show(measured)
        document = measured.document
        if output is not None:
            text = json.dumps({"schema_version": console.SCHEMA_VERSION, **document}, indent=2)
            write_whole(output, [text.encode(), b"\n"])
        if as_json:
            console.result_json(document)
        elif output is not None:
            console.result_paths([output], as_json=False)
        if max_fid is not None:
            measured.require_at_most(max_fid)
    joined().wait()  # nobody ends well where the gate does not open


def _show(measured: deme_cli.Evaluation) -> None:
    """The table on stderr, and under it what its figures depend on."""
    figures = measured.figures
    first = next(iter(figures))
    paired = any(figure.difference for row in figures.values() for figure in row.values())
    has_room = len(figures[first]) == 1
    columns = [("row", list(figures))]
    for metric in figures[first]:
        column = [row[metric] for row in figures.values()]
        columns.append((metric, _values(column)))
        if paired:
            columns.append((f"minus {first}", _differences(column, has_room=has_room)))
    for_counts = [next(iter(row.values())) for row in figures.values()]
    counts = [f"{one.n} x {len(one.values)}".removesuffix(" x 1") for one in for_counts]
    columns.append(("images", counts))
    names, cells = zip(*columns, strict=True)
    console.table("", names, list(zip(*cells, strict=True)))
    for line in describe_cards(measured.protocols):
        console.note(line)
    for name, row in figures.items():
        for figure in row.values():
            if count := figure.details.get("truncated"):
                console.note(f"{name}: CLIP reads {count} of {figure.n} prompts without their end")
    if paired:
        where = "in brackets" if has_room else "in --json"
        console.note(
            f"± is the standard deviation over repeats; differences are paired by repeat, "
            f"{where} the 95 % interval of their mean"
        )


def _values(figures: Sequence[deme_cli.Figure]) -> list[str]:
    """A column of figures with their standard deviation over repeats."""
    known = [figure.sd for figure in figures if figure.sd]
    digits = console.decimals(known or [figure.value for figure in figures], 2 if known else 4)
    return [
        f"{figure.value:.{digits}f}" + ("" if figure.sd is None else f" ± {figure.sd:.{digits}f}")
        for figure in figures
    ]


def _differences(figures: Sequence[deme_cli.Figure], *, has_room: bool) -> list[str]:
    """A column of differences to the first row; their interval where the terminal has room."""
    differences = [figure.difference for figure in figures]
    digits = console.decimals([one.sd for one in differences if one], 2)
    cells = []
    for one in differences:
        told = "" if one is None else f"{one.mean:+.{digits}f} ± {one.sd:.{digits}f}"
        if one and has_room:
            low, high = one.interval
            told += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
        cells.append(told)
    return cells
