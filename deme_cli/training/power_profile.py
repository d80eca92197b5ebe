"""Power-function profiles: how much each past update weighs in an average of weights (EDM2).

The profile of exponent gamma at update t weighs update tau by p(tau) proportional to tau^gamma on
[0, t] (Karras et al. 2024, Eq. 121), so that its shape scales with t. Its length is the
standard deviation of p over t, sigma_rel: 0.05 is short, 12^(-1/2) = 0.2887 the plain mean of all
updates (gamma = 0), where we stop. No torch.
"""

from __future__ import annotations

from deme_cli.errors import ConfigError


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma >= 0 whose profile has this relative length (EDM2 Eq. 126, Algorithm 2).

    By sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2) (Eq. 123), x = gamma + 2 is
    the largest root of s x^3 + s x^2 - x + 1 with s = sigma_rel^2. Newton from x = 1/sigma_rel,
    above that root and where the cubic is convex, falls to it and needs no linear algebra, so that
    every machine finds the same number. Raises ConfigError unless 0 < sigma_rel < 12^(-1/2).
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ConfigError(
            f"EMA length {sigma_rel}: expected a number above 0, below 0.2886 (the plain mean)"
        )
    s, x = sigma_rel**2, 1 / sigma_rel
    while True:
        closer = x - (s * x**3 + s * x**2 - x + 1) / (3 * s * x**2 + 2 * s * x - 1)
        if not closer < x:
            return x - 2
        x = closer


def beta(t: int, gamma: float) -> float:
    """The decay of update t, from 1: (1 - 1/t)^(gamma + 1)  (EDM2 Eq. 127).

    Then the weight of update tau in the average at t is exactly the integral of p over
    [tau - 1, tau], (tau^(gamma + 1) - (tau - 1)^(gamma + 1)) / t^(gamma + 1); beta_1 = 0 forgets
    where the run started.
    """
    return (1 - 1 / t) ** (gamma + 1)
