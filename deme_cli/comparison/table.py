"""What was measured as a table: the figures, what may be said of them, and four forms of it.

S training seeds, R repeats of the evaluation. A result is averaged over its repeats first, and
training seeds are the sample: how much a method owes to chance is their spread. Two rows are
compared by the differences of equal training seeds, each taken within the repeats, so that noise
which both rows share is gone. An interval holds for the evaluation seeds of the table; it is not
corrected for how many rows are looked at. What was measured here and what somebody printed never
share a table: their model, data and budget are other ones.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deme_cli.analysis.figure import BLACK, BLUE, OTHER, VERMILION, open_axis, render
from deme_cli.analysis.result import plain
from deme_cli.comparison.plan import Published
from deme_cli.console import decimals
from deme_cli.evaluation.measure import Difference, interval_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DAGGER, BLANK = "\N{DAGGER}", "\N{EN DASH}"  # the dagger marks a spread over evaluation seeds
OVER_TRAINING, OVER_EVALUATION = "training seeds", "evaluation seeds"
HIGHER_IS_BETTER = ("clip_score", "accuracy")
_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
_LONGEST_REASON = 200  # characters of a failure in a table; JSON has the whole
_MARKS = {
    "base": ("D", BLACK), "finetune": ("o", BLUE), "ensemble": ("s", OTHER),
    "merged": ("^", VERMILION),
}  # fmt: skip
_WIDE_SPREAD = 8.0  # largest over least mean from which an axis is logarithmic


@dataclass(frozen=True)
class Column:
    """One figure of the table: `metric` as `deme eval` names it, under the measure of that name."""

    metric: str
    measure: str = ""  # empty where a plan has one measure

    @property
    def lower_is_better(self) -> bool:
        return self.metric not in HIGHER_IS_BETTER

    @property
    def title(self) -> str:
        return f"{self.measure} {self.metric}".strip()


@dataclass(frozen=True)
class Result:
    """One training seed of a row (None for a row without training).

    values: by the title of a column, one number per repeat. `seconds` of training, all ranges
    together. `coefficients` are those of a merged model, `search` what finding them took: the
    evaluations, images, seconds, and the objective.
    """

    seed: int | None
    values: Mapping[str, Sequence[float]]
    seconds: float = 0.0
    search: Mapping[str, Any] | None = None
    coefficients: Sequence[float] = ()


@dataclass(frozen=True)
class Row:
    """A row as far as it is: its results, and why some are missing.

    settings: what sets it apart from plain finetuning.   updates, images, flops: of training in
    total, all ranges together; the same for every seed.   pending: seeds that have neither a result
    nor a failure.
    """

    name: str
    kind: str
    num_ranges: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Result] = ()
    updates: int = 0
    images: int = 0
    flops: float = 0.0
    published: Sequence[float | None] = ()
    failures: Sequence[str] = ()
    pending: int = 0

    @property
    def is_partial(self) -> bool:
        return bool(self.failures or self.pending)

    @property
    def word(self) -> str:
        """What is missing in a word; empty where nothing is."""
        if not self.is_partial:
            return ""
        return "partial" if self.results else "failed" if self.failures else "not run yet"

    @property
    def state(self) -> str:
        """What is missing of the row and why; empty where nothing is."""
        parts = []
        if reasons := "; ".join(dict.fromkeys(" ".join(text.split()) for text in self.failures)):
            short = textwrap.shorten(reasons, _LONGEST_REASON, placeholder=" ...")
            parts.append(f"failed{' for other seeds' if self.results else ''}: {short}")
        if self.pending:
            total = len(self.results) + len(self.failures) + self.pending
            parts.append("not run yet" + f" ({self.pending} of {total} seeds)" * (total > 1))
        return "; ".join(parts)


@dataclass(frozen=True)
class Comparison:
    """The whole table. The first row is what the others are compared with."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    protocol: Sequence[str]  # lines that say what the figures depend on
    published: Published = Published()
    cards: Mapping[str, Any] = field(default_factory=dict)  # protocol cards by measure


@dataclass(frozen=True)
class RowDifference(Difference):
    """A row minus another. `over` says what sd and interval are over: training seeds, or the
    evaluation seeds where the rows share one training seed, or neither row trains."""

    over: str = OVER_TRAINING


@dataclass(frozen=True)
class Cell:
    """One column of one row.

    seed_means: one mean over R repeats per training seed (one for a row without training).
    sd, interval: of these means and of their mean (95 %, Student's t); None for fewer than two.
    repeats_sd: the sd over repeats, averaged over training seeds; None for R = 1.
    """

    mean: float
    seed_means: list[float]
    sd: float | None
    interval: tuple[float, float] | None
    repeats_sd: float | None
    num_repeats: int
    difference: RowDifference | None = None


