"""How alike the gradients of timesteps are: one mean gradient per bucket, and the cosines between.

(The paper's figure 1; Go et al. 2023, ANT, section 3.1.) Per bucket of timesteps: the gradient of
the plain denoising loss over `num` draws (image, t, eps), as a sketch (sketch.py), so that memory
does not grow with buckets times parameters. Images come in shuffled rounds, t evenly from the
bucket's draws; each bucket's draws are a function of (seed, bucket) alone. The two halves of its
draws give two means, whose cosine is the bucket's reliability: with noise of variance v in each of
them it is |g|^2 / (|g|^2 + v), and cosines between buckets shrink likewise.
n buckets with mean gradients g_i and reliabilities r_i, m numbers per sketch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import BLUE, DIVERGING, LINE, VERMILION, open_axis, render, shorten
from deme_cli.analysis.result import (
    Analysis,
    Unfinished,
    check_images,
    check_output,
    own_base,
    write_analysis,
)
from deme_cli.analysis.settings import GradientConfig, bucket_ranges
from deme_cli.config import AFFINITY_NAME, DataConfig, SplitConfig
from deme_cli.console import Progress, Step, plain, silent
from deme_cli.errors import ConfigError, NumericsError
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, route, split_uniform
from deme_cli.training.clusters import Affinity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from deme_cli.diffusion.denoiser import Denoiser
    from deme_cli.training.batches import FixedDraws

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
SKETCH_SIZE = 65_536
_NOISY = 0.5  # halves that agree less have more noise than signal
_NOISE_TOLD = "noise in the gradients draws all cosines towards 0; raise --num for more draws"


def analyze_gradients(
    model: str | Path | None = None,
    settings: GradientConfig | None = None,
    *,
    images: DataConfig | None = None,
    num_ranges: int | None = None,
    output: Path = Path(AFFINITY_NAME),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    force: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Compare the gradients of timesteps, bucket by bucket; suggest ranges of those that agree.

    model: the base of `run` if None.   num_ranges: how many to suggest, by which `split` with
    by = gradient divides; that of `run` if None.

    Notes where noise hides what the gradients have in common. The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or GradientConfig()
    num_ranges = run.settings(SplitConfig, n=num_ranges).n
    check_output(output, force=force)
    model = str(model or own_base(run))
    whole = _check_buckets(model, settings.buckets, num_ranges)
    images, total = check_images(images, run, split="train"), settings.buckets * settings.num
    progress(Step(note=(
        f"{model}: {whole or 'all'} timesteps in {settings.buckets} buckets, {total:,} draws from "
        f"{images.source}"
    )))  # fmt: skip
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.draws import identity_of, open_images, spread_draws
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device

    denoiser = open_denoiser(
        model, pipeline=run.pipeline(pipeline), device=str(choose_device(device))
    )
    record, examples = open_images(
        denoiser.record, images, run, split="train", model=model, output=output,
        pipeline=pipeline, device=device, progress=progress,
    )  # fmt: skip
    buckets = bucket_ranges(settings.buckets, denoiser.schedule.num_train_timesteps)
    identity = {
        "model": record.fingerprint, **identity_of(record, examples),
        "buckets": settings.buckets, "num": settings.num, "seed": settings.seed,
    }  # fmt: skip

    def draws_of(bucket: TimestepRange) -> FixedDraws:
        return spread_draws(
            examples, denoiser.schedule, [bucket], settings.num,
            seed=settings.seed, purpose="gradients", batch_size=settings.batch_size,
        )  # fmt: skip

    with Unfinished(output, identity, force=force) as kept:
        sketch_size = _measure(model, denoiser, buckets, draws_of, kept, progress)
        affinity = _affinity(
            denoiser, buckets, kept.arrays, num_ranges, num=settings.num, seed=settings.seed,
            model={"source": model, "fingerprint": record.fingerprint},
            data={"source": examples.source, "fingerprint": examples.fingerprint},
            sketch_size=sketch_size,
        )  # fmt: skip
        means = cosine_means(affinity)
        if means["reliability_median"] < _NOISY:
            progress(Step(note=_NOISE_TOLD))
        return write_analysis(
            kept, draw_gradients(affinity), affinity.to_json(**_said(affinity, means)).encode(),
            shown=("reading", "ranges", "buckets", "norms", "reliability", "mean_norms"),
            columns=["timesteps", "mean cosine within", "norm of the mean", "noise in it"],
            rows=_table(affinity), **means,
        )  # fmt: skip


def _check_buckets(model: str, buckets: int, num_ranges: int) -> int | None:
    """What can be told before torch is imported; the number of timesteps where files tell it."""
    from deme_cli.diffusion.model_files import locate_model, peek_timesteps

    if num_ranges > buckets:
        raise ConfigError(
            f"cannot form {num_ranges} ranges of {buckets} buckets; choose a smaller -n or more "
            f"--buckets"
        )
    whole = peek_timesteps(locate_model(model))
    if whole:
        bucket_ranges(buckets, whole)
    return whole


def _measure(
    model: str, denoiser: Denoiser, buckets: Sequence[TimestepRange], draws_of: Any,
    kept: Unfinished, progress: Progress,
) -> int:  # fmt: skip
    """Add to the arrays the loss, sketch and reliability of each bucket; returns m."""
    from deme_cli.analysis.draws import part
    from deme_cli.analysis.sketch import CountSketch, cosines, inner_products

    network, n = denoiser.network, len(buckets)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    sketch = CountSketch(sizes, SKETCH_SIZE)
    arrays = kept.arrays = kept.arrays or {
        "sketches": np.zeros((n, sketch.size), np.float32),
        "losses": np.full(n, np.nan),  # one that is not finite is still to be measured
        "reliability": np.full(n, np.nan),
    }
    for bucket in buckets:
        denoiser.schedule.indices(bucket)  # ConfigError where it holds no time
    first = int(np.isfinite(arrays["losses"]).sum())
    note = f"continuing after {first} of {n} buckets" if first else kept.note
    for index in range(first, n):
        draws, check = draws_of(buckets[index]), kept.checker(f"{index} of {n} buckets")
        num = len(draws.t)
        progress(Step(index * num, n * num, "gradients", "draw", note))
        losses, halves, note = [], [], ""
        parts = [part(draws, range(num // 2)), part(draws, range(num // 2, num))]
        for half in parts:
            losses.append(half.loss_and_gradient(network, check))
            halves.append(sketch((name, p.grad) for name, p in network.named_parameters()))
            if not math.isfinite(losses[-1]) or not np.isfinite(halves[-1]).all():
                raise NumericsError(
                    f"{model}: the gradient of timesteps {buckets[index]} is not finite (loss "
                    f"{losses[-1]:.4g}); the model's weights are broken"
                )
        network.zero_grad(set_to_none=True)
        share = [len(half.t) / num for half in parts]
        arrays["sketches"][index] = np.average(halves, axis=0, weights=share)
        arrays["reliability"][index] = cosines(inner_products(np.array(halves)))[0, 1]
        arrays["losses"][index] = float(np.dot(losses, share))
        progress(Step((index + 1) * num, n * num, "gradients", "draw"))
    return sketch.size


def _affinity(
    denoiser: Denoiser, buckets: list[TimestepRange], arrays: dict[str, np.ndarray],
    num_ranges: int, *, num: int, seed: int, model: dict[str, str], data: dict[str, str],
    sketch_size: int,
) -> Affinity:  # fmt: skip
    """What the mean gradients say together, with the clusters they suggest."""
    from deme_cli.analysis.sketch import cosines, inner_products
    from deme_cli.training.clusters import split_times

    parameters = sum(p.numel() for p in denoiser.network.parameters())
    products = inner_products(arrays["sketches"])
    affinity = Affinity(
        buckets=buckets,
        cosines=[[round(value, 6) for value in row] for row in cosines(products).tolist()],
        norms=np.sqrt(np.diagonal(products)).tolist(),
        losses=arrays["losses"].tolist(),
        reliability=[round(value, 6) for value in arrays["reliability"].tolist()],
        model=model, data=data, num=num, seed=seed, parameters=parameters,
        sketch_size=sketch_size,
        standard_error=0.0 if sketch_size == parameters else math.sqrt(2 / sketch_size),
        ranges=[],
    )  # fmt: skip
    ranges = split_times(num_ranges, "gradient", denoiser.schedule, affinity)
    return replace(affinity, ranges=ranges)


def pair_cosines(
    affinity: Affinity, ranges: Sequence[TimestepRange]
) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of every two buckets in one range, and of every two in two ranges."""
    owners = np.array([route(bucket.start, ranges) for bucket in affinity.buckets])
    i, j = np.tril_indices(len(owners), -1)
    values, are_together = np.array(affinity.cosines)[i, j], owners[i] == owners[j]
    return values[are_together], values[~are_together]


