"""The command lines that made a run folder, told from the records of what lies in it.

Flags are those of the settings. A setting appears where it differs from its default, or from what
`deme.toml` would give instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.config import CONFIG_NAME, DataConfig, FinetuneConfig, MergeConfig, SplitConfig
from deme_cli.errors import DemeError
from deme_cli.records import BaseRecord, ExpertRecord, MergedRecord, SamplesRecord, TaskVectorRecord
from deme_cli.reporting.command_words import (
    Names,
    command_line,
    output_words,
    path_word,
    setting_words,
    word,
)
from deme_cli.reporting.folder import is_whole
from deme_cli.reporting.protocol_lines import analysing, measuring, sampling
from deme_cli.run_file import RunFile, read_run_file

if TYPE_CHECKING:
    from deme_cli.reporting.folder import Artifact, Folder

_DAMAGED = (DemeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def command_lines(folder: Folder) -> list[str]:
    """Command lines in the order of the pipeline, quoted for a shell; none for what is damaged."""
    run = _run_file(folder.path)
    names = {a.record.fingerprint: a.name for a in reversed(folder.artifacts)}
    makers: tuple[Callable[[Folder, RunFile, Names], Iterator[list[str]]], ...] = (
        _splits, _trainings, _vectors, _merges, _samples, _evaluations, _analyses,
    )  # fmt: skip
    lines: list[str] = []
    for maker in makers:
        try:
            for words in maker(folder, run, names):
                lines.append(command_line(words))  # those before a damaged one stay
        except _DAMAGED:
            continue  # a record of another shape: the page tells of it where it shows it
    return lines


def _run_file(path: Path) -> RunFile:
    """The settings of the folder, the defaults where there are none that can be read."""
    try:
        if (path / CONFIG_NAME).is_file():
            return read_run_file(path / CONFIG_NAME)
    except DemeError:
        pass
    return RunFile(path, {})


def _splits(folder: Folder, run: RunFile, names: Names) -> Iterator[list[str]]:
    for artifact, record in folder.of(BaseRecord):
        model = str(run.tables.get("model", {}).get("source") or record.source)
        if record.training and not run.tables.get("model", {}).get("source"):
            usual = output_words(artifact.name, "base.safetensors")
            yield ["finetune", "--from-scratch", "FILE", *usual]
            continue
        split = run.settings(SplitConfig)
        counts = [one.of for _, one in folder.of(ExpertRecord) if one.of and one.of > 1]
        count = split.n if "split" in run.tables else max(counts, default=split.n)
        words = ["split", path_word(model), "-n", str(count)]
        words += ["--by", split.by] if split.by != "uniform" else []
        data = run.settings(DataConfig).source
        yield [*words, *(["--data", path_word(data)] if data and data != record.source else [])]


def _trainings(folder: Folder, run: RunFile, names: Names) -> Iterator[list[str]]:
    """One line for all ranges where they were trained alike, else one for each expert."""
    lines: dict[tuple[str, ...], list[tuple[Artifact, ExpertRecord]]] = {}
    for artifact, record in sorted(folder.of(ExpertRecord), key=lambda one: is_whole(one[1])):
        lines.setdefault(tuple(_training(record, run)), []).append((artifact, record))
    for words, members in lines.items():
        named = {r.index for a, r in members if r.of and a.name == f"ft_{r.label}.safetensors"}
        counts = {record.of for _, record in members}
        count = counts.pop() if len(counts) == 1 else None
        if count and count > 1 and named == set(range(1, count + 1)):
            yield ["finetune", "--range", "all", *words]
            continue
        for artifact, record in members:
            span = f"{record.index}/{record.of}" if record.of else str(record.timesteps)
            usual = f"ft_{record.label}.safetensors"
            yield ["finetune", "--range", span, *words, *output_words(artifact.name, usual)]


def _training(record: ExpertRecord, run: RunFile) -> list[str]:
    """The options that trained an expert, without its range and its name."""
    words = setting_words(FinetuneConfig, run, record.training)
    source, flip = str(record.data.get("source", "")), record.training.get("flip")
    images: dict[str, Any] = {"source": source, "crop": record.training.get("crop")}
    if isinstance(flip, bool) and flip != (source != "digits"):  # else as it is by itself
        images["horizontal_flip"] = flip
    if source == run.settings(DataConfig).source:
        del images["source"]
    words += setting_words(DataConfig, run, images)
    dtype = record.training.get("dtype", "fp32")
    return words + (["--dtype", str(dtype)] if dtype != "fp32" else [])


def _vectors(folder: Folder, run: RunFile, names: Names) -> Iterator[list[str]]:
    made_of = [record.expert for _, record in folder.of(TaskVectorRecord)]
    if experts := [path_word(names[expert]) for expert in made_of if expert in names]:
        yield ["task-vector", *experts]


def _merges(folder: Folder, run: RunFile, names: Names) -> Iterator[list[str]]:
    for artifact, record in folder.of(MergedRecord):
        parents = [
            path_word(names.get(parent["fingerprint"], Path(parent["path"]).name))
            for parent in record.parents
        ]
        words = ["merge", *parents, *_merging(record, run)]
        yield [*words, *output_words(artifact.name, "merged.safetensors")]


def _merging(record: MergedRecord, run: RunFile) -> list[str]:
    """The options of a merge besides its parents: given coefficients, a search, or a method."""
    search = record.search or {}
    values: dict[str, Any] = {"method": record.method, **record.settings}
    if "seed" in values:
        values["mask_seed"] = values.pop("seed")
    values |= _reporting(record)
    if search.get("method") == "post-hoc EMA":
        return ["--ema-length", word(search["ema_length"])]
    if not search:
        words = setting_words(MergeConfig, run, values)
        equal = [1 / len(record.parents)] * len(record.parents)
        if record.method in ("linear", "ties", "dare", "slerp") and record.coefficients != equal:
            words += ["-w", ",".join(map(word, record.coefficients))]
        for glob, numbers in record.coefficients_for.items():
            words += ["--coefficients-for", f"{glob}={','.join(map(word, numbers))}"]
        return words
    objective = _objective(search)
    values |= {
        "search": search["method"], "objective": objective, "per": search.get("per"),
        "seed": search.get("seed"), "num": None if "," in objective else search.get("num"),
    }  # fmt: skip
    if search["method"] == "grid":
        values["grid"] = _shared(search["grid"])
    elif search.get("bounds") and _shared(search["bounds"]) != [-0.5, 1.5]:
        values["bounds"] = _shared(search["bounds"])
    protocol = search.get("protocol") or {}
    if objective.split(",")[-1].startswith(("fid", "kid")):
        values["steps"] = protocol.get("steps")
    elif "," not in objective:
        values["loss_range"] = protocol.get("range")
    words, dtype = setting_words(MergeConfig, run, values), protocol.get("dtype", "fp32")
    return words + (["--dtype", str(dtype)] if dtype != "fp32" else [])


def _reporting(record: MergedRecord) -> dict[str, Any]:
    """Whether it was measured afterwards, which it is by itself after a search alone, and how."""
    if not record.report:
        return {"report": False} if record.search else {}
    last = record.report["protocols"][-1]
    told: dict[str, Any] = {"report_seed": last["seed"], "report_repeats": last["seeds"]}
    if not record.search:
        told |= {"report": True, "report_num": last["num"]}
    elif last["num"] != record.search.get("num"):
        told["report_num"] = last["num"]
    return told


def _objective(search: Mapping[str, Any]) -> str:
    """`fid`, or the whole ladder as `loss@2048:64,fid@500:10`."""
    rungs = search.get("rungs") or [{"objective": search["objective"]}]
    words = [_asked(str(rung["objective"])) for rung in rungs]
    if len(rungs) == 1:
        return words[0]
    ladder = zip(words, rungs, strict=True)
    return ",".join(f"{word}@{rung['num']}:{rung['keep']}" for word, rung in ladder)


def _asked(metric: str) -> str:
    """The objective that a search is asked for, by the metric it is recorded as."""
    if metric.startswith(("frechet", "fid")):
        return "fid"
    return "kid" if metric.startswith(("kernel", "kid")) else metric


def _shared(lists: Sequence[Any]) -> Sequence[Any]:
    """One list where that of every expert is the same."""
    return lists[0] if all(one == lists[0] for one in lists) else lists


def _samples(folder: Folder, run: RunFile, names: Names) -> Iterator[list[str]]:
    for artifact, record in folder.of(SamplesRecord):
        yield sampling(record.protocol, artifact.name, run, names)


def _evaluations(folder: Folder, run: RunFile, names: Names) -> Iterator[list[str]]:
    for name, document in folder.documents.items():
        is_table = "rows" in document and "schema_version" in document
        if is_table and "kind" not in document and "columns" not in document:
            yield measuring(document["rows"], name, run, names)


def _analyses(folder: Folder, run: RunFile, names: Names) -> Iterator[list[str]]:
    for name, document in folder.documents.items():
        if words := analysing(document, name, run, names):
            yield words
