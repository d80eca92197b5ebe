"""The models of a run side by side: base, each expert, the ensemble of them, merged.

All of them are asked the same: they must denoise x_t of one shape, on one schedule, with one set of
frozen parts around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deme_cli.artifacts import DenoiserRecord, ExpertRecord
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.schedule import complete_config
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.rows import ENSEMBLE, plan_rows
from deme_cli.sampling.ensemble import SamplingExpert, open_ensemble, open_single, read_ensemble
from deme_cli.timesteps import TimestepRange


@dataclass(frozen=True)
class Model:
    """One model, and what denoises [0, T) in it: itself, or experts by range.

    kind: base, expert, ensemble, merged or model. Weights are read when an expert is loaded.
    members: of an ensemble, the names of its experts' own rows, in order of their ranges.
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
    paths = [base, *sorted(folder.glob("ft_*.safetensors")), folder / "merged.safetensors"]
    names = [str(path) for path in paths if path.exists()]
    if not names:
        raise MissingError(
            f"no models in {folder.resolve()}: no {base.name}, no ft_*.safetensors, no "
            f"merged.safetensors; name models, or make a base with `deme split`"
        )
    return names


def open_models(
    arguments: Sequence[str], *, pipeline: str | None, device: str, dtype: str
) -> list[Model]:
    """A model per argument in the order given; experts that make an ensemble, and then it.

    Raises what `plan_rows` raises, ArtifactError where two cannot be asked the same.
    """
    models: list[Model] = []
    for plan in plan_rows(arguments)[0]:
        if plan.kind == "samples":
            raise ArtifactError(f"{plan.arguments[0]}: images, not a model; give models")
        names = [(plan.name, plan.arguments[0])]
        if is_ensemble := plan.kind == ENSEMBLE:
            members = read_ensemble([Path(argument).expanduser() for argument in plan.arguments])
            names = [(member.path.stem, str(member.path)) for member in members]
        for name, argument in names:
            experts, record = open_single(argument, pipeline=pipeline, device=device, dtype=dtype)
            models.append(Model(name, record.kind, experts, [record]))
        if is_ensemble:
            paths, records = [m.path for m in members], [m.record for m in members]
            experts = open_ensemble(paths, device=device, dtype=dtype)
            models.append(Model(plan.name, ENSEMBLE, experts, records, [name for name, _ in names]))
    every = [model.name for model in models]
    if twice := next((name for name in every if every.count(name) > 1), None):
        raise ConfigError(f"two models are called {twice}; give their files names of their own")
    require_alike([(model.name, model.records[0]) for model in models])
    return models


def require_alike(models: Sequence[tuple[str, DenoiserRecord]]) -> None:
    """Check that models of these names can be asked the same; raises ArtifactError otherwise."""
    first, record = models[0]
    for name, other in models[1:]:
        for what, own, theirs in (
            ("shape of x_t", _shape(record), _shape(other)),
            ("number of timesteps", record.num_train_timesteps, other.num_train_timesteps),
            ("scheduler config", *(complete_config(r.scheduler_config) for r in (record, other))),
        ):
            if own != theirs:
                raise ArtifactError(
                    f"{name}: another {what} than {first} ({theirs}, not {own}); compare models of "
                    f"one base"
                )


def _shape(record: DenoiserRecord) -> tuple[int, ...]:
    return backbone_of(record.model_config).sample_shape(record.model_config)
