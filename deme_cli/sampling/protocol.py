"""The protocol card: everything that images depend on, so that two figures can be compared.

It goes into the `samples` artifact and under every distance that `deme eval` prints. Batch size and
device are not in it: images do not depend on them beyond rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deme_cli.artifacts import DenoiserRecord, ExpertRecord
from deme_cli.config import SampleConfig
from deme_cli.diffusion.schedule import FLOW
from deme_cli.sampling.flow_scheduler import is_flow
from deme_cli.sampling.scene import Scene, open_scene
from deme_cli.sampling.scheduler import build_scheduler, can_clip, name_sampler
from deme_cli.sampling.subjects import SUBJECT_FIELDS

_ASIDE = ("num", "source", "prompts")  # image i is the same whatever these say


def protocol_card(
    records: Sequence[DenoiserRecord],
    config: SampleConfig,
    *,
    scene: Scene | None = None,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """How, by which model and from which seed images are drawn; None where a field has no meaning.

    records: of one model, which then denoises all of [0, T), or of the experts of an ensemble in
    order of their ranges. Without a scene, `config` and their records make it. Raises ConfigError
    if the sampler does not fit the model.
    """
    first = records[0]
    scene = scene or open_scene(records, config)
    config = name_sampler(first, config)
    scheduler = build_scheduler(
        first.scheduler_config, config, lay_out=scene.lay_out, changes=scene.scheduler_changes
    )
    flow = is_flow(first.scheduler_config)
    horizon = first.num_train_timesteps
    spans = [[0, horizon]]
    if len(records) > 1:
        spans = [list(record.range) for record in records if isinstance(record, ExpertRecord)]
    return {
        "model": "ensemble" if len(records) > 1 else first.kind,
        "source": first.source,
        "fingerprints": [record.fingerprint for record in records],
        "companions": first.companions or None,
        "ranges": spans,
        "num_train_timesteps": horizon,
        "prediction_type": FLOW if flow else scheduler.config.prediction_type,
        "sampler": config.sampler,
        "steps": config.steps,
        "forwards": len(scheduler.timesteps) * (2 if scene.is_paired else 1),
        "spacing": None if flow else scheduler.config.timestep_spacing,
        "eta": config.eta if config.sampler == "ddim" else None,
        "clip_sample": scheduler.config.clip_sample if can_clip(type(scheduler)) else None,
        "guidance": scene.guidance,
        **{name: scene.card.get(name) for name in SUBJECT_FIELDS},
        "resolution": scene.resolution,
        "resize_to": scene.resize,
        "dtype": dtype,
        "seed": config.seed,
        "num": scene.num,
    }


def first_difference(card: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first field in which two cards promise different images, or None.

    How many images there are, what the model was imported from and where prompts lie are left out.
    """
    for name in [*card, *other]:
        if name not in _ASIDE and card.get(name) != other.get(name):
            return name
    return None
