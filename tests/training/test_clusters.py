"""Clusters of timesteps: exact, adjacent, and those that were published."""

from __future__ import annotations

import itertools
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from deme_cli.diffusion.schedule import FlowSchedule, NoiseSchedule, read_schedule
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.timesteps import TimestepRange, require_cover, split_uniform
from deme_cli.training.clusters import (
    Affinity,
    affinity_cost,
    cluster_draws,
    interval_clusters,
    read_affinity,
    snr_cost,
    split_times,
)

LINEAR = read_schedule({"num_train_timesteps": 1000})
SHIFTED = read_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
WHOLE = TimestepRange(0, 1000)


def affinity_of(buckets: list[TimestepRange], cosines: np.ndarray) -> Affinity:
    count = [1.0] * len(buckets)
    names = {"source": "tiny", "fingerprint": "abc"}
    return Affinity(
        buckets, cosines.tolist(), count, count, count, names, names, 2, 0, 10, 10, 0.0, []
    )


def blocks(sizes: list[int], across: float = -0.2) -> np.ndarray:
    """Cosines of 1 within blocks of buckets."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(owner[:, None] == owner[None, :], 1.0, across)


def least_cost(cost: np.ndarray, k: int) -> float:
    """The best of all partitions into k intervals, tried one by one."""
    n = len(cost)
    return min(
        sum(cost[start, stop - 1] for start, stop in pairwise([0, *cuts, n]))
        for cuts in itertools.combinations(range(1, n), k - 1)
    )


def test_interval_clusters_cost_no_more_than_any_partition() -> None:
    rng = np.random.default_rng(0)
    for n, k in itertools.product(range(1, 10), range(1, 10)):
        if k > n:
            continue
        cost = rng.normal(size=(n, n))
        clusters = interval_clusters(cost, k)
        assert [stop for _, stop in clusters[:-1]] == [start for start, _ in clusters[1:]]
        assert (clusters[0][0], clusters[-1][1], len(clusters)) == (0, n, k)
        found = sum(cost[start, stop - 1] for start, stop in clusters)
        assert found == pytest.approx(least_cost(cost, k))


def test_of_equal_partitions_always_the_same_is_taken() -> None:
    assert interval_clusters(np.zeros((4, 4)), 3) == [(0, 1), (1, 2), (2, 4)]


@pytest.mark.parametrize("n", [2, 7, 8])
def test_costs_are_those_of_the_formulas(n: int) -> None:
    rng = np.random.default_rng(n)
    values, cosines, sizes = rng.normal(size=n), rng.normal(size=(n, n)), rng.integers(1, 9, n)
    by_snr, by_gradient = snr_cost(values), affinity_cost(cosines, sizes)
    for left in range(n):
        for right in range(left, n):
            c, own = (left + right) // 2, range(left, right + 1)
            assert by_snr[left, right] == pytest.approx(
                sum(abs(values[t] - values[c]) for t in own)
            )
            expected = -sum(sizes[t] * cosines[c, t] for t in own)
            assert by_gradient[left, right] == pytest.approx(expected)


def test_clusters_of_the_linear_schedule_are_the_published_ones() -> None:
    by_snr = cluster_draws(WHOLE, 4, "snr", LINEAR)
    by_log = cluster_draws(WHOLE, 4, "log-snr", LINEAR)
    assert [str(one) for one in by_snr] == ["0:1", "1:4", "4:15", "15:1000"]
    assert [str(one) for one in by_log] == ["0:221", "221:522", "522:779", "779:1000"]


@pytest.mark.parametrize("by", ["uniform", "snr", "log-snr", "gradient"])
@pytest.mark.parametrize("schedule", [LINEAR, SHIFTED], ids=["ddpm", "flow"])
def test_clusters_cover_a_span_of_draws_and_ranges_the_horizon_once(by: str, schedule) -> None:
    affinity = affinity_of(split_uniform(25, 1000), blocks([5] * 5))
    for span in (TimestepRange(0, 1000), TimestepRange(123, 456)):
        clusters = cluster_draws(span, 3, by, schedule, affinity)
        edges = [clusters[0].start, *(one.stop for one in clusters)]
        assert edges == sorted(set(edges))
        assert (edges[0], edges[-1], len(clusters)) == (span.start, span.stop, 3)
        assert [one.start for one in clusters[1:]] == edges[1:-1]
    ranges = split_times(4, by, schedule, affinity)
    require_cover(ranges, 1000)
    clusters = cluster_draws(WHOLE, 4, by, schedule, affinity) if by != "uniform" else ()
    times = schedule.times(torch.arange(1000)).long()
    for span, cluster in zip(ranges, clusters, strict=False):
        draws = schedule.indices(span)  # the cluster's, but for those that share a whole time
        assert times[draws.start] == times[cluster.start]
        assert cluster.start - draws.start in (0, 1)


def test_gradient_clusters_end_where_alike_buckets_do() -> None:
    affinity = affinity_of(split_uniform(20, 1000), blocks([3, 7, 6, 4]))
    ranges = split_times(4, "gradient", LINEAR, affinity)
    assert [str(span) for span in ranges] == ["0:150", "150:500", "500:800", "800:1000"]
    within = cluster_draws(TimestepRange(100, 520), 3, "gradient", LINEAR, affinity)
    assert [str(span) for span in within] == ["100:150", "150:500", "500:520"]


def test_infinite_ratios_count_as_their_neighbours() -> None:
    without_noise = NoiseSchedule(torch.tensor([1.0, 0.9, 0.5, 0.1, 0.0]).double(), "epsilon")
    for by in ("snr", "log-snr"):
        assert len(split_times(2, by, without_noise)) == 2
    pure = FlowSchedule(torch.tensor([0.25, 0.5, 0.75, 1.0]).double())
    assert [str(span) for span in split_times(2, "log-snr", pure)] == ["0:2", "2:4"]


def test_what_cannot_be_clustered_is_refused() -> None:
    affinity = affinity_of(split_uniform(4, 1000), blocks([2, 2]))
    with pytest.raises(ConfigError, match="5 clusters of the 4 buckets"):
        split_times(5, "gradient", LINEAR, affinity)
    with pytest.raises(ConfigError, match="11 clusters of the 10 timesteps in 20:30"):
        cluster_draws(TimestepRange(20, 30), 11, "snr", LINEAR)
    with pytest.raises(ConfigError, match="3 clusters of 2 items"):
        interval_clusters(np.zeros((2, 2)), 3)
    with pytest.raises(ArtifactError, match="measured on 500 timesteps, this model has 1000"):
        split_times(2, "gradient", LINEAR, affinity_of(split_uniform(4, 500), blocks([2, 2])))
    dense = FlowSchedule(torch.tensor([0.1, 0.7, 0.75, 0.76, 0.77]).double())
    with pytest.raises(ConfigError, match="lie within one timestep"):
        split_times(5, "snr", dense)


def test_an_affinity_comes_back_from_its_file(tmp_path: Path) -> None:
    affinity = affinity_of(split_uniform(4, 1000), blocks([2, 2]))
    (tmp_path / "g.json").write_text(affinity.to_json())
    assert read_affinity(tmp_path / "g.json", "abc") == affinity
    assert json.loads(affinity.to_json())["num_train_timesteps"] == 1000


def test_damaged_files_of_gradients_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    with pytest.raises(MissingError, match="deme analyze gradients MODEL --data DATA"):
        read_affinity(path, "abc")
    whole = json.loads(affinity_of(split_uniform(4, 1000), blocks([2, 2])).to_json())
    for changes, message in [
        ({"kind": "other"}, "expected kind 'gradients' and schema_version 1"),
        ({"schema_version": 9}, "expected kind 'gradients' and schema_version 1"),
        ({"norms": [1.0]}, "expected 4 buckets in order and as many numbers of each"),
        ({"buckets": whole["buckets"][::-1]}, "expected 4 buckets in order"),
        ({"cosines": [[float("nan")] * 4] * 4}, "not finite"),
        ({"cosines": "none"}, "could not convert"),
        ({"buckets": ["0:400", "500:1000"]}, "400:500"),
        ({"sketch": {}}, "lacks 'parameters'"),
    ]:
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(ArtifactError, match=rf"{message}.*measure anew"):
            read_affinity(path, "abc")
    for text in ("{", "[]", "7"):
        path.write_text(text)
        with pytest.raises(ArtifactError, match="no gradients that this deme can read"):
            read_affinity(path, "abc")
    path.write_text(json.dumps(whole))
    with pytest.raises(ArtifactError, match="measured on another model, tiny"):
        read_affinity(path, "abd")
