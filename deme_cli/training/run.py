"""A training run before it begins: everything it needs, opened, and what makes it the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deme_cli.config import NOT_RESULT, FinetuneConfig
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.timesteps import RangeChoice, TimestepRange
from deme_cli.training.examples import Examples


@dataclass(frozen=True)
class Run:
    """What is trained, on what, how, and where it ends.

    `clusters` are the draws whose losses are balanced against each other, if any. `compile`: auto,
    on or off, as of `compile_network`; `shard`: divide the networks among the processes, which uses
    up the denoiser's. Like the device, neither is part of what makes a run the same.

    With `from_scratch` the denoiser's random weights are trained into a base; its config then asks
    for no consistency and no projection.
    """

    denoiser: Denoiser
    choice: RangeChoice
    examples: Examples
    held_out: Examples | None
    flip: bool
    config: FinetuneConfig
    output: Path
    dtype: str = "fp32"
    from_scratch: bool = False
    clusters: Sequence[TimestepRange] = ()
    compile: str = "off"
    shard: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the result: a kept run continues only if all of it agrees."""
        settings = asdict(self.config)
        for name in NOT_RESULT:
            settings.pop(name)
        return {
            "range": str(self.choice.range),
            "cluster_ranges": [str(cluster) for cluster in self.clusters],
            "base": self.denoiser.record.fingerprint,
            "data": self.examples.fingerprint,
            "resolution": list(self.examples.image_shape[1:]),
            "crop": self.examples.crop,
            "companions": self.denoiser.record.companions,
            "flip": self.flip,
            "dtype": self.dtype,
            **settings,
        }
