"""A row of the table, opened: experts to sample from, or finished images, with their card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deme_cli.artifacts import read_record
from deme_cli.config import SampleConfig
from deme_cli.data.images import ImageData, open_images
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.denoiser import sample_shape
from deme_cli.diffusion.locate import locate_model, read_json
from deme_cli.errors import ArtifactError
from deme_cli.evaluation.row_plans import ENSEMBLE, RowPlan, record_of_file
from deme_cli.records import SamplesRecord
from deme_cli.sampling.ensemble import open_ensemble, read_ensemble
from deme_cli.sampling.protocol import protocol_card
from deme_cli.sampling.sampler import SamplingExpert
from deme_cli.sampling.samples_folder import CARD_NAME
from deme_cli.timesteps import TimestepRange


@dataclass(frozen=True)
class Row:
    """A row that can be measured: `experts` to sample from, or `finished` images.

    `card` tells how the images are, or were, drawn.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]  # (C, H, W)
    card: dict[str, Any]
    experts: Sequence[SamplingExpert] = ()
    finished: ImageData | None = None


def open_rows(
    plans: Sequence[RowPlan], config: SampleConfig, *, device: str, dtype: str
) -> list[Row]:
    """All rows; raises ArtifactError where their images differ in size."""
    rows = [open_row(plan, config, device=device, dtype=dtype) for plan in plans]
    first = rows[0]
    for row in rows[1:]:
        if row.shape[1:] != first.shape[1:]:
            raise ArtifactError(
                f"{row.name} has {_size(row)} images, {first.name} {_size(first)}; "
                f"measure them in separate runs"
            )
    return rows


def _size(row: Row) -> str:
    return f"{row.shape[2]}x{row.shape[1]}"


def open_row(plan: RowPlan, config: SampleConfig, *, device: str, dtype: str) -> Row:
    """What a plan needs to be measured. Models in artifacts are loaded when they are sampled."""
    if plan.kind == "samples":
        return _open_samples(plan)
    if plan.kind == ENSEMBLE:
        paths = [Path(argument).expanduser() for argument in plan.arguments]
        records: list[Any] = [member.record for member in read_ensemble(paths)]
        experts = open_ensemble(paths, device=device, dtype=dtype)
    else:
        load = partial(open_denoiser, plan.arguments[0], device=device, dtype=dtype)
        place = locate_model(plan.arguments[0])
        if place.is_file():
            records = [read_record(place, "base", "expert", "merged")]
        else:  # a folder tells its fingerprint only by its weights
            denoiser = load()
            records, load = [denoiser.record], lambda: denoiser
        whole = TimestepRange(0, records[0].num_train_timesteps)
        experts = [SamplingExpert(whole, load)]
    card = protocol_card(records, config, dtype=dtype)
    kind = card["model"] if plan.kind == "model" else plan.kind
    return Row(plan.name, kind, sample_shape(records[0].model_config), card, experts)


def _open_samples(plan: RowPlan) -> Row:
    """Finished images: a samples artifact, or a folder of image files."""
    argument = plan.arguments[0]
    data = open_images(argument, shape=None, split="all")
    record = record_of_file(argument)
    if isinstance(record, SamplesRecord):
        card = record.protocol
    else:
        path = Path(argument).expanduser() / CARD_NAME
        card = read_json(path).get("protocol", {}) if path.is_file() else {}
    card = {**card, "images": data.fingerprint}
    return Row(plan.name, plan.kind, data.shape, card, finished=data)
