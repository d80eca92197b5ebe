"""An EMA of any length from those one run saved: the post-hoc EMA of EDM2 (Karras et al. 2024).

Every saved average (t_i, gamma_i) weighs the updates of the run by a profile p_i, a power function
on [0, t_i] (training/power_profile.py). Where a combination sum_i w_i p_i is close to the profile
of the length wanted, so is sum_i w_i theta_i to the weights under that EMA; over task vectors it is
Eq. 8 of the paper. The w_i need not sum to 1, and then theta + sum_i w_i tau_i leaves the rest
to the base, where the run stood at the first of its updates: for lengths beyond those saved that is
the right place, as the mass that no p_i reaches lies there. Weights are combined as they were
saved; folding the projections multiplies two averages, and so do the factors of a LoRA, so that
after `fold` and of adapters the result differs from the EMA itself also in the second order of how
far both moved. No torch.
n snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deme_cli.artifacts import ExpertRecord
from deme_cli.config import NOT_RESULT
from deme_cli.errors import ConfigError
from deme_cli.training.power_profile import gamma_of

Snapshot = tuple[int, float]  # (t, gamma): updates done, exponent of the profile
_OWN = ("step", "ema_length", "ema_gamma")  # of a record's training: what differs within a run


def inner_products(ones: Sequence[Snapshot], others: Sequence[Snapshot]) -> np.ndarray:
    """The integrals of p_i p_j over the updates that both know.  (n,), (m,) -> (n, m) float64

    With p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] (EDM2 Eq. 121) and t_i <= t_j:
    (gamma_i + 1) (gamma_j + 1) / (gamma_i + gamma_j + 1) (t_i / t_j)^gamma_j / t_j.
    """
    t, gamma = np.array(ones, dtype=np.float64).T[:, :, None]  # (n, 1)
    s, delta = np.array(others, dtype=np.float64).T[:, None, :]  # (1, m)
    first, last = np.minimum(t, s), np.maximum(t, s)
    shared = (first / last) ** np.where(t <= s, delta, gamma) / last
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * shared


def post_hoc_coefficients(snapshots: Sequence[Snapshot], t: int, sigma_rel: float) -> list[float]:
    """The w_i whose sum_i w_i p_i is nearest the profile of length `sigma_rel` at update t.

    Least squares in the space of profiles (EDM2 Algorithm 3), solved for profiles of unit norm.
    An average that is among the snapshots gets 1 and the others 0.
    """
    norms = np.sqrt(np.diag(inner_products(snapshots, snapshots)))
    cosines = inner_products(snapshots, snapshots) / np.outer(norms, norms)
    wanted = inner_products(snapshots, [(t, gamma_of(sigma_rel))])[:, 0] / norms
    return (np.linalg.lstsq(cosines, wanted, rcond=None)[0] / norms).tolist()


def misfit(
    snapshots: Sequence[Snapshot], coefficients: Sequence[float], t: int, sigma_rel: float
) -> float:
    """||sum_i w_i p_i - p|| / ||p||, 0 for a profile that is met exactly and 1 for one that is not
    met at all."""
    terms, w = [*snapshots, (t, gamma_of(sigma_rel))], np.array([*coefficients, -1.0])
    products = inner_products(terms, terms)
    return float(np.sqrt(max(w @ products @ w, 0.0) / products[-1, -1]))


def coefficients_for_length(records: Sequence[ExpertRecord], sigma_rel: float) -> list[float]:
    """The w_i, one per expert of one run, of an EMA of length `sigma_rel` at the last update given.

    Raises ConfigError if the experts are not of one run, naming the first thing that disagrees, if
    one carries no power-function EMA, or on a length that no profile has.
    """
    snapshots = snapshots_of(records)
    return post_hoc_coefficients(snapshots, max(t for t, _ in snapshots), sigma_rel)


def snapshots_of(records: Sequence[ExpertRecord]) -> list[Snapshot]:
    """(t, gamma) of each expert, checked to be power-function EMAs of one run.

    Raises ConfigError as `coefficients_for_length` does.
    """
    names = [
        f"expert {one.label} of update {one.steps} ({one.fingerprint[:12]})" for one in records
    ]
    runs = [
        {"range": one.range, "seed": one.seed, "base": one.base,
         "data": one.data.get("fingerprint"),
         **{k: v for k, v in one.training.items() if k not in (*_OWN, *NOT_RESULT)}}
        for one in records
    ]  # fmt: skip
    for name, run, record in zip(names, runs, records, strict=True):
        if "ema_gamma" not in record.training:
            raise ConfigError(
                f"{name} is no power-function EMA; an EMA length needs experts that "
                f"`deme finetune --ema-lengths` wrote"
            )
        for key in [*runs[0], *run]:
            if runs[0].get(key) != run.get(key):
                raise ConfigError(
                    f"{names[0]} and {name} are not of one run: {key} is {runs[0].get(key)!r} and "
                    f"{run.get(key)!r}; an EMA length needs one run"
                )
    return [(record.steps or 0, record.training["ema_gamma"]) for record in records]
