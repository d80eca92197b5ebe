"""All timesteps and each range: which draws belong to them, and what their errors say together.

Intervals are those of intervals.py. n draws, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deme_cli.analysis.intervals import estimate
from deme_cli.errors import ConfigError
from deme_cli.merging.search.losses import HeldOutLoss
from deme_cli.timesteps import TimestepRange


class Groups:
    """The draws of a loss by the range of their time.

    Raises ConfigError where a range has fewer than two draws.
    """

    def __init__(self, spans: Sequence[TimestepRange], loss: HeldOutLoss) -> None:
        self.images = loss.draws.images.numpy()
        self.masks = np.array([loss.draws_in(span).numpy() for span in spans])  # (G, n)
        for span, mask in zip(spans, self.masks, strict=True):
            if mask.sum() < 2:
                raise ConfigError(
                    f"timesteps {span} have {mask.sum()} of {len(mask)} draws; raise --num and "
                    f"--report-num, or tell fewer ranges apart"
                )

    def means(self, values: np.ndarray) -> np.ndarray:
        """The mean of each group: (n,) -> (G,); nan where it is not finite."""
        with np.errstate(invalid="ignore", over="ignore"):
            means = np.array([values[mask].mean() for mask in self.masks])
        return np.where(np.isfinite(means), means, np.nan)

    def intervals(self, values: np.ndarray) -> np.ndarray:
        """Half the 95 % interval of each mean over images: (n,) -> (G,)."""
        return np.array([estimate(values[mask], self.images[mask]).half for mask in self.masks])