def distance_cosines(affinity: Affinity) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of neighbouring buckets, and of buckets at least T / 2 apart."""
    values, n = np.array(affinity.cosines), len(affinity.buckets)
    i, j = np.triu_indices(n, -(-n // 2))
    return np.diagonal(values, 1), values[i, j]


def mean_norm(affinity: Affinity, span: TimestepRange) -> float:
    """|sum_i w_i g_i| over the buckets of a range, w_i their shares of it, without noise.

    A product of two buckets has no noise on average. In |g_i|^2 it is taken out by what two halves
    of the draws agree in: the signal is n_i^2 2r / (1 + r), n_i the norm of their mean (Spearman
    and Brown 1910). 0 where noise is all there is; compare with `noise_norm`.
    """
    chosen, lengths, signal = _weighted(affinity, span)
    products = np.array(affinity.cosines)[np.ix_(chosen, chosen)]
    np.fill_diagonal(products, signal)
    return float(np.sqrt(max(lengths @ products @ lengths, 0.0)))


def noise_norm(affinity: Affinity, span: TimestepRange) -> float:
    """The norm of the noise in that mean, sqrt(sum_i w_i^2 n_i^2 (1 - r_i) / (1 + r_i))."""
    _, lengths, signal = _weighted(affinity, span)
    return float(np.sqrt((lengths**2 * (1 - signal)).sum()))


def _weighted(affinity: Affinity, span: TimestepRange) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The buckets of a range, their w_i n_i, and the share of signal in each |g_i|^2."""
    chosen = [i for i, bucket in enumerate(affinity.buckets) if bucket.start in span]
    shares = np.array([len(affinity.buckets[i]) for i in chosen], dtype=float)
    r = np.clip(np.array(affinity.reliability)[chosen], 0, 1)
    return chosen, shares / shares.sum() * np.array(affinity.norms)[chosen], 2 * r / (1 + r)


