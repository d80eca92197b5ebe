"""Settings of a merge: the coefficients, how they are found, and what is reported of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deme_cli.errors import ConfigError
from deme_cli.ladder import parse_ladder
from deme_cli.settings import Settings, parse_lists, parse_numbers, setting
from deme_cli.timesteps import parse_span

SEARCHES = ("none", "grid", "random", "cmaes", "tpe", "gradient")
METHODS = ("linear", "ties", "dare", "slerp", "model-stock")
_METHOD, _SEARCH, _REPORT = "Method", "Search", "Report"


@dataclass(frozen=True)
class MergeConfig(Settings):
    """[merge]: the coefficients w_i of Eq. 8 and how they are found."""

    coefficients: list[float] | None = setting(
        None,
        "the w_i, as in 0.1,0.1,0.2,0.5, in the order of the arguments (in deme.toml: of the "
        "ranges); unset: 1/N each",
        flags="--coefficients -w",
        parse=parse_numbers,
    )
    method: str = setting(
        "linear", "how experts become one network", choices=METHODS, panel=_METHOD
    )
    density: float = setting(
        0.5, "share of each task vector that ties and dare keep", panel=_METHOD
    )
    trim: str = setting(
        "model", "what ties trims by size: the whole task vector, or tensor by tensor",
        choices=("model", "tensor"), option=False)  # fmt: skip
    mask_seed: int = setting(0, "seed of what dare drops", option=False)
    per: str = setting(
        "model", "what shares its coefficients", choices=("model", "block", "layer"), panel=_SEARCH
    )
    search: str = setting("none", "how to choose the coefficients", choices=SEARCHES, panel=_SEARCH)
    objective: str = setting(
        "loss",
        "what a search minimises: loss, experts, kid, fid, or a ladder as loss:64,kid@1k:16,fid@5k",
        panel=_SEARCH,
    )
    loss_range: str | None = setting(
        None, "timesteps that loss and experts are measured on, as 250:500; unset: all",
        option=False)  # fmt: skip
    grid: list[Any] | None = setting(
        None,
        "values tried for every expert, as 0,0.5,1, or a list for each, as '0,0.5;0,1'; "
        "unset: 0,0.5,1 for up to 4 experts, 0,1 for up to 8",
        panel=_SEARCH,
        parse=parse_lists,
    )
    bounds: list[Any] | None = setting(
        None, "lowest and highest coefficient of every expert, or of each; unset: -0.5, 1.5",
        option=False)  # fmt: skip
    start: list[float] | None = setting(
        None, "where a search begins; unset: 1/N each", option=False
    )
    evaluations: int | None = setting(
        None, "most candidates to evaluate; unset: what the search usually needs", panel=_SEARCH
    )
    time: str | None = setting(None, "most time to search, as 90s, 30m or 2h", option=False)
    num: int = setting(
        2048,
        "held-out draws (loss, experts) or images (kid, fid) per candidate",
        flags="--num -n",
        panel=_SEARCH,
    )
    steps: int = setting(20, "sampling steps per candidate image (kid, fid)", panel=_SEARCH)
    batch_size: int = setting(256, "images denoised at a time", option=False)
    seed: int = setting(
        1_000_003,
        "seed of the candidates' noise and of the search; disjoint from the seeds of eval",
        panel=_SEARCH,
    )
    report: bool | None = setting(
        None,
        "measure the merged model beside base, ensemble, means and single experts, on "
        "other seeds and images; unset: after a search",
        flags="--report/--no-report",
        panel=_REPORT,
    )
    report_num: int | None = setting(
        None, "draws or images per row of the report; unset: as num", option=False
    )
    report_repeats: int = setting(3, "seeds of the report", option=False)
    report_seed: int = setting(2_000_003, "first seed of the report", option=False)

    @classmethod
    def combine(cls, table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Coefficients that are given take the place of a search in the file, and the other way."""
        instead = {"search"} if given.get("coefficients") is not None else set()
        if given.get("search") not in (None, "none"):
            instead.add("coefficients")
        return {**{k: v for k, v in table.items() if k not in instead}, **given}

    def check(self) -> None:
        if self.coefficients is not None and self.search != "none":
            raise ConfigError(
                "coefficients are given, and a search is to look for them; keep one of the two"
            )
        self._positive("num", "steps", "batch_size", "evaluations", "report_num", "report_repeats")
        self._not_negative("seed", "mask_seed", "report_seed")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density = {self.density}: expected a share above 0, at most 1")
        parse_ladder(self.objective, num=self.num)
        if self.loss_range is not None:
            parse_span(self.loss_range, "loss_range")
