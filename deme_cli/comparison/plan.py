"""The plan of a comparison: which rows, on how many updates, from which seeds, measured how.

A plan is a TOML file. Its tables [model] [data] [finetune] [merge] [sample] [eval] are those of
`deme.toml` and hold for every row; each [[row]] adds what sets it apart; each [[measure]] is one
more protocol under which every row is measured. Rows cannot differ in how they are drawn or
measured, so that a table compares methods and nothing else. A row of kind finetune is plain where
it does not say otherwise: every timestep alike, no pull to the base, no projection. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deme_cli.config import (
    DIVISIONS,
    EVAL_NUM,
    NOT_RESULT,
    TABLES,
    EvalConfig,
    FinetuneConfig,
    MergeConfig,
    SampleConfig,
)
from deme_cli.errors import ConfigError, MissingError, nearest, reading
from deme_cli.run_file import checked_table

SHIPPED = Path(__file__).parent / "plans"
KINDS = ("base", "finetune", "ensemble", "merged")
BUDGETS = ("updates", "compute")
COMMON = tuple(name for name in TABLES if name != "split")
_TYPE_NAMES = {str: "text in quotes", int: "a whole number", list: "a list"}
_ROW_KEYS = ("name", "kind", "n", "by", "finetune", "merge", "published")
_PLAN_KEYS = ("title", "n", "updates", "budget", "seeds", "published", "row", "measure", *COMMON)


@dataclass(frozen=True)
class Published:
    """Figures that somebody printed: of their model, data and budget, never measured here."""

    source: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class RowPlan:
    """One row. kind: base (as it is), finetune (one network, all timesteps), ensemble or merged
    (experts of n ranges). `finetune` and `merge` are its settings on top of the common ones."""

    name: str
    kind: str
    n: int
    by: str = "uniform"
    finetune: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class MeasurePlan:
    """One protocol for all rows: [sample] and [eval] settings on top of the common ones."""

    name: str = ""
    sample: Mapping[str, Any] = field(default_factory=dict)
    eval: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The whole plan. `updates` in total per row; None: n times the steps of [finetune].

    budget: whether rows have equal updates, or as many as give equal FLOPs.
    """

    title: str
    n: int
    rows: tuple[RowPlan, ...]
    measures: tuple[MeasurePlan, ...] = (MeasurePlan(),)
    seeds: tuple[int, ...] = (0, 1, 2)
    updates: int | None = None
    budget: str = "updates"
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Published | None = None

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ConfigError(f"budget = {self.budget!r}: expected {' or '.join(BUDGETS)}")
        if self.n < 1 or (self.updates is not None and self.updates < 1):
            raise ConfigError(f"n = {self.n}, updates = {self.updates}: expected 1 or more")
        whole = all(type(seed) is int and seed >= 0 for seed in self.seeds)
        if not whole or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds = {list(self.seeds)}: expected distinct whole numbers, 0 or more"
            )


