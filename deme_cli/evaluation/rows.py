"""A row of the table, opened: experts to sample from, or finished images, with their card.

Images of a row have prompts or classes where they were drawn for them: as drawn, for
models; for finished images those that came with them, else the ones given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from deme_cli import console
from deme_cli.artifacts import DenoiserRecord, SamplesRecord
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.data.captions import NoAnnotations
from deme_cli.data.images import ImageData, open_images
from deme_cli.data.prompts import PromptSet
from deme_cli.diffusion.model_files import read_json
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.evaluation.row_plans import ENSEMBLE, RowPlan, record_of_file
from deme_cli.run_folder import CARD_NAME
from deme_cli.sampling.conditioning import (
    Conditioning,
    open_conditioning,
    prompts_in_turn,
    protocol_card,
)
from deme_cli.sampling.ensemble import SamplingExpert, open_ensemble, open_single, read_ensemble


@dataclass(frozen=True)
class Row:
    """A row that can be measured: `experts` to sample from, or `finished` images.

    `card` tells how the images are, or were, drawn; `prompts` and `classes` hold one per image.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]  # (C, H, W)
    card: dict[str, Any]
    experts: Sequence[SamplingExpert] = ()
    conditioning: Conditioning | None = None
    finished: ImageData | None = None
    prompts: Sequence[str] | None = None
    classes: Sequence[int] | None = None


@dataclass
class RowOpener:
    """Opens rows. Models of one base share a conditioning, its text encoders loaded once.

    wants: what of finished images is to be known, `text` or `class`.
    """

    sample: SampleConfig
    prompts: PromptSet | None = None
    wants: Sequence[str] = ()
    pipeline: str | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    _conditionings: dict[str, Conditioning] = field(default_factory=dict, init=False)

    def open(self, plan: RowPlan) -> Row:
        """What a plan needs to be measured. Models in artifacts are loaded when sampled."""
        return self._samples(plan) if plan.kind == "samples" else self._model(plan)

    def _model(self, plan: RowPlan) -> Row:
        if plan.kind == ENSEMBLE:
            paths = [Path(argument).expanduser() for argument in plan.arguments]
            records: list[DenoiserRecord] = [member.record for member in read_ensemble(paths)]
            experts = open_ensemble(paths, device=self.device, dtype=self.dtype)
        else:
            experts, record = open_single(
                plan.arguments[0], pipeline=self.pipeline, device=self.device, dtype=self.dtype
            )
            records = [record]
        conditioning = self._conditioning(records)
        card = protocol_card(records, self.sample, conditioning=conditioning, dtype=self.dtype)
        kind = card["model"] if plan.kind == "model" else plan.kind
        return Row(
            plan.name, kind, conditioning.image_shape, card, experts, conditioning,
            prompts=conditioning.prompts, classes=conditioning.classes,
        )  # fmt: skip

    def _conditioning(self, records: Sequence[DenoiserRecord]) -> Conditioning:
        first = records[0]
        key = json.dumps([first.source, first.model_config, first.companions], sort_keys=True)
        if key not in self._conditionings:
            self._conditionings[key] = open_conditioning(
                first, self.sample, pipeline=self.pipeline, device=self.device, dtype=self.dtype
            )
        return self._conditionings[key]

    def _samples(self, plan: RowPlan) -> Row:
        """Finished images: a samples artifact, or a folder of image files."""
        argument = plan.arguments[0]
        data = open_images(argument, shape=None, split="all")
        record = record_of_file(argument)
        prompts: Sequence[str] | None = None
        classes: Sequence[int] | None = None
        if isinstance(record, SamplesRecord):
            card, prompts, classes = record.protocol, record.prompts, record.classes
            _require_one_each(argument, "prompts", prompts, str, len(data))
            _require_one_each(argument, "classes", classes, int, len(data))
        else:
            card = _card_of(Path(argument).expanduser())
            if "text" in self.wants and (told := _told(argument, "text")):
                prompts = told.captions(range(len(told)))
        if self.wants and self.prompts is not None and prompts is None and classes is None:
            data, prompts, classes = pair(data, self.prompts, per_prompt=self.sample.per_prompt)
            card = {**card, "prompts_sha256": self.prompts.sha256}
        elif "class" in self.wants and classes is None and (told := _told(argument, "class")):
            classes = told.labels(range(len(told)))
        card = {**card, "images": data.fingerprint}
        return Row(
            plan.name, plan.kind, data.shape, card, finished=data, prompts=prompts, classes=classes
        )


