"""The model card of an exported pipeline: what it is, what it was made from, and what to doubt.

It tells only what the artifact's record says; quality is for `deme eval` to measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
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


# By what an image is drawn from: the pipeline's call, and the hub's name of the task, which has
# none for classes.
_CALLS = {"nothing": "", "class": "class_labels=[207]", "text": '"a photo of a church"'}
_TASKS = {"text": "text-to-image"}


def model_card(record: DenoiserRecord, path: Path) -> str:
    """The README.md of a pipeline made from the artifact at `path`."""
    backbone = backbone_of(record.model_config)
    is_merged = isinstance(record, MergedRecord)
    front = [  # what the hub reads
        "---", "library_name: diffusers", "license: unknown",
        f"pipeline_tag: {_TASKS.get(backbone.wants, 'unconditional-image-generation')}",
        *([f"base_model: {record.source}"] if is_hub_id(record.source) else []),
        "tags:", "- diffusers", "- deme", "- decouple-then-merge",
        *(["- model-merging"] if is_merged else []), "---",
    ]  # fmt: skip
    facts = [(name, str(value)) for name, value in _model_facts(record).items()]
    parts = [
        "\n".join(front),
        f"# {path.stem}",
        "Exported by `deme` from an artifact of kind `" + record.kind + "`.",
        "## Method\n\n" + _METHOD,
        "## Model\n\n" + _table(("", ""), facts),
    ]
    if isinstance(record, MergedRecord):
        parts += _merge_parts(record)
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
        facts |= {"fingerprint of the base": record.base, "merge": record.method,
                  "projection while finetuning": record.projection}  # fmt: skip
    if isinstance(record, ExpertRecord):
        facts |= {"fingerprint of the base": record.base,
                  "range of timesteps": str(record.timesteps), "p": record.p,
                  "updates": record.steps, "seed": record.seed,
                  "projection": record.projection}  # fmt: skip
    return facts


def _merge_parts(record: MergedRecord) -> Iterator[str]:
    """What was merged, how, and what was measured; training where the record tells of it."""
    ranges = [f"{parent['range'][0]}:{parent['range'][1]}" for parent in record.parents]
    told = [name for name in _TRAINING if all(name in parent for parent in record.parents)]
    rows = [
        (span, f"{w:g}", *(str(parent[n]) for n in told), parent["kind"],
         parent["fingerprint"][:16], _public_name(parent["path"]))
        for span, parent, w in zip(ranges, record.parents, record.coefficients, strict=True)
    ]  # fmt: skip
    columns = ("timesteps", "coefficient", *told, "kind", "fingerprint", "file")
    yield "## Parents and coefficients\n\n" + _table(columns, rows)
    if record.coefficients_for:
        finer = [(f"`{glob}`", *(f"{w:g}" for w in values))
                 for glob, values in record.coefficients_for.items()]  # fmt: skip
        yield _OTHERS + "\n\n" + _table(("tensors", *ranges), finer)
    if record.method != "linear":
        settings = dict(record.settings)
        if "data" in settings:
            settings["data"] = _public_name(settings["data"])
        yield _METHODS.format(record.method) + "\n\n" + _block(settings)
    if record.search:
        yield "## Search of the coefficients\n\n" + _block(record.search)
    if record.report:  # ranges of timesteps left out
        metrics = [n for n in record.report["rows"][0]["metrics"] if " " not in n]
        measured = [
            (row["name"], *(_number(row["metrics"][name]["value"]) for name in metrics))
            for row in record.report["rows"]
        ]
        yield "## Measured on other seeds and images\n\n" + _table(("model", *metrics), measured)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"


def _public_name(source: str) -> str:
    """A hub id as it is; of a path on somebody's machine only the last part."""
    return source if is_hub_id(source) else Path(source).name


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
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
