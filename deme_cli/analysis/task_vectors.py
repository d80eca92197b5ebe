"""What each expert changed, and where experts pull against each other (the paper's figure 6(b)).

One pass over the files: per tensor the inner products of the tau_i = theta_i - theta, and of each
pair of experts how many of the elements that both moved go in opposite directions: half of them for
vectors that have nothing to do with each other. No network, no data, no torch. A projection that
the base lacks is the identity there, its vector W_i - I.
T tensors in the network's order, N experts in the order of their ranges, n elements of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme_cli.analysis.figure import color_of, open_axis, render, shorten
from deme_cli.analysis.result import Analysis, check_output, write_analysis
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, MissingError, NumericsError
from deme_cli.files import TensorSpec
from deme_cli.jobs import claim
from deme_cli.merging.coefficients import network_order
from deme_cli.merging.inputs import Inputs, find_base, is_projection, open_experts, open_inputs
from deme_cli.merging.task_vectors import block_of
from deme_cli.merging.tensor_stream import COMPUTED_IN, PIECE, TensorStream, float_runs, float_specs
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNRELATED = 0.5  # sign conflict of vectors that have nothing to do with each other
_NAME = 30  # characters
Sums = dict[str, np.ndarray]


def analyze_task_vectors(
    experts: Sequence[str | Path] = (), *, base: Path | None = None,
    output: Path = Path("task-vectors.json"), run: RunFile | None = None, force: bool = False,
    dry_run: bool = False, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Measure how far each expert moved in each layer, and where experts pull against each other.

    experts: experts or task vectors of one base; without any, ft_* beside the base of `run`.
    base: None for that of `run`, or the one beside the experts.

    Needs no torch, and one pass over the files. The rest is as for `analyze_losses`.
    """
    run = run or RunFile()
    check_output(output, force=force)
    folder = run.base.parent
    paths = [Path(one) for one in experts] or sorted(folder.glob("ft_*.safetensors"))
    if not paths:
        raise MissingError(
            f"{folder.resolve()}: no experts (ft_*.safetensors) there; name EXPERTs, or train "
            f"them with `deme finetune --range all`"
        )
    parents = open_experts(paths, "expert", "task-vector")
    inputs = open_inputs(find_base(parents, run, base), parents)
    inputs = replace(inputs, experts=tuple(inputs.experts[i] for i in inputs.by_range))
    specs = [spec for spec in float_specs(inputs) if spec.num_elements]
    specs.sort(key=lambda spec: network_order(spec.name))
    if foreign := next((spec for spec in specs if spec.dtype not in COMPUTED_IN), None):
        raise ArtifactError(
            f"{inputs.base.path}: {foreign.name!r} of {foreign.dtype} cannot be subtracted; "
            f"analyze experts in F32, F16 or BF16"
        )
    tensors = f"{len(specs)} tensors, {sum(spec.num_elements for spec in specs):,} parameters"
    count = f"{len(parents)} experts" if len(parents) > 1 else "1 expert"
    progress(Step(note=f"{count} of {inputs.base.path}: {tensors}"))
    if dry_run:
        return Analysis(output, facts={"dry_run": True})
    with claim(output):
        document = _document(inputs, specs, _measure(inputs, specs, progress))
        foot = f"{tensors}; boxes: quartiles, whiskers to 1.5 quartile distances, dots beyond"
        title = f"What {count} changed: {inputs.base.path}"
        rows = [
            [row["name"], f"{row['norm']:.3g}", f"{100 * row['relative_norm']:.2g} %",
             *(f"{c:.2f}" if j > i and np.isfinite(c) else ""
               for j, c in enumerate(document["pairs"]["cosines"][i]) if j)]
            for i, row in enumerate(document["experts"])
        ]  # fmt: skip
        columns = ["expert", "norm", "of the base"]
        columns += [f"cosine {row['name']}" for row in document["experts"][1:]]
        return write_analysis(
            output, "task-vectors", document, draw_task_vectors(document, title=title, foot=foot),
            shown=("experts", "pairs"), columns=columns, rows=rows,
        )  # fmt: skip


