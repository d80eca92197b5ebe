"""What finetuning does to the features of a network, block by block (the paper's figure 2).

Base and expert see the same draws (image, t, eps), t spread evenly over a range; block_change.py
says what is told of the features after every block. Half of the draws fit the channel-wise map,
half test it; where there are fewer images than draws, both halves see the same images under other
noise. Only sums over draws are kept; what grows is C^2. Then the same once more for each control, a
network with random weight changes as large as the expert's.
C channels, P places.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import shorten
from deme_cli.analysis.result import (
    Analysis,
    Unfinished,
    check_images,
    check_output,
    document_bytes,
    write_analysis,
)
from deme_cli.analysis.settings import ActivationConfig
from deme_cli.artifacts import DenoiserRecord, ExpertRecord
from deme_cli.config import DataConfig, SplitConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError, nearest
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, parse_range

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deme_cli.diffusion.projection import Site
    from deme_cli.training.batches import FixedDraws

Row = dict[str, Any]
_LEVEL = 0.95  # of the interval in which chance puts one more share


def analyze_activations(
    expert: str | Path,
    settings: ActivationConfig | None = None,
    *,
    base: str | Path | None = None,
    images: DataConfig | None = None,
    split: str = "held-out",
    range: str | None = None,
    block: str | None = None,
    output: Path = Path("activations.json"),
    run: RunFile | None = None, pipeline: str | None = None, device: str = "auto",
    dtype: str = "fp32", force: bool = False, dry_run: bool = False, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Measure whether finetuning changed the features' channels or places, beyond chance or not.

    expert: any model finetuned from `base`, which is found by `run` or beside it if None.   range:
    `i/N`, `start:stop` or `all`; None for the expert's own.   block: the one that is drawn; None
    for the one that changed most.

    The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or ActivationConfig()
    check_output(output, force=force)
    pair = _find_base(run, str(expert)) if base is None else (str(base), str(expert))
    known = _check_models(run, pair, range)
    images, names = check_images(images, run, split=split), _names(pair)
    progress(Step(note=(
        f"{names[1]} against {names[0]}: {settings.num:,} draws of {known or 'the timesteps'} from "
        f"{images.source} ({split})"
    )))  # fmt: skip
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.block_change import randomly_changed
    from deme_cli.analysis.draws import identity_of, open_images, spread_draws
    from deme_cli.diffusion.checkpoints import open_denoiser
    from deme_cli.diffusion.denoiser import choose_device
    from deme_cli.diffusion.projection import sites

    place = str(choose_device(device))
    frozen = run.pipeline(pipeline)
    before, after = (
        open_denoiser(model, pipeline=frozen, device=place, dtype=dtype) for model in pair
    )
    _require_same_network(before.record, after.record, pair)
    blocks = sites(before.network, "block")
    paths = [site.path for site in blocks]
    if block is not None and block not in paths:
        raise ConfigError(f"--block {block}: no such block in {pair[0]}{nearest(block, paths)}")
    span = known or _range(run, after.record, range)
    record, examples = open_images(
        before.record, images, run, split=split, model=pair[0], output=output, pipeline=pipeline,
        device=device, progress=progress,
    )  # fmt: skip
    draws = spread_draws(
        examples, replace(before, record=record).schedule, [span], settings.num,
        seed=settings.seed, purpose="activations", batch_size=settings.batch_size,
    )  # fmt: skip
    identity = {  # not how many controls there are: the first are the same whatever follows
        "base": record.fingerprint, "expert": after.record.fingerprint,
        "dtype": str(before.dtype), **identity_of(record, examples), "split": split,
        "range": str(span), "num": settings.num, "seed": settings.seed,
    }  # fmt: skip
    with Unfinished(output, identity, force=force) as kept:
        passes: list[list[tuple[Row, Row]]] = []
        while (k := len(passes)) <= settings.controls:
            total, changed = settings.num * (settings.controls + 1), after.network
            if k > 0 and _done(kept) < settings.num * (k + 1):
                changed = randomly_changed(before.network, changed, seed=settings.seed, k=k)
            _compare((before.network, changed), blocks, draws, k, total, names, kept, progress)
            passes.append(_blocks(after.network, blocks, settings.num, k, names, kept.arrays))
        protocol = {
            "base": {"source": pair[0], "fingerprint": before.record.fingerprint},
            "expert": {"source": pair[1], "fingerprint": after.record.fingerprint,
                       "projection": getattr(after.record, "projection", None)},
            "data": {"source": examples.source, "fingerprint": examples.fingerprint,
                     "split": split},
            "range": str(span), "num": settings.num, "seed": settings.seed,
            "controls": settings.controls, "dtype": dtype,
        }  # fmt: skip
        return _written(kept, passes, names, block, protocol)


def _find_base(run: RunFile, model: str) -> tuple[str, str]:
    """The base of a single expert, and it."""
    from deme_cli.merging.inputs import find_base, open_experts

    expert = Path(model).expanduser()
    if not expert.is_file():
        raise MissingError(f"{expert}: no such file; name BASE and EXPERT")
    try:
        base = find_base(open_experts([expert], "expert"), run, None)
    except (ArtifactError, MissingError) as error:
        advice = f"name both: deme analyze activations BASE {expert}"
        raise type(error)(f"{str(error).rpartition(';')[0] or error}; {advice}") from error
    return str(base), str(expert)


def _check_models(run: RunFile, pair: tuple[str, str], span: str | None) -> TimestepRange | None:
    """What can be told before torch is imported; the range, where the files tell it."""
    from deme_cli.artifacts import read_record
    from deme_cli.diffusion.model_files import locate_model, peek_timesteps

    places = [locate_model(model) for model in pair]
    base, expert = (read_record(place) if place.is_file() else None for place in places)
    if isinstance(base, DenoiserRecord) and isinstance(expert, DenoiserRecord):
        _require_same_network(base, expert, pair)
    if isinstance(expert, DenoiserRecord):
        return _range(run, expert, span)
    timesteps = peek_timesteps(places[1])
    return _parse(run, span or "all", timesteps) if timesteps else None


def _range(run: RunFile, record: DenoiserRecord, span: str | None) -> TimestepRange:
    """As given, else the one the expert was finetuned on, else all of [0, T)."""
    if span is None and isinstance(record, ExpertRecord):
        return record.timesteps
    return _parse(run, span or "all", record.num_train_timesteps)


def _parse(run: RunFile, span: str, num_train_timesteps: int) -> TimestepRange:
    if span == "all":
        return TimestepRange(0, num_train_timesteps)
    return parse_range(span, num_train_timesteps, run.settings(SplitConfig).timestep_ranges).range


def _require_same_network(
    base: DenoiserRecord, expert: DenoiserRecord, names: tuple[str, str]
) -> None:
    """Check that two models are one network with other weights, block projections aside.

    Raises ArtifactError naming the first setting that differs, or that the weights are the same.
    """
    if base.fingerprint and base.fingerprint == expert.fingerprint:
        raise ArtifactError(
            f"{names[0]} and {names[1]} have the same weights; give a base and what was "
            f"finetuned from it"
        )
    from deme_cli.diffusion.schedule import complete_config

    configs = {
        "model_config": (base.model_config, expert.model_config),
        "scheduler_config": tuple(complete_config(one.scheduler_config) for one in (base, expert)),
    }
    for what, (ours, theirs) in configs.items():
        for key in sorted(ours.keys() | theirs.keys()):
            kept = not key.startswith("_") or key == "_class_name"  # the rest says who wrote it
            if kept and ours.get(key) != theirs.get(key):
                raise ArtifactError(
                    f"{names[1]}: {key} of its {what} is {theirs.get(key)!r}, {names[0]} has "
                    f"{ours.get(key)!r}; give a base and what was finetuned from it"
                )


def _names(pair: tuple[str, str]) -> tuple[str, str]:
    """The models as the picture calls them: by their files, or as given where those agree."""

    def name(model: str) -> str:
        path = Path(model)
        return path.name.removesuffix(".safetensors") if path.expanduser().exists() else model

    short = (name(pair[0]), name(pair[1]))
    return pair if short[0] == short[1] else short


def _done(kept: Unfinished) -> int:
    return int(kept.arrays.get("done", [0])[0])


def _compare(
    networks: tuple[nn.Module, nn.Module], blocks: Sequence[Site], draws: FixedDraws, k: int,
    total: int, names: tuple[str, str], kept: Unfinished, progress: Progress,
) -> None:  # fmt: skip
    """Add what is missing of the sums of the expert (k = 0), or of control k, as `k/block/name`."""
    from deme_cli.analysis.block_change import fit_map

    num, arrays, keys = len(draws.t), kept.arrays, [f"{k}/{site.path}/" for site in blocks]
    start, done = k * num, _done(kept) - k * num
    note = f"continuing after {start + done} of {total} comparisons" if start + done else kept.note
    if k == 0:
        progress(Step(min(done, total), total, "activations", "comparison", note))
    while done < num:
        kept.checker(f"{start + done} of {total} comparisons")()
        stop = min(done + draws.batch_size, num if done >= num // 2 else num // 2)
        if done == num // 2:
            for key in keys:
                if f"{key}map" not in arrays:  # then what it is fitted by is no longer needed
                    gram, cross = arrays.pop(f"{key}gram"), arrays.pop(f"{key}cross")
                    arrays[f"{key}map"] = fit_map(gram, cross)
        arrays.update(_batch_sums(networks, blocks, draws, range(done, stop), k, names, arrays))
        done = stop
        if done == num:
            for key in keys:
                del arrays[f"{key}map"]  # tested, and large
        arrays["done"] = np.array([start + done])
        progress(Step(start + done, total, "activations", "comparison"))


def _batch_sums(
    networks: tuple[nn.Module, nn.Module], blocks: Sequence[Site], draws: FixedDraws,
    chosen: range, k: int, names: tuple[str, str], arrays: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:  # fmt: skip
    """`arrays` of these blocks with the sums of these draws added."""
    import torch

    from deme_cli.analysis.block_change import as_places, block_sums, listening

    before: dict[str, Tensor] = {}
    added: dict[str, np.ndarray] = {}

    def compare(path: str, features: Tensor) -> None:
        start = f"{k}/{path}/"
        base, grid = as_places(before.pop(path), draws.examples.shape)
        delta = as_places(features, draws.examples.shape)[0] - base
        fitted = arrays.get(f"{start}map")
        sums = block_sums(
            base, delta, None if fitted is None else torch.from_numpy(fitted).to(base.device)
        )
        require_finite(sums, path, names, k)
        added[f"{start}grid"] = np.array(grid)
        for key, value in sums.items():
            added[start + key] = arrays.get(start + key, 0.0) + value.cpu().numpy()

    indices = torch.arange(chosen.start, chosen.stop)
    for network, take in zip(networks, (before.__setitem__, compare), strict=True):
        with listening(network, blocks, take):
            draws.outputs(network, indices)
    return added


def require_finite(sums: dict[str, Tensor], path: str, names: tuple[str, str], k: int) -> None:
    """Check the sums of the base and of the expert (k = 0) or control k; raises NumericsError."""
    base, expert = (bool(sums[key].isfinite().all()) for key in ("base_moments", "squares"))
    if base and not expert and k > 0:
        raise NumericsError(
            f"the features after {path} are not finite with random weight changes as large as "
            f"those of {names[1]}; leave them out with --controls 0"
        )
    for finite, name in zip((base, expert), names, strict=True):
        if not finite:
            raise NumericsError(
                f"{name}: the features after {path} are not finite; the model's weights are broken"
            )


def _blocks(
    expert: nn.Module, blocks: Sequence[Site], num: int, k: int, names: tuple[str, str],
    arrays: dict[str, np.ndarray],
) -> list[tuple[Row, Row]]:  # fmt: skip
    """What the sums of one pass say of each block, and its maps.

    Raises ArtifactError where the expert changed none.
    """
    from deme_cli.analysis.block_change import block_change, projection_distances

    distances = projection_distances(expert) if k == 0 else {}
    rows = []
    for site in blocks:
        start = f"{k}/{site.path}/"
        sums = {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}
        rows_, columns = sums["grid"].tolist()
        projection = distances.get(site.path)
        rows.append(block_change(site.path, sums, num, (rows_, columns), projection))
    if k == 0 and not any(row["size"] > 0 for row, _ in rows):
        raise ArtifactError(
            f"{names[1]}: its features are those of {names[0]} after every block; nothing was "
            f"finetuned"
        )
    return rows


def _document(rows: Sequence[Row], controls: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Every block with the means of the controls beside it, and means over the blocks."""
    by_block = list(zip(*controls, strict=True))
    means: list[Row | None] = [_means(one, ("shares", "explained")) for one in by_block]
    means = means or [None] * len(rows)
    return {
        "summary": summarize(rows), "controls": [summarize(one) for one in controls],
        "blocks": [{**row, "controls": mean} for row, mean in zip(rows, means, strict=True)],
    }  # fmt: skip


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over the blocks of which it can be told, None where there are none.

    negative: how many blocks have a negative component, counted as a share of 0.
    """
    negative = sum(min(r["components"]["channel"], r["components"]["place"]) < 0 for r in rows)
    return {
        "size": _mean(row["size"] for row in rows), "shift": _mean(row["shift"] for row in rows),
        **_means(rows, ("shares", "fixed", "explained")), "negative": negative,
    }  # fmt: skip


def _means(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    return {
        name: {key: _mean(row[name][key] for row in rows) for key in rows[0][name]}
        for name in names
    }


def _mean(values: Iterable[float]) -> float | None:
    told = [value for value in values if not math.isnan(value)]
    return sum(told) / len(told) if told else None


def _written(
    kept: Unfinished, passes: Sequence[Sequence[tuple[Row, Row]]], names: tuple[str, str],
    block: str | None, protocol: dict[str, Any],
) -> Analysis:  # fmt: skip
    """The files; `block` is drawn, or the one that changed most."""
    from deme_cli.analysis.activation_picture import draw_activations
    from deme_cli.analysis.block_change import QUANTILES

    rows, controls = passes[0], passes[1:]
    most = max(rows, key=lambda one: one[0]["size"] if one[0]["size"] > 0 else 0.0)
    drawn = next((one for one in rows if one[0]["name"] == block), most)
    document = _document([row for row, _ in rows], [[r for r, _ in one] for one in controls])
    document = {
        "reading": _headline(names, protocol["range"], document), "protocol": protocol,
        **document, "quantiles": QUANTILES, "drawn": drawn[1],
    }  # fmt: skip
    base, expert = (shorten(name, 28) for name in names)
    source, split = shorten(protocol["data"]["source"], 40), protocol["data"]["split"]
    foot = (
        f"{protocol['num']:,} draws (image, t, noise) of timesteps {protocol['range']} from "
        f"{source} ({split}), the same for every model"
    )
    title = f"Features changed by finetuning: {expert} against {base}"
    return write_analysis(
        kept, draw_activations(document, drawn[0], title=title, foot=foot),
        document_bytes("activations", document), shown=("reading",),
        columns=["block", "change, sd", "channels", "places", "neither", "W F",
                 *(["random: channels", "W F"] if controls else [])],
        rows=_table(document["blocks"]), **document["summary"], controls=document["controls"],
    )  # fmt: skip


def chance_interval(shares: Sequence[float]) -> tuple[float, float]:
    """Mean of the controls' shares, and how far from it one more would lie at most (95 %).

    The prediction interval t_{k-1} s sqrt(1 + 1/k) of k controls; nan for fewer than two.
    """
    from scipy.stats import t

    k = len(shares)
    mean = float(np.mean(shares))
    if k < 2:
        return mean, math.nan
    sd = float(np.std(shares, ddof=1))
    return mean, float(t.ppf((1 + _LEVEL) / 2, k - 1)) * sd * math.sqrt(1 + 1 / k)


def _headline(names: tuple[str, str], span: str, document: dict[str, Any]) -> str:
    base, expert = (shorten(name, 24) for name in names)
    summary = document["summary"]
    size = f"{summary['size']:.2g} of their sd"
    start = f"{expert} changed the features of {base} at timesteps {span} by {size}"
    channel, place = summary["shares"]["channel"], summary["shares"]["place"]
    if channel is None:
        return start
    shares = [one["shares"] for one in document["controls"] if one["shares"]["channel"] is not None]
    text = f"{start}: {_percent(channel)} of the change in channels, {_percent(place)} in places"
    if not shares:
        return text
    mean, reach = chance_interval([one["channel"] for one in shares])
    shown = f"{100 * mean:.0f} ± {100 * reach:.0f} %" if reach == reach else _percent(mean)
    places = _mean(one["place"] for one in shares)
    return f"{text} (random changes of this size: {shown}, {_percent(places)})"


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.0f} %"


def _table(blocks: Sequence[Row]) -> list[list[str]]:
    lines = []
    for row in blocks:
        values = [*row["shares"].values(), row["explained"]["channel_map"]]
        if random := row["controls"]:
            values += [random["shares"]["channel"], random["explained"]["channel_map"]]
        lines.append([row["name"], f"{row['size']:.2g}", *map(_percent, values)])
    return lines
