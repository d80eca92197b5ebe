"""A row of the table, opened: experts to sample from, or finished images, with their card.

Images of a row have prompts or classes where they were drawn for them: those of the scene for
models; for finished images those that came with them, else the ones given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.data.images import ImageData, open_images
from deme_cli.data.prompts import PromptSet
from deme_cli.diffusion.locate import read_json
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.evaluation.row_plans import ENSEMBLE, RowPlan, record_of_file
from deme_cli.records import DenoiserRecord, SamplesRecord
from deme_cli.sampling.ensemble import open_ensemble, read_ensemble
from deme_cli.sampling.protocol import protocol_card
from deme_cli.sampling.sampler import SamplingExpert
from deme_cli.sampling.samples_folder import CARD_NAME, read_subjects
from deme_cli.sampling.scene import Scene, open_scene
from deme_cli.sampling.single import open_single
from deme_cli.sampling.subjects import prompts_in_turn


@dataclass(frozen=True)
class Row:
    """A row that can be measured: `experts` to sample from in a `scene`, or `finished` images.

    `card` tells how the images are, or were, drawn; `prompts` and `classes` hold one per image.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]  # (C, H, W)
    card: dict[str, Any]
    experts: Sequence[SamplingExpert] = ()
    scene: Scene | None = None
    finished: ImageData | None = None
    prompts: Sequence[str] | None = None
    classes: Sequence[int] | None = None


@dataclass
class RowOpener:
    """Opens rows. Models of one base share a scene, so that its text encoders are loaded once."""

    sample: SampleConfig
    prompts: PromptSet | None = None
    pipeline: str | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    _scenes: dict[str, Scene] = field(default_factory=dict, init=False)

    def open(self, plan: RowPlan) -> Row:
        """What a plan needs to be measured. Models in artifacts are loaded when sampled."""
        return self._samples(plan) if plan.kind == "samples" else self._model(plan)

    def _model(self, plan: RowPlan) -> Row:
        if plan.kind == ENSEMBLE:
            paths = [Path(argument).expanduser() for argument in plan.arguments]
            records: list[DenoiserRecord] = [member.record for member in read_ensemble(paths)]
            experts = open_ensemble(paths, device=self.device, dtype=self.dtype)
        else:
            experts, record = open_single(plan.arguments[0], device=self.device, dtype=self.dtype)
            records = [record]
        scene = self._scene(records)
        card = protocol_card(records, self.sample, scene=scene, dtype=self.dtype)
        kind = card["model"] if plan.kind == "model" else plan.kind
        return Row(
            plan.name, kind, scene.image_shape, card, experts, scene,
            prompts=scene.prompts, classes=scene.classes,
        )  # fmt: skip

    def _scene(self, records: Sequence[DenoiserRecord]) -> Scene:
        first = records[0]
        key = json.dumps([first.source, first.model_config, first.companions], sort_keys=True)
        if key not in self._scenes:
            self._scenes[key] = open_scene(
                records, self.sample, pipeline=self.pipeline, device=self.device, dtype=self.dtype
            )
        return self._scenes[key]

    def _samples(self, plan: RowPlan) -> Row:
        """Finished images: a samples artifact, or a folder of image files."""
        argument = plan.arguments[0]
        data = open_images(argument, shape=None, split="all")
        record = record_of_file(argument)
        if isinstance(record, SamplesRecord):
            card, prompts, classes = record.protocol, record.prompts, record.classes
        else:
            folder = Path(argument).expanduser()
            card = _card_of(folder)
            prompts, classes = read_subjects(folder)
        _require_one_each(argument, "prompts", prompts, str, len(data))
        _require_one_each(argument, "classes", classes, int, len(data))
        if self.prompts is not None and prompts is None and classes is None:
            per_prompt = self.sample.per_prompt
            prompts, classes = prompts_in_turn(self.prompts, num=len(data), per_prompt=per_prompt)
            card = {**card, "prompts_sha256": self.prompts.sha256}
        card = {**card, "images": data.fingerprint}
        return Row(
            plan.name, plan.kind, data.shape, card, finished=data, prompts=prompts, classes=classes
        )


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
                f"{row.name}: nobody knows the prompts of its images, which --clip-score needs; "
                f"give them with --prompts FILE"
            )
        if config.accuracy and row.classes is None:
            raise ConfigError(
                f"{row.name}: nobody knows the classes of its images, which --accuracy needs; "
                f"give prompts that have classes, as --prompts digits or imagenet, or a table "
                f"with a column class"
            )
    return rows


def _size(row: Row) -> str:
    return f"{row.shape[2]}x{row.shape[1]}"
