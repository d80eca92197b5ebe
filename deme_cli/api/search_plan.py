"""From `--search` to a plan: which one, over which space, with how many evaluations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from deme_cli.api.merge_order import Order
from deme_cli.errors import ConfigError

if TYPE_CHECKING:
    from deme_cli.merging.search.plan import Plan
    from deme_cli.merging.search.space import Point, Space


def open_plan(order: Order, space: Space) -> Plan:
    """The plan that `--search` names; where groups differ, coarse to fine if it can be.

    Raises ConfigError where nothing is left to search for.
    """
    from deme_cli.merging.search.fixed_points import FixedPoints
    from deme_cli.merging.search.nested import CoarseToFine

    if not space.dimensions:
        raise ConfigError(
            "--coefficients-for sets every tensor, which leaves nothing to search for; leave out "
            "--search, or narrow the globs"
        )
    if order.search == "grid":
        return FixedPoints(_grid_points(order, space))
    given = order.settings.evaluations
    if not space.groups:
        return _open_continuous(order, space, given)
    return CoarseToFine(space, partial(_open_continuous, order), given)


def _open_continuous(order: Order, space: Space, evaluations: int | None) -> Plan:
    """A search off the lattice, of at most `evaluations` where these were given."""
    from deme_cli.merging.search.bayesian import Bayesian
    from deme_cli.merging.search.descent import Descent
    from deme_cli.merging.search.evolution import Evolution
    from deme_cli.merging.search.fixed_points import FixedPoints, random_points

    seed = order.settings.seed
    plans: dict[str, Callable[[], Plan]] = {
        "random": lambda: FixedPoints(random_points(space, evaluations, seed)),
        "cmaes": lambda: Evolution(space, seed),
        "tpe": lambda: Bayesian(space, seed),
        "gradient": lambda: Descent(space, evaluations),
    }
    return plans[order.search]()


def _grid_points(order: Order, space: Space) -> list[Point]:
    """Every combination, for all groups of tensors at once or for each on its own."""
    from deme_cli.merging.search.grid import grid_points, resolve_grid

    grid = order.grid()
    if space.groups:
        lists = [list(values) for values in grid] * len(space.all_groups)
        grid = resolve_grid(lists, space.dimensions)
    references = (space.base, space.mean)  # which every search tries
    return [point for point in grid_points(grid) if point not in references]
