from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deme_cli.comparison.figures import (
    OVER_EVALUATION,
    OVER_TRAINING,
    Column,
    Comparison,
    Result,
    RowResult,
    SearchCost,
    cell_of,
    difference_of,
    digits_of,
    headlines,
    search_of,
    status_of,
    winner,
)
from deme_cli.evaluation.measure import interval_of

FID = Column("fid")
ACCURACY = Column("accuracy", lower_is_better=False)


def row(name: str, values, kind: str = "finetune", column: Column = FID, **known) -> RowResult:
    """values: (S, R); by training seed where they are a dict."""
    by_seed = values if isinstance(values, dict) else dict(enumerate(values))
    if kind == "base":
        by_seed = {None: values}
    results = tuple(Result(s, {column: tuple(map(float, v))}) for s, v in by_seed.items())
    return RowResult(name, kind, 4 if kind == "merged" else 1, {}, results, **known)


def table(*rows: RowResult, column: Column = FID) -> Comparison:
    return Comparison("a table", (column,), rows, ("drawn alike",))


BASE = row("base", [10.0, 11.0], kind="base")


def test_a_cell_averages_repeats_first_and_its_sd_is_over_training_seeds() -> None:
    values = np.random.default_rng(0).normal(5, 1, (4, 3))
    cell = cell_of(row("a", values), FID, BASE)
    assert cell.mean == pytest.approx(values.mean())
    assert cell.sd == pytest.approx(values.mean(1).std(ddof=1))
    assert cell.repeats_sd == pytest.approx(values.std(1, ddof=1).mean())
    assert (cell.num_seeds, cell.num_repeats) == (4, 3)


def test_intervals_are_those_of_students_t() -> None:
    sample = np.random.default_rng(1).normal(2, 1, 5)
    expected = stats.t.interval(0.95, 4, sample.mean(), stats.sem(sample))
    assert interval_of(sample) == pytest.approx(expected)
    cell = cell_of(row("a", sample[:, None]), FID, BASE)
    assert cell.interval == pytest.approx(expected)


def test_a_shift_that_all_rows_share_in_a_repeat_leaves_their_difference_exactly() -> None:
    draws = np.random.default_rng(2)
    ours, theirs, shift = draws.integers(0, 9, (3, 4)), draws.integers(0, 9, (3, 4)), [64, -8, 0, 2]
    plain = difference_of(row("a", ours), row("b", theirs), FID)
    assert difference_of(row("a", ours + shift), row("b", theirs + shift), FID) == plain


def test_equal_training_seeds_are_paired_and_others_left_out() -> None:
    ours = row("a", {7: [1.0], 3: [2.0], 9: [50.0]})
    theirs = row("b", {3: [1.5], 7: [0.5], 8: [-50.0]})
    difference = difference_of(ours, theirs, FID)
    assert (difference.mean, difference.sd, difference.over) == (0.5, 0.0, OVER_TRAINING)


def test_a_row_without_training_is_paired_with_every_seed() -> None:
    trained = row("a", [[8.0, 9.0], [6.0, 7.0]])
    difference = cell_of(trained, FID, BASE).difference
    assert (difference.to, difference.mean, difference.over) == ("base", -3.0, OVER_TRAINING)
    back = difference_of(BASE, trained, FID)
    assert (back.mean, back.sd) == (3.0, difference.sd)


def test_one_training_seed_gives_an_interval_over_evaluation_seeds_that_says_so() -> None:
    cell = cell_of(row("a", [[9.0, 11.5, 99.0]]), FID, BASE)  # a repeat that only one row has
    assert cell.sd is None
    assert cell.interval is None
    assert cell.difference.over == OVER_EVALUATION
    assert cell.difference.interval == pytest.approx(interval_of([-1.0, 0.5]))


def test_one_pair_makes_no_difference_and_no_result_makes_no_cell() -> None:
    assert cell_of(row("a", [[9.0]]), FID, row("base", [10.0], kind="base")).difference is None
    assert cell_of(row("a", {}), FID, BASE) is None
    assert cell_of(row("a", [[9.0]]), ACCURACY, BASE) is None
    assert cell_of(row("a", [[9.0], [8.0]]), FID, row("b", {})).difference is None
    assert cell_of(BASE, FID, BASE).difference is None


@pytest.mark.parametrize(("column", "expected"), [(FID, "low"), (ACCURACY, "high")])
def test_the_best_row_follows_the_direction_of_its_column(column: Column, expected: str) -> None:
    rows = [row("low", [[1.0], [1.1]], column=column), row("high", [[5.0], [5.2]], column=column)]
    found = winner(rows, column)
    assert (found.best.name, found.not_beaten) == (expected, ())


def test_rows_whose_interval_includes_0_are_not_told_apart_from_the_best() -> None:
    best, near = row("best", [[1.0], [1.1], [0.9]]), row("near", [[1.2], [1.0], [1.0]])
    far, gone = row("far", [[5.0], [5.1], [4.8]]), row("gone", {}, failures=("lost",))
    found = winner([far, near, gone, best], FID)
    assert found.best is best
    assert found.not_beaten == (near,)


def test_a_row_that_lacks_seeds_is_not_called_best_until_every_row_does() -> None:
    whole, part = row("whole", [[2.0], [2.1]]), row("part", [[1.0]], pending=1)
    assert winner([whole, part], FID).best is whole
    assert winner([part], FID).best is part
    assert winner([row("none", {}, pending=2)], FID) is None
    assert "not all seeds are measured yet: part" in headlines(table(whole, part))


def test_digits_follow_the_spread_of_a_column() -> None:
    wide, narrow = [[80.0], [120.0]], [[1.0], [1.002]]
    assert digits_of([cell_of(row("a", wide), FID, BASE)]) == 0
    assert digits_of([None, cell_of(row("a", narrow), FID, BASE)]) == 4
    assert digits_of([cell_of(row("a", [[12.0]]), FID, BASE)]) == 2  # no spread: four figures
    assert digits_of([None]) == digits_of([cell_of(row("a", [[0.0]]), FID, BASE)]) == 3


def test_the_cost_of_a_search_is_a_mean_over_seeds() -> None:
    costs = SearchCost(10, 100, 2.0), SearchCost(30, 300, 4.0)
    results = tuple(Result(s, {}, search=cost) for s, cost in enumerate(costs))
    assert search_of(RowResult("a", "merged", 4, {}, results)) == SearchCost(20, 200, 3.0)
    assert search_of(BASE) is None


def test_the_state_of_a_row_tells_each_reason_once_and_what_is_still_to_run() -> None:
    assert status_of(BASE) == ""
    failed = row("a", {}, failures=("no\nmemory", "no memory"), pending=1)
    assert status_of(failed) == "failed: no memory; not run yet (1 of 3 seeds)"
    assert status_of(row("a", [[1.0]], failures=("lost",))) == "failed for other seeds: lost"
    assert len(status_of(row("a", {}, failures=("x" * 5000,)))) < 300
