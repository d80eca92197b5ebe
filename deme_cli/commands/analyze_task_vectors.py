"""`deme analyze task-vectors`: how far each expert moved, and where experts pull apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.analysis import check_output, watch, write_analysis
from deme_cli.commands.options import ConfigPath, DryRun, Force, Json, Quiet, begin
from deme_cli.errors import MissingError
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.analysis.task_vectors import TaskVectors
    from deme_cli.merging.lineage import Family, Parent

_CLEAR = 1.1  # ratio of norms from which one is told to be larger


def task_vectors(
    experts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="EXPERT|VECTOR...",
            help=r"Experts or task vectors of one base \[default: ft_* beside that of deme.toml].",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            help=r"The base they were finetuned from \[default: that of deme.toml, or beside "
            "them].",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks/--no-ranks",
            help="Measure effective ranks; their time grows with the cubes of layer widths.",
        ),
    ] = True,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file; pictures go beside it.")
    ] = Path("task-vectors.json"),
    config: ConfigPath = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show how far each expert moved in each layer, and where experts pull against each other.

    Example: deme analyze task-vectors ft_*.safetensors
    """
    run = begin(config, quiet=quiet)
    pictures = check_output(output, force=force)

    from deme_cli.analysis.task_vectors import layers_of, measure_task_vectors
    from deme_cli.merging.lineage import find_base, open_family, open_parents

    parents = open_parents(experts or _own_experts(run), "expert", "task-vector")
    family = open_family(find_base(parents, run, base), parents)
    layers = layers_of(family)
    size = sum(spec.num_elements for spec in layers)
    what = f"{_count(parents)} of {family.base.path}: {len(layers)} tensors, {size:,} parameters"
    console.note(what)
    if dry_run:
        console.result_paths([], as_json=as_json, dry_run=True)
        return

    import json

    from deme_cli.analysis.document import document_bytes
    from deme_cli.analysis.task_vector_tables import tables
    from deme_cli.analysis.task_vectors_figure import draw_task_vectors

    found = watch(
        measure_task_vectors(family, output, ranks=ranks, force=force),
        "task vectors", size, "parameter",
    )  # fmt: skip
    reading = _reading(found)
    document = document_bytes("task-vectors", reading, _protocol(family, ranks), **tables(found))
    title = f"What {_count(parents)} changed: {family.base.path}"
    drawn = draw_task_vectors(found, title=title, foot=_foot(found, size))
    write_analysis(output, pictures, drawn, document)
    console.note(reading)
    written = json.loads(document)
    shown = {name: written[name] for name in ("experts", "pairs", "blocks")}
    console.result_paths([output, *pictures], as_json=as_json, reading=reading, **shown)


def _own_experts(run: RunFile) -> list[Path]:
    """The experts beside the base of deme.toml. Raises MissingError where there are none."""
    folder = run.base.parent
    found = sorted(folder.glob("ft_*.safetensors"))
    if not found:
        raise MissingError(
            f"{folder.resolve()}: no experts (ft_*.safetensors) there; name EXPERTs, or train "
            f"them with `deme finetune --range all`"
        )
    return found


def _count(parents: list[Parent]) -> str:
    return f"{len(parents)} experts" if len(parents) > 1 else "1 expert"


def _protocol(family: Family, ranks: bool) -> dict[str, Any]:
    experts = [family.parents[i] for i in family.by_range]
    return {
        "base": {"source": str(family.base.path), "fingerprint": family.base_record.fingerprint},
        "experts": [
            {
                "source": str(parent.path), "kind": parent.record.kind,
                "fingerprint": parent.record.fingerprint, "range": str(parent.record.timesteps),
                "steps": parent.record.steps, "p": parent.record.p,
                "projection": parent.record.projection,
            }
            for parent in experts
        ],
        "num_train_timesteps": family.base_record.num_train_timesteps,
        "ranks": ranks,
    }  # fmt: skip