def _measure(inputs: Inputs, specs: Sequence[TensorSpec], progress: Progress) -> Sums:
    """`squares` (T,) of |theta|^2; (T, N, N) of every two experts: `products`, how many elements
    `both` moved, and how many of those in `opposed` directions.

    Raises NumericsError naming a file and a tensor that is not finite.
    """
    count, total = len(inputs.experts), sum(spec.num_elements for spec in specs)
    runs, done = {run.specs[0].name: run for run in float_runs(inputs)}, 0
    squares, (products, both, net) = np.zeros(len(specs)), np.zeros((3, len(specs), count, count))
    with TensorStream(inputs) as stream, np.errstate(over="ignore", invalid="ignore"):
        for index, spec in enumerate(specs):
            for start, stop in runs[spec.name].spans(PIECE):
                theta, taus = stream.vectors(runs[spec.name], start, stop, np.dtype(np.float64))
                signs = np.sign(taus)
                squares[index] += theta @ theta
                products[index] += taus @ taus.T
                both[index] += np.abs(signs) @ np.abs(signs).T
                net[index] += signs @ signs.T
                progress(Step(done := done + stop - start, total, "task vectors", "parameter"))
            own = [squares[index], *np.diag(products[index])]
            for header, square in zip(inputs.headers, own, strict=True):
                if not np.isfinite(square):
                    raise NumericsError(f"{header.path}: {spec.name!r} is not finite")
    return {"squares": squares, "products": products, "both": both, "opposed": (both - net) / 2}


def _document(inputs: Inputs, specs: Sequence[TensorSpec], sums: Sums) -> dict[str, Any]:
    """Rows by expert, by tensor, and by two experts (N, N); nan where something is unknown."""
    norms = np.sqrt(np.diagonal(sums["products"], axis1=1, axis2=2))  # (T, N)
    own = np.array([not is_projection(spec.name) for spec in specs])  # |theta| of the base's alone
    total = np.sqrt((norms**2).sum(axis=0))
    relative = _ratio(total, np.sqrt(sums["squares"][own].sum()))
    by_tensor = _ratio(norms, np.sqrt(sums["squares"])[:, None])
    ranges = [str(parent.record.timesteps) for parent in inputs.experts]
    experts = [
        {"name": span if ranges.count(span) == 1 else f"{span} {parent.path.stem}", "range": span,
         "norm": float(total[i]), "relative_norm": float(relative[i]),
         "source": str(parent.path), "fingerprint": parent.record.fingerprint}
        for i, (span, parent) in enumerate(zip(ranges, inputs.experts, strict=True))
    ]  # fmt: skip
    products = sums["products"].sum(axis=0)
    lengths = np.sqrt(np.diag(products))
    cosines = np.clip(_ratio(products, np.outer(lengths, lengths)), -1, 1)
    conflicts = _ratio(sums["opposed"].sum(axis=0), sums["both"].sum(axis=0))
    known = np.tril(np.isfinite(cosines), -1)
    means = [float(one[known].mean()) if known.any() else None for one in (cosines, conflicts)]
    pairs = {
        "cosines": cosines, "sign_conflicts": conflicts, "mean_cosine": means[0],
        "mean_sign_conflict": means[1],
    }  # fmt: skip
    base = {"source": str(inputs.base.path), "fingerprint": inputs.base_record.fingerprint}
    return {
        "reading": _headline(experts, pairs),
        "protocol": {"base": base, "experts": [expert["fingerprint"] for expert in experts]},
        "experts": experts, "pairs": pairs,
        "tensors": [
            {"name": spec.name, "block": block_of(spec.name), "shape": list(spec.shape),
             "norms": norms[i], "relative_norms": by_tensor[i]}
            for i, spec in enumerate(specs)
        ],
    }  # fmt: skip


