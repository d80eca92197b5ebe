"""What the images of a source show: a caption of each, or its class. No image is read for it.

A source gives its raw values (`Annotations`); here they are required of every image, cleaned, and
classes that are names become numbers, in the order of the names. Nothing here tokenizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deme_cli.errors import ArtifactError

WANTED = ("nothing", "text", "class")
CAPTION_COLUMNS = ("text", "caption", "prompt")
LABEL_COLUMNS = ("label", "labels", "cls")


@dataclass(frozen=True)
class Annotations:
    """One raw value per image, None where there is none; `where` they come from, for messages.

    classes: all values that a whole dataset holds, where `values` are of one split of it.
    num_classes: where the source declares it. are_names: whether `10` is a name, too.
    """

    values: Sequence[Any]
    where: str
    classes: Sequence[Any] = ()
    num_classes: int | None = None
    are_names: bool = False


@dataclass(frozen=True)
class Subjects:
    """What each image shows: `captions` or `labels` (numbers below `num_classes`), never both."""

    captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    num_classes: int | None = None

    def fingerprint(self, images: str) -> str:
        """That of the images, joined with what they show where anything was asked for."""
        if not self.captions and not self.labels:
            return images
        shown = json.dumps([images, self.captions, self.labels, self.num_classes])
        return hashlib.sha256(shown.encode()).hexdigest()


def columns_for(wants: str, column: str | None) -> tuple[str, ...]:
    """The columns to look for: the one asked for, else those that usually hold such values."""
    if column is not None:
        return (column,)
    return CAPTION_COLUMNS if wants == "text" else LABEL_COLUMNS


def read_captions(found: Annotations, source: str, name: Callable[[int], str]) -> Subjects:
    """A caption of every image; of a list of captions, the first. `name(i)` is image i in messages.

    Raises ArtifactError naming the first image without one, or with one that is not text.
    """
    captions = [_first(value) for value in found.values]
    for index, caption in enumerate(captions):
        if caption is not None and not isinstance(caption, str):
            raise ArtifactError(
                f"{name(index)}: expected text in {found.where}, found {type(caption).__name__}; "
                f"name the column of the captions"
            )
    present = [caption is not None and bool(caption.strip()) for caption in captions]
    _require_all(present, "captions", found.where, source, name)
    return Subjects(captions=tuple(caption.strip() for caption in captions))


def read_labels(found: Annotations, source: str, name: Callable[[int], str]) -> Subjects:
    """The class of every image. Numbers stay; names are numbered in their sorted order.

    Raises ArtifactError naming the first image without a class, or with a value that is neither.
    """
    values = list(found.values) if found.are_names else [*map(_number_or_name, found.values)]
    present = [value is not None and value != "" and value != -1 for value in values]  # -1: hidden
    _require_all(present, "labels", found.where, source, name)
    for index, value in enumerate(values):
        if not isinstance(value, type(values[0])) or not _is_class(value):
            raise ArtifactError(
                f"{name(index)}: {found.values[index]!r} in {found.where} is no class; expected "
                f"whole numbers from 0, or names, throughout"
            )
    kind = type(values[0])
    known = {*values, *(v for v in map(_number_or_name, found.classes) if isinstance(v, kind))}
    if kind is str:
        numbers = {each: number for number, each in enumerate(sorted(known - {""}))}
        return Subjects(labels=tuple(numbers[value] for value in values), num_classes=len(numbers))
    count = max(known) + 1 if found.num_classes is None else found.num_classes
    return Subjects(labels=tuple(values), num_classes=count)


def _first(value: Any) -> Any:
    """The first of a list of captions, or the only one."""
    if isinstance(value, (list, tuple)):
        return value[0] if value else None
    return value


def _number_or_name(value: Any) -> Any:
    """Text that is a whole number as that number: a CSV knows no types."""
    if isinstance(value, str):
        text = value.strip()
        digits = text.removeprefix("-")
        return int(text) if digits.isascii() and digits.isdigit() else text
    return value


def _is_class(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and value >= 0)


def _require_all(
    present: Sequence[bool], what: str, where: str, source: str, name: Callable[[int], str]
) -> None:
    absent = len(present) - sum(present)
    if absent:
        raise ArtifactError(
            f"{source}: {what} missing for {absent} of {len(present)} images, the first "
            f"{name(present.index(False))}; looked in {where}; add them or remove the images"
        )
