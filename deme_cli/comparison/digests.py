"""What decides a result, and its digest: the same digest means that nothing needs to run again.

Settings count as they are in the end, defaults included, without those that leave results alone
(batch sizes of sampling, checkpoints, caches, the device) and without those that nothing reads. The
seed of training has a folder of its own. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from deme_cli.comparison.plan import MeasurePlan
from deme_cli.config import (
    EVAL_NUM,
    NOT_RESULT,
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
)

_OF_TASKS = ("clusters", "cluster_by", "multitask_lr", "multitask_every")
_LEFT_ALONE = {
    FinetuneConfig: (*NOT_RESULT, "seed", "snapshot_every", "ema_lengths"),
    MergeConfig: ("batch_size", "report", "report_num", "report_repeats", "report_seed"),
    SampleConfig: ("batch_size", "num", "seed"),  # the last two are those of [eval]
    EvalConfig: ("batch_size", "mixed"),
}


def deciding(config: FinetuneConfig | MergeConfig | SampleConfig | EvalConfig) -> dict[str, Any]:
    """The settings of `config` that decide a result."""
    left_alone = set(_LEFT_ALONE[type(config)])
    if isinstance(config, FinetuneConfig) and config.multitask == "none":
        left_alone |= set(_OF_TASKS)
    if isinstance(config, EvalConfig) and config.num is None:
        config = replace(config, num=EVAL_NUM)
    return {name: value for name, value in asdict(config).items() if name not in left_alone}


def deciding_measures(measures: Sequence[MeasurePlan]) -> list[dict[str, Any]]:
    """The settings of each measure that decide its figures; its name does, for it is shown."""
    return [
        {
            "name": measure.name,
            "sample": deciding(SampleConfig(**measure.sample)),
            "eval": deciding(EvalConfig(**measure.eval)),
        }
        for measure in measures
    ]


def as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True, default=list)


def digest(values: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell `values` from others."""
    return hashlib.blake2b(as_json(values).encode(), digest_size=4).hexdigest()
