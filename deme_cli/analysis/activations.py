"""What finetuning does to the features of a network, block by block (the paper's figure 2).

Base and expert see the same draws (image, t, eps), t spread evenly over a range. After every block,
where the paper puts its projections, features are taken as (B, C, P): B draws, C channels, P
places; tokens of transformers are places. Delta = F_expert - F_base of one draw is taken apart
(two-way analysis of variance) as

    Delta_cp = mu + alpha_c + beta_p + eps_cp

The paper's figure shows the spread of mu + alpha_c, the mean over places (channel activation),
beside that of mu + beta_p, the mean over channels (spatial activation). Of independent numbers a
mean over P places keeps 1/P of the variance, one over C channels 1/C, so noise alone gives spreads
in the ratio sqrt(C / P). The components of variance are free of that: the mean squares have
E MS_c = P sigma_c^2 + sigma_e^2, E MS_p = C sigma_p^2 + sigma_e^2 and E MS_e = sigma_e^2
(Scheffe 1959, ch. 7). eps counts as independent: what varies smoothly over the places of a channel
leans to channels. And a convolution does the same at every place: weights changed at random move
channels, too. So the same is measured for controls, networks with random weight changes as large as
the expert's. Only sums over draws are kept, in float64.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import BLACK, BLUE, DIVERGING, VERMILION, open_axis, render, shorten
from deme_cli.analysis.result import Analysis, Kept, check_inputs, keeping, peek, write_analysis
from deme_cli.analysis.settings import ActivationConfig
from deme_cli.artifacts import ExpertRecord
from deme_cli.config import DataConfig, SplitConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, ConfigError, MissingError, NumericsError, nearest
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, parse_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from torch import Tensor, nn

    from deme_cli.diffusion.projection import Site
    from deme_cli.training.batches import FixedDraws

Row = dict[str, Any]
Arrays = Mapping[str, np.ndarray]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PARTS = ("channel", "place", "rest")
_ROOM = 60  # characters of names beside each other under an axis


def analyze_activations(
    expert: str | Path, settings: ActivationConfig | None = None, *,
    base: str | Path | None = None, images: DataConfig | None = None, split: str = "held-out",
    range: str | None = None, block: str | None = None, output: Path = Path("activations.json"),
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
    images = check_inputs(output, images, run, split=split, force=force)
    pair = (str(base or _find_base(run, Path(expert).expanduser())), str(expert))
    (first, _), (second, whole) = map(peek, pair)
    if first and second and first.fingerprint == second.fingerprint:
        raise ArtifactError(
            f"{pair[0]} and {pair[1]} have the same weights; give a base and what was finetuned "
            f"from it"
        )
    span = _span(run, second, range, whole)
    stems = [Path(model).name.removesuffix(".safetensors") for model in pair]
    names = stems if stems[0] != stems[1] else pair
    told = f"{settings.num:,} draws of {span or 'the timesteps'} from {images.source} ({split})"
    progress(Step(note=f"{names[1]} against {names[0]}: {told}"))
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.draws import open_images, open_models, spread_draws
    from deme_cli.diffusion.projection import sites

    before, after = open_models(
        pair, run=run, pipeline=run.pipeline(pipeline), device=device, dtype=dtype
    )
    span = span or _span(run, after.record, range, after.record.num_train_timesteps)
    assert span is not None
    blocks = sites(before.network, "block")
    paths = [site.path for site in blocks]
    if block is not None and block not in paths:
        raise ConfigError(f"--block {block}: no such block in {pair[0]}{nearest(block, paths)}")
    examples, data, seen = open_images(
        before.record, images, split, run=run, output=output, pipeline=pipeline, device=device,
        progress=progress,
    )  # fmt: skip
    draws = spread_draws(examples, before.schedule, [span], settings)
    protocol = {
        "base": before.record.fingerprint, "expert": after.record.fingerprint, "data": data,
        "range": str(span), **asdict(settings), "dtype": dtype,
    }  # fmt: skip
    total = settings.num * (settings.controls + 1)
    with keeping(
        output, {**protocol, **seen}, "activations", "draw", total, progress=progress, force=force
    ) as kept:
        passes = _passes((before.network, after.network), names, blocks, draws, settings, kept)
        return _written(output, passes, names, block, protocol)


def _find_base(run: RunFile, expert: Path) -> Path:
    from deme_cli.merging.inputs import find_base, open_experts

    try:
        return find_base(open_experts([expert], "expert"), run, None)
    except (ArtifactError, MissingError) as error:
        advice = f"name both: deme analyze activations BASE {expert}"
        raise type(error)(f"{str(error).rpartition(';')[0] or error}; {advice}") from error


def _span(run: RunFile, record: Any, text: str | None, whole: int | None) -> TimestepRange | None:
    """As given, else the one the expert was finetuned on, else all of [0, T); None while T is not
    known."""
    if text is None and isinstance(record, ExpertRecord):
        return record.timesteps
    if whole is None or text in (None, "all"):
        return None if whole is None else TimestepRange(0, whole)
    return parse_range(text, whole, run.settings(SplitConfig).timestep_ranges).range


def _passes(
    networks: tuple[nn.Module, nn.Module], names: Sequence[str], blocks: Sequence[Site],
    draws: FixedDraws, settings: ActivationConfig, kept: Kept,
) -> list[list[Row]]:  # fmt: skip
    """The blocks of the expert, then those of each control.

    Raises ArtifactError where the expert changed none, NumericsError where features are not finite.
    """
    (base, expert), passes = networks, []
    for k in range(settings.controls + 1):

        def measure(k: int = k) -> Arrays:
            if not k:
                return _sums((base, expert), names, blocks, draws, kept.check)
            control = randomly_changed(base, expert, seed=settings.seed, k=k)
            said = f"random changes as large as those of {names[1]} (--controls 0 leaves them out)"
            return _sums((base, control), (names[0], said), blocks, draws, kept.check)

        sums = kept.unit(str(k), settings.num, measure)
        passes.append([block_change(site.path, sums, settings.num) for site in blocks])
    if not any(row["size"] > 0 for row in passes[0]):
        raise ArtifactError(
            f"{names[1]}: its features are those of {names[0]} after every block; nothing was "
            f"finetuned"
        )
    return passes


def _sums(
    networks: Sequence[nn.Module], names: Sequence[str], blocks: Sequence[Site],
    draws: FixedDraws, check: Callable[[], None],
) -> Arrays:  # fmt: skip
    """The sums of `block_sums` over all draws, as `block/name`."""
    import torch

    sums: dict[str, np.ndarray] = {}
    before: dict[str, Tensor] = {}

    def compare(path: str, features: Tensor) -> None:
        base, grid = as_places(before.pop(path), draws.examples.shape)
        delta = as_places(features, draws.examples.shape)[0] - base
        for name, values in zip(names, (base, delta), strict=True):
            if not values.isfinite().all():
                raise NumericsError(f"{name}: the features after {path} are not finite")
        for name, value in block_sums(base, delta).items():
            key = f"{path}/{name}"
            sums[key] = sums.get(key, 0.0) + value.cpu().numpy()
        sums[f"{path}/grid"] = np.array(grid)

    first, second = networks
    with listening(first, blocks, before.__setitem__), listening(second, blocks, compare):
        for chosen in torch.arange(len(draws.t)).split(draws.batch_size):
            check()
            for network in networks:
                draws.outputs(network, chosen)
    return sums


@contextmanager
def listening(
    network: nn.Module, blocks: Sequence[Site], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While open, `take(path, features)` what comes out of each block, its projection included."""

    def hook(site: Site, module: nn.Module, inputs: Any, output: Any) -> None:
        take(site.path, output[site.output] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for site in blocks:
            module = network.get_submodule(site.path)
            stack.enter_context(module.register_forward_hook(partial(hook, site)))
        yield


def as_places(features: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Maps (B, C, H, W) or tokens (B, P, C) as (B, C, P) float64, and rows and columns of places.

    shape: of x_t, whose aspect tokens have; those that do not fill such a grid make one row. Stays
    on the device where that has float64.
    """
    features = features.to("cpu" if features.device.type == "mps" else features.device).double()
    if features.ndim == 4:
        return features.flatten(2), (features.shape[2], features.shape[3])
    num = features.shape[1]
    rows = max(round((num * shape[1] / shape[2]) ** 0.5), 1)
    return features.transpose(1, 2), (rows, num // rows) if num % rows == 0 else (1, num)


def randomly_changed(base: nn.Module, expert: nn.Module, *, seed: int, k: int) -> nn.Module:
    """A new network theta + n_k, n_k Gaussian, each tensor's with the norm of the expert's change.

    The noise of a tensor depends on (seed, k, its name) alone, and is drawn on the CPU whatever the
    device. In half precision the sum is rounded, so that of a very small change less may be left.
    """
    import torch

    from deme_cli.training.batches import derived_generator

    changed, before = copy.deepcopy(expert), base.state_dict()
    for name, tensor in changed.state_dict().items():
        if tensor.is_floating_point():
            theta, moved = before[name].float().cpu(), tensor.float().cpu()
            generator = derived_generator(seed, "random change", k, name)
            noise = torch.randn(theta.shape, generator=generator)
            tensor.copy_(theta + noise * ((moved - theta).norm() / noise.norm()))
    return changed


def block_sums(base: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """The sums over a batch that `block_change` takes.  base, delta: (B, C, P) float64"""
    import torch

    channel, place, mu = delta.mean(2), delta.mean(1), delta.mean((1, 2))
    _, num_channels, num_places = delta.shape
    total = delta.square().sum((1, 2))
    of_channel = num_places * (channel - mu[:, None]).square().sum(1)
    of_place = num_channels * (place - mu[:, None]).square().sum(1)
    rest = (total - num_channels * num_places * mu.square() - of_channel - of_place).clamp(min=0)
    return {
        "channel_base": base.mean(2).sum(0), "channel_change": channel.sum(0),
        "place_base": base.mean(1).sum(0), "place_change": place.sum(0),
        "moments": torch.stack([base.sum(), base.square().sum()]),
        "squares": torch.stack([of_channel, of_place, rest, total]).sum(1),
    }  # fmt: skip


def block_change(name: str, sums: Arrays, num: int) -> Row:
    """What the sums `name/…` over `num` draws say of a block; nan where it cannot be told.

    size: root mean square of Delta in `base_sd`, the standard deviation of F_base. components:
    sigma^2 in base_sd^2, negative where the means vary less than those of independent numbers;
    shares: of their sum, negative ones counted as 0. difference: quantiles of channel (C,) and
    spatial (P,) activations, means over draws in base_sd. maps: means over draws, in the network's
    units.
    """
    own = {key.removeprefix(f"{name}/"): v for key, v in sums.items() if key.startswith(f"{name}/")}
    keys = ("channel_base", "channel_change", "place_base", "place_change")
    maps = {key: own[key] / num for key in keys}
    num_channels, num_places = len(maps["channel_base"]), len(maps["place_base"])
    size = num * num_channels * num_places
    mean, square = own["moments"] / size
    of_channel, of_place, rest, total = own["squares"] / num
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = rest / np.float64(num_channels - 1) / (num_places - 1)
        channel = (of_channel / np.float64(num_channels - 1) - noise) / num_places
        place = (of_place / np.float64(num_places - 1) - noise) / num_channels
        components = np.array([channel, place, noise])
        if min(num_channels, num_places) < 2:
            components[:] = np.nan
        positive = np.maximum(components, 0)
        variance = np.maximum(square - mean * mean, 0)
        return {
            "name": name, "channels": num_channels, "places": num_places, "grid": own["grid"],
            "base_sd": math.sqrt(variance), "size": np.sqrt(total * num / size / variance),
            "components": _parts(components / variance),
            "shares": _parts(positive / positive.sum()),
            "difference": {
                part: np.quantile(maps[f"{part}_change"] / np.sqrt(variance), QUANTILES).tolist()
                for part in ("channel", "place")
            },
            "maps": maps,
        }  # fmt: skip


def _parts(values: np.ndarray) -> dict[str, float]:
    return dict(zip(PARTS, values.tolist(), strict=True))


def _mean_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Means over the rows of which they can be told, nan where there are none."""
    known = [[*row["shares"].values()] for row in rows if math.isfinite(row["shares"]["channel"])]
    return _parts(np.mean(known or [[math.nan] * 3], axis=0))


def _written(
    output: Path, passes: Sequence[Sequence[Row]], names: Sequence[str], block: str | None,
    protocol: dict[str, Any],
) -> Analysis:  # fmt: skip
    rows, controls = passes[0], passes[1:]
    most = max(rows, key=lambda row: np.nan_to_num(row["size"]))
    drawn = next((row for row in rows if row["name"] == block), most)
    blocks = [
        {**{key: value for key, value in row.items() if key != "maps"},
         "controls": _mean_shares(beside) if beside else None}
        for row, *beside in zip(*passes, strict=True)
    ]  # fmt: skip
    summary = {"size": np.nanmean([row["size"] for row in rows]), "shares": _mean_shares(rows)}
    base, expert = (shorten(name, 24) for name in names)
    reading = (
        f"{expert} changed the features of {base} at timesteps {protocol['range']} by "
        f"{summary['size']:.2g} of their sd"
    )
    chance = [_mean_shares(one) for one in controls]
    if math.isfinite(summary["shares"]["channel"]):
        channel, place, _ = map(_percent, summary["shares"].values())
        reading += f": {channel} of the change in channels, {place} in places"
        if chance:
            ends = " to ".join(_percent(end([c["channel"] for c in chance])) for end in (min, max))
            reading += f" (random changes of this size: {ends} in channels)"
    document = {
        "reading": reading, "protocol": protocol, "summary": summary,
        "controls": chance, "blocks": blocks, "quantiles": QUANTILES,
        "drawn": {"name": drawn["name"], "grid": drawn["grid"], **drawn["maps"]},
    }  # fmt: skip
    data = protocol["data"]
    foot = (
        f"{protocol['num']:,} draws (image, t, noise) of timesteps {protocol['range']} from "
        f"{shorten(data['source'], 40)} ({data['split']}), the same for every model"
    )
    title = f"Features changed by finetuning: {expert} against {base}"
    random = [[row["controls"]["channel"]] if controls else [] for row in blocks]
    return write_analysis(
        output, "activations", document, draw_activations(blocks, drawn, title=title, foot=foot),
        shown=("summary", "controls"),
        columns=["block", "change, sd", "channels", "places", "neither"]
        + ["random: channels"] * bool(controls),
        rows=[
            [row["name"], f"{row['size']:.2g}", *map(_percent, [*row["shares"].values(), *beside])]
            for row, beside in zip(blocks, random, strict=True)
        ],
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if math.isfinite(share) else ""


def draw_activations(blocks: Sequence[Row], drawn: Row, *, title: str, foot: str) -> bytes:
    """Above, over the blocks in the network's order: which part of the variance of the change lies
    in channels, in places, in neither; and the differences of channel and spatial activations.
    Below, of the block `drawn`, the activations of base and expert and their differences."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.08], squeeze=False)[:, 0]
        left, right = upper.subplots(1, 2, width_ratios=[1.15, 1])
        _draw_shares(left, blocks)
        _draw_differences(right, blocks)
        _draw_block(lower, drawn)

    return render(draw, size=(12, 7.6), title=title, foot=foot)


def short_name(name: str) -> str:
    """A block as an axis has room for it: `up 0`, `mid`, `12`, `single 3`."""
    name = re.sub(r"^(transformer_)?blocks\.|_block$", "", name)
    return re.sub(r"_transformer_blocks?\.|_blocks?\.", " ", name)


def _finish(axis: Axes, blocks: Sequence[Row], title: str) -> None:
    open_axis(axis)
    axis.set_title(title, fontsize=9.5, pad=22)
    axis.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=7.5, ncols=4,
        columnspacing=1.0, handlelength=1.3, borderaxespad=0.1,
    )  # fmt: skip
    chosen = range(0, len(blocks), -(-len(blocks) * 4 // _ROOM))
    names = [short_name(blocks[i]["name"]) for i in chosen]
    is_long = max(map(len, names)) * len(names) > _ROOM
    turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if is_long else {}
    axis.set_xticks(chosen, names, fontsize=8, **turned)
    axis.set(xlim=(-0.6, len(blocks) - 0.4), xlabel="block, in the network's order")


def _draw_shares(axis: Axes, blocks: Sequence[Row]) -> None:
    places, bottom = np.arange(len(blocks)), np.zeros(len(blocks))
    looks = {"channels": BLUE, "places": VERMILION, "neither": "0.8"}
    for part, (label, color) in zip(PARTS, looks.items(), strict=True):
        heights = np.nan_to_num([row["shares"][part] for row in blocks])
        axis.bar(places, heights, 0.8, bottom, color=color, label=label)
        bottom += heights
    if blocks[0]["controls"]:
        shares = [row["controls"]["channel"] for row in blocks]
        for color, width, label in (("white", 3.4, ""), (BLACK, 1.4, "channels, at random")):
            axis.hlines(shares, places - 0.4, places + 0.4, color=color, lw=width, label=label)
    axis.set(ylim=(0, 1), ylabel="share of the change")
    _finish(axis, blocks, "Where the change lies (components of its variance)")


def _draw_differences(axis: Axes, blocks: Sequence[Row]) -> None:
    wide = min(5.0, 120 / len(blocks))
    for part, shift, color, label in (
        ("channel", -0.2, BLUE, "channel activations (mean over places)"),
        ("place", 0.2, VERMILION, "spatial activations (mean over channels)"),
    ):
        places = np.arange(len(blocks)) + shift
        spans = np.array([row["difference"][part] for row in blocks]).T
        axis.vlines(places, spans[0], spans[4], color=color, linewidth=0.3 * wide)
        axis.vlines(places, spans[1], spans[3], color=color, linewidth=wide, label=label)
        axis.plot(places, spans[2], "o", color="white", markersize=0.6 * wide, mec=color)
    axis.axhline(0, color="0.25", linewidth=0.8, zorder=0)
    axis.set_ylabel("expert minus base (sd of the base)")
    _finish(axis, blocks, "Differences, mean over draws: median, 50 %, 90 %")


def _draw_block(figure: SubFigure, row: Row) -> None:
    maps, (rows, columns) = row["maps"], row["grid"]
    figure.suptitle(
        f"After {shorten(row['name'], 40)}: {row['channels']} channels, {rows} x {columns} places, "
        f"change {row['size']:.2g} sd; activations are means over draws", fontsize=9.5,
        fontweight="bold",
    )  # fmt: skip
    grid = figure.add_gridspec(2, 4, width_ratios=[1.6, 1, 1, 1])
    upper, lower = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    before, change = maps["channel_base"], maps["channel_change"]
    edges = np.arange(len(before) + 1) - 0.5
    upper.stairs(before, edges, color="0.8", fill=True, label="base")
    upper.stairs(before + change, edges, color=BLUE, baseline=None, label="expert")
    upper.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    lower.stairs(change, edges, color=BLUE, fill=True)
    lower.set_xlabel("channel")
    for axis, title in ((upper, "Channel activations"), (lower, "Their difference")):
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlim(edges[0], edges[-1])
        open_axis(axis)
    before, change = (maps[f"place_{what}"].reshape(rows, columns) for what in ("base", "change"))
    low, high = np.quantile([before, before + change], (0, 1))
    reach = np.abs(change).max()
    for place, (name, image, colors, *ends) in enumerate((
        ("base", before, "cividis", low, high), ("expert", before + change, "cividis", low, high),
        ("difference", change, DIVERGING, -reach, reach),
    ), start=1):  # fmt: skip
        axis = figure.add_subplot(grid[:, place], aspect="auto" if rows == 1 else "equal")
        shown = axis.imshow(image, cmap=colors, vmin=ends[0], vmax=ends[1], aspect=None)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"Spatial activations:\n{name}", fontsize=9)
        bar = figure.colorbar(shown, ax=axis, orientation="horizontal", fraction=0.05, pad=0.03)
        bar.ax.locator_params(nbins=3)
        bar.outline.set_visible(False)