def cell_of(row: Row, column: Column, first: Row) -> Cell | None:
    """The figures of a row, and its difference to `first`; None where it has no result."""
    results = list(_by_seed(row, column).values())
    if not results:
        return None
    means = [float(values.mean()) for values in results]
    spreads = [float(values.std(ddof=1)) for values in results if len(values) > 1]
    return Cell(
        mean=float(np.mean(means)),
        seed_means=means,
        sd=float(np.std(means, ddof=1)) if len(means) > 1 else None,
        interval=interval_of(means) if len(means) > 1 else None,
        repeats_sd=float(np.mean(spreads)) if spreads else None,
        num_repeats=min(map(len, results)),
        difference=None if row is first else difference_of(row, first, column),
    )


def difference_of(row: Row, other: Row, column: Column) -> RowDifference | None:
    """`row` minus `other`, paired; None where fewer than two pairs leave no interval.

    A row without training stands beside every training seed of the other.
    """
    ours, theirs = _by_seed(row, column), _by_seed(other, column)
    pairs = []
    for seed in theirs if None in ours else ours:
        one, two = ours.get(seed, ours.get(None)), theirs.get(seed, theirs.get(None))
        if one is not None and two is not None:
            shared = min(len(one), len(two))
            with np.errstate(invalid="ignore"):  # inf - inf is no difference
                pairs.append(one[:shared] - two[:shared])
    over = OVER_TRAINING if len(pairs) > 1 else OVER_EVALUATION
    sample = [pair.mean() for pair in pairs] if len(pairs) > 1 else [x for p in pairs for x in p]
    if len(sample) < 2:
        return None
    mean, sd = float(np.mean(sample)), float(np.std(sample, ddof=1))
    return RowDifference(other.name, mean, sd, interval_of(sample), over)


def _by_seed(row: Row, column: Column) -> dict[int | None, np.ndarray]:
    """The values over repeats by training seed (None for a row without training)."""
    return {
        result.seed: np.array(result.values[column.title], dtype=np.float64)
        for result in row.results
        if result.values.get(column.title)
    }


def best_of(rows: Sequence[Row], column: Column) -> tuple[Row, list[Row]] | None:
    """The row of the best finite mean and those that it does not beat: the interval of the paired
    difference holds 0. A row that lacks seeds is not called best while another has all."""
    means = {row.name: cell.mean for row in rows if (cell := cell_of(row, column, row))}
    measured = [row for row in rows if np.isfinite(means.get(row.name, np.nan))]
    if not measured:
        return None
    sign = 1 if column.lower_is_better else -1
    best = min(measured, key=lambda row: (row.is_partial, sign * means[row.name]))
    others = [(row, difference_of(best, row, column)) for row in measured if row is not best]
    return best, [
        row for row, minus in others
        if minus is None or not max(sign * end for end in minus.interval) < 0
    ]  # fmt: skip


def headlines(comparison: Comparison) -> list[str]:
    """The best row of each column and those not told apart from it, and what is still missing."""
    lines, rows = [], [row for row in comparison.rows if row.results]
    for column in comparison.columns:
        if len(rows) > 1 and (found := best_of(rows, column)):
            best, near = found
            names = f"; not told apart from it: {', '.join(row.name for row in near)}"
            told = names if near else ", told apart from every other row"
            lines.append(f"{column.title}: best is {best.name}{told}")
    if names := ", ".join(row.name for row in rows if row.is_partial):
        lines.append(f"not all seeds are measured yet: {names}")
    return lines


