"""`deme analyze task-vectors`: how far each expert moved, and where experts pull apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.analysis import Output, check_output, watch, write_analysis
from deme_cli.commands.options import ConfigPath, DryRun, Force, Json, Quiet, begin
from deme_cli.errors import MissingError
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.merging.lineage import Family, Parent


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
    output: Output = Path("task-vectors.json"),
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
    check_output(output, force=force)

    from deme_cli.analysis.task_vectors.measure import layers_of, measure_task_vectors
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
    from deme_cli.analysis.task_vectors.picture import draw_task_vectors
    from deme_cli.analysis.task_vectors.reading import foot_of, read_task_vectors
    from deme_cli.analysis.task_vectors.tables import tables

    found = watch(
        measure_task_vectors(family, output, ranks=ranks, force=force),
        "task vectors", size, "parameter",
    )  # fmt: skip
    reading = read_task_vectors(found)
    document = document_bytes("task-vectors", reading, _protocol(family, ranks), **tables(found))
    title = f"What {_count(parents)} changed: {family.base.path}"
    drawn = draw_task_vectors(found, title=title, foot=foot_of(found, size))
    written = json.loads(document)
    shown = {name: written[name] for name in ("experts", "pairs", "blocks")}
    paths = write_analysis(output, drawn, document, reading)
    console.result_paths(paths, as_json=as_json, reading=reading, **shown)


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
