"""The pictures of a search: the map of a grid, the trials of any other, coefficients by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deme_cli.api.merge_order import Order
from deme_cli.outputs import write_whole

if TYPE_CHECKING:
    from deme_cli.merging.search.space import Point, Space
    from deme_cli.merging.search.trials import Trial


def draw_pictures(
    order: Order, space: Space, trials: Sequence[Trial], labels: Sequence[str],
    rhos: Sequence[float | None], best: Point,
) -> list[Path]:  # fmt: skip
    """Write `*.search.png` and, where coefficients differ by block, `*.coefficients.png`."""
    from deme_cli.merging.search.figure import draw_search
    from deme_cli.merging.search.heat_map import draw_heat_map
    from deme_cli.merging.search.importance import importances
    from deme_cli.merging.search.trials_figure import draw_trials

    if order.search == "grid" and len(order.rungs) == 1 and not space.groups:
        picture = draw_search(trials, order.grid(), space.experts, objective=labels[0])
    else:
        picture = draw_trials(
            trials, space.labels, objectives=labels, importances=importances(trials, space.labels),
            rhos=rhos,
        )  # fmt: skip
    paths = [order.output.with_name(f"{order.output.stem}.search.png")]
    write_whole(paths[0], [picture])
    if space.groups:
        paths.append(order.output.with_name(f"{order.output.stem}.coefficients.png"))
        title = f"coefficients by --per {order.settings.per}, search {order.search}"
        means = space.summary(best)
        write_whole(
            paths[1],
            [draw_heat_map(space.by_group(best), space.experts, title=title, means=means)],
        )
    return paths
