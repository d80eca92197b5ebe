"""The merging methods by name, their settings, and what each asks of experts and coefficients.

Checks here read headers only. No torch.
N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deme_cli.errors import ConfigError
from deme_cli.merging.coefficients import Coefficients, require_matches
from deme_cli.merging.inputs import Inputs
from deme_cli.merging.methods.angles import model_stock, slerp
from deme_cli.merging.methods.linear import Method, linear
from deme_cli.merging.methods.sparsify import dare, ties

SUM_TOLERANCE = 1e-9  # of slerp's w_1 + w_2 = 1


@dataclass(frozen=True)
class MethodSettings:
    """A method and its settings, checked where they come from: [merge], or a merged record."""

    name: str = "linear"
    density: float = 0.5  # share of each task vector that ties and dare keep
    trim: str = "model"  # what ties trims by magnitude: the whole vector, or tensor by tensor
    seed: int = 0  # of what dare drops

    @property
    def used(self) -> dict[str, Any]:
        """The settings that this method depends on."""
        return {name: getattr(self, name) for name in USES.get(self.name, ())}


USES = {"ties": ("density", "trim"), "dare": ("density", "seed")}
# What opens a method for these files; all but linear and dare read them once or twice here.
METHODS: dict[str, Callable[[Inputs, MethodSettings], Method]] = {
    "linear": lambda inputs, settings: linear(inputs),
    "ties": lambda inputs, settings: ties(inputs, density=settings.density, trim=settings.trim),
    "dare": lambda inputs, settings: dare(inputs, density=settings.density, seed=settings.seed),
    "slerp": lambda inputs, settings: slerp(inputs),
    "model-stock": lambda inputs, settings: model_stock(inputs),
}
LINEAR = MethodSettings()


def fit_coefficients(
    inputs: Inputs,
    coefficients: Coefficients | Sequence[float] | None,
    settings: MethodSettings = LINEAR,
) -> Coefficients:
    """The coefficients, checked against inputs and method; None stands for 1/N each.

    Raises ConfigError on a wrong count, a glob that matches nothing, for slerp unless there are two
    experts with w_1 + w_2 = 1, and for model-stock unless there are several and no coefficients.
    """
    count = len(inputs.experts)
    if settings.name == "slerp" and count != 2:
        raise ConfigError(f"method slerp merges 2 experts, found {count}")
    if settings.name == "model-stock":
        if count < 2:
            raise ConfigError("method model-stock compares experts with each other; give 2 or more")
        if coefficients is not None:
            raise ConfigError("method model-stock finds the coefficients itself; leave out -w")
    given = [1 / count] * count if coefficients is None else coefficients
    if not isinstance(given, Coefficients):
        given = Coefficients(tuple(float(w) for w in given))
    if len(given.values) != count:
        raise ConfigError(
            f"{len(given.values)} coefficients for {count} experts; give one for each"
        )
    require_matches(list(given.finer), [spec.name for spec in inputs.specs])
    for values in (given.values, *given.finer.values()) if settings.name == "slerp" else ():
        if abs(sum(values) - 1) > SUM_TOLERANCE:
            raise ConfigError(
                f"method slerp interpolates: expected w_1 + w_2 = 1, found {sum(values):g}"
            )
    return given