def shipped_plans() -> list[str]:
    """The names of the plans that come with deme."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def read_plan(name: str) -> Plan:
    """The plan in the file `name`, or the shipped one of that name.

    Raises MissingError if there is none, ConfigError saying which row or key is wrong.
    """
    import tomli

    path = Path(name)
    if not path.suffix and not path.is_file():  # `table1` may be the folder of an earlier run
        path = SHIPPED / f"{name}.toml"
    if not path.exists():
        shipped = ", ".join(shipped_plans())
        raise MissingError(f"{name}: no such plan; a TOML file is expected, or one of {shipped}")
    try:
        with reading(path):
            document = tomli.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        return _parse(document, path.stem)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _parse(document: dict[str, Any], stem: str) -> Plan:
    _require_known(document, _PLAN_KEYS, "plan")
    n = _typed(document, "n", int, 4)
    published = _published(document.get("published"))
    rows = tuple(
        _row(row, index, n, published) for index, row in enumerate(_tables(document, "row"), 1)
    )
    tables = {t: checked_table(t, document[t], "plan") for t in COMMON if t in document}
    if "seed" in tables.get("finetune", {}):
        raise ConfigError("[finetune] seed: training seeds are those of `seeds`")
    names = [row.name for row in rows]
    if len(rows) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"a comparison needs two [[row]] or more, each with a name: {names}")
    measures = tuple(_measure(one) for one in _tables(document, "measure")) or (MeasurePlan(),)
    if len({one.name for one in measures} - {""}) < len(measures) > 1:
        raise ConfigError("every [[measure]] needs a name of its own")
    return Plan(
        title=_typed(document, "title", str, stem),
        n=n,
        rows=rows,
        measures=measures,
        seeds=tuple(_typed(document, "seeds", list, [0, 1, 2])),
        updates=_typed(document, "updates", int, None),
        budget=_typed(document, "budget", str, "updates"),
        tables=tables,
        published=published,
    )


def _row(values: dict[str, Any], index: int, n: int, published: Published | None) -> RowPlan:
    where = f"row {values.get('name', index)!r}"
    for table in ("sample", "eval"):
        if table in values:
            raise ConfigError(
                f"{where}: has its own [{table}], and rows of different protocols cannot be "
                f"compared; move it to the top of the plan, or make a [[measure]] of it"
            )
    _require_known(values, _ROW_KEYS, where)
    name = _typed(values, "name", str, "", where)
    kind = _typed(values, "kind", str, "", where)
    if not name or kind not in KINDS:
        raise ConfigError(
            f"{where}: needs a name, and a kind of {', '.join(KINDS)}; found kind = {kind!r}"
        )
    row = RowPlan(
        name=name,
        kind=kind,
        n=1 if kind in ("base", "finetune") else _typed(values, "n", int, n, where),
        by=_typed(values, "by", str, "uniform", where),
        finetune=checked_table("finetune", values.get("finetune", {}), where),
        merge=checked_table("merge", values.get("merge", {}), where),
        published=_numbers(values.get("published", []), published, where),
    )
    _require_sense(row, values, where)
    return row


def _require_sense(row: RowPlan, values: Mapping[str, Any], where: str) -> None:
    """Check that nothing stands in a row that would do nothing or undo the comparison."""
    for name in ("steps", "seed"):
        if name in row.finetune:
            raise ConfigError(f"{where}: {name} follows from the plan's updates, n and seeds")
    needless = {
        "finetune": bool(row.finetune) and row.kind == "base",
        "merge": bool(row.merge) and row.kind != "merged",
        "n": "n" in values and row.kind in ("base", "finetune"),
        "by": "by" in values and row.kind in ("base", "finetune"),
    }
    for key, is_needless in needless.items():
        if is_needless:
            raise ConfigError(f"{where}: a row of kind {row.kind!r} takes no {key}")
    if row.by not in DIVISIONS:
        raise ConfigError(f"{where}: by = {row.by!r}: expected one of {', '.join(DIVISIONS)}")
    if row.n < 1:
        raise ConfigError(f"{where}: n = {row.n}: expected 1 or more")


def _measure(values: dict[str, Any]) -> MeasurePlan:
    where = f"measure {values.get('name', '')!r}"
    _require_known(values, ("name", "sample", "eval"), where)
    return MeasurePlan(
        name=_typed(values, "name", str, "", where),
        sample=checked_table("sample", values.get("sample", {}), where),
        eval=checked_table("eval", values.get("eval", {}), where),
    )


def _published(values: Any) -> Published | None:
    if values is None:
        return None
    shaped = isinstance(values, dict) and set(values) == {"source", "columns"}
    if not shaped or not isinstance(values["columns"], list):
        raise ConfigError("[published] needs source and columns: whose figures they are, of what")
    return Published(str(values["source"]), tuple(map(str, values["columns"])))


def _numbers(values: Any, published: Published | None, where: str) -> tuple[float | None, ...]:
    """The published figures of a row; "" where there is none."""
    if not values:
        return ()
    expected = len(published.columns) if published else 0
    numbers = isinstance(values, list) and all(
        one == "" or (isinstance(one, (int, float)) and not isinstance(one, bool)) for one in values
    )
    if not numbers or len(values) != expected:
        raise ConfigError(
            f'{where}: published = {values!r}: expected {expected} numbers, "" for none, '
            f"one for each column of [published]"
        )
    return tuple(None if one == "" else float(one) for one in values)


def _tables(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = document.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ConfigError(f"{key} should be written as [[{key}]]")
    return found


def _typed(
    values: Mapping[str, Any], key: str, kind: type, default: Any, where: str = "plan"
) -> Any:
    value = values.get(key, default)
    if key in values and type(value) is not kind:
        raise ConfigError(f"{where}: {key} = {value!r}: expected {_TYPE_NAMES[kind]}")
    return value


def _require_known(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, known)}")


_OF_TASKS = ("clusters", "cluster_by", "multitask_lr", "multitask_every")
_LEFT_ALONE = {
    FinetuneConfig: (*NOT_RESULT, "seed", "snapshot_every", "ema_lengths"),
    MergeConfig: ("batch_size", "report", "report_num", "report_repeats", "report_seed"),
    SampleConfig: ("batch_size", "num", "seed"),  # the last two are those of [eval]
    EvalConfig: ("batch_size", "mixed"),
}


def deciding(config: FinetuneConfig | MergeConfig | SampleConfig | EvalConfig) -> dict[str, Any]:
    """The settings of `config` that decide a result."""
    left_alone = set(_LEFT_ALONE[type(config)])
    if isinstance(config, FinetuneConfig) and config.multitask == "none":
        left_alone |= set(_OF_TASKS)
    if isinstance(config, EvalConfig) and config.num is None:
        config = replace(config, num=EVAL_NUM)
    return {name: value for name, value in asdict(config).items() if name not in left_alone}


def deciding_measures(measures: Sequence[MeasurePlan]) -> list[dict[str, Any]]:
    """The settings of each measure that decide its figures; its name does, for it is shown."""
    return [
        {
            "name": measure.name,
            "sample": deciding(SampleConfig(**measure.sample)),
            "eval": deciding(EvalConfig(**measure.eval)),
        }
        for measure in measures
    ]


def as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True, default=list)


def digest(values: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell `values` from others."""
    return hashlib.blake2b(as_json(values).encode(), digest_size=4).hexdigest()


