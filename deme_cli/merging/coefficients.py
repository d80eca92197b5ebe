"""The coefficients w_i of Eq. 8: one per expert, the same for all tensors or, by glob, for some.

A group of tensors is a glob over their names, as `mid_block.*`; the first glob that matches a name
decides, and tensors that none matches take the coefficients for all. `groups_of` gives the globs of
the network's blocks or layers. No torch.
N experts (experts or task vectors).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from functools import cached_property

from deme_cli.errors import ConfigError

REST = "*"  # how the tensors of no group are called
# How the names of parts begin, in the order of the network; of the others those with `out` in them
# come last, the rest with the input.
_STAGES = (
    "down_blocks", "mid_block", "transformer_blocks", "single_transformer", "blocks", "up_blocks",
)  # fmt: skip
_BLOCK = re.compile(
    r"((?:down_blocks|up_blocks|(?:single_|joint_)?transformer_blocks|blocks)\.\d+|mid_block)\."
)


@dataclass(frozen=True)
class Coefficients:
    """`values` hold for every tensor (N,), except for those that a glob of `finer` matches (N,)."""

    values: tuple[float, ...]
    finer: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for values in (self.values, *self.finer.values()):
            if len(values) != len(self.values):
                raise ConfigError(
                    f"{len(values)} coefficients where there are {len(self.values)} experts; "
                    f"give one for each"
                )
            if not all(math.isfinite(w) for w in values):
                raise ConfigError(f"coefficients {list(values)}: expected finite numbers")

    def of(self, name: str) -> tuple[float, ...]:
        """The coefficients of the tensor of this name."""
        for matches, values in self._patterns:
            if matches(name):
                return values
        return self.values

    @cached_property
    def _patterns(self) -> list[tuple[Callable[[str], object], tuple[float, ...]]]:
        """Compiled once: hundreds of globs are more than `fnmatch` keeps."""
        return [(re.compile(translate(glob)).match, w) for glob, w in self.finer.items()]


def block_name(name: str) -> str | None:
    """The block of a tensor: down_blocks.0, mid_block, transformer_blocks.3, ...; else None."""
    match = _BLOCK.match(name)
    return match[1] if match else None


def groups_of(names: Iterable[str], per: str) -> list[str]:
    """Globs that divide tensors by `per`: none for model, one per block, or one per layer.

    A block is one of the down, mid and up blocks or a transformer block; what lies outside of them
    (input, output, time embedding) is left to the coefficients for all. A layer is a module with
    weights of its own. Globs of deeper modules come first, so that each matches its own alone.
    """
    if per == "model":
        return []
    found: dict[str, None] = {}
    for name in sorted(names):
        if per == "block":
            if block := block_name(name):
                found[f"{block}.*"] = None
        else:
            module, _, _ = name.rpartition(".")
            found[f"{module}.*" if module else name] = None
    return sorted(found, key=lambda glob: (-glob.count("."), _natural(glob)))


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts down_blocks.2 before down_blocks.10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def network_order(glob: str) -> tuple:
    """A key that sorts groups as the data passes them: input, down, mid, up, output, the rest."""
    if glob == REST:
        return (len(_STAGES) + 1, ())
    top = glob.split(".")[0]
    outside = len(_STAGES) if "out" in top else -1
    stage = next((i for i, part in enumerate(_STAGES) if top.startswith(part)), outside)
    return (stage, tuple(_natural(glob)))


def require_matches(globs: Sequence[str], names: Iterable[str]) -> None:
    """Check that every glob matches a tensor. Raises ConfigError offering the nearest names."""
    names = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            known = [*groups_of(names, "block"), *groups_of(names, "layer")]
            near = difflib.get_close_matches(glob, known, n=3, cutoff=0.3) or known[:3]
            raise ConfigError(
                f"{glob!r} matches no tensor of this model; near names: {', '.join(near)}"
            )