def columns_of(comparison: Comparison, *, brief: bool = False) -> list[tuple[str, list[str]]]:
    """Headings with the cells below, for Markdown; `brief`: what a terminal has room for.

    Differences to the first row are left out there where several metrics share the width.
    """
    rows, mark = comparison.rows, str if brief else escape
    names = [f"{row.name} ({row.word})" if brief and row.word else mark(row.name) for row in rows]
    table: list[tuple[str, list[str]]] = [("row", names)]
    for column in comparison.columns:
        cells = [cell_of(row, column, rows[0]) for row in rows]
        known = [cell for cell in cells if cell]
        spreads = [spread for cell in known if (spread := cell.sd or cell.repeats_sd)]
        spreads = spreads or [cell.mean / 100 for cell in known] or [0]
        digits = decimals([float(np.median(spreads))], 2)  # two figures of the typical spread
        texts = [_texts(cell, digits, brief=brief) for cell in cells]
        figures, differences = [text for text, _ in texts], [text for _, text in texts]
        if not brief and len(rows) > 1 and (found := best_of(rows, column)):
            place = rows.index(found[0])
            figures[place] = f"**{figures[place]}**"
        arrow = "\N{DOWNWARDS ARROW}" if column.lower_is_better else "\N{UPWARDS ARROW}"
        table.append((f"{mark(column.title)} {arrow}", figures))
        if not brief or len(comparison.columns) == 1:
            first = "first" if brief else f"{mark(rows[0].name)} [95 % interval]"
            table.append((f"minus {first}", differences))
    flops = max(row.flops for row in rows)
    unit, scale = next((unit for unit in _UNITS if flops >= unit[1]), _UNITS[-1])
    table += [
        ("updates", [f"{row.updates:,}" if row.updates else "" for row in rows]),
        ("images", [f"{row.images:,}" if row.images else "" for row in rows]),
        (unit, [_short([row.flops / scale]) for row in rows]),
        ("seconds of training", [_short([one.seconds for one in row.results]) for row in rows]),
        ("search", [_search([one.search for one in row.results if one.search]) for row in rows]),
        ("state", [mark(row.state) for row in rows]),
    ]
    left_out = {"images", "search", "state"} if brief else set()
    return [(title, texts) for title, texts in table if title not in left_out and any(texts)]


def _texts(cell: Cell | None, digits: int, *, brief: bool) -> tuple[str, str]:
    """mean ± sd; and the difference to the first row with its interval, or (brief) ± half of that.
    The dagger is at what is over evaluation seeds."""
    if cell is None:
        return "", ""
    sd, figure = cell.repeats_sd if cell.sd is None else cell.sd, f"{cell.mean:.{digits}f}"
    if sd is not None:
        figure += f" ± {sd:.{digits}f}{DAGGER * (cell.sd is None)}"
    if (minus := cell.difference) is None:
        return figure, ""
    low, high = minus.interval
    ends = f"[{low:+.{digits}f}, {high:+.{digits}f}]"
    ends = f"± {(high - low) / 2:.{digits}f}" if brief else ends
    return figure, f"{minus.mean:+.{digits}f} {ends}{DAGGER * (minus.over == OVER_EVALUATION)}"


def _short(values: Sequence[float]) -> str:
    """Their mean in three figures, and never a power of ten; empty for none."""
    mean = float(np.mean(values)) if values else 0.0
    return "" if not mean else f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"


def _search(costs: Sequence[Mapping[str, Any]]) -> str:
    """What the search of coefficients took, a mean over training seeds; empty if none."""
    if not costs:
        return ""
    candidates, images = (
        np.mean([one[name] for one in costs]) for name in ("evaluations", "images")
    )
    seconds = _short([one["seconds"] for one in costs])
    return f"{candidates:,.0f} candidates, {images:,.0f} images, {seconds} s"