def _ratio(a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    """a / b; nan where b is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(b, 0), np.nan, np.divide(a, b))


def _headline(experts: Sequence[dict[str, Any]], pairs: dict[str, Any]) -> str:
    told = ", ".join(f"{100 * row['relative_norm']:.2g} % ({row['name']})" for row in experts)
    text = f"task vectors are {told} of the base's norm"
    if pairs["mean_cosine"] is None:
        return text
    return (
        f"{text}; mean cosine {pairs['mean_cosine']:.2f}, signs differ in "
        f"{100 * pairs['mean_sign_conflict']:.0f} % of elements"
    )


def draw_task_vectors(document: dict[str, Any], *, title: str, foot: str) -> bytes:
    """On top the relative norm of every tensor, a box per range (the paper's figure 6(b)). Below,
    experts by experts, the cosines and the shares of opposite signs: red pulls together, blue
    against. One expert alone has no pairs."""
    names, pairs = [shorten(row["name"], _NAME) for row in document["experts"]], document["pairs"]

    def draw(figure: Figure) -> None:
        if len(names) == 1:
            _draw_norms(figure.subplots(), document, names)
            return
        upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.1], squeeze=False)[:, 0]
        _draw_norms(upper.subplots(), document, names)
        left, right = lower.subplots(1, 2)
        _draw_matrix(left, pairs["cosines"], names, centre=0.0, least=0.5, cmap="RdBu_r")
        left.set_title("Cosines (0 if unrelated)", fontsize=9)
        _draw_matrix(right, pairs["sign_conflicts"], names, centre=0.5, least=0.17, cmap="RdBu")
        right.set_title(f"Share of opposite signs ({UNRELATED} if unrelated)", fontsize=9)

    return render(draw, size=(10, 4.2 if len(names) == 1 else 7.6), title=title, foot=foot)


def _draw_norms(axis: Axes, document: dict[str, Any], names: Sequence[str]) -> None:
    relative = np.array([row["relative_norms"] for row in document["tensors"]], dtype=float)
    columns = [column[np.isfinite(column) & (column > 0)] for column in relative.T]
    axis.set_yscale("log")
    drawn = axis.boxplot(
        columns, positions=range(len(names)), widths=0.55, patch_artist=True, manage_ticks=False,
        medianprops={"color": "black", "linewidth": 1.6},
        flierprops={"marker": "o", "markersize": 2.6, "markeredgecolor": "none",
                    "markerfacecolor": "0.5"},
    )  # fmt: skip
    for index, box in enumerate(drawn["boxes"]):
        box.set(facecolor=color_of(index), edgecolor="0.2", linewidth=0.9)
    whole = np.array([row["relative_norm"] for row in document["experts"]])
    whole = np.where(whole > 0, whole, np.nan)
    axis.scatter(
        range(len(names)), whole, marker="D", s=26, color="white", edgecolor="black", zorder=4,
        label="all tensors together",
    )  # fmt: skip
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.9))
    axis.set_ylabel("|task vector| / |base weights|")
    axis.set_title("Relative norm of each tensor, by range of timesteps", fontsize=9)
    axis.set_xlabel("expert, by its range of timesteps (0 = clean)")
    axis.set_xlim(-0.6, len(names) - 0.4)
    _name_experts(axis, names)
    open_axis(axis)


def _name_experts(axis: Axes, names: Sequence[str]) -> None:
    """Along x, turned where names would meet."""
    turn = 30 if len(names) * max(map(len, names)) > 60 else 0
    axis.set_xticks(range(len(names)), names, rotation=turn, ha="right" if turn else "center")


def _draw_matrix(
    axis: Axes, values: np.ndarray, names: Sequence[str], *, centre: float, least: float, cmap: str
) -> None:
    """Cells with their numbers, colours centred at what unrelated vectors have.

    least: how far the colours reach, so that little looks like little.
    """
    shown = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    reach = np.abs(shown - centre)
    limit = max(least, float(reach[np.isfinite(reach)].max(initial=0.0)))
    axis.imshow(shown, cmap=cmap, vmin=centre - limit, vmax=centre + limit, aspect="auto")
    for (y, x), value in np.ndenumerate(shown):
        if y != x:
            text = f"{round(value, 2) + 0.0:.2f}" if np.isfinite(value) else "none"
            color = "white" if reach[y, x] > 0.65 * limit else "black"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    _name_experts(axis, names)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
