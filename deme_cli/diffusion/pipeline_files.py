"""Which files of a model repository are needed, told from their names alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

DENOISERS = ("unet", "transformer")  # the part that is trained
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
_WEIGHTS = (
    re.compile(  # the variant stands before the shard, or behind it as diffusers < 0.30 wrote
        r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.]+?))?"
        r"(?:-\d{5}-of-(?P<shards>\d{5}))?(?:\.(?P<behind>[^.]+))?\.(?P<ending>safetensors|bin)"
    )
)
_ROOT = ("model_index.json", "config.json", "scheduler_config.json")
_SMALL = (".json", ".txt", ".model")


@dataclass(frozen=True)
class WeightSet:
    """Files that together hold a network once: one file, or shards. `variant` is "" for none."""

    variant: str
    ending: str
    num_shards: int
    files: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        return len(self.files) == max(self.num_shards, 1)

    @property
    def indices(self) -> set[str]:
        """What the file may be called that tells which shard holds a tensor."""
        stem = re.split(r"[.-]", self.files[0])[0]
        names = {f"index.{self.variant}", f"{self.variant}.index"} if self.variant else {"index"}
        return {f"{stem}.{self.ending}.{name}.json" for name in names}

    def __str__(self) -> str:
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and its shards"


def weight_sets(names: Iterable[str]) -> list[WeightSet]:
    """The sets of weights among the files of one folder, in the order of their preference."""
    found: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            variant = match["variant"] or match["behind"] or ""
            found[variant, match["ending"], int(match["shards"] or 0)].append(name)
    sets = [WeightSet(*key, tuple(files)) for key, files in found.items()]
    return sorted(sets, key=lambda one: (one.variant, one.ending == "bin", one.num_shards))


def sets_of_variant(names: Iterable[str], variant: str | None = None) -> list[WeightSet]:
    """The sets of one variant: the one named, else those of no variant, else of the only one."""
    sets = weight_sets(names)
    if variant is None:
        variants = {one.variant for one in sets}
        variant = variants.pop() if len(variants) == 1 else ""
    return [one for one in sets if one.variant == variant]


def needed_of_part(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of the files in one folder: configs, and weights in one format and of one variant."""
    names = list(names)
    small = [name for name in names if name.endswith(_SMALL) and not name.startswith(".")]
    sets = sets_of_variant(names, variant)
    return small + [name for one in sets if one.ending == sets[0].ending for name in one.files]


def wanted_files(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of a repository's files: what makes a pipeline, or, without its index, a denoiser.

    variant: of the denoiser's weights.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        by_folder[folder].append(file)
    root = by_folder.pop("", [])
    chosen = [name for name in _ROOT if name in root]
    part = next((name for name in DENOISERS if "config.json" in by_folder[name]), None)
    if part is None:
        chosen += [name for name in needed_of_part(root, variant) if name not in _ROOT]
    is_pipeline = "model_index.json" in root
    keep = set(by_folder) - set(UNUSED_PARTS) if is_pipeline else {part, "scheduler"}
    for folder, files in sorted(by_folder.items()):
        if folder in keep and "/" not in folder:
            needed = needed_of_part(files, variant if folder == part else None)
            chosen += [f"{folder}/{name}" for name in sorted(needed)]
    return chosen
