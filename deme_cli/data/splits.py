"""Which images are held out, as names of folders and files say: the splits of `datasets`.

Nothing here looks into a file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_WORDS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
_TRAIN_WORDS = ("train", "training")  # both as `datasets` knows splits of folders and files
_BETWEEN = "[-._ 0-9]"


@dataclass(frozen=True)
class Splits:
    """The images of a folder that are in a split, those of them held out, and the folders of both.

    Without any split, `held_out` and `folders` are empty.
    """

    images: tuple[Path, ...]
    held_out: frozenset[Path] = frozenset()
    folders: frozenset[Path] = frozenset()


def find_splits(root: Path, images: Sequence[Path]) -> Splits:
    """The splits that folders below `root` say; else those of the names, where all say one.

    Where folders to train on lie beside those held out, images in neither are in no split.
    """
    parents = {image.parent for image in images}
    held, train = _split_folders(root, parents)
    inside = {
        parent: [folders for folders in (held, train) if not folders.isdisjoint(_up(parent))]
        for parent in parents
    }
    held_out = {image for image in images if held and held in inside[image.parent]}
    kept = [image for image in images if inside[image.parent]] if train else images
    if not held and all(_speaks_of(image.name, HELD_OUT_WORDS + _TRAIN_WORDS) for image in images):
        held_out = {image for image in images if not _speaks_of(image.name, _TRAIN_WORDS)}
    if not held_out or len(held_out) == len(kept):
        return Splits(tuple(images))
    return Splits(tuple(kept), frozenset(held_out), frozenset(held | train))


def _split_folders(root: Path, parents: Collection[Path]) -> tuple[set[Path], set[Path]]:
    """Of the folders that hold images: those held out, and those to train on beside them.

    One named `test2017` is held out. One named `test_set` is where `training_set` lies beside it,
    or no folder that says neither; else it may be a class, as `test tube` is.
    """
    siblings: dict[Path, set[Path]] = {}
    for folder in {folder for parent in parents for folder in _up(parent)}:
        if root in folder.parents:
            siblings.setdefault(folder.parent, set()).add(folder)
    held_out, to_train = set(), set()
    for folders in siblings.values():
        train = {folder for folder in folders if _speaks_of(folder.name, _TRAIN_WORDS)}
        test = {f for f in folders - train if _speaks_of(f.name, HELD_OUT_WORDS)}
        if not train or folders - train - test:
            rests = {"", *(_rest(folder.name, _TRAIN_WORDS) for folder in train)}
            test = {folder for folder in test if _rest(folder.name, HELD_OUT_WORDS) in rests}
        if test:
            held_out |= test
            to_train |= train
    return held_out, to_train


def _up(folder: Path) -> tuple[Path, ...]:
    return (folder, *folder.parents)


def _speaks_of(name: str, words: Sequence[str]) -> bool:
    """Whether one of `words` stands in a name by itself, between anything but letters."""
    return not set(words).isdisjoint(re.split(_BETWEEN, name.lower()))


def _rest(name: str, words: Sequence[str]) -> str:
    """A name without `words` and all that is not a letter."""
    return "".join(part for part in re.split(_BETWEEN, name.lower()) if part not in words)


def is_held_out(path: Path) -> bool:
    """Whether a folder or the file in a relative path says test or validation."""
    return any(_speaks_of(part, HELD_OUT_WORDS) for part in path.with_suffix("").parts)