PLAIN = {"p": 0.0, "consistency": 0.0, "projection": "none"}  # of rows of kind finetune
Tables = Mapping[str, Mapping[str, Any]]


def finetune_settings(row: RowPlan, tables: Tables, *, updates: int) -> FinetuneConfig:
    """Every setting of a row's training: the common ones, those of its kind, its own.

    Raises ConfigError, naming the row, on settings that do not go together.
    """
    plain = PLAIN if row.kind == "finetune" else {}
    if updates < row.n:
        raise ConfigError(f"row {row.name!r}: {row.n} ranges cannot share {updates} updates")
    steps = {"steps": updates // row.n, "snapshot_every": None, "ema_lengths": None}
    try:
        return FinetuneConfig(**{**tables.get("finetune", {}), **plain, **row.finetune, **steps})
    except ConfigError as error:
        raise ConfigError(f"row {row.name!r}: {error}") from error


def merge_settings(row: RowPlan, tables: Tables) -> MergeConfig | None:
    """Every setting of a row's merge; None for a row of another kind.

    Raises ConfigError, naming the row, on settings that do not go together.
    """
    if row.kind != "merged":
        return None
    try:
        config = MergeConfig(**{**tables.get("merge", {}), **row.merge})
    except ConfigError as error:
        raise ConfigError(f"row {row.name!r}: [merge] {error}") from error
    given = config.coefficients
    if given is not None and len(given) != row.n:
        raise ConfigError(
            f"row {row.name!r}: [merge] coefficients = {given}: expected {row.n}, one a range"
        )
    return config


def settings_apart(
    row: RowPlan, config: FinetuneConfig, merge: MergeConfig | None, tables: Tables
) -> dict[str, Any]:
    """What sets a row apart from plain finetuning with the common settings."""
    plain = deciding(FinetuneConfig(**{**tables.get("finetune", {}), **PLAIN}))
    ours = deciding(config)
    apart = {name: ours[name] for name in ours if name != "steps" and ours[name] != plain.get(name)}
    if row.n > 1:
        apart["by"] = row.by
    if merge is None:
        return apart
    default, own = deciding(MergeConfig()), deciding(merge)
    told = {name: own[name] for name in own if own[name] != default[name]}
    return {**apart, "search": merge.search, **told}
