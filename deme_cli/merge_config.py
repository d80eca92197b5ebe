"""Settings of a merge: the coefficients, how they are found, and what is reported of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deme_cli.errors import ConfigError
from deme_cli.ladder import parse_ladder
from deme_cli.settings import Settings, setting
from deme_cli.timesteps import parse_span

SEARCHES = ("none", "grid", "random", "cmaes", "tpe", "gp", "quadratic", "gradient", "greedy")
METHODS = ("linear", "ties", "dare", "slerp", "greedy", "model-stock", "regmean", "fisher")


@dataclass(frozen=True)
class MergeConfig(Settings):
    """[merge]: the coefficients w_i of Eq. 8 and how they are found."""

    coefficients: list[float] | None = setting(None, "w_i, one per expert; unset: 1/N each")
    method: str = setting("linear", "how experts become one network", choices=METHODS)
    density: float = setting(0.5, "share of each task vector that ties and dare keep")
    trim: str = setting(
        "model", "what ties trims by size: the whole task vector, or tensor by tensor",
        choices=("model", "tensor"),
    )  # fmt: skip
    mask_seed: int = setting(0, "seed of what dare drops")
    per: str = setting("model", "what shares its coefficients", choices=("model", "block", "layer"))
    search: str = setting("none", "how to choose the coefficients", choices=SEARCHES)
    objective: str = setting(
        "loss",
        "what a search minimises: loss, experts, kid, fid, or a ladder as loss:64,kid@1k:16,fid@5k",
    )
    loss_range: str | None = setting(
        None, "timesteps that loss and experts are measured on, as 250:500; unset: all"
    )
    grid: list[Any] | None = setting(
        None,
        "values tried for every expert, or one list per expert; unset: 0, 0.5, 1 (N <= 4), 0, 1",
    )
    bounds: list[Any] | None = setting(
        None,
        "lowest and highest coefficient of every expert, or one pair per expert; unset: -0.5,1.5",
    )
    start: list[float] | None = setting(None, "where a search begins; unset: 1/N each")
    optimizer: str = setting("lbfgs", "of search gradient", choices=("lbfgs", "adam"))
    evaluations: int | None = setting(
        None, "most candidates to evaluate; unset: what the search usually needs"
    )
    time: str | None = setting(None, "most time to search, as 90s, 30m or 2h")
    num: int = setting(2048, "held-out draws (loss, experts) or images (kid, fid) per candidate")
    steps: int = setting(20, "sampling steps per candidate image (kid, fid)")
    batch_size: int = setting(256, "images denoised at a time")
    seed: int = setting(
        1_000_003,
        "seed of the candidates' noise and of the search; disjoint from the seeds of eval",
    )
    report: bool | None = setting(
        None,
        "measure the merged model beside others on other seeds and data; unset: after a search",
    )
    report_num: int | None = setting(None, "draws or images per row of the report; unset: as num")
    report_repeats: int = setting(3, "seeds of the report")
    report_seed: int = setting(2_000_003, "first seed of the report")

    def check(self) -> None:
        self._positive("num", "steps", "batch_size", "evaluations", "report_num", "report_repeats")
        self._not_negative("seed", "mask_seed", "report_seed")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density = {self.density}: expected a share above 0, at most 1")
        parse_ladder(self.objective, num=self.num)
        if self.loss_range is not None:
            parse_span(self.loss_range, "loss_range")
        if self.method == "greedy" and self.search not in ("none", "greedy"):
            raise ConfigError(f"method greedy searches by itself; leave out search {self.search}")
