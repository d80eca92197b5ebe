"""The plan of a comparison: which rows, on how many updates, from which seeds, measured how.

A plan is a TOML file. Its tables [model] [data] [finetune] [merge] [sample] [eval] are those of
`deme.toml` and hold for every row; each [[row]] adds what sets it apart; each [[measure]] is one
more protocol under which every row is measured. Rows cannot differ in how they are drawn or
measured, so that a table compares methods and nothing else. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_cli.config import DIVISIONS, TABLES
from deme_cli.errors import ConfigError, DemeError, MissingError, reading
from deme_cli.run_file import checked_fields, checked_table

SHIPPED = Path(__file__).parent / "plans"
PLAIN = {"p": 0.0, "consistency": 0.0, "projection": "none"}  # of rows of kind finetune
COMMON = tuple(name for name in TABLES if name != "split")
_NEEDLESS = {  # what a row of each kind takes no notice of
    "base": ("n", "by", "finetune", "merge"),
    "finetune": ("n", "by", "merge"),
    "ensemble": ("merge",),
    "merged": (),
}
Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Published:
    """Figures that somebody printed: of their model, data and budget, never measured here."""

    source: str = ""
    columns: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowPlan:
    """One row. kind: base (as it is), finetune (one network, all timesteps), ensemble or merged
    (experts of n ranges). `finetune` and `merge` are its settings on top of the common ones,
    `published` its figures in the columns of [published], None where there is none."""

    name: str
    kind: str
    n: int = 1
    by: str = "uniform"
    finetune: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    published: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class MeasurePlan:
    """One protocol for all rows: [sample] and [eval] settings on top of the common ones."""

    name: str = ""
    sample: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The whole plan. `updates` in total per row; None: n times the steps of [finetune].

    budget: whether rows have equal updates, or as many as give equal FLOPs.
    """

    title: str
    rows: tuple[RowPlan, ...]
    n: int = 4
    measures: tuple[MeasurePlan, ...] = (MeasurePlan(),)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    updates: int | None = None
    budget: str = "updates"
    tables: Tables = field(default_factory=dict)
    published: Published = Published()

    def __post_init__(self) -> None:
        if self.budget not in ("updates", "compute"):
            raise ConfigError(f"budget = {self.budget!r}: expected updates or compute")
        if self.n < 1 or (self.updates is not None and self.updates < 1):
            raise ConfigError(f"n = {self.n}, updates = {self.updates}: expected 1 or more")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds = {self.seeds}: expected distinct whole numbers, 0 or more")
        names = [row.name for row in self.rows]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"a comparison needs two [[row]] or more, each with a name: {names}")
        if len({one.name for one in self.measures} - {""}) < len(self.measures) > 1:
            raise ConfigError("every [[measure]] needs a name of its own")
        if "seed" in self.tables.get("finetune", {}):
            raise ConfigError("[finetune] seed: training seeds are those of `seeds`")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Let an error that a user can mend begin with what it is about."""
    try:
        yield
    except DemeError as error:
        raise type(error)(f"{where}: {error}") from error


def read_plan(name: str) -> Plan:
    """The plan in the file `name`, or the shipped one of that name.

    Raises MissingError if there is none, ConfigError saying which row or key is wrong.
    """
    import tomli

    path = Path(name)
    if not path.suffix and not path.is_file():  # `table1` may be the folder of an earlier run
        path = SHIPPED / f"{name}.toml"
    if not path.exists():
        shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))
        raise MissingError(f"{name}: no such plan; a TOML file is expected, or one of {shipped}")
    try:
        with reading(path):
            document = tomli.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise ConfigError(f"{name}: not valid TOML: {error}") from error
    with naming(name):
        return _parse(document, path.stem)


def _parse(document: dict[str, Any], stem: str) -> Plan:
    rows, measures = document.pop("row", []), document.pop("measure", [])
    for key, value in ("row", rows), ("measure", measures):
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise ConfigError(f"{key} should be written as [[{key}]]")
    cited = document.pop("published", {"source": "", "columns": []})
    if not isinstance(cited, dict) or set(cited) != {"source", "columns"}:
        raise ConfigError("[published] needs source and columns: whose figures they are, of what")
    published = Published(**checked_fields(Published, cited, "[published]"))
    tables = {t: checked_table(t, document.pop(t), "plan") for t in COMMON if t in document}
    head = {"title": stem, **checked_fields(Plan, document, "plan")}
    return Plan(
        rows=tuple(
            _row(values, index, head.get("n", Plan.n), len(published.columns))
            for index, values in enumerate(rows, 1)
        ),
        measures=tuple(map(_measure, measures)) or (MeasurePlan(),),
        tables=tables, published=published, **head,
    )  # fmt: skip


def _row(values: dict[str, Any], index: int, n: int, num_columns: int) -> RowPlan:
    where = f"row {values.get('name', index)!r}"
    given = checked_fields(RowPlan, values, where)
    for table in {"finetune", "merge"} & set(given):
        given[table] = checked_table(table, given[table], where)
    kind, figures = given.get("kind", ""), given.get("published", [])
    with naming(where):
        if not given.get("name") or kind not in _NEEDLESS:
            kinds = ", ".join(_NEEDLESS)
            raise ConfigError(f"needs a name, and a kind of {kinds}; found kind = {kind!r}")
        for key in set(_NEEDLESS[kind]) & set(given):
            raise ConfigError(f"a row of kind {kind!r} takes no {key}")
        for key in {"steps", "seed"} & set(given.get("finetune", {})):
            raise ConfigError(f"{key} follows from the plan's updates, n and seeds")
        if given.get("by", "uniform") not in DIVISIONS or given.get("n", 1) < 1:
            raise ConfigError(f"expected n of 1 or more, by {', '.join(DIVISIONS)}")
        numbers = [one for one in figures if one == "" or type(one) in (int, float)]
        if figures and not len(figures) == len(numbers) == num_columns:
            raise ConfigError(
                f'published = {figures}: expected {num_columns} numbers, "" for none, one for each '
                f"column of [published]"
            )
    given["published"] = [None if one == "" else one for one in figures]
    given.setdefault("n", n if kind in ("ensemble", "merged") else 1)
    return RowPlan(**given)


def _measure(values: dict[str, Any]) -> MeasurePlan:
    where = f"measure {values.get('name', '')!r}"
    given = checked_fields(MeasurePlan, values, where)
    for table in {"sample", "eval"} & set(given):
        given[table] = checked_table(table, given[table], where)
    return MeasurePlan(**given)
