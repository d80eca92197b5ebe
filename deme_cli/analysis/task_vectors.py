"""What each expert changed, and where experts pull against each other (the paper's figure 6(b)).

One pass over the files: per tensor the inner products of the tau_i = theta_i - theta, and of each
pair of experts how many elements, and how much of what both moved, go in opposite directions; both
shares are 1/2 for vectors that have nothing to do with each other. Then per matrix its effective
rank, how many directions it really uses: with singular values s_k and p_k = s_k / sum(s) it is
exp(-sum_k p_k log p_k) (Roy and Vetterli 2007, Eq. 3). A tensor (out, ...) is the matrix
(out, rest), as its layer multiplies by it. No network, no data, no torch. A projection that the
base lacks is the identity there, its vector W_i - I.
T tensors in the network's order, N experts in the order of their ranges, n elements of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deme_cli.analysis.result import (
    Analysis,
    Unfinished,
    check_output,
    document_bytes,
    write_analysis,
)
from deme_cli.analysis.settings import TaskVectorConfig
from deme_cli.console import Progress, Step, silent
from deme_cli.errors import ArtifactError, MissingError, NumericsError
from deme_cli.files import TensorSpec
from deme_cli.merging.coefficients import network_order
from deme_cli.merging.inputs import Inputs, find_base, is_projection, open_experts, open_inputs
from deme_cli.merging.task_vectors import block_of
from deme_cli.merging.tensor_stream import (
    COMPUTED_IN,
    PIECE,
    Run,
    TensorStream,
    float_runs,
    float_specs,
    plan_runs,
)
from deme_cli.run_file import RunFile

UNRELATED = 0.5  # sign conflict of vectors that have nothing to do with each other
Sums = dict[str, np.ndarray]
Check = Callable[[], None]
_WIDE = np.dtype(np.float64)  # what differences are computed and summed in
_OUTSIDE = ("channel_projection", "other")  # not blocks of the network: shown last
# Of two experts: tau_i . tau_j, the number of elements that both moved and of those with opposite
# signs, the sum of min(|tau_i|, |tau_j|) and the part of it with opposite signs.
PAIRWISE = ("products", "both", "opposed", "overlap", "cancelled")
# Of a tensor: |theta|^2, the number of elements that all experts moved, and of those with one sign.
ONCE = ("squares", "moved", "unanimous")


def analyze_task_vectors(
    experts: Sequence[str | Path] = (),
    settings: TaskVectorConfig | None = None,
    *,
    base: Path | None = None,
    output: Path = Path("task-vectors.json"),
    run: RunFile | None = None, force: bool = False, dry_run: bool = False,
    progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Measure how far each expert moved in each layer, and where experts pull against each other.

    experts: experts or task vectors of one base; without any, ft_* beside the base of `run`.
    base: None for that of `run`, or the one beside the experts.

    Needs no torch. The rest is as for `analyze_losses`.
    """
    run, settings = run or RunFile(), settings or TaskVectorConfig()
    check_output(output, force=force)
    parents = open_experts(
        [Path(expert) for expert in experts] or _own_experts(run), "expert", "task-vector"
    )
    family = open_inputs(find_base(parents, run, base), parents)
    family = replace(family, experts=tuple(family.experts[i] for i in family.by_range))
    specs = layers_of(family)
    size = sum(spec.num_elements for spec in specs)
    count = f"{len(parents)} experts" if len(parents) > 1 else "1 expert"
    told = f"{count} of {family.base.path}: {len(specs)} tensors, {size:,} parameters"
    progress(Step(note=told))
    if dry_run:
        return Analysis(output, facts={"dry_run": True})

    from deme_cli.analysis.task_vectors_picture import draw_task_vectors

    identity = {
        "base": family.base_record.fingerprint,
        "experts": [parent.record.fingerprint for parent in family.experts],
        "ranks": settings.ranks,
    }
    with Unfinished(output, identity, force=force) as kept:
        measure(family, specs, kept, progress, ranks=settings.ranks)
        document = describe(family, specs, kept.arrays)
        foot = (
            f"{len(specs)} tensors, {size:,} parameters; boxes: quartiles, whiskers to 1.5 "
            f"quartile distances, dots beyond"
        )
        drawn = draw_task_vectors(
            document, title=f"What {count} changed: {family.base.path}", foot=foot
        )
        return write_analysis(
            kept, drawn, document_bytes("task-vectors", document),
            shown=("reading", "experts", "pairs", "blocks"),
            columns=["expert", "norm", "of the base", "rank / full",
                     *(f"cosine {row['name']}" for row in document["experts"][1:])],
            rows=_table(document),
        )  # fmt: skip