def _told(argument: str, wants: str) -> ImageData | None:
    """The images of a folder with what lies beside them tells of them, if anything does."""
    try:
        return open_images(argument, shape=None, split="all", wants=wants, keep=False)
    except NoAnnotations:
        return None


def pair(
    data: ImageData, found: PromptSet, *, per_prompt: int
) -> tuple[ImageData, list[str], list[int] | None]:
    """The images that prompts are for, and the prompt and class of each.

    By the names of files, where the prompts have any, else in order: of images the first ones.
    Raises ArtifactError where names do not fit, ConfigError for fewer images than prompts.
    """
    names = data.file_names()
    if found.files is not None and names is not None:
        chosen, rows = _by_name(data.source, found, names)
        classes = None if found.classes is None else [found.classes[row] for row in rows]
        data = data if len(chosen) == len(data) else data.select(chosen)
        return data, [found.prompts[row] for row in rows], classes
    total = len(data) if found.cycles else len(found) * per_prompt
    if len(data) < total:
        raise ConfigError(
            f"{data.source} has {len(data)} images, {found.source} prompts for {total}, and "
            f"nothing tells which belong together; give the prompts of these images, or a table "
            f"with a column file_name"
        )
    return data, *prompts_in_turn(found, num=total, per_prompt=per_prompt)


def _by_name(source: str, found: PromptSet, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The numbers of the images that rows name, and those of their rows."""
    assert found.files is not None
    rows: dict[str, int] = {}
    for row, file in enumerate(found.files):
        if file is None:
            raise ArtifactError(f"{found.source}: row {row + 1} has no file_name")
        first = rows.setdefault(os.path.normpath(file.replace("\\", "/")), row)
        if found.prompts[first] != found.prompts[row]:
            raise ArtifactError(
                f"{found.source}: rows {first + 1} and {row + 1} name {file} with two prompts; "
                f"keep one"
            )
    if not rows.keys() & set(names):  # names as seen from another folder
        rows = {PurePosixPath(file).name: row for file, row in rows.items()}
        names = [PurePosixPath(name).name for name in names]
        if len(rows) < len(set(found.files)) or len(set(names)) < len(names):
            rows = {}
    chosen = [number for number, name in enumerate(names) if name in rows]
    if not chosen:
        raise ArtifactError(
            f"{found.source}: its column file_name names none of the images of {source}, as "
            f"{found.files[0]} and {names[0]}"
        )
    if len(chosen) < max(len(names), len(rows)):
        console.note(
            f"{source}: {len(chosen)} of its {len(names)} images are taken, which "
            f"{found.source} names in {len(rows)} rows"
        )
    return chosen, [rows[names[number]] for number in chosen]


def _require_one_each(
    where: str, name: str, subjects: Sequence[Any] | None, kind: type, count: int
) -> None:
    """Check that there is one prompt or class for every image. Raises ArtifactError."""
    if subjects is None:
        return
    if len(subjects) != count or not all(type(subject) is kind for subject in subjects):
        raise ArtifactError(
            f"{where}: expected {count} {name}, one for each image, found {len(subjects)}"
        )


def _card_of(folder: Path) -> dict[str, Any]:
    """The protocol card that `deme sample` left in a folder of images; empty without one."""
    path = folder / CARD_NAME
    card = read_json(path).get("protocol", {}) if path.is_file() else {}
    if not isinstance(card, dict):
        raise ArtifactError(f"{path}: expected a table under protocol, found {card!r:.40}")
    return card


def open_rows(plans: Sequence[RowPlan], opener: RowOpener, config: EvalConfig) -> list[Row]:
    """All rows. Raises ArtifactError where their images differ in size, ConfigError where one lacks
    the prompts or classes that it is to be measured by."""
    rows = [opener.open(plan) for plan in plans]
    first = rows[0]
    for row in rows:
        if row.shape[1:] != first.shape[1:]:
            raise ArtifactError(
                f"{row.name} has {_size(row)} images, {first.name} {_size(first)}; "
                f"measure them in separate runs"
            )
        if config.clip_score and row.prompts is None:
            raise ConfigError(
                f"{row.name}: the prompts of its images are not known, --clip-score needs them; "
                f"give them with --prompts FILE"
            )
        if config.accuracy and row.classes is None:
            raise ConfigError(
                f"{row.name}: the classes of its images are not known, --accuracy needs them; "
                f"give prompts that have classes, as --prompts digits or imagenet, or a table "
                f"with a column class"
            )
    return rows


def _size(row: Row) -> str:
    return f"{row.shape[2]}x{row.shape[1]}"