def _foot(found: TaskVectors, size: int) -> str:
    """How much was measured, how boxes are drawn, and what they leave out or do not name."""
    from deme_cli.analysis.task_vector_numbers import norms, outliers

    parts = [
        f"{len(found.specs)} tensors, {size:,} parameters; boxes: quartiles, whiskers to 1.5 "
        f"quartile distances, dots beyond"
    ]
    if listed := outliers(found):
        row = listed[0]
        moved = f"{row['tensor']} moved {row['relative']:.2g} in {row['expert']}"
        parts.append(f"farthest dot: {moved}")
    if zeros := int((found.once["squares"] == 0).sum()):
        parts.append(f"tensors without relative norm, 0 in the base: {zeros}")
    still = zip(found.names, (norms(found) == 0).sum(axis=0).tolist(), strict=True)
    if shown := [f"{count} in {name}" for name, count in still if count]:
        parts.append(f"tensors that did not move: {', '.join(shown)}")
    half = (len(parts) + 1) // 2
    return "\n".join("; ".join(some) for some in (parts[:half], parts[half:]) if some)


def _reading(found: TaskVectors) -> str:
    """In a sentence: how far experts moved, whether more where t is large, and who disagrees."""
    from deme_cli.analysis.task_vector_numbers import median_ranks

    parts = [f"{_moved(found)}{_against_paper(found)}"]
    if len(found.names) > 1:
        parts.append(_disagreement(found))
    base, *ranks = median_ranks(found)
    known = [rank for rank in ranks if rank is not None and math.isfinite(rank)]
    if base is not None and known:
        low, high = f"{min(known):.2f}", f"{max(known):.2f}"
        span = low if low == high else f"{low} to {high}"
        parts.append(f"effective rank {span} of full (base {base:.2f})")
    return "; ".join(parts)


def _moved(found: TaskVectors) -> str:
    from deme_cli.analysis import task_vector_numbers as numbers

    _, relative = numbers.whole_norms(found)
    shares = zip(relative, found.names, strict=True)
    told = ", ".join(f"{100 * one:.2g} % ({name})" for one, name in shares)
    return f"task vectors are {told} of the base's norm"


def _against_paper(found: TaskVectors) -> str:
    """Whether those of large t moved farther, as the paper's figure 6(b) shows."""
    from deme_cli.analysis import task_vector_numbers as numbers

    low, high = numbers.halves(found)
    if not (low > 0 and math.isfinite(high)):
        return ""
    middle, ratio = found.family.base_record.num_train_timesteps // 2, high / low
    words = f"about as long above t = {middle} as below"
    if ratio >= _CLEAR:
        words = f"longer above t = {middle} than below, as in the paper"
    elif ratio <= 1 / _CLEAR:
        words = f"shorter above t = {middle} than below, unlike the paper"
    return f", {words} (ratio {ratio:.2f})"


def _disagreement(found: TaskVectors) -> str:
    """Cosine, sign conflict and the block with the most of it; experts without a direction."""
    from deme_cli.analysis import task_vector_numbers as numbers

    every, (norms, _) = numbers.pairs(found), numbers.whole_norms(found)
    still = [name for name, norm in zip(found.names, norms, strict=True) if norm == 0]
    told = f"; no cosine where nothing moved ({', '.join(still)})" if still else ""
    worst = numbers.most_opposed(found)
    if worst is None:
        return f"no two experts moved the same elements{told}"
    block, own = worst
    return (
        f"{_cosines(found.names, every.cosines.tolist())}; signs differ in "
        f"{100 * every.mean('opposed'):.0f} % of elements (50 % if unrelated), most in {block} "
        f"({100 * own.mean('opposed'):.0f} %); {numbers.directions(every.cosines):.1f} independent "
        f"directions of {len(found.names)}{told}"
    )


def _cosines(names: list[str], cosines: list[list[float]]) -> str:
    """The two pairs that are least and most alike."""
    known = sorted(
        (value, f"{names[j]} and {names[i]}")
        for i, row in enumerate(cosines)
        for j, value in enumerate(row[:i])
        if math.isfinite(value)
    )
    ends = known if len(known) == 1 else [known[0], known[-1]]
    return f"cosine {' to '.join(f'{value:.2f} ({pair})' for value, pair in ends)}"
