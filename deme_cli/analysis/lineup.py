"""The models of a run side by side: base, each expert, the ensemble of them, merged.

All of them are asked the same: they must denoise x_t of one shape, on one schedule, with one set of
frozen parts around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme_cli.diffusion.backbones.known import backbone_of
from deme_cli.diffusion.schedule import complete_config
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.row_plans import ENSEMBLE, plan_rows
from deme_cli.records import DenoiserRecord, ExpertRecord
from deme_cli.sampling.ensemble import open_ensemble, read_ensemble
from deme_cli.sampling.sampler import SamplingExpert
from deme_cli.sampling.single import open_single
from deme_cli.timesteps import TimestepRange


@dataclass(frozen=True)
class Entrant:
    """One model of the line-up, and what denoises [0, T) in it: itself, or experts by range.

    kind: base, expert, ensemble, merged or model. Weights are read when an expert is loaded.
    members: of an ensemble, the names of its experts' own entrants, in order of their ranges.
    """

    name: str
    kind: str
    experts: Sequence[SamplingExpert]
    records: Sequence[DenoiserRecord]
    members: Sequence[str] = ()

    @property
    def span(self) -> TimestepRange | None:
        """The range that an expert was finetuned on, if that is not all of [0, T)."""
        record = self.records[0]
        if self.kind != "expert" or not isinstance(record, ExpertRecord):
            return None
        return None if len(record.timesteps) == record.num_train_timesteps else record.timesteps

    @property
    def fingerprints(self) -> list[str]:
        return [record.fingerprint for record in self.records]


def folder_models(base: Path) -> list[str]:
    """What lies in a run's folder: base, `ft_*` and merged, in this order.

    Raises MissingError where there is none of them.
    """
    folder = base.parent
    found = [base, *sorted(folder.glob("ft_*.safetensors")), folder / "merged.safetensors"]
    names = [str(path) for path in found if path.exists()]
    if not names:
        raise MissingError(
            f"no models in {folder.resolve()}: no {base.name}, no ft_*.safetensors, no "
            f"merged.safetensors; name models, or make a base with `deme split`"
        )
    return names


def line_up(arguments: Sequence[str], *, device: str = "cpu", dtype: str = "fp32") -> list[Entrant]:
    """An entrant per argument in the order given; experts that make an ensemble, and then it.

    Raises what `plan_rows` raises, ArtifactError where two cannot be asked the same.
    """
    place = {"device": device, "dtype": dtype}
    entrants: list[Entrant] = []
    for plan in plan_rows(arguments).plans:
        if plan.kind == "samples":
            raise ArtifactError(f"{plan.arguments[0]}: images, not a model; give models")
        if plan.kind != ENSEMBLE:
            entrants.append(_single(plan.name, plan.arguments[0], place))
            continue
        members = read_ensemble([Path(argument).expanduser() for argument in plan.arguments])
        paths, records = [m.path for m in members], [m.record for m in members]
        alone = [_single(path.stem, str(path), place) for path in paths]
        names = [entrant.name for entrant in alone]
        whole = Entrant(plan.name, ENSEMBLE, open_ensemble(paths, **place), records, names)
        entrants += [*alone, whole]
    names = [entrant.name for entrant in entrants]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two models are called {twice}; give their files names of their own")
    require_alike(entrants)
    return entrants


def _single(name: str, argument: str, place: dict[str, str]) -> Entrant:
    experts, record = open_single(argument, **place)
    return Entrant(name, record.kind, experts, [record])


def require_alike(entrants: Sequence[Entrant]) -> None:
    """Check that all can be asked the same; raises ArtifactError naming what differs."""
    first = entrants[0]
    for entrant in entrants[1:]:
        for what, own, other in zip(
            ("shape of x_t", "number of timesteps", "scheduler config"),
            _asked(first), _asked(entrant), strict=True,
        ):  # fmt: skip
            if own != other:
                raise ArtifactError(
                    f"{entrant.name}: another {what} than {first.name} ({other}, not {own}); "
                    f"compare models of one base"
                )


def _asked(entrant: Entrant) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    record = entrant.records[0]
    shape = backbone_of(record.model_config).sample_shape(record.model_config)
    return shape, record.num_train_timesteps, complete_config(record.scheduler_config)