def _own_experts(run: RunFile) -> list[Path]:
    """The experts beside the base of deme.toml. Raises MissingError where there are none."""
    folder = run.base.parent
    paths = sorted(folder.glob("ft_*.safetensors"))
    if not paths:
        raise MissingError(
            f"{folder.resolve()}: no experts (ft_*.safetensors) there; name EXPERTs, or train "
            f"them with `deme finetune --range all`"
        )
    return paths


def layers_of(family: Inputs) -> list[TensorSpec]:
    """The tensors that are looked at, in the network's order: floating point, not empty.

    Raises ArtifactError on a dtype that cannot be subtracted.
    """
    specs = [spec for spec in float_specs(family) if spec.num_elements]
    for spec in specs:
        if spec.dtype not in COMPUTED_IN:
            raise ArtifactError(
                f"{family.base.path}: {spec.name!r} of {spec.dtype} cannot be subtracted; "
                f"analyze experts in F32, F16 or BF16"
            )
    return sorted(specs, key=lambda spec: network_order(spec.name))


def measure(
    family: Inputs, specs: Sequence[TensorSpec], kept: Unfinished, progress: Progress,
    *, ranks: bool,
) -> None:  # fmt: skip
    """Add what is missing of the sums over every tensor: (T, N, N) by name of PAIRWISE, (T,) by
    name of ONCE; and `effective` (T, 1 + N), the ranks of theta and the tau_i, nan where there is
    none: of a zero or a vector, of theta where it is the identity.

    Raises NumericsError naming a file and a tensor that is not finite.
    """
    num, count = len(specs), len(family.experts)
    runs = {run.specs[0].name: run for run in float_runs(family)}
    sums = kept.arrays
    if not sums:
        sums |= {name: np.zeros((num, count, count)) for name in PAIRWISE}
        sums |= {name: np.full(num, np.nan) for name in ONCE}  # nan: still to be measured
        if ranks:
            sums["effective"] = np.full((num, 1 + count), np.nan)
    total = sum(spec.num_elements for spec in specs)
    known = ~np.isnan(sums["squares"])
    done = sum(spec.num_elements for spec, one in zip(specs, known, strict=True) if one)
    note = f"continuing after {known.sum()} of {num} tensors" if done else kept.note
    progress(Step(done, total, "task vectors", "parameter", note))
    with TensorStream(family) as stream:
        for index in np.flatnonzero(~known).tolist():
            check, run = kept.checker(f"{index} of {num} tensors"), runs[specs[index].name]
            added = _add_up(stream, run, count, check)
            _require_finite(family, run, added)
            if ranks and min(matrix_shape(specs[index].shape)) > 1:
                matrices = [(0, True), *((i, False) for i in range(count))]  # one at a time
                added["effective"] = np.array([
                    effective_rank(_singular_values(family, i, specs[index], check, of_base=of))
                    for i, of in matrices
                ])  # fmt: skip
            for name, value in added.items():
                sums[name][index] = value
            done += run.num_elements
            progress(Step(done, total, "task vectors", "parameter"))