def cosine_means(affinity: Affinity) -> dict[str, Any]:
    """Mean cosines of near and far buckets, within ranges and across; None without such pairs."""
    equal = split_uniform(len(affinity.ranges), affinity.whole.stop)
    groups = {
        ("within", "across"): pair_cosines(affinity, affinity.ranges),
        ("equal_within", "equal_across"): pair_cosines(affinity, equal),
        ("neighbouring", "distant"): distance_cosines(affinity),
    }
    means = {
        name: float(values.mean()) if values.size else None
        for names, pair in groups.items()
        for name, values in zip(names, pair, strict=True)
    }
    return {**means, "reliability_median": float(np.median(affinity.reliability))}


def _said(affinity: Affinity, means: dict[str, Any]) -> dict[str, Any]:
    """What `gradients.json` tells people, besides what it tells `deme split`."""
    within, across = pair_cosines(affinity, affinity.ranges)
    spans = (affinity.whole, *affinity.ranges)
    shown = {k: "-" if v is None else f"{v:.2f}" for k, v in means.items()}
    return {
        "reading": (
            f"mean cosine {shown['neighbouring']} of neighbouring buckets, {shown['distant']} of "
            f"distant ones; {len(affinity.ranges)} ranges by gradient, "
            f"{', '.join(map(str, affinity.ranges))}: {shown['within']} within, {shown['across']} "
            f"across"
        ),
        "protocol": {
            "model": affinity.model, "data": {**affinity.data, "split": "train"},
            "buckets": len(affinity.buckets), "num": affinity.num, "seed": affinity.seed,
            "n": len(affinity.ranges),
        },
        "quantiles": list(QUANTILES),
        "within_ranges": _quantiles(within), "across_ranges": _quantiles(across),
        "mean_norms": {str(span): mean_norm(affinity, span) for span in spans},
        "noise_norms": {str(span): noise_norm(affinity, span) for span in spans},
    }  # fmt: skip


def _quantiles(values: np.ndarray) -> list[float]:
    return np.quantile(values, QUANTILES).round(6).tolist() if values.size else []


def _table(affinity: Affinity) -> list[list[str]]:
    lines = []
    for span in (affinity.whole, *affinity.ranges):
        inside = [i for i, bucket in enumerate(affinity.buckets) if bucket.start in span]
        own = np.array(affinity.cosines)[np.ix_(inside, inside)][np.tril_indices(len(inside), -1)]
        norms = mean_norm(affinity, span), noise_norm(affinity, span)
        cosine = f"{own.mean():.2f}" if own.size else ""
        lines.append([str(span), cosine, *map(plain, norms)])
    return lines