def markdown(comparison: Comparison) -> str:
    """The report: measured table, what was compared, what may be said, published figures apart."""
    headings, cells = zip(*columns_of(comparison), strict=True)
    parts = [f"# {escape(comparison.title)}", _grid(headings, [*zip(*cells, strict=True)])]
    told = {"What was compared": list(_compared(comparison)), "Reading": headlines(comparison)}
    for heading, lines in told.items():
        if lines:
            parts += [f"## {heading}", "\n".join(f"- {escape(line)}" for line in lines)]
    if (published := comparison.published).columns:
        whose = f"{escape(published.source)}; not measured here: their model, data and budget"
        cited = [
            [escape(row.name), *("" if one is None else f"{one:g}" for one in row.published)]
            for row in comparison.rows if row.published
        ]  # fmt: skip
        parts += [f"## Published ({whose})", _grid(["row", *map(escape, published.columns)], cited)]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """`text` on one line, with nothing that Markdown or a table cell would take for markup."""
    line = " ".join(text.split())
    line = re.sub(r"[\\`*|<$~&]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|^[#>+-]", r"\\\g<0>", line)
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", line)


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of finished cells, numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    filled = [[cell or BLANK for cell in cells] for cells in (header, rule, *lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in filled)


def _compared(comparison: Comparison) -> Iterator[str]:
    """Rows, what the marks mean, and the protocol."""
    for row in comparison.rows:
        ranges = f" of {row.num_ranges} ranges" if row.kind in ("ensemble", "merged") else ""
        settings = "".join(f", {name} = {value}" for name, value in row.settings.items())
        lists = [", ".join(f"{w:g}" for w in one.coefficients) for one in row.results]
        chosen = f"; coefficients by training seed: {'; '.join(lists)}" if any(lists) else ""
        yield f"{row.name}: {row.kind}{ranges}{settings}{chosen}"
    yield (
        f"± is the sd over training seeds; differences are paired by training and evaluation seed; "
        f"in brackets the 95 % interval of their mean (Student's t), uncorrected for the number of "
        f"rows; {DAGGER} over evaluation seeds only, which tell nothing of how training varies"
    )
    yield (
        "costs are of training in total, all ranges together; seconds are a mean over seeds, of "
        "jobs that may have run side by side or on several machines"
    )
    yield from comparison.protocol


def document(comparison: Comparison) -> dict[str, Any]:
    """Everything, for JSON: what is not finite is null, published figures stand apart."""
    columns, rows, shown = comparison.columns, comparison.rows, asdict(comparison)
    for column, told in zip(columns, shown["columns"], strict=True):
        told |= {"title": column.title, "lower_is_better": column.lower_is_better}
    cited = {}
    for row, told in zip(rows, shown["rows"], strict=True):
        cells = {column.title: cell_of(row, column, rows[0]) for column in columns}
        told["metrics"] = {title: asdict(cell) for title, cell in cells.items() if cell}
        if figures := told.pop("published"):
            cited[row.name] = figures
    shown["published"] = {**shown["published"], "rows": cited} if cited else None
    shown["best"] = {
        column.title: {"row": found[0].name, "not_beaten": [row.name for row in found[1]]}
        for column in columns if (found := best_of(rows, column))
    }  # fmt: skip
    return plain({**shown, "reading": headlines(comparison)})


_READING = (
    "◆ base  ● finetuned  ■ ensemble  "
    "▲ merged: means, with the sd over training seeds, which are the "
    "dots (hollow: one seed); dashed: the first row, in a band of its sd over evaluation seeds"
)


def draw(comparison: Comparison, kind: Literal["png", "svg"]) -> bytes:
    """A panel per column, a line per row. Published figures are not drawn."""
    columns, rows = comparison.columns, comparison.rows
    abreast = min(len(columns), 3)
    down = -(-len(columns) // abreast)
    size = (3.3 * abreast + 2.6, down * (0.34 * len(rows) + 0.6) + 1.4)
    lines = [_READING, " · ".join(comparison.protocol)]
    foot = "\n".join(textwrap.fill(line, int(16 * size[0])) for line in lines)

    def draw_panels(figure: Figure) -> None:
        axes = figure.subplots(down, abreast, squeeze=False, sharey=True)
        for axis, column in zip(axes.flat, columns, strict=False):
            _draw_panel(axis, column, rows)
        for axis in axes.flat[len(columns) :]:
            axis.set_axis_off()
        names = [textwrap.fill(row.name, 30) for row in rows]
        axes[0][0].set_yticks(range(len(rows)), names, fontsize=8)
        axes[0][0].set_ylim(len(rows) - 0.4, -0.6)  # the first row on top

    return render(draw_panels, size=size, title=comparison.title, foot=foot, kind=kind)


def _draw_panel(axis: Axes, column: Column, rows: Sequence[Row]) -> None:
    cells = [cell_of(row, column, rows[0]) for row in rows]
    means = [cell.mean for cell in cells if cell and np.isfinite(cell.mean)]
    if means and 0 < _WIDE_SPREAD * min(means) < max(means):
        axis.set_xscale("log", subs=(2, 3, 5))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
    if (first := cells[0]) is not None:
        half = first.repeats_sd or 0.0
        axis.axvline(first.mean, color="0.45", linestyle="--", linewidth=1, zorder=1)
        axis.axvspan(first.mean - half, first.mean + half, color="0.9", linewidth=0, zorder=0)
    for y, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        marker, color = _MARKS[row.kind]
        if cell is None:
            axis.text(
                0.5, y, row.word or "not measured", ha="center", va="center",
                transform=axis.get_yaxis_transform(), color="0.55", fontsize=8, fontstyle="italic",
            )  # fmt: skip
            continue
        is_lone = len(cell.seed_means) == 1 and row.results[0].seed is not None
        axis.errorbar(
            cell.mean, y, xerr=cell.sd, fmt=marker, color=color, markersize=7, zorder=4,
            markerfacecolor="white" if is_lone else color,
        )  # fmt: skip
        if cell.sd is not None:
            below = [y + 0.24] * len(cell.seed_means)
            axis.plot(cell.seed_means, below, ".", color=color, alpha=0.6, markersize=5)
    open_axis(axis)
    axis.tick_params(axis="y", length=0)
    direction = "lower" if column.lower_is_better else "higher"
    axis.set_xlabel(f"{column.title} ({direction} is better)")