def _add_up(stream: TensorStream, run: Run, count: int, check: Check) -> Sums:
    """The sums over one tensor: (N, N) by name of PAIRWISE, () by name of ONCE."""
    lower = {name: np.zeros((count, count)) for name in PAIRWISE}
    once = {name: np.zeros(()) for name in ONCE}
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop in run.spans(PIECE):
            check()
            theta, taus = stream.vectors(run, start, stop, _WIDE)
            sizes = np.abs(taus)
            once["squares"] += (theta * theta).sum()
            once["moved"] += np.count_nonzero((taus != 0).all(axis=0))
            once["unanimous"] += np.count_nonzero((taus > 0).all(axis=0) | (taus < 0).all(axis=0))
            for i in range(count):
                for j in range(i + 1):
                    product = taus[i] * taus[j]
                    opposed = product < 0
                    smaller = np.minimum(sizes[i], sizes[j])
                    lower["products"][i, j] += product.sum()
                    lower["both"][i, j] += np.count_nonzero(product)
                    lower["opposed"][i, j] += np.count_nonzero(opposed)
                    lower["overlap"][i, j] += smaller.sum()
                    lower["cancelled"][i, j] += smaller[opposed].sum()
    return {name: np.tril(one) + np.tril(one, -1).T for name, one in lower.items()} | once


def _require_finite(family: Inputs, run: Run, sums: Sums) -> None:
    squares = [sums["squares"], *np.diag(sums["products"])]
    for header, square in zip(family.headers, squares, strict=True):
        if not np.isfinite(square):
            raise NumericsError(f"{header.path}: {run.specs[0].name!r} is not finite")


