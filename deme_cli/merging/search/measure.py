"""What objectives need to know of a run, before anything heavy is loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deme_cli.config import DataConfig, SampleConfig


@dataclass(frozen=True)
class Measure:
    """What candidates are measured with: the run's images; for distances features and sampling.

    `pipeline` and `cache` are where frozen parts and their latents are, for models that have any;
    `auto` puts the cache beside the base, in `beside`. `report_reference` is what the report takes
    distances to; None takes the held-out images.
    """

    images: DataConfig
    features: str
    resize: str
    sample: SampleConfig
    pipeline: str | None = None
    cache: str = "off"
    device: str = "cpu"
    dtype: str = "fp32"
    beside: Path = Path(".")
    report_reference: str | None = None

    @property
    def source(self) -> str:
        return self.images.source
