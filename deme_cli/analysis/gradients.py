"""How alike the gradients of timesteps are: one mean gradient per bucket, and the cosines between.

(The paper's figure 1; Go et al. 2023, ANT, section 3.1.) Per bucket of timesteps: the gradient of
the plain denoising loss over `num` draws (image, t, eps), as a sketch, so that memory does not grow
with buckets times parameters. Images come in shuffled rounds, t evenly from the bucket's draws;
each bucket's draws are a function of (seed, bucket) alone. The two halves of its draws give two
means, whose cosine is the bucket's reliability: with noise of variance v in each of them it is
|g|^2 / (|g|^2 + v), and cosines between buckets shrink likewise.
n buckets with mean gradients g_i, m numbers per sketch.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import BLUE, DIVERGING, EDGE, VERMILION, open_axis, render, shorten
from deme_cli.analysis.result import Analysis, check_inputs, keeping, own_base, peek, write_analysis
from deme_cli.analysis.settings import GradientConfig, bucket_ranges
from deme_cli.config import AFFINITY_NAME, DataConfig, SplitConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, route
from deme_cli.training.clusters import Affinity, split_times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from torch import Tensor, nn

    from deme_cli.training.batches import FixedDraws

SKETCH_SIZE = 65_536
_NOISY = 0.5  # halves that agree less have more noise than signal


def analyze_gradients(
    model: str | Path | None = None, settings: GradientConfig | None = None, *,
    images: DataConfig | None = None, num_ranges: int | None = None,
    output: Path = Path(AFFINITY_NAME), run: RunFile | None = None, pipeline: str | None = None,
    device: str = "auto", force: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Compare the gradients of timesteps, bucket by bucket; suggest ranges of those that agree.

    model: the base of `run` if None.   num_ranges: how many to suggest, by which `split` with
    by = gradient divides; that of `run` if None.

    Notes where noise hides what the gradients have in common. The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or GradientConfig()
    images = check_inputs(output, images, run, split="train", force=force)
    num_ranges = run.settings(SplitConfig, n=num_ranges).n
    model = str(model or own_base(run))
    if num_ranges > settings.buckets:
        raise ConfigError(
            f"cannot form {num_ranges} ranges of {settings.buckets} buckets; choose a smaller -n "
            f"or more --buckets"
        )
    if whole := peek(model)[1]:
        bucket_ranges(settings.buckets, whole)
    total = settings.buckets * settings.num
    parts = f"{whole or 'all'} timesteps in {settings.buckets} buckets"
    progress(Step(note=f"{model}: {parts}, {total:,} draws from {images.source}"))
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.draws import open_images, spread_draws
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device

    place = str(choose_device(device))
    denoiser = open_denoiser(model, run=run, pipeline=run.pipeline(pipeline), device=place)
    examples, data, seen = open_images(
        denoiser.record, images, "train", run=run, output=output, pipeline=pipeline,
        device=device, progress=progress,
    )  # fmt: skip
    schedule, network = denoiser.schedule, denoiser.network
    buckets = bucket_ranges(settings.buckets, schedule.num_train_timesteps)
    protocol: dict[str, Any] = {
        "model": {"source": model, "fingerprint": denoiser.record.fingerprint},
        "data": data, **asdict(settings),
    }  # fmt: skip
    for bucket in buckets:
        schedule.indices(bucket)  # ConfigError where it holds no time
    with keeping(
        output, {**protocol, **seen}, "gradients", "draw", total, progress=progress, force=force
    ) as kept:
        measured = []
        for bucket in buckets:
            draws = spread_draws(examples, schedule, [bucket], settings)
            where = f"{model}: timesteps {bucket}"
            measure = functools.partial(_mean_gradient, where, network, draws, kept.check)
            measured.append(kept.unit(where, settings.num, measure))
        affinity = _affinity(buckets, measured, network, protocol)
        affinity = replace(affinity, ranges=split_times(num_ranges, "gradient", schedule, affinity))
        if np.median(affinity.reliability) < _NOISY:
            note = "noise in the gradients draws all cosines towards 0; raise --num for more draws"
            progress(Step(note=note))
        means = cosine_means(affinity)
        near, far = (f"{means[key] or 0:.2f}" for key in ("neighbouring", "distant"))
        reading = f"mean cosine {near} of neighbouring buckets, {far} of distant ones; "
        reading += f"{num_ranges} ranges by gradient: {', '.join(map(str, affinity.ranges))}"
        document = json.loads(affinity.to_json()) | means
        document |= {"reading": reading, "protocol": {**protocol, "n": num_ranges}}
        return write_analysis(
            output, "gradients", document, draw_gradients(affinity),
            shown=("ranges", "buckets", "norms", "reliability", *means),
            columns=["timesteps", "mean cosine within", "reliability"], rows=_table(affinity),
        )  # fmt: skip


def sketch(
    tensors: Iterable[tuple[str, Tensor]], num: int, size: int, *, seed: int = 0
) -> np.ndarray:
    """Named tensors of `num` elements in all as (m,) float64 that keep inner products.

    A count sketch (Charikar et al. 2002): S_k sums s_i g_i over the elements i with h_i = k, of
    random places h and signs s. <S(a), S(b)> has the mean <a, b> and a variance of at most
    2 |a|^2 |b|^2 / m, so a cosine is off by sqrt(2 / m) at most: 0.0055 for m = 65,536. A row of m
    successive elements goes to m different places, all shifted by one random number; so no table
    of places is kept. The same names give the same places on every machine. With num <= m all is
    kept as it is.
    """
    if num <= size:
        return np.concatenate([one.cpu().flatten() for _, one in tensors], dtype=np.float64)
    total = np.zeros(size)
    for name, tensor in tensors:
        random = np.random.default_rng([seed, *name.encode()])
        for row in tensor.float().cpu().flatten().split(size):
            bits = np.frombuffer(random.bytes(-(-len(row) // 8)), np.uint8)
            signs = np.unpackbits(bits, count=len(row)).astype(np.float32) * 2 - 1
            places = (np.arange(len(row)) + random.integers(size)) % size
            total[places] += signs * row.numpy()
    return total


def _mean_gradient(
    where: str, network: nn.Module, draws: FixedDraws, check: Callable[[], None]
) -> dict[str, np.ndarray]:
    """The sketch (m,) of a bucket's mean gradient, the cosine of its halves, the loss."""
    import torch

    from deme_cli.analysis.draws import part

    num, losses, halves = len(draws.t), [], []
    size = sum(p.numel() for p in network.parameters())
    for half in (range(num // 2), range(num // 2, num)):
        losses.append(part(draws, half).loss_and_gradient(network, check))
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in network.named_parameters()
        }
        halves.append(sketch(gradients.items(), size, SKETCH_SIZE))
    network.zero_grad(set_to_none=True)
    if not np.isfinite([*losses, *map(np.sum, halves)]).all():
        raise NumericsError(f"{where}: the gradient is not finite; the weights are broken")
    share = [num // 2, num - num // 2]
    return {
        "sketch": np.average(halves, axis=0, weights=share).astype(np.float32),
        "reliability": cosines_of(np.array(halves))[0, 1],
        "loss": np.average(losses, weights=share),
    }


def _affinity(
    buckets: list[TimestepRange], measured: Sequence[Mapping[str, np.ndarray]],
    network: nn.Module, protocol: dict[str, Any],
) -> Affinity:  # fmt: skip
    vectors, reliability, losses = (
        np.array([one[name] for one in measured]) for name in ("sketch", "reliability", "loss")
    )
    parameters, size = sum(p.numel() for p in network.parameters()), vectors.shape[1]
    return Affinity(
        buckets=buckets, cosines=cosines_of(vectors).round(6).tolist(), ranges=[],
        norms=np.linalg.norm(vectors, axis=1).tolist(), losses=losses.tolist(),
        reliability=reliability.round(6).tolist(), num=protocol["num"], seed=protocol["seed"],
        model=protocol["model"], data=protocol["data"], parameters=parameters, sketch_size=size,
        standard_error=0 if size == parameters else math.sqrt(2 / size),
    )  # fmt: skip


def cosines_of(vectors: np.ndarray) -> np.ndarray:
    """The cosines of every two of the vectors (n, m): (n, n) float64; 0 where one is 0."""
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return np.clip(unit @ unit.T, -1, 1)


def pair_cosines(
    affinity: Affinity, ranges: Sequence[TimestepRange]
) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of every two buckets in one range, and of every two in two ranges."""
    owners = np.array([route(bucket.start, ranges) for bucket in affinity.buckets])
    i, j = np.tril_indices(len(owners), -1)
    values, are_together = np.array(affinity.cosines)[i, j], owners[i] == owners[j]
    return values[are_together], values[~are_together]


def cosine_means(affinity: Affinity) -> dict[str, float | None]:
    """Mean cosines within ranges and across, of neighbouring buckets, of those at least T / 2
    apart; None without such pairs."""
    values, n = np.array(affinity.cosines), len(affinity.buckets)
    within, across = pair_cosines(affinity, affinity.ranges)
    groups = {
        "within": within, "across": across, "neighbouring": np.diagonal(values, 1),
        "distant": values[np.triu_indices(n, -(-n // 2))],
    }  # fmt: skip
    return {name: float(one.mean()) if one.size else None for name, one in groups.items()}


def _table(affinity: Affinity) -> list[list[str]]:
    """The buckets of all timesteps, then of each range; medians of reliability."""
    lines = []
    for span in (affinity.whole, *affinity.ranges):
        inside = [i for i, bucket in enumerate(affinity.buckets) if bucket.start in span]
        own = np.array(affinity.cosines)[np.ix_(inside, inside)][np.tril_indices(len(inside), -1)]
        reliability = np.median(np.array(affinity.reliability)[inside])
        lines.append([str(span), f"{own.mean():.2f}" if own.size else "", f"{reliability:.2f}"])
    return lines


def draw_gradients(affinity: Affinity) -> bytes:
    """On the left the cosines, red where two timesteps pull the same way, blue where they pull
    against each other, with the suggested ranges. On the right the distributions of the cosines
    within these ranges and across them, and over the timesteps the reliability of each bucket."""

    def draw(figure: Figure) -> None:
        left, right = figure.subfigures(1, 2, width_ratios=[1.3, 1], squeeze=False)[0]
        edges = np.array([0, *(bucket.stop for bucket in affinity.buckets)])
        _draw_cosines(left, edges, affinity)
        upper, lower = right.subplots(2, 1)
        _draw_distributions(upper, affinity)
        lower.stairs(affinity.reliability, edges, color=BLUE, linewidth=1.4, baseline=None)
        lower.set(
            xlim=(0, affinity.whole.stop), ylim=(min(0.0, *affinity.reliability) - 0.03, 1.03),
            xlabel="timestep t (0 = clean)", ylabel="cosine of two halves",
        )  # fmt: skip
        lower.set_title("Reliability: agreement of two halves of a bucket's draws", fontsize=9)
        for span in affinity.ranges[1:]:
            lower.axvline(span.start, **EDGE)
        open_axis(lower)

    names = shorten(f"{affinity.model['source']} on {affinity.data['source']}", 40)
    buckets = f"{len(affinity.buckets)} buckets of {affinity.num:,} draws"
    return render(draw, size=(10.8, 5.6), title=f"Gradients by timestep: {names}, {buckets}")


def _draw_cosines(figure: SubFigure, edges: np.ndarray, affinity: Affinity) -> None:
    values, axis = np.array(affinity.cosines), figure.subplots()
    others = np.abs(values[~np.eye(len(values), dtype=bool)]).max(initial=0.0)
    limit = float(np.clip(np.ceil(others * 10) / 10, 0.2, 1.0))  # to the next tenth
    mesh = axis.pcolormesh(edges, edges, values, cmap=DIVERGING, vmin=-limit, vmax=limit)
    axis.set_aspect("equal")
    for span in affinity.ranges[1:]:
        axis.axhline(span.start, color="black", linewidth=0.8)
        axis.axvline(span.start, color="black", linewidth=0.8)
    beyond = "both" if limit < 1 else "neither"
    bar = figure.colorbar(mesh, ax=axis, fraction=0.046, pad=0.02, extend=beyond)
    bar.set_label("cosine (red: alike, blue: opposed)")
    bar.outline.set_visible(False)
    axis.set(xlabel="timestep t (0 = clean)", ylabel="timestep t (0 = clean)")
    lines = f"lines: {len(affinity.ranges)} suggested ranges"
    axis.set_title(f"Cosine of mean gradients; {lines}", fontsize=9)


def _draw_distributions(axis: Axes, affinity: Affinity) -> None:
    within, across = pair_cosines(affinity, affinity.ranges)
    bins = np.linspace(-1, 1, 41)
    for values, color, name in (
        (within, BLUE, "in one of these ranges"), (across, VERMILION, "in two of them"),
    ):  # fmt: skip
        if values.size:
            label = f"{name}: mean {values.mean():.2f}"
            density = np.histogram(values, bins, density=True)[0]
            axis.stairs(density, bins, color=color, fill=True, alpha=0.25)
            axis.stairs(density, bins, color=color, linewidth=1.4, label=label)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    axis.margins(y=0.35)
    axis.set(xlabel="cosine of two buckets", ylabel="density", xlim=(-1, 1))
    axis.set_title("Distribution of the cosines", fontsize=9)
    open_axis(axis)