def draw_gradients(affinity: Affinity) -> list[bytes]:
    """On the left the cosines, red where two timesteps pull the same way, blue where they pull
    against each other, with the suggested ranges. On the right the distributions of the cosines
    within these ranges and across them, and over the timesteps the reliability of each bucket and
    the norm of its gradient, with that of the mean gradient over each range."""

    def draw(figure: Figure) -> None:
        left, right = figure.subfigures(1, 2, width_ratios=[1.3, 1], squeeze=False)[0]
        _draw_cosines(left, left.subplots(), affinity)
        upper, middle, lower = right.subplots(3, 1)
        _draw_distributions(upper, affinity)
        edges = np.array([0, *(bucket.stop for bucket in affinity.buckets)])
        middle.stairs(affinity.reliability, edges, color=BLUE, linewidth=1.4, baseline=None)
        middle.set_ylim(min(0.0, *affinity.reliability) - 0.03, 1.03)
        middle.set_ylabel("cosine of two halves")
        middle.set_title("Reliability: agreement of two halves of a bucket's draws", fontsize=9)
        lower.stairs(
            affinity.norms, edges, color=VERMILION, linewidth=1.4, baseline=None,
            label="of a bucket",
        )  # fmt: skip
        _draw_norms(lower, affinity)
        for axis in (middle, lower):
            axis.set_xlim(0, affinity.whole.stop)
            for span in affinity.ranges[1:]:
                axis.axvline(span.start, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)))
            open_axis(axis)

    names = shorten(f"{affinity.model['source']} on {affinity.data['source']}", 40)
    buckets = f"{len(affinity.buckets)} buckets of {affinity.num:,} draws"
    return render(draw, size=(10.8, 6.6), title=f"Gradients by timestep: {names}, {buckets}")


def _draw_cosines(figure: SubFigure, axis: Axes, affinity: Affinity) -> None:
    edges = np.array([0, *(bucket.stop for bucket in affinity.buckets)])
    values = np.array(affinity.cosines)
    others = np.abs(values[~np.eye(len(values), dtype=bool)]).max(initial=0.0)
    limit = float(np.clip(np.ceil(others * 10) / 10, 0.2, 1.0))  # to the next tenth
    mesh = axis.pcolormesh(
        edges, edges, values, cmap=DIVERGING, vmin=-limit, vmax=limit, rasterized=True
    )
    axis.set_aspect("equal")
    for span in affinity.ranges[1:]:
        axis.axhline(span.start, color="black", linewidth=0.8)
        axis.axvline(span.start, color="black", linewidth=0.8)
    bar = figure.colorbar(
        mesh, ax=axis, fraction=0.046, pad=0.02, extend="both" if limit < 1 else "neither"
    )
    bar.set_label("cosine (red: alike, blue: opposed)")
    bar.outline.set_visible(False)
    axis.set(xlabel="timestep t (0 = clean)", ylabel="timestep t (0 = clean)")
    count = len(affinity.ranges)
    axis.set_title(f"Cosine of mean gradients; lines: {count} suggested ranges", fontsize=9)


def _draw_distributions(axis: Axes, affinity: Affinity) -> None:
    """Densities of the cosines of two buckets in one range, and in two."""
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


def _draw_norms(axis: Axes, affinity: Affinity) -> None:
    """The norm of the mean gradient over each range, and over all timesteps."""
    from matplotlib.ticker import LogLocator, NullLocator

    for span in affinity.ranges:
        label = "of a range" if span == affinity.ranges[0] else ""
        level = mean_norm(affinity, span)
        axis.hlines(level, span.start, span.stop, linewidth=1.4, color=BLUE, label=label)
    whole = affinity.whole
    level, label = mean_norm(affinity, whole), "of all timesteps"
    if not level:  # which no logarithmic axis shows: the noise in it
        level, label = noise_norm(affinity, whole), f"{label} (below this)"
    dashed: dict[str, Any] = {"color": LINE, "linestyle": (0, (4, 2)), "linewidth": 1.4}
    axis.hlines(level, whole.start, whole.stop, label=label, **dashed)
    if is_log := max(affinity.norms) > 10 * min(affinity.norms) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)
    axis.set(xlabel="timestep t (0 = clean)", ylabel="norm of the gradient")
    axis.set_title("Norm of the mean gradient", fontsize=9)
    axis.set_ylim(top=axis.get_ylim()[1] * (3 if is_log else 1.25))
    axis.legend(
        frameon=False, fontsize=7.5, loc="upper center", ncols=3, columnspacing=1, handlelength=1.4
    )
