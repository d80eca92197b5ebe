"""The model card of an exported pipeline: what it is, what it was made from, and what to doubt.

It tells only what the artifact's record says; quality is for `deme eval` to measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deme_cli.artifacts import DenoiserRecord, ExpertRecord, MergedRecord
from deme_cli.diffusion.backbones.known import backbone_of
from deme_cli.diffusion.schedule import alphas_config, flow_config, read_schedule
from deme_cli.fetch import is_hub_id

_METHOD = """\
Decouple-then-Merge (DeMe): the timesteps [0, T) of a pretrained diffusion model are divided into
ranges, one expert is finetuned per range, and the experts' task vectors are added to the pretrained
weights: theta = theta_base + sum_i w_i (theta_i - theta_base). One network comes out, of the size
and cost of the pretrained one."""

_OTHERS = """\
These hold for the tensors that none of the following patterns matches. Of the patterns the first
that matches a tensor's name decides:"""

_METHODS = "The method `{}` takes the place of the plain sum above, with these settings:"

_TRAINING = ("p", "steps", "seed")  # of an expert's record, where a merge has kept them

_LICENCE = """\
Unknown: the weights inherit the terms of the model they started from and of the training images.
Fill this in, here and in the lines at the top, before you share it."""

_CAVEATS = {
    "merged": """\
- A merged model is not the ensemble of its experts: it may gain less, or lose. No quality is
  claimed here; compare base, ensemble and merged with `deme eval` under one protocol.
- A Fréchet distance depends on the number of images, sampler, steps, resize, features and
  reference; a figure without its protocol is not comparable.
- Coefficients found by a search fit the seeds and data of the search; judge on others.""",
    "expert": """\
- This is one expert, finetuned for a part of the timesteps only. Used alone for all of them it is
  expected to be worse than the model it came from.""",
    "base": """\
- This is the starting point of finetuning, not a merged model.""",
}


# By what an image is drawn from: the pipeline's call, and the hub's name of the task.
_CALLS = {"nothing": "", "class": "class_labels=[207]", "text": '"a photo of a church"'}
_TASKS = {
    "nothing": "unconditional-image-generation",
    "class": "unconditional-image-generation",  # the hub has none for classes
    "text": "text-to-image",
}


def _wants(record: DenoiserRecord) -> str:
    return backbone_of(record.model_config).wants


def model_card(record: DenoiserRecord, path: Path) -> str:
    """The README.md of a pipeline made from the artifact at `path`."""
    backbone = backbone_of(record.model_config)
    parts = [
        _front_matter(record),
        f"# {path.stem}",
        "Exported by `deme` from an artifact of kind `" + record.kind + "`.",
        "## Method\n\n" + _METHOD,
        "## Model\n\n" + _table(_model_facts(record)),
    ]
    if isinstance(record, MergedRecord):
        parts.append("## Parents and coefficients\n\n" + _parents(record))
        if record.coefficients_for:
            parts.append(_OTHERS + "\n\n" + _finer(record))
        if record.method != "linear":
            parts.append(_METHODS.format(record.method) + "\n\n" + _block(_settings(record)))
        if record.search:
            parts.append("## Search of the coefficients\n\n" + _block(record.search))
        if record.report:
            parts.append("## Measured on other seeds and images\n\n" + _measured(record.report))
    if isinstance(record, ExpertRecord):
        parts.append("## Training\n\n" + _block({**record.training, "data": record.data}))
    parts += [
        "## Use\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")\n'
        f"image = {backbone.call.format(_CALLS[backbone.wants])}\n```",
        "## Caveats\n\n" + _CAVEATS[record.kind],
        "## Licence\n\n" + _LICENCE,
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(record: DenoiserRecord) -> str:
    """The lines that the hub reads."""
    lines = [
        "---",
        "library_name: diffusers",
        "license: unknown",
        f"pipeline_tag: {_TASKS[_wants(record)]}",
        *([f"base_model: {record.source}"] if is_hub_id(record.source) else []),
        "tags:",
        *(f"- {tag}" for tag in ("diffusers", "deme", "decouple-then-merge")),
        *(["- model-merging"] if isinstance(record, MergedRecord) else []),
        "---",
    ]
    return "\n".join(lines)


def _model_facts(record: DenoiserRecord) -> dict[str, Any]:
    scheduler = record.scheduler_config
    is_flow = flow_config(scheduler) is not None  # whose betas, if any, are unused
    facts: dict[str, Any] = {
        "starting point": _public_name(record.source),
        "network": record.model_config.get("_class_name"),
        "timesteps T": record.num_train_timesteps,
        "beta schedule": None if is_flow else alphas_config(scheduler)["beta_schedule"],
        "predicts": read_schedule(scheduler).prediction_type,
        "fingerprint of the weights": record.fingerprint,
        "written by": record.created_by,
    }
    if isinstance(record, MergedRecord):
        facts |= {
            "fingerprint of the base": record.base,
            "merge": record.method,
            "projection while finetuning": record.projection,
        }
    if isinstance(record, ExpertRecord):
        facts |= {
            "fingerprint of the base": record.base,
            "range of timesteps": str(record.timesteps),
            "p": record.p,
            "updates": record.steps,
            "seed": record.seed,
            "projection": record.projection,
        }
    return facts


def _parents(record: MergedRecord) -> str:
    """A row per parent; how it was trained where the record tells."""
    told = [name for name in _TRAINING if all(name in parent for parent in record.parents)]
    rows = [
        (f"{parent['range'][0]}:{parent['range'][1]}", f"{w:g}", *(str(parent[n]) for n in told),
         parent["kind"], parent["fingerprint"][:16], _public_name(parent["path"]))
        for parent, w in zip(record.parents, record.coefficients, strict=True)
    ]  # fmt: skip
    return _rows(("timesteps", "coefficient", *told, "kind", "fingerprint", "file"), rows)


def _finer(record: MergedRecord) -> str:
    """The coefficients by pattern, one column per parent."""
    head = ("tensors", *(f"{p['range'][0]}:{p['range'][1]}" for p in record.parents))
    found = record.coefficients_for.items()
    return _rows(head, [(f"`{glob}`", *(f"{w:g}" for w in values)) for glob, values in found])


def _settings(record: MergedRecord) -> dict[str, Any]:
    """Those of the method; of images on somebody's machine the name alone."""
    told = {"data": _public_name(record.settings["data"])} if "data" in record.settings else {}
    return {**record.settings, **told}


def _measured(report: Mapping[str, Any]) -> str:
    """A row per model with its value of each metric, ranges of timesteps left out."""
    metrics = [name for name in report["rows"][0]["metrics"] if " " not in name]
    rows = []
    for row in report["rows"]:
        values = [row["metrics"][name]["value"] for name in metrics]
        shown = ("not finite" if value is None else f"{value:.5g}" for value in values)
        rows.append((row["name"], *shown))
    return _rows(("model", *metrics), rows)


def _public_name(source: str) -> str:
    """A hub id as it is; of a path on somebody's machine only the last part."""
    return source if is_hub_id(source) else Path(source).name


def _table(facts: Mapping[str, Any]) -> str:
    return _rows(("", ""), [(name, str(value)) for name, value in facts.items()])


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _block(document: Mapping[str, Any]) -> str:
    """A record as JSON; long lists are cut, and say so."""
    cut = {
        name: [*value[:20], f"... {len(value) - 20} more in the artifact"]
        if isinstance(value, list) and len(value) > 20
        else value
        for name, value in document.items()
    }
    return f"```json\n{json.dumps(cut, indent=2)}\n```"
