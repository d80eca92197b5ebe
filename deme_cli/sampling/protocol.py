"""The protocol card: everything that images depend on, so that two figures can be compared.

It goes into the `samples` artifact and under every distance that `deme eval` prints. Batch size and
device are not in it: images do not depend on them beyond rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from deme_cli.config import SampleConfig
from deme_cli.records import DenoiserRecord, ExpertRecord
from deme_cli.sampling.scheduler import build_scheduler

_ASIDE = ("num", "source")  # image i is the same whatever these say


def protocol_card(
    records: Sequence[DenoiserRecord], config: SampleConfig, *, dtype: str = "fp32"
) -> dict[str, Any]:
    """How, by which model and from which seed images are drawn.

    records: of one model, which then denoises all of [0, T), or of the experts of an ensemble in
    order of their ranges. Raises ConfigError if the sampler does not fit the model.
    """
    first = records[0]
    scheduler = build_scheduler(first.scheduler_config, config)
    horizon = first.num_train_timesteps
    spans = [[0, horizon]]
    if len(records) > 1:
        spans = [list(record.range) for record in records if isinstance(record, ExpertRecord)]
    return {
        "model": "ensemble" if len(records) > 1 else first.kind,
        "source": first.source,
        "fingerprints": [record.fingerprint for record in records],
        "ranges": spans,
        "num_train_timesteps": horizon,
        "prediction_type": scheduler.config.prediction_type,
        "sampler": config.sampler,
        "steps": config.steps,
        "forwards": len(scheduler.timesteps),
        "spacing": scheduler.config.timestep_spacing,
        "eta": config.eta if config.sampler == "ddim" else None,
        "clip_sample": _clips(scheduler),
        "dtype": dtype,
        "seed": config.seed,
        "num": config.num,
    }


def _clips(scheduler: Any) -> bool | None:
    """Whether x_0 is clipped in every step; None for samplers that cannot clip."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return scheduler.config.clip_sample if "clip_sample" in known else None


def first_difference(card: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first field in which two cards promise different images, or None.

    How many images there are and what the model was imported from are left out.
    """
    for name in [*card, *other]:
        if name not in _ASIDE and card.get(name) != other.get(name):
            return name
    return None
