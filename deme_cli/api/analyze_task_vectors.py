"""`analyze_task_vectors`: how far each expert moved, and where experts pull apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deme_cli import console
from deme_cli.analysis_config import TaskVectorConfig
from deme_cli.api import analyzing
from deme_cli.errors import MissingError
from deme_cli.run_file import RunFile


def analyze_task_vectors(
    experts: Sequence[str | Path] = (),
    settings: TaskVectorConfig | None = None,
    *,
    base: Path | None = None,
    output: Path = Path("task-vectors.json"),
    run: RunFile | None = None, force: bool = False, dry_run: bool = False,
) -> analyzing.Analysis:  # fmt: skip
    """Measure how far each expert moved in each layer, and where experts pull against each other.

    experts: experts or task vectors of one base; without any, ft_* beside the base of `run`.
    base: None for that of `run`, or the one beside the experts.

    Needs no torch. The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or TaskVectorConfig()
    analyzing.check_output(output, force=force)

    from deme_cli.analysis.task_vectors.measure import layers_of, measure_task_vectors
    from deme_cli.merging.lineage import find_base, open_family, open_parents

    named = [Path(expert) for expert in experts] or _own_experts(run)
    parents = open_parents(named, "expert", "task-vector")
    family = open_family(find_base(parents, run, base), parents)
    layers = layers_of(family)
    size = sum(spec.num_elements for spec in layers)
    count = f"{len(parents)} experts" if len(parents) > 1 else "1 expert"
    console.note(f"{count} of {family.base.path}: {len(layers)} tensors, {size:,} parameters")
    if dry_run:
        return analyzing.nothing_written(output, dry_run=True)

    from deme_cli.analysis.task_vectors.picture import draw_task_vectors
    from deme_cli.analysis.task_vectors.reading import document_of, foot_of

    steps = measure_task_vectors(family, output, ranks=settings.ranks, force=force)
    found = analyzing.watch(steps, "task vectors", size, "parameter")
    title = f"What {count} changed: {family.base.path}"
    drawn = draw_task_vectors(found, title=title, foot=foot_of(found, size))
    shown = ("reading", "experts", "pairs", "blocks")
    return analyzing.write_analysis(output, drawn, document_of(found), shown)


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
