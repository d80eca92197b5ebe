"""Ladders of objectives: how they are written, who goes on, and what a search makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from deme_cli.errors import ConfigError, NumericsError
from deme_cli.merging.journal import Journal
from deme_cli.merging.samplers import WAIT, first_free
from deme_cli.merging.search import Conclusion, Search, conclude, rank_correlation, shortlist
from deme_cli.merging.space import BASE_NAME, MEAN_NAME, Point, Space, Trial
from deme_cli.merging.successive_halving import Stage, parse_stages
from deme_cli.timesteps import TimestepRange

SPACE = Space(("1of2", "2of2"), ((-0.5, 1.5),) * 2, (0.5, 0.5))
POINTS = list(itertools.product((0.0, 0.3, 0.6, 0.9, 1.2), repeat=2))
RUNGS = [Stage("loss", 64, 6), Stage("kid", 1000, 3), Stage("fid", 5000, 1)]
Objectives = Callable[[int, Point], float]


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("loss", [("loss", 2048, 10)]),
        ("experts:5", [("experts", 2048, 5)]),
        ("fid@500", [("fid", 500, 10)]),
        ("kid@2.5k:3", [("kid", 2500, 3)]),
        ("loss:64,fid", [("loss", 2048, 64), ("fid", 2048, 10)]),
        ("loss:64,kid@1k:16,fid@5k:5", [("loss", 2048, 64), ("kid", 1000, 16), ("fid", 5000, 5)]),
        (" loss:4 , fid@0.5k:4 ", [("loss", 2048, 4), ("fid", 500, 4)]),
        ("fid@1k:8,fid@10k", [("fid", 1000, 8), ("fid", 10000, 10)]),
    ],
)
def test_a_ladder_reads_as_its_rungs(text: str, stages: list[tuple]) -> None:
    found = parse_stages(text, num=2048)
    assert [(stage.name, stage.num, stage.keep) for stage in found] == stages
    assert [stage.is_distance for stage in found] == [name in ("kid", "fid") for name, *_ in stages]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "objective '': expected loss, experts, kid, fid"),
        ("lose", "objective 'lose': expected loss"),
        ("Loss", "objective 'Loss': expected"),
        ("loss:4,", "objective '': expected"),
        ("loss:4;fid", "objective 'loss:4;fid': expected"),
        ("loss:", "objective 'loss:': expected"),
        ("loss:-4,fid", "objective 'loss:-4': expected"),
        ("loss:4:4,fid", "objective 'loss:4:4': expected"),
        ("loss:4@1k,fid", "objective 'loss:4@1k': expected"),
        ("loss@,fid", "objective 'loss@': expected"),
        ("loss,fid", "how many does it keep for the next"),
        ("loss:0,fid", "keeps 0; expected at least 1"),
        ("loss:4,kid:5,fid", "keeps 5; expected at most the 4"),
        ("loss:4,fid:5", "keeps 5; expected at most the 4"),
        ("fid@0", "0 is no number of draws"),
        ("fid@0.0001k", "0.0001k is no number"),
        ("fid@1.5", "1.5 is no number"),
        ("fid@1.2.3k", "1.2.3k is no number"),
        ("fid@.", ". is no number"),
    ],
)
def test_a_ladder_that_does_not_parse_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_stages(text, num=2048)
    assert words in str(caught.value)


def trial(index: int, value: float, *, name: str = "", stage: int = 0) -> Trial:
    return Trial(index, stage, (float(index), 0.0), value, name)


def test_the_best_pass_and_base_and_mean_besides() -> None:
    trials = [
        trial(0, 9.0, name=BASE_NAME), trial(1, 2.5, name=MEAN_NAME), trial(2, 3.0),
        trial(3, math.inf), trial(4, 1.0), trial(5, 2.0, name="soup"), trial(6, 4.0),
    ]  # fmt: skip
    assert [t.index for t in shortlist(trials, 2)] == [4, 5, 1, 0]
    assert [t.index for t in shortlist(trials, 1)] == [4, 1, 0]
    assert [t.index for t in shortlist(trials, 99)] == [4, 5, 1, 2, 6, 0]
    broken = [trial(0, math.inf, name=BASE_NAME), trial(1, 1.0), trial(2, math.inf)]
    assert [t.index for t in shortlist(broken, 2)] == [1], "what is broken stays behind"
    with pytest.raises(NumericsError, match="not finite for any candidate"):
        shortlist([trial(0, math.inf)], 1)


def test_among_equals_the_shorter_then_the_earlier_pass() -> None:
    equal = [Trial(i, 0, p, 1.0) for i, p in enumerate([(1.0, 1.0), (0.0, 0.5), (0.5, 0.0)])]
    assert [t.index for t in shortlist(equal, 2)] == [1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_is_that_of_ranks(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.integers(0, 6, 20) / 3, draw.normal(size=20)
    lower = [trial(i, float(v)) for i, v in enumerate(a)]
    upper = [trial(i, float(b[i]), stage=1) for i in draw.permutation(20)]
    expected = np.corrcoef(rankdata(a), rankdata(b))[0, 1]
    assert rank_correlation(lower, upper) == pytest.approx(expected, abs=1e-12)
    some = [t for t in upper if t.index < 9] + [trial(3000, 0.0, stage=1)]
    some = [trial(t.index, math.inf if t.index == 4 else t.objective, stage=1) for t in some]
    shared = [i for i in range(9) if i != 4]
    expected = np.corrcoef(rankdata(a[shared]), rankdata(b[shared]))[0, 1]
    assert rank_correlation(lower, some) == pytest.approx(expected, abs=1e-12)


def test_rungs_that_share_too_little_have_no_rank_correlation() -> None:
    lower = [trial(i, float(i)) for i in range(5)]
    assert rank_correlation(lower, [trial(i, -float(i), stage=1) for i in range(2)]) is None
    assert rank_correlation(lower, [trial(i, 1.0, stage=1) for i in range(5)]) is None
    assert rank_correlation(lower, []) is None
    assert rank_correlation(lower, [trial(i, -float(i), stage=1) for i in range(3)]) == -1.0


@dataclass(frozen=True)
class Named:
    """As much of an objective as a conclusion asks for."""

    name: str

    @property
    def label(self) -> str:
        return self.name


def search_of(stages: list[Stage] = RUNGS) -> Search:
    """A search of all POINTS."""
    return Search("random", SPACE, partial(first_free, POINTS), stages, len(POINTS))


def search(path: Path, objectives: Objectives, stages: list[Stage] = RUNGS) -> tuple[Search, list]:
    """A search of all POINTS on disk, and what was asked of it: (stage, point, name)."""
    what, asked = search_of(stages), []

    def evaluate(stage: int, point: Point, name: str) -> tuple[float, dict]:
        asked.append((stage, point, name))
        return objectives(stage, point), {}

    journal = Journal(path, SPACE.labels, {})
    journal.open(force=False)
    list(what.run(journal, evaluate, lambda: None))
    return what, asked


def concluded(path: Path, what: Search) -> tuple[Conclusion, list[Trial]]:
    journal = Journal(path, SPACE.labels, {})
    journal.open(force=False)
    asked = journal.trials()
    return conclude(what, asked, [Named(stage.name) for stage in what.stages]), asked


def distance(stage: int, point: Point) -> float:
    """Each stage measures from another place, and on another scale."""
    target = ((0.9, 0.9), (0.6, 0.9), (0.6, 0.6))[stage]
    return 1000.0**stage * (math.dist(point, target) - 0.5)


def best_of(points: list[Point], stage: int, keep: int) -> set[Point]:
    order = sorted(points, key=lambda point: (distance(stage, point), math.hypot(*point)))
    return set(order[:keep])


def test_each_rung_judges_what_the_one_below_kept_and_the_references(tmp_path: Path) -> None:
    what, asked = search(tmp_path / "trials.jsonl", distance)
    references = {SPACE.base, SPACE.mean}
    first, second, third = ([p for r, p, _ in asked if r == stage] for stage in range(3))
    assert first == [SPACE.base, SPACE.mean, *(p for p in POINTS if p != SPACE.base)]
    candidates = [point for point in first if point not in references]
    kept = best_of(candidates, 0, 6)
    assert set(second) == kept | references
    again = best_of(list(kept), 1, 3)
    assert set(third) == again | references, "by the second rung's own values, not by the first's"
    assert again != best_of(list(kept), 0, 3), "else this would prove nothing"
    assert len(second) == 8
    assert len(third) == 5
    names = {(stage, name) for stage, point, name in asked if point in references}
    assert names == {(stage, name) for stage in range(3) for name in (BASE_NAME, MEAN_NAME)}
    assert what.expected == 2 + 25 + 8 + 5


def test_a_rung_waits_for_every_trial_of_the_one_below(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    what, _ = search(path, distance)
    _, asked = concluded(path, what)
    for stage in (0, 1):
        below = [one for one in asked if one.stage <= stage]
        step = what.next(below)
        assert isinstance(step, tuple)
        assert step[0] == stage + 1
        for index in (len(below) - 1, len(below) - 3):
            running = [
                replace(one, objective=None) if i == index else one for i, one in enumerate(below)
            ]
            assert what.next(running) == WAIT, "another worker may still find the best"
    last = [*asked[:-1], replace(asked[-1], objective=None)]
    assert what.next(last) == WAIT, "if that worker dies, somebody must take over"
    assert what.next(asked) is None


def test_the_last_rung_decides_and_the_record_tells_of_all(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    what, asked = search(path, distance)
    end, trials = concluded(path, what)
    third = [point for stage, point, _ in asked if stage == 2]
    assert end.best.point == min(third, key=lambda point: distance(2, point))
    assert [t.stage for t in end.ranking] == [2] * 5
    assert [t.objective for t in end.ranking] == sorted(distance(2, point) for point in third)
    assert len(trials) == len(asked)
    rhos = [stage["rho_to_next"] for stage in end.record["rungs"][:2]]
    expected = [
        np.corrcoef(*(rankdata([distance(r, p) for p in shared]) for r in stages))[0, 1]
        for stages, shared in (((0, 1), [p for r, p, _ in asked if r == 1]), ((1, 2), third))
    ]
    assert rhos == pytest.approx(expected)
    record = end.record
    seconds = record.pop("seconds")
    assert 0 <= seconds < 60
    assert record == {
        "objective": "fid", "evaluations": 39, "best": end.best.objective,
        "values": {"base": distance(2, SPACE.base), "mean": distance(2, SPACE.mean),
                   "best": end.best.objective},
        "rungs": [
            {"objective": "loss", "num": 64, "evaluations": 26, "keep": 6,
             "rho_to_next": rhos[0],
                "rho_to_next_by_range": {}},
            {"objective": "kid", "num": 1000, "evaluations": 8, "keep": 3,
             "rho_to_next": rhos[1],
                "rho_to_next_by_range": {}},
            {"objective": "fid", "num": 5000, "evaluations": 5, "keep": 1, "rho_to_next": None,
                "rho_to_next_by_range": {}},
        ],
    }  # fmt: skip


def test_the_loss_on_each_range_is_compared_with_the_next_rung_alone() -> None:
    """Low timesteps rank as the next stage does, high ones the other way round."""
    what = search_of(RUNGS[:2])
    asked: list[Trial] = []
    while (step := what.next(asked)) is not None:
        stage, point, name = step
        value = distance(stage, point)
        extra = {"by_range": [distance(1, point), -distance(1, point), None]} if not stage else {}
        asked.append(Trial(len(asked), stage, point, value, name, extra=extra))
    ranges = [TimestepRange(0, 30), TimestepRange(30, 60), TimestepRange(60, 100)]
    end = conclude(what, asked, [Named("loss"), Named("kid")], ranges)
    found = [stage["rho_to_next_by_range"] for stage in end.record["rungs"]]
    assert found == [{"0:30": pytest.approx(1), "30:60": pytest.approx(-1)}, {}]


def test_a_reference_may_win(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    what, _ = search(path, lambda stage, point: math.dist(point, (0.5, 0.5)))
    assert concluded(path, what)[0].best.name == MEAN_NAME


def test_what_is_broken_on_a_rung_goes_no_further(tmp_path: Path) -> None:
    def objectives(stage: int, point: Point) -> float:
        broken = (point[0] == 0.9, point == (0.6, 0.6), sum(point) == 0)[stage]
        return math.nan if broken else distance(stage, point)

    path = tmp_path / "trials.jsonl"
    what, asked = search(path, objectives)
    second, third = ([p for r, p, _ in asked if r == stage] for stage in (1, 2))
    assert (0.6, 0.6) in second
    assert not any(point[0] == 0.9 for point in second)
    assert (0.6, 0.6) not in third
    end, _ = concluded(path, what)
    assert f"{5 + 1 + 1} of {len(asked)} trials had no finite objective" in end.warnings[0]
    assert end.record["values"]["base"] is None, "not finite, so not in the record"
    assert math.isfinite(end.best.objective)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_rung_on_which_all_are_broken_ends_the_search(stage: int, tmp_path: Path) -> None:
    def objectives(at: int, point: Point) -> float:
        return math.nan if at == stage else distance(at, point)

    path = tmp_path / "trials.jsonl"
    with pytest.raises(NumericsError, match="not finite for any candidate"):  # noqa: PT012
        what, _ = search(path, objectives)
        concluded(path, what)
    count = Journal(path, SPACE.labels, {}).open(force=False)
    assert count == (26, 34, 39)[stage], "what was tried is kept"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_one_rung_is_no_ladder(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    what, asked = search(path, distance, [Stage("loss", 64, 1)])
    end, _ = concluded(path, what)
    assert len(asked) == len(POINTS) + 1 == end.record["evaluations"]
    assert [stage["rho_to_next"] for stage in end.record["rungs"]] == [None]
