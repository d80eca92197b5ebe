"""The head of the page: what the run is of, how far it is, and what is not there yet."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deme_cli.artifacts import (
    KINDS,
    BaseRecord,
    ExpertRecord,
    MergedRecord,
    SamplesRecord,
    TaskVectorRecord,
)
from deme_cli.console import plain, size_of
from deme_cli.reporting.folder import Artifact, Folder, is_whole
from deme_cli.reporting.tables import Table, plain_table, public_name


@dataclass(frozen=True)
class Missing:
    """What a reader might expect, and the command that makes it."""

    what: str
    command: str


def experts_of(folder: Folder) -> list[ExpertRecord]:
    """Records of the experts of a part of the timesteps, in order of their ranges."""
    parts = [record for _, record in folder.of(ExpertRecord) if not is_whole(record)]
    return sorted(parts, key=lambda record: (-(record.of or 0), *record.range))


def facts(folder: Folder) -> Iterator[tuple[str, str]]:
    """Base, experts, merged models and images, as far as there are any."""
    for artifact, base in folder.of(BaseRecord):
        yield artifact.stem, _of_base(artifact, base)
    known: list[ExpertRecord | MergedRecord] = [record for _, record in folder.of(ExpertRecord)]
    known += [record for _, record in folder.of(MergedRecord)]
    if known and not folder.of(BaseRecord):
        source, base_mark = public_name(known[0].source), known[0].base[:12]
        yield "base", f"{source}, {base_mark} (not in this folder)"
    if experts := experts_of(folder):
        ranges = dict.fromkeys(str(record.timesteps) for record in experts)
        shown = ", ".join(list(ranges)[:16]) + (", …" if len(ranges) > 16 else "")
        counted = str(len(experts))
        if len(experts) > len(ranges):
            counted += f" in {len(ranges)} ranges"
        yield "experts", f"{counted}: t in {shown}"
    if data := {str(r.data.get("source")): r.data for _, r in folder.of(ExpertRecord)}:
        yield "images", ", ".join(_of_images(source, one) for source, one in data.items())
    for artifact, merged in folder.of(MergedRecord):
        searched = (merged.search or {}).get("method")
        how = f"coefficients by {searched}" if searched else "given coefficients"
        yield artifact.stem, f"{merged.method} merge of {len(merged.parents)}, {how}"


def _of_images(source: str, data: Mapping[str, Any]) -> str:
    num = data.get("num")
    return public_name(source) + (f", {plain(num)} in training" if type(num) is int else "")


def _of_base(artifact: Artifact, record: BaseRecord) -> str:
    network = record.model_config.get("_class_name", "network")
    return (
        f"{public_name(record.source)}, {network}, {artifact.num_parameters:,} parameters, "
        f"T = {record.num_train_timesteps:,}, {record.fingerprint[:12]}"
    )


def missing(folder: Folder, *, has_table: bool, has_figures: bool, is_comparison: bool) -> list[
    Missing
]:  # fmt: skip
    """What is not there, in the order in which commands make it; nothing of a lone comparison."""
    if is_comparison and not folder.artifacts:
        return []
    found: list[Missing] = []
    if not folder.of(BaseRecord):
        found.append(Missing("the base", "deme split MODEL -n 4"))
    found += _missing_experts(folder)
    whole = {artifact.stem for artifact, _ in folder.of(ExpertRecord, BaseRecord)}
    curves = {path.name.removesuffix(".metrics.jsonl") for path in folder.metrics}
    if folder.of(ExpertRecord) and not curves & whole:
        found.append(Missing("curves of training", "deme finetune --range all"))
    if not folder.of(MergedRecord):
        found.append(Missing("a merged model", "deme merge ft_*.safetensors --search grid"))
    if not (folder.of(SamplesRecord) or folder.image_folders):
        models = [artifact for artifact, _ in folder.of(MergedRecord)]
        models += [artifact for artifact, _ in folder.of(BaseRecord)]
        name = _quoted(models[0]) if models else "merged.safetensors"
        found.append(Missing("images", f"deme sample {name}"))
    if not has_table:
        found.append(Missing("a table", "deme eval --fid REF --repeats 3 --output eval.json"))
    if not has_figures:
        found.append(Missing("figures of why it works", "deme analyze gradients"))
    return found


def _quoted(artifact: Artifact) -> str:
    name = artifact.name
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def _missing_experts(folder: Folder) -> Iterator[Missing]:
    experts = experts_of(folder)
    if not experts:
        yield Missing("experts", "deme finetune --range all")
        return
    counts = {record.of for record in experts if record.of}
    for count in sorted(counts):
        there = {record.index for record in experts if record.of == count}
        for index in range(1, min(count, 64) + 1):
            if index not in there:
                yield Missing(
                    f"expert {index} of {count}", f"deme finetune --range {index}/{count}"
                )


def artifact_table(folder: Folder) -> Table:
    """Every artifact that can be read: what it is, of what, how large."""
    rows = []
    names = {a.record.fingerprint: a.stem for a in reversed(folder.artifacts)}
    kinds = list(KINDS)
    for artifact in sorted(folder.artifacts, key=lambda a: kinds.index(a.record.kind)):
        record = artifact.record
        span = str(record.timesteps) if isinstance(record, ExpertRecord) else ""
        rows.append([
            artifact.name, record.kind, span, ", ".join(_parents(artifact, names)),
            size_of(artifact.num_bytes), record.fingerprint[:12], record.created_by,
        ])  # fmt: skip
    columns = ["file", "kind", "timesteps", "made of", "size", "fingerprint", "written by"]
    caption = f"{len(rows)} artifact{'s' * (len(rows) != 1)}"
    return plain_table(caption, columns, rows, words=(1, 2, 3, 5, 6))


def _parents(artifact: Artifact, names: dict[str, str]) -> list[str]:
    """Names of what an artifact was made of, or their fingerprints where they are elsewhere."""
    record = artifact.record
    marks: Any = []
    if isinstance(record, MergedRecord):
        marks = [p.get("fingerprint") for p in record.parents if isinstance(p, dict)]
    elif isinstance(record, TaskVectorRecord):
        marks = [record.expert]
    elif isinstance(record, ExpertRecord):
        marks = [record.base]
    elif isinstance(record, SamplesRecord):
        marks = record.protocol.get("fingerprints")
    marks = map(str, marks) if isinstance(marks, list) else ()
    return [names.get(mark, mark[:12]) for mark in marks]


def counts_of(folder: Folder) -> str:
    """Artifacts by kind, as a line says it: `1 base, 4 experts`."""
    counts = Counter(artifact.record.kind for artifact in folder.artifacts)
    plural = {"base": "bases", "merged": "merged", "samples": "samples", "statistics": "statistics"}
    return ", ".join(
        f"{count} {kind if count == 1 else plural.get(kind, f'{kind}s')}"
        for kind, count in counts.items()
    )
