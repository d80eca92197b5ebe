"""What the images of a source show: a caption of each, or its class. No image is read for it.

A source gives its raw values (`Annotations`); here they are required of every image and cleaned.
Classes whose names are whole numbers are these numbers; others are numbered in the order of their
names. Nothing here tokenizes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deme_cli.errors import ArtifactError

WANTED = ("nothing", "text", "class")
CAPTION_COLUMNS = ("text", "caption", "prompt")
LABEL_COLUMNS = ("label", "labels", "cls")


class NoAnnotations(ArtifactError):
    """Nothing is told of the images, in any of the ways that deme knows."""


@dataclass(frozen=True)
class Annotations:
    """One raw value per image, None where there is none; `where` they come from, for messages.

    classes: all values that a whole dataset holds, where `values` are of one split of it.
    names: of classes that the source declares, which `values` number. are_names: whether `10` is a
    name where others are words. repeats: how often training sees each image in an epoch.
    """

    values: Sequence[Any]
    where: str
    classes: Sequence[Any] = ()
    names: Sequence[str] = ()
    are_names: bool = False
    repeats: Sequence[int] = ()


@dataclass(frozen=True)
class Subjects:
    """What each image shows: `captions` or `labels` (numbers below `num_classes`), never both.

    classes: the names of the classes found, by number.
    """

    captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    num_classes: int | None = None
    classes: Mapping[int, str] = field(default_factory=dict)
    repeats: Sequence[int] = ()

    def fingerprint(self, images: str) -> str:
        """That of the images, joined with what they show where anything was asked for."""
        if not self.captions and not self.labels:
            return images
        shown: list[Any] = [images, self.captions, self.labels, self.num_classes]
        if self.repeats:
            shown.append(self.repeats)
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


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
    return Subjects(tuple(caption.strip() for caption in captions), repeats=found.repeats)


def read_labels(found: Annotations, source: str, name: Callable[[int], str]) -> Subjects:
    """The class of every image. Numbers stay; names are numbered in their sorted order.

    Raises ArtifactError naming the first image without a class, or with a value that is neither.
    """
    numbers = _declared(found.names)
    as_is = found.are_names and not all(
        isinstance(_number_or_name(value), int) for value in (*found.values, *found.classes)
    )
    values = list(found.values) if as_is else [*map(_number_or_name, found.values)]
    present = [value not in (None, "", -1) and value == value for value in values]  # -1: hidden
    _require_all(present, "labels", found.where, source, name)
    for index, value in enumerate(values):
        is_declared = not numbers or (type(value) is int and value < len(numbers))
        if not isinstance(value, type(values[0])) or not _is_class(value) or not is_declared:
            raise ArtifactError(
                f"{name(index)}: {found.values[index]!r} in {found.where} is no class; expected "
                f"whole numbers from 0{f' to {len(numbers) - 1}' * bool(numbers)}, or names, "
                f"throughout"
            )
    if numbers:
        values = [numbers[value] for value in values]
        return _labelled(values, dict(zip(numbers, found.names, strict=True)), len(numbers))
    kind = type(values[0])
    others = found.classes if as_is else map(_number_or_name, found.classes)
    known = sorted({*values, *(value for value in others if isinstance(value, kind))} - {""})
    if kind is str:
        number_of = {each: number for number, each in enumerate(known)}
        values = [number_of[value] for value in values]
        return _labelled(values, dict(enumerate(known)), len(known))
    return _labelled(values, {number: str(number) for number in known if number >= 0})


def _labelled(labels: list[int], classes: Mapping[int, str], num_classes: int = 0) -> Subjects:
    count = max(num_classes, max(classes) + 1)
    return Subjects(labels=tuple(labels), num_classes=count, classes=classes)


def _declared(names: Sequence[str]) -> list[int]:
    """The number of each declared class: that of its name where all are numbers, else its place.

    Names that count from 1 in order are left to their places, as datasets of such names mean them.
    """
    places = list(range(len(names)))
    if all(name.isascii() and name.isdigit() for name in names):
        numbers = [int(name) for name in names]
        if len(set(numbers)) == len(names) and numbers != [place + 1 for place in places]:
            return numbers
    return places


def describe_classes(found: Subjects, where: str) -> str:
    """`3 classes by the names of sub-folders: 0 cat, 1 dog, 2 emu`; of many, the first and last."""
    shown = [
        str(number) if name == str(number) else f"{number} {name}"
        for number, name in sorted(found.classes.items())
    ]
    listed = shown if len(shown) <= 12 else [*shown[:8], "…", *shown[-2:]]
    plural = "es" if len(shown) > 1 else ""
    return f"{len(shown)} class{plural} by {where}: {', '.join(listed)}"


def _first(value: Any) -> Any:
    """The first of a list of captions, or the only one."""
    if isinstance(value, (list, tuple)):
        return value[0] if value else None
    return value


def _number_or_name(value: Any) -> Any:
    """Text or a float that is a whole number as that number: a CSV knows no types."""
    if isinstance(value, str):
        text = value.strip()
        return int(float(text)) if re.fullmatch(r"-?[0-9]{1,15}(\.0+)?", text) else text
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