def _singular_values(
    family: Inputs, expert: int, spec: TensorSpec, check: Check, *, of_base: bool
) -> np.ndarray:
    """Those of theta or tau (m,); none where theta is the identity that the base lacks."""
    if of_base and is_projection(spec.name):
        return np.zeros(0)
    alone = replace(family, experts=(family.experts[expert],))
    (run,) = plan_runs([spec], alone.headers)
    with TensorStream(alone) as stream:

        def read(start: int, stop: int) -> np.ndarray:
            theta, taus = stream.vectors(run, start, stop, _WIDE)
            return theta if of_base else taus[0]

        return singular_values(gram(read, spec.shape, check))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, rest) of a tensor; (1, n) of a vector."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def gram(
    read: Callable[[int, int], np.ndarray], shape: tuple[int, ...], check: Check
) -> np.ndarray:
    """X^T X or X X^T, whichever is smaller: (m, m) float64, m = min(out, rest).

    read: elements start .. stop - 1 of the flattened tensor, at most PIECE. A matrix with no more
    columns than rows is read in whole rows and never held; the others are held as a whole, for
    each entry of X X^T needs all columns. check: called before each piece.
    """
    rows, columns = matrix_shape(shape)

    def spans(step: int) -> Iterator[tuple[int, int]]:
        for start in range(0, rows * columns, step):
            check()
            yield start, min(start + step, rows * columns)

    if columns > min(rows, PIECE):
        whole = np.empty(rows * columns)
        for start, stop in spans(PIECE):
            whole[start:stop] = read(start, stop)
        wide = whole.reshape(rows, columns)
        return wide @ wide.T if rows <= columns else wide.T @ wide
    total = np.zeros((columns, columns))
    for start, stop in spans(PIECE // columns * columns):
        some = read(start, stop).reshape(-1, columns)
        total += some.T @ some
    return total


def singular_values(gram: np.ndarray) -> np.ndarray:
    """Of the matrix behind a Gram matrix (m, m): (m,), ascending.

    What is below s_1 sqrt(m eps), where rounding hides it, counts as 0.
    """
    squares = np.linalg.eigvalsh(gram)
    noise = max(squares[-1], 0.0) * len(gram) * np.finfo(np.float64).eps
    return np.sqrt(np.where(squares > noise, squares, 0.0))


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the singular values (m,), in [1, m]; nan where all are 0."""
    shares = values[values > 0]
    if not len(shares):
        return math.nan
    shares = shares / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def names_of(family: Inputs) -> list[str]:
    """What the experts are called: their ranges, with their files where ranges repeat."""
    ranges = [str(parent.record.timesteps) for parent in family.experts]
    if len(set(ranges)) == len(ranges):
        return ranges
    folders = [parent.path.parent.name for parent in family.experts]
    places = folders if len(set(folders)) > 1 else [parent.path.stem for parent in family.experts]
    return [f"{span} {place}".strip() for span, place in zip(ranges, places, strict=True)]


def describe(family: Inputs, specs: Sequence[TensorSpec], sums: Sums) -> dict[str, Any]:
    """The document: rows by expert, block and tensor; lists in the order of `experts`."""
    names, count = names_of(family), len(family.experts)
    norms = np.sqrt(np.diagonal(sums["products"], axis1=1, axis2=2))  # (T, N)
    relative = _ratio(norms, np.sqrt(sums["squares"])[:, None])
    own = np.array([not is_projection(spec.name) for spec in specs])
    total = np.sqrt((norms**2).sum(axis=0))
    of_base = _ratio(total, np.sqrt(sums["squares"][own].sum()))  # as `deme task-vector` has it
    elements = np.array([spec.num_elements for spec in specs])
    still = 1 - np.diagonal(sums["both"], axis1=1, axis2=2).sum(axis=0) / elements.sum()
    full = np.array([min(matrix_shape(spec.shape)) for spec in specs])
    effective = sums.get("effective", np.full((len(specs), 1 + count), np.nan))
    ranks = medians(effective / full[:, None]).tolist()
    low, high = _halves(family, of_base)
    experts = [
        {
            "name": name, "range": str(parent.record.timesteps), "norm": total[i].item(),
            "relative_norm": of_base[i].item(), "median_relative_norm": middle,
            "rms": total[i].item() / math.sqrt(elements.sum()), "unmoved_share": still[i].item(),
            "median_relative_rank": ranks[1 + i],
        }
        for i, (name, parent, middle) in enumerate(
            zip(names, family.experts, medians(relative).tolist(), strict=True)
        )
    ]  # fmt: skip
    pairs = None
    if count > 1:
        every = pairs_of(sums)
        same = float(_ratio(sums["unanimous"].sum(), sums["moved"].sum()))
        pairs = {
            **every, **_pair_means(every), "sign_conflict_if_unrelated": UNRELATED,
            "same_sign_in_all": same, "same_sign_in_all_if_unrelated": 2.0 ** (1 - count),
            "directions": directions(every["cosines"]),
        }  # fmt: skip
    return {
        "reading": _headline(experts, pairs),
        "protocol": {**_protocol(family), "ranks": "effective" in sums},
        "relative_norm": {
            "below_half": low, "from_half": high, "ratio": high / low if low else None,
        },
        "experts": experts, "pairs": pairs, "base_relative_rank": ranks[0],
        "blocks": _block_rows(specs, sums, norms, elements),
        "tensors": [
            {
                "name": spec.name, "block": block_of(spec.name), "shape": list(spec.shape),
                "base_norm": math.sqrt(sums["squares"][i]), "norms": norms[i],
                "relative_norms": relative[i], "rms": norms[i] / math.sqrt(spec.num_elements),
                "base_effective_rank": effective[i, 0], "effective_ranks": effective[i, 1:],
            }
            for i, spec in enumerate(specs)
        ],
    }  # fmt: skip


def _protocol(family: Inputs) -> dict[str, Any]:
    return {
        "base": {"source": str(family.base.path), "fingerprint": family.base_record.fingerprint},
        "experts": [
            {"source": str(one.path), "kind": one.record.kind,
             "fingerprint": one.record.fingerprint, "range": str(one.record.timesteps),
             "steps": one.record.steps, "p": one.record.p, "projection": one.record.projection}
            for one in family.experts
        ],
        "num_train_timesteps": family.base_record.num_train_timesteps,
    }  # fmt: skip


def _halves(family: Inputs, relative: np.ndarray) -> tuple[float, float]:
    """Mean relative norm of the experts within [0, T/2), and of those within [T/2, T).

    (The paper's figure 6(b): slight in the first, notable in the second.) nan without such.
    """
    middle = family.base_record.num_train_timesteps / 2
    spans = [parent.record.timesteps for parent in family.experts]
    low = [r for r, span in zip(relative, spans, strict=True) if span.stop <= middle]
    high = [r for r, span in zip(relative, spans, strict=True) if span.start >= middle]
    means = [float(np.mean(some)) if some else math.nan for some in (low, high)]
    return means[0], means[1]


def pairs_of(sums: Sums, chosen: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
    """Of every two experts over the chosen tensors together, (N, N): cosine, share of elements that
    both moved in opposite directions, and of what both moved; nan where it is unknown."""
    whole = {name: sums[name][chosen].sum(axis=0) for name in PAIRWISE}
    lengths = np.sqrt(np.diag(whole["products"]))
    cosines = np.clip(_ratio(whole["products"], np.outer(lengths, lengths)), -1, 1)
    return {
        "cosines": cosines,
        "sign_conflicts": _ratio(whole["opposed"], whole["both"]),
        "sign_conflicts_by_magnitude": _ratio(whole["cancelled"], whole["overlap"]),
    }


def known_pairs(values: np.ndarray) -> np.ndarray:
    """What is known of the N (N - 1) / 2 pairs of (N, N)."""
    own = values[np.tril_indices(len(values), -1)]
    return own[np.isfinite(own)]


def _pair_means(pairs: dict[str, np.ndarray]) -> dict[str, float]:
    known = {name: known_pairs(values) for name, values in pairs.items()}
    means = {name: float(some.mean()) if len(some) else math.nan for name, some in known.items()}
    return {
        "mean_cosine": means["cosines"], "mean_sign_conflict": means["sign_conflicts"],
        "mean_sign_conflict_by_magnitude": means["sign_conflicts_by_magnitude"],
    }  # fmt: skip


def directions(cosines: np.ndarray) -> float:
    """How many independent directions task vectors span: N if all are orthogonal, 1 on one line.

    The effective rank of the matrix of their unit vectors; zero vectors have none.
    cosines: (N, N)
    """
    moved = np.isfinite(np.diag(cosines))
    if not moved.any():
        return math.nan
    squares = np.linalg.eigvalsh(cosines[np.ix_(moved, moved)])
    return effective_rank(np.sqrt(np.maximum(squares, 0)))


def _block_rows(
    specs: Sequence[TensorSpec], sums: Sums, norms: np.ndarray, elements: np.ndarray
) -> list[dict[str, Any]]:
    """In the network's order."""
    blocks: dict[str, list[int]] = {}
    for index, spec in enumerate(specs):
        blocks.setdefault(block_of(spec.name), []).append(index)
    rows = []
    for name in sorted(blocks, key=lambda name: (name in _OUTSIDE, network_order(name))):
        tensors = np.array(blocks[name])
        base = sums["squares"][tensors].sum()
        squares = (norms[tensors] ** 2).sum(axis=0)
        row = {
            "name": name, "parameters": int(elements[tensors].sum()),
            "relative_norms": np.sqrt(squares / base) if base else None,
        }  # fmt: skip
        if norms.shape[1] > 1:
            pairs = pairs_of(sums, tensors)
            row |= {**_pair_means(pairs), **pairs}
        rows.append(row)
    return rows


def medians(values: np.ndarray) -> np.ndarray:
    """Of each column, over the rows where it is known; nan without such."""
    known = [column[np.isfinite(column)] for column in values.T]
    return np.array([np.median(column) if len(column) else np.nan for column in known])


def _ratio(a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    """a / b; nan where b is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(b, 0), np.nan, np.divide(a, b))


def _headline(experts: Sequence[dict[str, Any]], pairs: dict[str, Any] | None) -> str:
    told = ", ".join(f"{100 * row['relative_norm']:.2g} % ({row['name']})" for row in experts)
    text = f"task vectors are {told} of the base's norm"
    if pairs is None or math.isnan(pairs["mean_cosine"]):
        return text
    return (
        f"{text}; mean cosine {pairs['mean_cosine']:.2f}, signs differ in "
        f"{100 * pairs['mean_sign_conflict']:.0f} % of elements"
    )


def _table(document: dict[str, Any]) -> list[list[str]]:
    """A row per expert; cosines below the diagonal."""
    lines = []
    for i, row in enumerate(document["experts"]):
        rank = row["median_relative_rank"]
        line = [
            row["name"], f"{row['norm']:.3g}", f"{100 * row['relative_norm']:.2g} %",
            "" if math.isnan(rank) else f"{rank:.2f}",
        ]  # fmt: skip
        if pairs := document["pairs"]:
            cosines = pairs["cosines"][i, 1:]
            line += [f"{c:.2f}" if j > i and np.isfinite(c) else "" for j, c in
                     enumerate(cosines, 1)]  # fmt: skip
        lines.append(line)
    return lines
